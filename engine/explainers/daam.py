"""DAAM: each patch's contribution to a transformer's class token, block by block, weighted by the target's gradient."""

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
from blocksight.engine.model.token_stream import layouts_by_number


@dataclass(frozen=True)
class _Pass:
    """One forward pass with its attentions, joined to autograd."""

    logits: Tensor
    """[N, K]."""
    feature: Tensor
    """[N, D]; the logits if no feature is needed."""
    attentions: tuple[Attention, ...]
    """The attentions over the picture's tokens, in order of execution."""
    num_others: int
    """Self-attentions over other things, such as the tokens of a window, or whose weights cannot be followed."""


class Daam(SignedExplainer):
    """`D_b = sum_{j <= b} L_j`, `L_j[i] = relu(sum_d relu(C_j)_d S_j[i]_d)`; the last D is the map.

    Liao et al., arXiv 2503.14640: `S_j[i] = A_j[0, i] V_j[i]` is patch i's contribution to the class token, for
    every head, and C_j the gradient of the target by the class token's row of `A_j V_j`. For a class the target is its
    logit. For a feature f of length |f|, the propagated gradient is `(f / |f|)^2`; with a memory bank it is the
    agreement with the neighbours of the class. In both cases C_j keeps its sign.

    Without a class token every token is a query, to first order:
    `L_j[i] = relu(sum_q sum_d relu(C_j[q])_d A_j[q, i] V_j[i]_d)`, an extension. So it is if the target's gradient by
    the class token is zero after the last attention, for example if the patches are averaged.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.layouts = layouts_by_number(self.adapter)
        self.bank = self.adapter.module.bank if isinstance(self.adapter.module, NeighbourClassifier) else None
        self.feature_path = self._feature_path()
        example = self.adapter.normalise(torch.zeros(2, 3, *self.adapter.input_size, dtype=torch.uint8))
        with self.adapter.borrowed():
            made = self._run(example)
        found = made.attentions
        if found and made.num_others:
            raise ModelError(
                f"daam adds the maps of all attentions, and {made.num_others} of the {made.num_others + len(found)} of "
                f"{self.adapter.name} are not over all patches (in windows, over channels), or weigh by more than one "
                "softmax: take gradcam, layercam or rise"
            )
        if not found:
            raise ModelError(
                f"daam needs self-attention over tokens of the picture's patches, and in {self.adapter.name} none was "
                "seen (in windows, over channels or in a kernel of its own it is not): take gradcam, layercam or rise"
            )
        grids = sorted({self._layout(one).grid for one in found})
        if len(grids) > 1:
            sizes = ", ".join(f"{height} x {width}" for height, width in grids)
            raise ModelError(
                f"daam adds the maps of all attentions, and those of {self.adapter.name} have several sizes ({sizes}): "
                "take gradcam, layercam or rise"
            )
        has_prefix = all(self._layout(one).prefix for one in found)
        if self.parameters.query == "class" and not has_prefix:
            raise ModelError(f"{self.adapter.name} has no class token whose attention could count: take query=mean")
        self.may_use_class_token = self.parameters.query != "mean" and has_prefix

    def _feature_path(self) -> str | None:
        """The sub-module that takes the feature as input; None if the feature is the output, or is not needed."""
        if self.bank is not None:
            return "bank"
        return head_path(self.adapter) if self.parameters.of == "feature" else None

    def _layout(self, one: Attention) -> Layout:
        return self.layouts[one.weights.shape[2]]

    def _run(self, inputs_nchw: Tensor) -> _Pass:
        found: list[Attention] = []
        features: list[Tensor] = []
        module, path = self.adapter.module, self.feature_path
        capture = nullcontext() if path is None else capture_input(module, path, features.append)
        with torch.enable_grad(), capture, explicit_attention(module, found.append) as missed:
            logits = self.adapter.logits(inputs_nchw.detach().requires_grad_(True))
        own = [one for one in found if one.kind == "self"]
        usable = tuple(
            one
            for one in own
            if one.weights.shape[2] in self.layouts
            and len(one.weights) == len(inputs_nchw)
            and one.output.requires_grad
        )
        return _Pass(logits, features[-1] if features else logits, usable, len(own) - len(usable) + len(missed))

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
        has_gradient = slopes[-1][:, :, :1].flatten(1).any(1) | (self.parameters.query == "class")
        is_class = has_gradient & self.may_use_class_token
        total, steps = torch.zeros(()), []
        for one, slope in zip(made.attentions, slopes, strict=True):
            total = self._spatial(one, slope, is_class) + total.to(slope.device)
            steps.append(total)
        return steps

    def _direction(self, made: _Pass, target: Target, index: int) -> tuple[Tensor, Tensor]:
        """The explained tensor, and the gradient by it that is propagated."""
        if not all(target.is_class) and (self.bank is not None or self.parameters.of == "feature"):
            raise ModelError(
                "daam explains a feature, or its agreement with the neighbours of one class, and the target is of "
                "no single class: take gradcam, layercam or rise, or leave of=feature out"
            )
        if self.parameters.of == "feature":
            return made.feature, functional.normalize(made.feature.detach(), dim=1) ** 2
        if self.bank is None:
            return made.logits, target.raw.direction(made.logits.detach(), index)
        classes = target.raw.direction(made.logits.detach(), index).argmax(1)  # the class whose logit it raises
        return made.feature, self.bank.agreement(made.feature.detach(), classes)

    @property
    def is_rectified(self) -> bool:
        """Whether negative coefficients are cut off."""
        if self.parameters.rectify is not None:
            return self.parameters.rectify
        return self.parameters.of == "class" and self.bank is None

    def _spatial(self, one: Attention, slope: Tensor, is_class: Tensor) -> Tensor:
        """L [N, h, w] of one attention and the target's gradient by its output [N, heads, T, d].

        `is_class` [N]: only the row of the first token counts.
        """
        queries = slice(0, 1) if is_class.all() else slice(None)
        wanted = slope[:, :, queries].double()
        wanted[is_class, :, 1:] = 0
        coefficients = wanted.relu() if self.is_rectified else wanted
        taken = one.weights[:, :, queries].detach().double().transpose(2, 3)
        summed = ((taken @ coefficients) * one.values.detach().double()).sum((1, 3)).relu()
        layout = self._layout(one)
        own = summed[:, layout.prefix :].unflatten(1, layout.grid)
        return scaled(own) if self.parameters.normalise else own


def _distinct(names: Sequence[str]) -> list[str]:
    """The names. If a module runs more than once, the later ones are numbered: `blocks.0#2`."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"{name}#{count}" for name, count in zip(names, counts, strict=True)]
