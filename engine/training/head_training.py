"""Trains an attention head step by step; each step's gradient is a sum over shards in their order.

Whoever computes which shard, the sum has the same bits, so that a head does not depend on the number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import cos, isfinite, pi
from typing import Literal

import torch
from torch import Tensor

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.training.attention_head import AttentionHead, Statistics, in_order
from blocksight.engine.training.feature_maps import FeatureMaps
from blocksight.engine.training.mask_loss import LABELS, LossWeights, mask_loss, other_labels

NUM_SHARDS = 8
"""Shards of a step. Each has `LABELS / NUM_SHARDS` images, which are one batch of the network."""
SHARD_SIZE = LABELS // NUM_SHARDS

WARM_UP, START_DIVISOR, END_DIVISOR = 0.3, 25.0, 1e4
"""Of the learning rate's one cycle: the share of steps in which it rises, and its start and end by its greatest
value and by its start."""


@dataclass(frozen=True)
class Recipe:
    """How a head is trained."""

    optimiser: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov's momentum of 0.9, or AdamW with amsgrad."""
    max_lr: float = 1e-3
    weight_decay: float = 5e-4
    """Of all weights, also those of the batch norms, and of no bias."""
    weights: LossWeights = field(default_factory=LossWeights)
    fill: Literal["black", "zero"] = "black"
    """What a mask of 0 leaves: a black pixel, or zero of the model's input, its mean colour."""
    keeps_own: bool = True
    """As in `other_labels`."""


@dataclass(frozen=True)
class Seen:
    """A shard's images after the first pass."""

    inputs_nchw: Tensor
    labels: Tensor
    """The model's own predictions [N]; labels of the data are never read."""
    maps: list[Tensor]
    """The taps' feature maps."""


@dataclass(frozen=True)
class ShardGradient:
    """What one shard adds to a step."""

    gradients: list[Tensor]
    """One per parameter of the head, the mean over the shard's images."""
    statistics: Statistics
    terms: tuple[float, float, float]
    """Cross entropy, area and smoothness, the means over the shard's images."""


class HeadTraining:
    """A head, its optimiser and its place in the schedule."""

    def __init__(
        self, adapter: ModelAdapter, features: FeatureMaps, head: AttentionHead, recipe: Recipe, num_steps: int
    ) -> None:
        """`num_steps` is the length of the whole training, which the learning rate's cycle spans."""
        refuse_unfit(adapter)
        self.adapter, self.features, self.head, self.recipe = adapter, features, head, recipe
        self.num_steps, self.step = num_steps, 0
        self.parameters = dict(head.named_parameters())
        decayed = [own for name, own in self.parameters.items() if not name.endswith("bias")]
        free = [own for name, own in self.parameters.items() if name.endswith("bias")]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(groups, recipe.max_lr, momentum=0.9, nesterov=True, foreach=False)
            if recipe.optimiser == "sgd"
            else torch.optim.AdamW(groups, recipe.max_lr, amsgrad=True, foreach=False)
        )

    def see(self, inputs_nchw: Tensor) -> Seen:
        """The first pass of a shard: model inputs [SHARD_SIZE, 3, H, W] to labels and feature maps."""
        with self.adapter.borrowed():
            logits, maps = self.features(inputs_nchw)
        return Seen(inputs_nchw, self.adapter.of_classes(logits).argmax(1), maps)

    def gradient(self, seen: Seen, labels: Tensor, shard: int) -> ShardGradient:
        """The gradient of shard number `shard`; `labels` [LABELS] are those of all shards in order."""
        parameters = list(self.parameters.values())
        with self.adapter.borrowed(), torch.enable_grad():
            features, statistics = self.head.trained_features(seen.maps)
            others, counts = other_labels(labels, shard * SHARD_SIZE, len(seen.labels), keeps_own=self.recipe.keeps_own)
            masks = torch.sigmoid(self.head.masks(features, torch.cat([seen.labels[:, None], others], 1)))
            logits = self.adapter.of_classes(self.adapter.logits(self._masked(seen.inputs_nchw, masks[:, :1])))
            terms = mask_loss(logits, masks[:, 0], masks[:, 1:], seen.labels, counts, self.recipe.weights)
            gradients = torch.autograd.grad(terms.total.mean(), parameters, materialize_grads=True)
        shares = tuple(float(own.detach().mean()) for own in (terms.cross_entropy, terms.area, terms.smoothness))
        return ShardGradient(list(gradients), statistics, (shares[0], shares[1], shares[2]))

    def _masked(self, inputs_nchw: Tensor, masks_n1hw: Tensor) -> Tensor:
        full = grid_of(inputs_nchw)
        large = upsampling(grid_of(masks_n1hw), full, inputs_nchw.device)(masks_n1hw)
        if self.recipe.fill == "zero":
            return inputs_nchw * large
        return self.adapter.normalise_shares(self.adapter.pixels_of(inputs_nchw) * large)

    def advance(self, shards: Sequence[ShardGradient]) -> tuple[float, float, float]:
        """Makes one step with the shards' gradients, in the shards' order; returns the terms of the loss.

        Raises ModelError, and changes nothing, if a gradient or a term is not finite.
        """
        terms = [sum(own) / len(shards) for own in zip(*(shard.terms for shard in shards), strict=True)]
        summed = [in_order(list(parts)) for parts in zip(*(shard.gradients for shard in shards), strict=True)]
        if not all(map(isfinite, terms)) or not all(bool(own.isfinite().all()) for own in summed):
            raise ModelError(
                f"the loss or its gradient is not finite in step {self.step + 1}: take a smaller rate, such as "
                f"-p lr={self.recipe.max_lr / 10:g}"
            )
        for own, gradient in zip(self.parameters.values(), summed, strict=True):
            own.grad = gradient
        for group in self.optimiser.param_groups:
            group["lr"] = one_cycle(self.step, self.num_steps, self.recipe.max_lr)
        self.optimiser.step()
        self.head.move_statistics([shard.statistics for shard in shards])
        self.step += 1
        return terms[0], terms[1], terms[2]

    def state(self) -> dict[str, Tensor]:
        """Everything that a later process needs to go on, as named tensors on the CPU."""
        state = {f"head.{name}": own for name, own in self.head.state_dict().items()}
        for name, own in self.parameters.items():
            for kind, value in self.optimiser.state.get(own, {}).items():
                state[f"optimiser.{kind}.{name}"] = torch.as_tensor(value)
        state["step"] = torch.tensor(self.step)
        return {name: own.detach().cpu().contiguous() for name, own in state.items()}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state`. Raises ModelError if it is of another head."""
        own = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
        try:
            self.head.load_state_dict(own)
        except RuntimeError as error:
            raise ModelError(f"the step is of another head: {str(error).splitlines()[0]}") from error
        for name, parameter in self.parameters.items():
            kept = {
                key.split(".", 2)[1]: value
                for key, value in state.items()
                if key.startswith("optimiser.") and key.split(".", 2)[2] == name
            }
            if kept:
                self.optimiser.state[parameter].update(
                    {kind: value.to(parameter.device) if value.dim() else value for kind, value in kept.items()}
                )
        self.step = int(state["step"])


def refuse_unfit(adapter: ModelAdapter) -> None:
    """Raises ModelError for a model that no head can be trained for."""
    if adapter.readout != "softmax":
        raise ModelError(
            f"{adapter.name} is read by {adapter.readout}, and a head is trained with the cross entropy of one class "
            "among several: take a method without training, such as sise or rise, or a model read by softmax"
        )
    if adapter.num_classes < 2:
        raise ModelError(f"{adapter.name} has one class, and a head needs two to tell apart")


def one_cycle(step: int, num_steps: int, max_lr: float) -> float:
    """The learning rate of a step: rises and falls along a cosine once (Smith and Topin, 2017), as torch's default."""
    start, last = max_lr / START_DIVISOR, max_lr / START_DIVISOR / END_DIVISOR
    peak = WARM_UP * num_steps - 1
    if step <= peak:
        return _cosine(start, max_lr, step / peak if peak > 0 else 1.0)
    return _cosine(max_lr, last, min(1.0, (step - peak) / (num_steps - 1 - peak)) if num_steps - 1 > peak else 1.0)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + cos(pi * share))
