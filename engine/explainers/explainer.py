"""What all explainers share: a few images per pass, of one fixed shape, through a borrowed model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from blocksight.engine.catalog.side_products import SideProducts
from blocksight.engine.explainers.explanation import BlockMap, Explanation, sound_explanation
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.forward import Forward
from blocksight.engine.scoring.perturb import perturbation
from blocksight.engine.scoring.scorer import Scorer

Item = TypeVar("Item")

BATCH_SIZE, IMAGES_PER_PASS = 8, 4
"""Defaults; runs choose values for their device."""

State = Mapping[str, Tensor]
"""What a method learned in a first pass, as named tensors on the CPU."""


@dataclass(frozen=True)
class Attribution:
    """A method's result for one target of an image before it becomes a map: wrappers join these."""

    values: Tensor
    """Float64, with sign where the method has one: [h, w], or [3, H, W] where sums over channels come last."""
    score: float
    """The target's value on the image."""
    num_forwards: int = 0
    """As an Explanation's."""
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
    ) -> None:
        """`parameters` are of the catalogue's kind; `blocks` are places named by hand (none: the rule finds them).

        `batch_size` perturbed inputs go into one forward, and those of `images_per_pass` images are packed
        together: both set memory and speed alone. `forward` scores masks in place of the adapter's own pass, for
        batches of this size. `state` is what a `learner` leaves, of methods that learn. Raises ModelError where the
        model lacks what the method needs, or a block that is named.
        """
        self.adapter = adapter
        self.parameters = parameters
        removed = perturbation(adapter, getattr(parameters, "baseline", "zero"))
        self.scorer = Scorer(adapter, removed, batch_size, forward)
        self.images_per_pass = images_per_pass
        self.state = state
        self._prepare(blocks)

    def _prepare(self, blocks: Sequence[str]) -> None:  # noqa: B027 - not every method has something to do
        """Prepares the method once, before any image."""

    def explain(
        self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int] | None = None
    ) -> list[list[Explanation]]:
        """One Explanation per image and target, for inputs [N, 3, H, W] as `adapter.normalise` gives them.

        `seeds` holds a number per image, from which all that is random about its maps is drawn; None: 0.
        """
        drawn = [0] * len(inputs_nchw) if seeds is None else seeds
        explanations = []
        with self.adapter.borrowed():
            for images in self._passes(len(inputs_nchw)):
                explanations += self._explain_pass(inputs_nchw[images], target.of(images), drawn[images])
        return explanations

    def attribute(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        """As `explain`, but before signs and grids are lost: what wrappers join."""
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
        """As `attribute`, for at most `images_per_pass` images; of a method without signs: its maps."""
        return [
            [
                Attribution(torch.from_numpy(one.saliency_hw), one.score, one.num_forwards, one.blocks, one.products)
                for one in own
            ]
            for own in self._explain_pass(inputs_nchw, target, seeds)
        ]

    def flat(self, values: Tensor) -> Tensor:
        """The signed map [h, w] of an attribution's values."""
        return values

    def finish(self, flat_hw: Tensor) -> Tensor:
        """The saliency map [H, W], at least 0, of a signed one [h, w]."""
        positive = flat_hw.relu()
        if grid_of(positive) == self.adapter.input_size:
            return positive
        return upsampling(grid_of(positive), self.adapter.input_size, positive.device)(positive)

    def learner(self) -> "Learner":
        """A first pass over images of the data, of methods that learn."""
        raise NotImplementedError(f"{type(self).__name__} learns nothing")

    def _scores(self, inputs_nchw: Tensor, target: Target) -> list[list[float]]:
        """The target's values [N][T] on the whole images."""
        padded = pad(inputs_nchw, self.images_per_pass)
        with torch.inference_mode():
            logits = self.adapter.logits(padded)[: len(inputs_nchw)]
        return target.score(logits, torch.arange(len(inputs_nchw), device=logits.device)).tolist()


class Learner(Protocol):
    """A first pass: its state depends on the images and their order alone."""

    def see(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> None:
        """Learns from some images, as `Explainer.explain` takes them."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What was learned so far, as the explainer's constructor takes it."""
        ...


class SignedExplainer(Explainer):
    """A method whose maps are the positive part of signed attributions, which `_attribute_pass` gives."""

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        return [[self._explanation(one) for one in own] for own in self._attribute_pass(inputs_nchw, target, seeds)]

    @abstractmethod
    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        """As `attribute`, for at most `images_per_pass` images."""

    def _explanation(self, one: Attribution) -> Explanation:
        saliency = self.finish(self.flat(one.values)).double().cpu().numpy()
        return sound_explanation(saliency, one.score, one.blocks, num_forwards=one.num_forwards, products=one.products)


def pad(inputs_nchw: Tensor, size: int) -> Tensor:
    """The inputs, filled up to a fixed number with copies of the last: rounding must not depend on how many."""
    return torch.cat([inputs_nchw, inputs_nchw[-1:].expand(size - len(inputs_nchw), -1, -1, -1)])


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of this size; the last may be shorter."""
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk
