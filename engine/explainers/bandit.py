"""A contextual bandit: learns from one reward per image which of a few arms suits an image best."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log1p, sqrt, tanh

import torch
from torch import Tensor

CONTEXT_LENGTH = 100
"""Length of an image's context."""

MAX_STEPS, MIN_LOSS_CHANGE = 100, 1e-5
"""Limits of one update: the optimiser's steps, and the change of the loss below which it stops."""
LEARNING_RATE, LAYER_LEARNING_RATE = 3e-3, 1e-5
"""For the arm's weights; and for the layer that makes contexts, divided by its K features."""
FIRST_LENGTH = 0.3
"""The first length of each part of a context: it sets the effect of one reward, and the spread of draws."""


@dataclass
class Bandit:
    """Regularised logistic Thompson sampling: per arm a Gaussian over weights w, each entry with its own precision.

    An arm is good for an image with probability `sigmoid(w u)`, u the image's context (Chapelle and Li, NeurIPS
    2011, algorithm 3). The context is a linear layer over features of the image, learned together with w. All
    numbers are float64 on the CPU.
    """

    weight: Tensor
    """The layer's weight, [100, K]."""
    bias: Tensor
    """The layer's bias, [100]."""
    centre: Tensor
    """Mean of the features over the first images, [K]."""
    spread: Tensor
    """Their standard deviation, [K]; 1 where it is 0."""
    means: Tensor
    """Means of the weights of each arm, [Z, 100]."""
    precisions: Tensor
    """Precisions of the weights of each arm, [Z, 100]; at least 1, and never falling."""
    counts: Tensor
    """Number of updates of each arm, int64 [Z]."""

    @classmethod
    def untrained(cls, features: Tensor, num_arms: int) -> "Bandit":
        """The bandit before any reward, for features [N, K] of the first images.

        Every arm's weights have mean 0 and precision 1. The layer starts with fixed random numbers. They make the part
        of a context that is common to all images about as long as the part that is the image's own.
        """
        features = features.double()
        own = torch.Generator().manual_seed(0)
        num_features = features.shape[1]
        weight = torch.randn(CONTEXT_LENGTH, num_features, generator=own, dtype=torch.float64)
        bias = torch.randn(CONTEXT_LENGTH, generator=own, dtype=torch.float64)
        spread = features.std(0, correction=0)
        return cls(
            weight=FIRST_LENGTH * weight / sqrt(CONTEXT_LENGTH * num_features),
            bias=FIRST_LENGTH * bias / sqrt(CONTEXT_LENGTH),
            centre=features.mean(0),
            spread=torch.where(spread > 0, spread, 1.0),
            means=torch.zeros(num_arms, CONTEXT_LENGTH, dtype=torch.float64),
            precisions=torch.ones(num_arms, CONTEXT_LENGTH, dtype=torch.float64),
            counts=torch.zeros(num_arms, dtype=torch.int64),
        )

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "Bandit":
        """The bandit that a state holds."""
        own = {name: state[f"bandit.{name}"] for name in cls.__dataclass_fields__}
        return cls(**{name: tensor if name == "counts" else tensor.double() for name, tensor in own.items()})

    def state(self) -> dict[str, Tensor]:
        """All fields as named tensors, to be stored; floats in single precision."""
        own = {f"bandit.{name}": getattr(self, name) for name in self.__dataclass_fields__}
        return {name: one.float() if one.is_floating_point() else one for name, one in own.items()}

    def context(self, features: Tensor) -> Tensor:
        """The context u [100] of an image's features [K]."""
        return self.weight @ self._standard(features) + self.bias

    def _standard(self, features: Tensor) -> Tensor:
        return (features.double() - self.centre) / self.spread

    def choice(self, context: Tensor, generator: torch.Generator) -> int:
        """The arm with the largest `w u`, w drawn from the arm's Gaussian."""
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
            {"params": [weights], "lr": LEARNING_RATE, "weight_decay": 0.0},  # the precisions regularise them already
            {"params": [weight, bias], "lr": LAYER_LEARNING_RATE / len(own)},
        ]
        optimiser = torch.optim.AdamW(groups, fused=True)
        before = float("inf")
        for _ in range(MAX_STEPS):
            context = weight @ own + bias
            odds = sign * float(weights @ context)
            loss = float(precision @ (weights - mean) ** 2) / 2 + softplus(-odds)
            if abs(before - loss) < MIN_LOSS_CHANGE:
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
    """The earlier values of one metric. The reward of a new value is its rank among them."""

    is_higher_better: bool
    counts_rises: bool = False
    """The reward is 1 for a value above 0, else 0, not the rank."""
    values: list[float] = field(default_factory=list)
    """Ascending."""

    def reward(self, value: float | None) -> float:
        """The share of earlier values that this one beats, in [0, 1]; ties count half. Then stores the value.

        The first reward is 1/2. The reward of None, for no value, is 0.
        """
        if value is None:
            return 0.0
        if self.counts_rises:
            return float(value > 0)
        below, up_to = bisect_left(self.values, value), bisect_right(self.values, value)
        rank = (below + up_to) / (2 * len(self.values)) if self.values else 0.5
        insort(self.values, value)
        return rank if self.is_higher_better else 1 - rank
