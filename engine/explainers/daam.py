"""DAAM: what each patch put into a transformer's class token, block by block, and what the target wants of it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.catalog.side_products import GridMap, SideProducts
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Attribution, SignedExplainer, pad
from blocksight.engine.model.attention import Attention, explicit_attention
from blocksight.engine.model.features import capture_input, head_path
from blocksight.engine.model.layouts import Layout
from blocksight.engine.model.neighbours import NeighbourClassifier
from blocksight.engine.model.resample import scaled
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target


@dataclass(frozen=True)
class _Pass:
    """One forward pass with its attentions, joined to autograd."""

    logits: Tensor
    """[N, K]."""
    feature: Tensor
    """[N, D]; the logits if no feature was asked for."""
    attentions: tuple[Attention, ...]
    """Those over the picture's tokens, in order of execution."""


class Daam(SignedExplainer):
    """`D_b = sum_{j <= b} L_j`, `L_j[i] = relu(sum_d relu(C_j)_d S_j[i]_d)`; the last D is the map.

    Liao et al., arXiv 2503.14640: `S_j[i] = A_j[0, i] V_j[i]` is what patch i puts into the class token, for every
    head, and C_j the gradient of the target by the class token's row of `A_j V_j`. Of a class the target is its logit.
    Of a feature f of length |f|, the gradient that is propagated is `(f / |f|)^2`; under a memory bank it is the
    agreement with the neighbours of the class, and in both cases C_j keeps its sign.

    Where no token stands for all, every token is a query, to first order:
    `L_j[i] = relu(sum_q sum_d relu(C_j[q])_d A_j[q, i] V_j[i]_d)`, an extension. A class token that the target does not
    hear behind the last attention, as where the patches are averaged, stands for nothing.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.layouts = {_num_tokens(one): one for one in self._token_layouts()}
        self.bank = self.adapter.module.bank if isinstance(self.adapter.module, NeighbourClassifier) else None
        self.feature_path = self._feature_path()
        example = self.adapter.normalise(torch.zeros(2, 3, *self.adapter.input_size, dtype=torch.uint8))
        with self.adapter.borrowed():
            found = self._run(example).attentions
        if not found:
            raise ModelError(
                f"daam needs self-attention over tokens of the picture's patches, and in {self.adapter.name} none was "
                "seen (with masks, in windows or in a kernel of its own it cannot be): take gradcam, layercam or rise"
            )
        has_prefix = all(self._layout(one).prefix for one in found)
        if self.parameters.query == "class" and not has_prefix:
            raise ModelError(f"{self.adapter.name} has no class token whose attention could count: take query=mean")
        self.may_be_class = self.parameters.query != "mean" and has_prefix

    def _token_layouts(self) -> list[Layout]:
        """Those of the network's tensors that hold tokens; the first of a number of tokens comes last, and counts."""
        layouts = [place.layout for place in self.adapter.network.places if place.layout is not None]
        return [layout for layout in reversed(layouts) if layout.kind == "tokens"]

    def _feature_path(self) -> str | None:
        """The sub-module that the feature enters; None: the feature is the output, or is not asked for."""
        if self.bank is not None:
            return "bank"
        return head_path(self.adapter) if self.parameters.of == "feature" else None

    def _layout(self, one: Attention) -> Layout:
        return self.layouts[one.weights.shape[2]]

    def _run(self, inputs_nchw: Tensor) -> _Pass:
        found: list[Attention] = []
        features: list[Tensor] = []
        module, path = self.adapter.module, self.feature_path
        watched = nullcontext() if path is None else capture_input(module, path, features.append)
        with torch.enable_grad(), watched, explicit_attention(module, found.append):
            logits = self.adapter.logits(inputs_nchw.detach().requires_grad_(True))
        usable = tuple(
            one
            for one in found
            if one.weights.shape[2] in self.layouts
            and len(one.weights) == len(inputs_nchw)
            and one.output.requires_grad
        )
        return _Pass(logits, features[-1] if features else logits, usable)

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        made = self._run(pad(inputs_nchw, self.images_per_pass))
        filled = torch.arange(self.images_per_pass, device=inputs_nchw.device).clamp(max=len(inputs_nchw) - 1)
        maps = [self._accumulated(made, target.of(filled), index) for index in range(target.num_targets)]
        names = _distinct([one.name for one in made.attentions])
        return [
            [
                self._attribution([step[image] for step in own], names, score)
                for own, score in zip(maps, row, strict=True)
            ]
            for image, row in enumerate(self._scores(inputs_nchw, target))
        ]

    def _attribution(self, steps: Sequence[Tensor], names: Sequence[str], score: float) -> Attribution:
        grids = tuple(GridMap(name, step.float().cpu().numpy()) for name, step in zip(names, steps, strict=True))
        return Attribution(steps[-1], score, products=SideProducts(accumulated_maps=grids))

    def _accumulated(self, made: _Pass, target: Target, index: int) -> list[Tensor]:
        """D_b [N, h, w] in float64 for every block."""
        wanted, direction = self._direction(made, target, index)
        slopes = gradients(wanted, direction, [one.output for one in made.attentions])
        is_heard = slopes[-1][:, :, :1].flatten(1).any(1) | (self.parameters.query == "class")
        is_class = is_heard & self.may_be_class
        total, steps = torch.zeros(()), []
        for one, slope in zip(made.attentions, slopes, strict=True):
            total = self._spatial(one, slope, is_class) + total.to(slope.device)
            steps.append(total)
        return steps

    def _direction(self, made: _Pass, target: Target, index: int) -> tuple[Tensor, Tensor]:
        """What is explained, and the gradient by it that is propagated."""
        if self.parameters.of == "feature":
            return made.feature, functional.normalize(made.feature.detach(), dim=1) ** 2
        if self.bank is None:
            return made.logits, target.raw.direction(made.logits.detach(), index)
        classes = target.raw.direction(made.logits.detach(), index).argmax(1)  # the one whose logit it raises
        return made.feature, self.bank.agreement(made.feature.detach(), classes)

    @property
    def is_rectified(self) -> bool:
        """Whether negative coefficients are cut off."""
        if self.parameters.rectify is not None:
            return self.parameters.rectify
        return self.parameters.of == "class" and self.bank is None

    def _spatial(self, one: Attention, slope: Tensor, is_class: Tensor) -> Tensor:
        """L [N, h, w] of one attention and the target's gradient by its output [N, heads, T, d].

        `is_class` [N]: the first token's row counts alone.
        """
        queries = slice(0, 1) if is_class.all() else slice(None)
        wanted = slope[:, :, queries].double()
        wanted[is_class, :, 1:] = 0
        coefficients = wanted.relu() if self.is_rectified else wanted
        taken = one.weights[:, :, queries].detach().double().transpose(2, 3)
        every = ((taken @ coefficients) * one.values.detach().double()).sum((1, 3)).relu()
        layout = self._layout(one)
        own = every[:, layout.prefix :].unflatten(1, layout.grid)
        return scaled(own) if self.parameters.normalise else own


def _num_tokens(layout: Layout) -> int:
    return layout.prefix + layout.grid[0] * layout.grid[1]


def _distinct(names: Sequence[str]) -> list[str]:
    """The names; the second and later of a module that runs again are numbered, `blocks.0#2`."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"{name}#{count}" for name, count in zip(names, counts, strict=True)]
