"""The base class of wrappers: explain variants of the image by another method, and join the results."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blocksight.engine.catalog.side_products import SideProducts
from blocksight.engine.explainers.explainer import (
    BATCH_SIZE,
    IMAGES_PER_PASS,
    Attribution,
    Explainer,
    Learner,
    SignedExplainer,
    chunks,
)
from blocksight.engine.explainers.points import MAX_POINTS_PER_PASS
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import Target

MakeBase = Callable[..., Explainer]
"""Makes the wrapped method from an adapter and the options of `Explainer`."""


class Joined:
    """The attributions of one target over an image's views, joined one by one."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.scores: list[float] = []
        """Scores of the joined views, in order."""
        self.num_forwards = 0
        self.last: Attribution | None = None
        """The last view's attribution, without its values."""


class Wrapper(SignedExplainer):
    """Explains views of each image by the base method, and joins the signed attributions.

    A pass of the base has one fixed size and may hold views of several images; each view is made when it is needed.
    A view's seed comes from its image's seed and its number.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        parameters: Any,
        *,
        base: MakeBase,
        batch_size: int = BATCH_SIZE,
        images_per_pass: int = IMAGES_PER_PASS,
        **options: Any,
    ) -> None:
        """`base` makes the wrapped method, from an adapter and the options of `Explainer`."""
        views = max(images_per_pass, min(batch_size, MAX_POINTS_PER_PASS))
        inner = {**options, "batch_size": batch_size, "images_per_pass": views}
        self.base = self._base(adapter, parameters, base, inner)
        super().__init__(adapter, parameters, batch_size=batch_size, images_per_pass=images_per_pass, **options)

    def _base(self, adapter: ModelAdapter, parameters: Any, base: MakeBase, options: dict[str, Any]) -> Explainer:
        """The wrapped method, made for the size of the views."""
        return base(adapter, **options)

    def image_data(self, image_chw: Tensor) -> Any:
        """Other data that `views` and `joined_values` need; computed once per image, for all targets."""

    @abstractmethod
    def views(self, image_chw: Tensor, data: Any, generator: torch.Generator) -> Iterator[Tensor]:
        """The variants of one image that the base explains."""

    @abstractmethod
    def add(self, joined: Joined, number: int, one: Attribution) -> Tensor:
        """The new total: that of `joined` with the values of view `number`."""

    def joined_values(self, joined: Joined, data: Any) -> Tensor:
        """The wrapper's attribution values, once all views are joined."""
        assert joined.total is not None
        return joined.total

    def products(self, joined: Joined) -> SideProducts:
        """The side products to keep; by default the base's selection metric and edge detector."""
        assert joined.last is not None
        own = joined.last.products
        return SideProducts(selected_by=own.selected_by, edge_detector=own.edge_detector)

    def learner(self) -> Learner:
        return self.base.learner()

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        joined = [[Joined() for _ in range(target.num_targets)] for _ in inputs_nchw]
        data = [self.image_data(image) for image in inputs_nchw]
        for batch in chunks(self._all_views(inputs_nchw, data, seeds), self.base.images_per_pass):
            images, numbers, views, own_seeds = zip(*batch, strict=True)
            chosen = torch.tensor(images, device=inputs_nchw.device)
            found = self.base.attribute(torch.stack(views), target.of(chosen), own_seeds)
            for image, number, own in zip(images, numbers, found, strict=True):
                for into, one in zip(joined[image], own, strict=True):
                    self._join(into, number, one)
        return [
            [self._joined_attribution(into, known, score) for into, score in zip(own, row, strict=True)]
            for own, known, row in zip(joined, data, self._scores(inputs_nchw, target), strict=True)
        ]

    def _all_views(
        self, inputs_nchw: Tensor, data: Sequence[Any], seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Tensor, int]]:
        for image, (own, known, seed) in enumerate(zip(inputs_nchw, data, seeds, strict=True)):
            for number, view in enumerate(self.views(own, known, torch.Generator().manual_seed(seed))):
                yield image, number, view, seed_of_view(seed, number)

    def _join(self, into: Joined, number: int, one: Attribution) -> None:
        into.total = self.add(into, number, one)
        into.scores.append(one.score)
        into.num_forwards += max(1, one.num_forwards)
        into.last = replace(one, values=one.values[:0])

    def _joined_attribution(self, joined: Joined, data: Any, score: float) -> Attribution:
        assert joined.last is not None
        values, products = self.joined_values(joined, data), self.products(joined)
        return Attribution(values, score, joined.num_forwards, joined.last.blocks, products)


def seed_of_view(seed: int, number: int) -> int:
    """The seed of an image's view, below 2^63."""
    return (seed * 1_000_003 + number) % 2**63
