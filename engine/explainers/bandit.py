"""A contextual bandit: which of a few arms serves an image best, learned from a reward per image."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log1p, sqrt, tanh

import torch
from torch import Tensor

CONTEXT = 100
"""Length of an image's context."""

MOST_STEPS, FLAT = 100, 1e-5
"""Of the optimiser, for one update; and the change of the loss at which it stops."""
RATE, THETA_RATE = 3e-3, 1e-5
"""Of the optimiser: for the arm's weights; for the layer that makes contexts, shared among its K features."""
SCALE = 0.3
"""The length of either part of a context at first, which sets how much one reward teaches and how far draws stray."""


@dataclass
class Bandit:
    """Regularised logistic Thompson sampling: per arm a Gaussian over weights w, each entry with its own precision.

    An arm is good for an image with probability `sigmoid(w u)`, u the image's context (Chapelle and Li, NeurIPS
    2011, algorithm 3). The context is a linear layer over features of the image, learned together with w. All
    numbers are float64 on the CPU.
    """

    weight: Tensor
    """Of the layer, [100, K]."""
    bias: Tensor
    """Of the layer, [100]."""
    centre: Tensor
    """Mean of the features over the images that were learned from, [K]."""
    spread: Tensor
    """Their deviation, [K]; 1 where there was none."""
    means: Tensor
    """Of the weights, by arm, [Z, 100]."""
    precisions: Tensor
    """Of the weights, by arm, [Z, 100]; at least 1, and never falling."""
    counts: Tensor
    """How often each arm was learned from, int64 [Z]."""

    @classmethod
    def untrained(cls, features: Tensor, num_arms: int) -> "Bandit":
        """The bandit before any reward, for features [N, K] of the images that it will see.

        Every arm's weights have mean 0 and precision 1. The layer begins at random (always the same numbers), so
        that a context's share that is common to all images and the share that is its own are about as long.
        """
        features = features.double()
        own = torch.Generator().manual_seed(0)
        num_features = features.shape[1]
        weight = torch.randn(CONTEXT, num_features, generator=own, dtype=torch.float64)
        bias = torch.randn(CONTEXT, generator=own, dtype=torch.float64)
        spread = features.std(0, correction=0)
        return cls(
            weight=SCALE * weight / sqrt(CONTEXT * num_features),
            bias=SCALE * bias / sqrt(CONTEXT),
            centre=features.mean(0),
            spread=torch.where(spread > 0, spread, 1.0),
            means=torch.zeros(num_arms, CONTEXT, dtype=torch.float64),
            precisions=torch.ones(num_arms, CONTEXT, dtype=torch.float64),
            counts=torch.zeros(num_arms, dtype=torch.int64),
        )

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "Bandit":
        """The bandit whose `state` this is."""
        own = {name: state[f"bandit.{name}"] for name in cls.__dataclass_fields__}
        return cls(**{name: tensor if name == "counts" else tensor.double() for name, tensor in own.items()})

    def state(self) -> dict[str, Tensor]:
        """Everything as named tensors, to be stored; floats in single precision."""
        own = {f"bandit.{name}": getattr(self, name) for name in self.__dataclass_fields__}
        return {name: one.float() if one.is_floating_point() else one for name, one in own.items()}

    def context(self, features: Tensor) -> Tensor:
        """u [100] of an image's features [K]."""
        return self.weight @ self._standard(features) + self.bias

    def _standard(self, features: Tensor) -> Tensor:
        return (features.double() - self.centre) / self.spread

    def choice(self, context: Tensor, generator: torch.Generator) -> int:
        """The arm whose weights, drawn from what is known of them, promise most."""
        noise = torch.randn(self.means.shape, generator=generator, dtype=torch.float64)
        return int(((self.means + noise / self.precisions.sqrt()) @ context).argmax())

    def update(self, arm: int, features: Tensor, is_good: bool) -> None:
        """Learns that the arm was good for an image, or that it was not.

        `w, theta = argmin sum q (w - m)^2 / 2 + log(1 + exp(-y w u))`, then `m = w` and `q += u^2 p (1 - p)` with
        `p = sigmoid(w u)`.
        """
        sign = 1.0 if is_good else -1.0
        own, mean, precision = self._standard(features), self.means[arm], self.precisions[arm]
        weights, weight, bias = mean.clone(), self.weight.clone(), self.bias.clone()
        groups = [
            {"params": [weights], "lr": RATE, "weight_decay": 0.0},  # the precisions hold them already
            {"params": [weight, bias], "lr": THETA_RATE / len(own)},
        ]
        optimiser = torch.optim.AdamW(groups, fused=True)
        before = float("inf")
        for _ in range(MOST_STEPS):
            context = weight @ own + bias
            odds = sign * float(weights @ context)
            loss = float(precision @ (weights - mean) ** 2) / 2 + softplus(-odds)
            if abs(before - loss) < FLAT:
                break
            before = loss
            slope = -sign * sigmoid(-odds)
            weights.grad = precision * (weights - mean) + slope * context
            weight.grad, bias.grad = torch.outer(slope * weights, own), slope * weights
            optimiser.step()
        weight.grad = bias.grad = None
        self.weight, self.bias, self.means[arm] = weight, bias, weights
        context = self.context(features)
        chance = sigmoid(float(weights @ context))
        self.precisions[arm] += context**2 * chance * (1 - chance)
        self.counts[arm] += 1


def softplus(odds: float) -> float:
    """`log(1 + exp(odds))`, at any size."""
    return max(odds, 0.0) + log1p(exp(-abs(odds)))


def sigmoid(odds: float) -> float:
    """`1 / (1 + exp(-odds))`, at any size."""
    return (1 + tanh(odds / 2)) / 2


@dataclass
class History:
    """The values of one metric so far; a new value's reward is its rank among them."""

    is_higher_better: bool
    counts_rises: bool = False
    """The reward is whether the value is above 0, not its rank."""
    values: list[float] = field(default_factory=list)
    """Ascending."""

    def reward(self, value: float | None) -> float:
        """The share of earlier values that this one beats, ties half, in [0, 1]; it then is one of them.

        The first is 1/2; None, which says that there is no value, is 0.
        """
        if value is None:
            return 0.0
        if self.counts_rises:
            return float(value > 0)
        below, up_to = bisect_left(self.values, value), bisect_right(self.values, value)
        rank = (below + up_to) / (2 * len(self.values)) if self.values else 0.5
        insort(self.values, value)
        return rank if self.is_higher_better else 1 - rank
