"""A classifier without a trained head: the nearest features of a memory bank vote for their labels."""

import json
from collections.abc import Mapping, Sequence
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.errors import ModelError
from blocksight.engine.model.resample import scaled

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Usual values of the vote for self-supervised networks."""
SELF_MARGIN = 1e-6
"""An image whose cosine to a row of the bank is above 1 minus this counts as that row."""
LOG_FLOOR = log(1e-6)
"""Log of a class's least vote, relative to its mean feature's: every class has a logit and a gradient."""
NO_VOTE = -2.0
"""The cosine of a row that must not vote; its vote is negligible."""


class MemoryBank(nn.Module):
    """Features of labelled images; the nearest to a new image vote."""

    features: Tensor
    labels: Tensor
    names: Tensor
    centres: Tensor

    def __init__(
        self, features: Tensor, labels: Tensor, class_names: Sequence[str], num_neighbours: int, temperature: float
    ) -> None:
        super().__init__()
        self.num_neighbours, self.temperature = min(num_neighbours, len(features)), temperature
        self.num_classes = len(class_names)
        self.register_buffer("features", functional.normalize(features, dim=1))
        self.register_buffer("labels", labels)
        self.register_buffer("names", torch.tensor(list(json.dumps(list(class_names)).encode()), dtype=torch.uint8))
        self.register_buffer("centres", self._centres(), persistent=False)

    def _centres(self) -> Tensor:
        """The mean feature of each class [K, D]; zeros for a class without features."""
        counts = torch.bincount(self.labels, minlength=self.num_classes).clamp(min=1)
        sums = torch.zeros(self.num_classes, self.features.shape[1], dtype=torch.float64, device=self.labels.device)
        sums.index_add_(0, self.labels, self.features.double())
        return (sums / counts[:, None]).to(self.features.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D]: the logarithms of the votes, whose softmax is the normalised vote.

        A neighbour votes with exp(cosine / temperature). A class's vote is at least a millionth of its mean feature's,
        or of the last neighbour's if that is less.
        """
        unit, cosines = self._cosines(features)
        nearest, rows = cosines.topk(self.num_neighbours, 1)
        is_class = functional.one_hot(self.labels.take(rows), self.num_classes).bool()
        votes = torch.where(is_class, nearest[:, :, None], float("-inf"))
        floor = torch.minimum(unit @ self._wide(self.centres).T, nearest[:, -1:])
        floored = torch.cat([votes / self.temperature, (floor / self.temperature + LOG_FLOOR)[:, None]], 1)
        return floored.logsumexp(1)

    def agreement(self, features: Tensor, classes: Tensor) -> Tensor:
        """How much each dimension of features [N, D] agrees with the neighbours of classes [N]: omega, in [0, 1].

        `f z` scaled to [0, 1] per image, which cancels the paper's division by |sum f z|. f has length 1; z is the
        mean of the nearest neighbours that have the class. If none has it, z is the mean of as many nearest rows of
        the class. Zeros if all dimensions agree equally, for example if the bank has no other image of the class.
        """
        unit, cosines = self._cosines(features)
        is_class = self.labels == classes[:, None]
        of_class = cosines.masked_fill(~is_class, NO_VOTE)
        last = cosines.topk(self.num_neighbours, 1).values[:, -1:]
        among = of_class.masked_fill(cosines < last, NO_VOTE)
        has_some = (among > NO_VOTE).any(1, keepdim=True)
        chosen, rows = torch.where(has_some, among, of_class).topk(self.num_neighbours, 1)
        counts = (chosen > NO_VOTE).to(unit.dtype)
        mean = (self._wide(self.features)[rows] * counts[:, :, None]).sum(1) / counts.sum(1, keepdim=True).clamp(min=1)
        return scaled((unit * mean)[:, None])[:, 0]

    def _cosines(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The features at length 1 [N, D], and their cosines to the bank's rows [N, M]; an image skips its own row."""
        unit = functional.normalize(self._wide(features), dim=1)
        cosines = unit @ self._wide(self.features).T
        return unit, torch.where(cosines > 1 - SELF_MARGIN, NO_VOTE, cosines)

    def _wide(self, values: Tensor) -> Tensor:
        """At least float32: half precision cannot tell an image from a near copy."""
        return values.to(torch.promote_types(self.features.dtype, torch.float32))


class NeighbourClassifier(nn.Module):
    """A network that returns features [N, D], with a memory bank; its state dict holds both."""

    def __init__(
        self,
        backbone: nn.Module,
        features: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        num_neighbours: int = NUM_NEIGHBOURS,
        temperature: float = TEMPERATURE,
    ) -> None:
        """`features` [M, D] with their `labels` [M], int64 numbers of `class_names`."""
        super().__init__()
        self.backbone = backbone
        self.bank = MemoryBank(features, labels, class_names, num_neighbours, temperature)

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        return self.bank(self.backbone(inputs_nchw))


def from_state(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[NeighbourClassifier, list[str]]:
    """The classifier with the bank of a state dict, and its class names; the backbone's weights are not read.

    Raises ModelError if the bank is missing or damaged.
    """
    features, labels, names = (tensors.get(f"bank.{name}") for name in ("features", "labels", "names"))
    if features is None or labels is None or names is None:
        raise ModelError("the weights file holds no memory bank; `blocksight bank` makes one that does")
    try:
        class_names = json.loads(bytes(names.to(torch.uint8).tolist()))
    except ValueError as error:
        raise ModelError(f"the memory bank's class names cannot be read: {error}") from error
    is_sound = (
        features.dim() == 2
        and len(features) > 0
        and features.is_floating_point()
        and labels.dtype == torch.int64
        and labels.shape == features.shape[:1]
        and isinstance(class_names, list)
        and all(isinstance(name, str) for name in class_names)
        and 0 <= int(labels.min()) <= int(labels.max()) < len(class_names)
    )
    if not is_sound:
        raise ModelError(
            f"the memory bank is damaged: features {tuple(features.shape)}, labels {tuple(labels.shape)} "
            f"({labels.dtype}) and its class names do not fit each other"
        )
    return NeighbourClassifier(backbone, features, labels, class_names), class_names
