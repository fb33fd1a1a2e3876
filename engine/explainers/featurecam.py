"""Feature CAM: a class activation map, sharpened by the image's edges.

A RECONSTRUCTION from the abstract: neither code nor full text was available. Every choice that the abstract leaves
open is a parameter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blocksight.engine.catalog.edge_detectors import installed_detector
from blocksight.engine.catalog.side_products import SideProducts
from blocksight.engine.explainers.edges import DETECTORS, edges_of
from blocksight.engine.explainers.explainer import Attribution
from blocksight.engine.explainers.wrapper import Joined, Wrapper
from blocksight.engine.model.resample import scaled


def variants(pixels_chw: Tensor, edges_hw: Tensor, second: str) -> list[Tensor]:
    """The image, the image with its edges (`product` or `sum`), the edges alone: each [3, H, W] in [0, 1]."""
    edges = edges_hw.to(pixels_chw).expand_as(pixels_chw)
    both = pixels_chw * edges if second == "product" else (pixels_chw + edges).clamp(max=1)
    return [pixels_chw, both, edges]


class FeatureCam(Wrapper):
    """`M = S (rho + (1 - rho) E)`: S the base's map scaled to [0, 1], E the edges, rho the weight of the interior.

    With `recompute`, S is the mean of the scaled maps of the three variants, scaled again. With signs S is relative to
    the largest absolute value, so that it is on one scale with the map of what speaks against the target.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.detector = installed_detector() if self.parameters.edges == "auto" else self.parameters.edges
        self.detect = DETECTORS[self.detector](self.adapter.device)

    def image_data(self, image_chw: Tensor) -> Tensor:
        """The edges [H, W]."""
        pixels = self.adapter.pixels_of(image_chw[None])[0]
        return edges_of(pixels, self.detect, self.parameters.edge_scale)

    def views(self, image_chw: Tensor, data: Any, generator: torch.Generator) -> Iterator[Tensor]:
        yield image_chw
        if self.parameters.recompute:
            pixels = self.adapter.pixels_of(image_chw[None])[0]
            for variant in variants(pixels, data, self.parameters.variant)[1:]:
                yield self.adapter.normalise_shares(variant[None])[0]

    def add(self, joined: Joined, number: int, one: Attribution) -> Tensor:
        own = self._scaled(self.base.signed_map(one.values))
        return own if joined.total is None else joined.total + own

    def _scaled(self, signed_hw: Tensor) -> Tensor:
        positive = self.base.saliency_map(signed_hw).double()
        if not self.is_signed:
            return scaled(positive)
        greatest = torch.maximum(positive.max(), self.base.saliency_map(-signed_hw).max().double())
        return torch.where(greatest == 0, 0.0, positive / torch.where(greatest == 0, 1.0, greatest))

    def joined_values(self, joined: Joined, data: Any) -> Tensor:
        assert joined.total is not None
        saliency = joined.total / len(joined.scores) if self.is_signed else scaled(joined.total)
        kept = saliency * (saliency >= self.parameters.threshold)
        rho = self.parameters.interior
        return kept * (rho + (1 - rho) * data.to(kept))

    def products(self, joined: Joined) -> SideProducts:
        """The base's side products if it explained the image alone; else only how it made them."""
        assert joined.last is not None
        kept = super().products(joined) if self.parameters.recompute else joined.last.products
        return replace(kept, edge_detector=self.detector)
