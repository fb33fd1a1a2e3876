"""Input gradients: plain, and integrated along a straight path from a baseline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.explainers.points import ImageExplainer, Point, PointExplainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target


@dataclass(frozen=True)
class Balance:
    """Whether attributions sum to the change of the class's output from the baseline to the image."""

    found: float
    """The sum."""
    wanted: float
    largest: float
    """The largest change of any logit, at least 0."""

    @property
    def gap(self) -> float:
        """The difference as a share of the largest change, at least 0; infinite where a sum has no change to match."""
        apart = abs(self.found - self.wanted)
        return apart / self.largest if self.largest else (float("inf") if apart else 0.0)


def input_gradients(adapter: ModelAdapter, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor]]:
    """The logits [N, K], and per target the gradients of its raw score by the inputs, float64 [N, 3, H, W]."""
    with torch.enable_grad():
        inputs = inputs_nchw.detach().requires_grad_(True)
        logits = adapter.logits(inputs)
    return logits.detach(), [
        gradients(logits, target.raw.direction(logits.detach(), index), [inputs])[0].double()
        for index in range(target.num_targets)
    ]


class Gradient(ImageExplainer):
    """`max_channel |dz_c / dx|` (Simonyan et al., 2014, arXiv 1312.6034)."""

    def attributions(self, inputs_nchw: Tensor, target: Target) -> tuple[Tensor, list[Tensor]]:
        return input_gradients(self.adapter, inputs_nchw, target)

    def signed_map(self, values: Tensor) -> Tensor:
        return values.abs().amax(0)


class IntegratedGradients(PointExplainer):
    """`(x - b) int_0^1 dz_c(b + a (x - b)) / dx da`, summed over channels; its positive part.

    Sundararajan et al., ICML 2017 (arXiv 1703.01365), equation 1; Gauss-Legendre quadrature.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.num_forwards = self.parameters.steps

    def points(self, image_chw: Tensor, generator: torch.Generator) -> Iterator[Point]:
        nodes, weights = np.polynomial.legendre.leggauss(self.num_forwards)
        baseline = self.scorer.perturbation.baseline[0]
        path = image_chw - baseline
        for place, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            yield baseline + float(place) * path, float(weight) * path

    def attributions(self, points_nchw: Tensor, target: Target) -> list[Tensor]:
        return input_gradients(self.adapter, points_nchw, target)[1]

    def signed_map(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def balance(self, input_nchw: Tensor, target: Target) -> Balance:
        """What the attributions of one image [1, 3, H, W] and its first target sum to, and should (proposition 1)."""
        ((one, *_),) = self.attribute(input_nchw, target, [0])
        baseline = self.scorer.perturbation.baseline.expand_as(input_nchw)
        with self.adapter.borrowed(), torch.inference_mode():
            before, after = self.adapter.logits(torch.cat([baseline, input_nchw])).double().split(1)
        wanted = target.raw.change(before, after)[0, 0]  # its gradient is integrated: of class c, that of z_c
        return Balance(float(one.values.sum()), float(wanted), float((after - before).abs().max()))
