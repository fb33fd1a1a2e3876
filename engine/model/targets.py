"""Targets: the scalar of a model's output that is explained."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.catalog.readouts import ReadoutName


class Readout(Protocol):
    """T scalars of the output for each of N images, as the scorer needs them."""

    @property
    def num_targets(self) -> int:
        """T."""
        ...

    def score(self, logits: Tensor, images: Tensor) -> Tensor:
        """Scores [B, T] (float64) of logits [B, K], whose row b belongs to image `images[b]`."""
        ...


class Target(Readout, Protocol):
    """Scalars that have a gradient, as explainers need them."""

    def of(self, images: slice | Tensor) -> "Target":
        """The same target for a slice of the images, or for image numbers [M] (int64) in any order."""
        ...

    def direction(self, logits: Tensor, index: int) -> Tensor:
        """A tensor [N, K], each row a positive multiple of the gradient of target `index` by the logits."""
        ...

    @property
    def raw(self) -> "Target":
        """The same scalars before the softmax: for a class's probability, its logit."""
        ...

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """What a path's gradients, as `direction` gives them, sum to between two outputs [N, K]: [N, T]."""
        ...

    @property
    def leading(self) -> Tensor:
        """The class of each target, of a sum its first one, [N, T] int64."""
        ...

    @property
    def is_class(self) -> tuple[bool, ...]:
        """Per target whether it is a class's own score."""
        ...


@dataclass(frozen=True)
class _OfClasses:
    """A scalar for each of some classes."""

    classes: Tensor
    """T class indices of each of N images, [N, T] int64."""

    @property
    def num_targets(self) -> int:
        return self.classes.shape[1]

    def of(self, images: slice | Tensor) -> Self:
        return type(self)(self.classes[images])

    @property
    def leading(self) -> Tensor:
        """The classes themselves, [N, T]."""
        return self.classes

    @property
    def is_class(self) -> tuple[bool, ...]:
        """All of them are."""
        return (True,) * self.num_targets


@dataclass(frozen=True)
class ClassTarget(_OfClasses, ABC):
    """The score of a class, by one of `TARGETS`."""

    @staticmethod
    @abstractmethod
    def values(logits: Tensor) -> Tensor:
        """The scores [B, K] (float64) of all classes."""

    def score(self, logits: Tensor, images: Tensor) -> Tensor:
        """Scores [B, T] (float64)."""
        return self.values(logits).gather(1, self.classes[images])

    def direction(self, logits: Tensor, index: int) -> Tensor:
        """`e_c`, a positive multiple of the gradient of any increasing function of z_c."""
        return functional.one_hot(self.classes[:, index], logits.shape[1]).double()

    @property
    def raw(self) -> "ClassTarget":
        return ClassLogit(self.classes)

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """`direction(after)` times the change of the output: for a class's logit, its change."""
        changes = after - before
        parts = [(self.direction(after, index) * changes).sum(1) for index in range(self.num_targets)]
        return torch.stack(parts, 1)


@dataclass(frozen=True)
class ClassProbability(ClassTarget):
    """Psi of SISE: the softmax probability of a class (the paper's confidence score)."""

    @staticmethod
    def values(logits: Tensor) -> Tensor:
        """Probabilities in [0, 1]; the softmax is taken in float64 so that 1e-7 and 1 - 1e-12 survive."""
        return logits.double().softmax(1)

    def direction(self, logits: Tensor, index: int) -> Tensor:
        """`e_c - softmax(z without c)`, which is dp_c/dz divided by the positive number p_c (1 - p_c).

        In this form nothing cancels where the softmax is saturated: p_c may round to 1 or to 0 and the
        direction stays exact. Selection is relative, so the positive factor does not matter.
        """
        chosen = functional.one_hot(self.classes[:, index], logits.shape[1]).bool()
        others = logits.double().masked_fill(chosen, float("-inf")).softmax(1)
        return torch.where(chosen, 1.0, -others)


@dataclass(frozen=True)
class LabelProbability(ClassTarget):
    """The sigmoid of a label's own output: the labels are independent, and several may hold at once."""

    @staticmethod
    def values(logits: Tensor) -> Tensor:
        """Probabilities in [0, 1]."""
        return logits.double().sigmoid()


@dataclass(frozen=True)
class ClassLogit(ClassTarget):
    """The class's logit z_c, which no saturation flattens."""

    @staticmethod
    def values(logits: Tensor) -> Tensor:
        """Logits, unbounded."""
        return logits.double()


@dataclass(frozen=True)
class GivenProbability(ClassTarget):
    """The output itself, where the model returns probabilities."""

    @staticmethod
    def values(logits: Tensor) -> Tensor:
        """The outputs; in [0, 1] if the model keeps its word."""
        return logits.double()

    @property
    def raw(self) -> "LogProbability":
        return LogProbability(self.classes)


@dataclass(frozen=True)
class LogProbability(ClassTarget):
    """The logarithm of the output, which takes the place of a logit where the model returns probabilities."""

    @staticmethod
    def values(logits: Tensor) -> Tensor:
        """At most 0; that of the smallest float32 where the probability is 0."""
        return logits.double().clamp(min=torch.finfo(torch.float32).tiny).log()

    @property
    def raw(self) -> "LogProbability":
        return self


@dataclass(frozen=True)
class Negated:
    """The negative of a target: its map is what speaks against the target."""

    inner: Target

    @property
    def num_targets(self) -> int:
        return self.inner.num_targets

    @property
    def leading(self) -> Tensor:
        """As the target's, [N, T]."""
        return self.inner.leading

    @property
    def is_class(self) -> tuple[bool, ...]:
        """None of them is."""
        return (False,) * self.num_targets

    @property
    def raw(self) -> "Negated":
        return Negated(self.inner.raw)

    def of(self, images: slice | Tensor) -> "Negated":
        return Negated(self.inner.of(images))

    def score(self, logits: Tensor, images: Tensor) -> Tensor:
        """Minus the target's scores [B, T] (float64)."""
        return -self.inner.score(logits, images)

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """Minus the target's changes [N, T]."""
        return -self.inner.change(before, after)

    def direction(self, logits: Tensor, index: int) -> Tensor:
        """Minus the target's direction [N, K]."""
        return -self.inner.direction(logits, index)


TARGETS: Mapping[ReadoutName, type[ClassTarget]] = {
    "softmax": ClassProbability,
    "sigmoid": LabelProbability,
    "probabilities": GivenProbability,
    "identity": ClassLogit,
}
"""The target of each readout."""


@dataclass(frozen=True)
class TopClass(_OfClasses):
    """1 if the class is the prediction, else 0; it has no gradient."""

    num_features: int = 0
    """Outputs behind the classes."""

    def score(self, logits: Tensor, images: Tensor) -> Tensor:
        """1 or 0; ties go to the lower class number, as everywhere."""
        of_classes = logits[:, : logits.shape[1] - self.num_features]
        return (of_classes.argmax(1, keepdim=True) == self.classes[images]).double()
