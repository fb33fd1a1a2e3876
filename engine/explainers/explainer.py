"""The base class of explainers: explains a few images per pass, always in batches of one fixed shape."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from blocksight.engine.catalog.side_products import SideProducts
from blocksight.engine.explainers.explanation import BlockMap, Explanation, checked_explanation
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.targets import Target
from blocksight.engine.model.transfers import to_host
from blocksight.engine.scoring.dropping import make_scorer
from blocksight.engine.scoring.forward import Forward

Item = TypeVar("Item")

BATCH_SIZE, IMAGES_PER_PASS = 8, 4
"""Defaults; runs choose values for their device."""

State = Mapping[str, Tensor]
"""What a method learned in its first pass, as named tensors on the CPU."""


@dataclass(frozen=True)
class Attribution:
    """A method's result for one target of an image, before it becomes a map. Wrappers join these."""

    values: Tensor
    """Float64, signed if the method is: [h, w], or [3, H, W] if `signed_map` still has to sum over channels."""
    score: float
    """The target's value on the image."""
    num_forwards: int = 0
    """As in `Explanation`."""
    blocks: tuple[BlockMap, ...] = ()
    products: SideProducts = field(default_factory=SideProducts)


class Explainer(ABC):
    """Explains images of one model; users call `explain`, methods implement `_explain_pass`."""

    def __init__(
        self,
        adapter: ModelAdapter,
        parameters: Any,
        *,
        blocks: Sequence[str] = (),
        batch_size: int = BATCH_SIZE,
        images_per_pass: int = IMAGES_PER_PASS,
        forward: Forward | None = None,
        state: State | None = None,
        is_signed: bool = False,
    ) -> None:
        """`parameters` are the method's, of the catalogue; `blocks` names the blocks (empty: the rule finds them).

        One forward takes `batch_size` perturbed inputs, packed from `images_per_pass` images. Both change memory and
        speed, never results. `forward` scores masks in place of the adapter, in batches of `batch_size`. `state` is
        that of the method's `learner`, if it learns. `is_signed`: the map of a target's negative shall show, on one
        scale with its own, what speaks against it; methods that sum masks then weigh them by how far their score is
        from the mean. Raises ModelError if the model lacks a named block, or something that the method needs.
        """
        self.adapter = adapter
        self.parameters = parameters
        self.scorer = make_scorer(adapter, getattr(parameters, "baseline", "zero"), batch_size, forward)
        self.images_per_pass = images_per_pass
        self.state = state
        self.is_signed = is_signed
        self._prepare(blocks)

    def _prepare(self, blocks: Sequence[str]) -> None:  # noqa: B027 - not every method has something to do
        """Prepares the method once, before any image."""

    def explain(
        self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int] | None = None
    ) -> list[list[Explanation]]:
        """One Explanation per image and target, for inputs [N, 3, H, W] made by `adapter.normalise`.

        `seeds` holds one seed per image, for everything that is random in its maps; None: 0.
        """
        drawn = [0] * len(inputs_nchw) if seeds is None else seeds
        explanations = []
        with self.adapter.borrowed():
            for images in self._passes(len(inputs_nchw)):
                explanations += self._explain_pass(inputs_nchw[images], target.of(images), drawn[images])
        return explanations

    def attribute(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        """As `explain`, but returns the attributions that wrappers join: signed, on their own grid."""
        attributions = []
        with self.adapter.borrowed():
            for images in self._passes(len(inputs_nchw)):
                attributions += self._attribute_pass(inputs_nchw[images], target.of(images), seeds[images])
        return attributions

    def _passes(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.images_per_pass):
            yield slice(start, start + self.images_per_pass)

    @abstractmethod
    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        """As `explain`, for at most `images_per_pass` images."""

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        """As `attribute`, for at most `images_per_pass` images. An unsigned method returns its maps."""
        return [
            [
                Attribution(torch.from_numpy(one.saliency_hw), one.score, one.num_forwards, one.blocks, one.products)
                for one in own
            ]
            for own in self._explain_pass(inputs_nchw, target, seeds)
        ]

    def signed_map(self, values: Tensor) -> Tensor:
        """The signed map [h, w] of an attribution's values."""
        return values

    def saliency_map(self, signed_hw: Tensor) -> Tensor:
        """The saliency map [H, W], at least 0, of a signed map [h, w]."""
        positive = signed_hw.relu()
        if grid_of(positive) == self.adapter.input_size:
            return positive
        return upsampling(grid_of(positive), self.adapter.input_size, positive.device)(positive)

    def learner(self) -> "Learner":
        """The method's first pass. Raises NotImplementedError if the method learns nothing."""
        raise NotImplementedError(f"{type(self).__name__} learns nothing")

    def _scores(self, inputs_nchw: Tensor, target: Target) -> list[list[float]]:
        """The target's values [N][T] on the unmasked images."""
        padded = pad(inputs_nchw, self.images_per_pass)
        with torch.inference_mode():
            return scores_of(self.adapter.logits(padded), target, len(inputs_nchw))


class Learner(Protocol):
    """A first pass. Its state depends on the images and their order alone."""

    def see(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> None:
        """Learns from some images, as `Explainer.explain` takes them."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The state learned so far, for the explainer's constructor."""
        ...


class SignedExplainer(Explainer):
    """A method whose maps are the positive part of the signed attributions of `_attribute_pass`."""

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        found = self._attribute_pass(inputs_nchw, target, seeds)
        saliency = iter(to_host([self.saliency_map(self.signed_map(one.values)) for own in found for one in own]))
        return [[self._explanation(one, next(saliency)) for one in own] for own in found]

    @abstractmethod
    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        """As `attribute`, for at most `images_per_pass` images."""

    def _explanation(self, one: Attribution, saliency_hw: Tensor) -> Explanation:
        return checked_explanation(
            saliency_hw.numpy(), one.score, one.blocks, num_forwards=one.num_forwards, products=one.products
        )


def scores_of(logits: Tensor, target: Target, count: int) -> list[list[float]]:
    """The target's values [count][T] on the first images of a pass, from its logits [N, K]."""
    return target.score(logits[:count], torch.arange(count, device=logits.device)).tolist()


def pad(inputs_nchw: Tensor, size: int) -> Tensor:
    """The inputs, padded to `size` with copies of the last, because rounding depends on the batch size.

    In one layout, whether something is padded or not: that of the network's weights.
    """
    missing = inputs_nchw[-1:].expand(size - len(inputs_nchw), *inputs_nchw.shape[1:])
    padded = torch.cat([inputs_nchw, missing]) if len(missing) else inputs_nchw
    return padded.contiguous(memory_format=torch.channels_last) if padded.dim() == 4 else padded.contiguous()


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of this size; the last may be shorter."""
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk
