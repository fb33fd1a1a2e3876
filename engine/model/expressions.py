"""Targets that are weighted sums of classes, and several targets of different kinds for one image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.catalog.target_expressions import Atom, Formula, Summand
from blocksight.engine.errors import ModelError
from blocksight.engine.model.targets import TARGETS, LogProbability, Negated, Target

NO_LOGPROB = (
    "a log-probability needs probabilities, and with readout identity the output is none: take the logits, or say "
    "--readout softmax, sigmoid or probabilities"
)


NO_SUM = (
    "a sum of a class and a feature needs a logit of the class, and with readout probabilities there is none: ask for "
    "them one by one, or let the model return logits"
)


@dataclass(frozen=True)
class WeightedSum:
    """One scalar per image: a weighted sum of logits, or of log-probabilities."""

    classes: Tensor
    """The M classes of each of N images, [N, M] int64."""
    weights: Tensor
    """What they count, [N, M] float64; 0 where an image has fewer classes."""
    readout: ReadoutName
    """What the model's output is."""
    is_log: bool
    """Log-probabilities are summed."""

    @property
    def num_targets(self) -> int:
        return 1

    @property
    def leading(self) -> Tensor:
        """The first class of each image, [N, 1]."""
        return self.classes[:, :1]

    @property
    def is_class(self) -> tuple[bool, ...]:
        """It is no class's score."""
        return (False,)

    @property
    def raw(self) -> "WeightedSum":
        """It is before the softmax already, or means to be behind it."""
        return self

    def of(self, images: slice | Tensor) -> "WeightedSum":
        return replace(self, classes=self.classes[images], weights=self.weights[images])

    def score(self, logits: Tensor, images: Tensor) -> Tensor:
        """The sums [B, 1] (float64), unbounded."""
        values = self._values(logits.double()).gather(1, self.classes[images])
        return (values * self.weights[images]).sum(1, keepdim=True)

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """How the sums [N, 1] change between two outputs."""
        every = torch.arange(len(after), device=after.device)
        return self.score(after, every) - self.score(before, every)

    def direction(self, logits: Tensor, index: int) -> Tensor:  # noqa: ARG002 - there is one
        """The gradient by the output itself, [N, K] float64."""
        output = logits.double()
        if self.readout == "probabilities":  # both readings are of the logarithm, as `LogProbability` is
            return self._spread(output, self.weights / self._given(output).gather(1, self.classes))
        if not self.is_log:
            return self._spread(output, self.weights)
        if self.readout == "sigmoid":
            return self._spread(output, self.weights * functional.sigmoid(-output).gather(1, self.classes))
        return self._of_softmax(output)

    def _of_softmax(self, output: Tensor) -> Tensor:
        """`sum_c w_c (e_c - p)`, class by class in a form in which a saturated softmax cancels nothing."""
        total = torch.zeros_like(output)
        for classes, weights in zip(self.classes.T, self.weights.T, strict=True):
            chosen = functional.one_hot(classes, output.shape[1]).bool()
            others = output.masked_fill(chosen, float("-inf"))
            rest = functional.sigmoid(others.logsumexp(1) - output.gather(1, classes[:, None])[:, 0])  # 1 - p_c
            total += (weights * rest)[:, None] * torch.where(chosen, 1.0, -others.softmax(1))
        return total

    def _spread(self, output: Tensor, weights: Tensor) -> Tensor:
        """The weights [N, M] at the places of their classes, [N, K]."""
        return torch.zeros_like(output).scatter_add(1, self.classes, weights)

    def _values(self, output: Tensor) -> Tensor:
        """What is summed, of all classes [B, K]."""
        if self.readout == "probabilities":
            return LogProbability.values(output)
        if not self.is_log:
            return output
        return functional.logsigmoid(output) if self.readout == "sigmoid" else output.log_softmax(1)

    @staticmethod
    def _given(output: Tensor) -> Tensor:
        """Probabilities that can be divided by."""
        return output.clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class JoinedTargets:
    """Several targets of an image, side by side."""

    parts: tuple[Target, ...]

    @property
    def num_targets(self) -> int:
        return sum(part.num_targets for part in self.parts)

    @property
    def leading(self) -> Tensor:
        """The class of each target, of a sum its first one, [N, T]."""
        return torch.cat([part.leading for part in self.parts], 1)

    @property
    def is_class(self) -> tuple[bool, ...]:
        """Per target whether it is a class's score."""
        return tuple(is_class for part in self.parts for is_class in part.is_class)

    @property
    def raw(self) -> "JoinedTargets":
        return JoinedTargets(tuple(part.raw for part in self.parts))

    def of(self, images: slice | Tensor) -> "JoinedTargets":
        return JoinedTargets(tuple(part.of(images) for part in self.parts))

    def score(self, logits: Tensor, images: Tensor) -> Tensor:
        """Scores [B, T] (float64)."""
        return torch.cat([part.score(logits, images) for part in self.parts], 1)

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """How the scores [N, T] change between two outputs."""
        return torch.cat([part.change(before, after) for part in self.parts], 1)

    def direction(self, logits: Tensor, index: int) -> Tensor:
        """As `Target.direction`, [N, K]."""
        for part in self.parts:
            if index < part.num_targets:
                return part.direction(logits, index)
            index -= part.num_targets
        raise IndexError(f"there are {self.num_targets} targets, from 0")


@dataclass(frozen=True)
class AmongClasses:
    """A target of the first K outputs, which are the classes; those behind them are features."""

    inner: Target
    num_classes: int
    """K."""

    @property
    def num_targets(self) -> int:
        return self.inner.num_targets

    @property
    def leading(self) -> Tensor:
        """As the target's, [N, T]."""
        return self.inner.leading

    @property
    def is_class(self) -> tuple[bool, ...]:
        """As the target's."""
        return self.inner.is_class

    @property
    def raw(self) -> "AmongClasses":
        return AmongClasses(self.inner.raw, self.num_classes)

    def of(self, images: slice | Tensor) -> "AmongClasses":
        return AmongClasses(self.inner.of(images), self.num_classes)

    def score(self, logits: Tensor, images: Tensor) -> Tensor:
        """Scores [B, T] (float64)."""
        return self.inner.score(logits[:, : self.num_classes], images)

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """How the scores [N, T] change between two outputs."""
        return self.inner.change(before[:, : self.num_classes], after[:, : self.num_classes])

    def direction(self, logits: Tensor, index: int) -> Tensor:
        """As `Target.direction`: 0 at the features."""
        own = self.inner.direction(logits[:, : self.num_classes], index)
        return functional.pad(own, (0, logits.shape[1] - self.num_classes))


def with_opposite(target: Target) -> Target:
    """The T targets, and behind them their negatives: 2 T."""
    return JoinedTargets((target, Negated(target)))


def target_of(
    formulas: Sequence[Sequence[Formula]],
    readout: ReadoutName,
    device: torch.device | str,
    num_classes: int = 0,
    features: Sequence[Atom] = (),
) -> Target:
    """The target of T formulas for each of N images; those of one place differ in their classes alone.

    `features` are what the output holds behind its `num_classes` classes. Raises ModelError for log-probabilities of
    an output that is none, and for a feature that the output does not hold.
    """
    if not features and all(one.is_score for own in formulas for one in own):
        return TARGETS[readout](_indices([[one.classes[0] for one in own] for own in formulas], device))
    return JoinedTargets(
        tuple(_column(own, readout, device, num_classes, features) for own in zip(*formulas, strict=True))
    )


def _indices(rows: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _column(
    formulas: Sequence[Formula],
    readout: ReadoutName,
    device: torch.device | str,
    num_classes: int,
    features: Sequence[Atom],
) -> Target:
    is_feature = any(one.features for one in formulas)
    if is_feature and readout == "probabilities" and any(one.classes for one in formulas):
        raise ModelError(NO_SUM)
    read: ReadoutName = "identity" if is_feature else readout
    own = _of_outputs(formulas, read, device, num_classes, features)
    return AmongClasses(own, num_classes) if features and not is_feature else own


def _of_outputs(
    formulas: Sequence[Formula],
    readout: ReadoutName,
    device: torch.device | str,
    num_classes: int,
    features: Sequence[Atom],
) -> Target:
    if all(one.is_score for one in formulas):
        return TARGETS[readout](_indices([one.classes for one in formulas], device))
    is_log = formulas[0].reading == "logprob"
    if is_log and readout == "identity":
        raise ModelError(NO_LOGPROB)
    most = max(len(one.terms) for one in formulas)
    filled = [[*one.terms, *[(0.0, 0)] * (most - len(one.terms))] for one in formulas]
    places = _indices([[_place_of(one, num_classes, features) for _, one in own] for own in filled], device)
    weights = torch.tensor([[weight for weight, _ in own] for own in filled], dtype=torch.float64, device=device)
    return WeightedSum(places, weights, readout, is_log)


def _place_of(own: Summand, num_classes: int, features: Sequence[Atom]) -> int:
    """The place of a class or a feature in the output."""
    if isinstance(own, int):
        return own
    if own not in features:
        raise ModelError(f"the target {own.text} is none that the model's output was made for")
    return num_classes + features.index(own)
