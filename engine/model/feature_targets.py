"""Targets of the feature vector: similarities and directions, which the module returns behind its classes."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.target_expressions import Atom
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.features import capture_input, head_path
from blocksight.engine.model.nearness import are_near
from blocksight.engine.model.neighbours import MemoryBank
from blocksight.engine.model.prompts import Prompted

SAME = 1 - 1e-5
"""A cosine above this is that of the picture to itself: its gradient is 0, and what is computed is rounding."""


class WithFeatures(nn.Module):
    """A head, and behind its outputs [N, K] the cosines and products of its input with vectors [N, M]."""

    units: Tensor
    directions: Tensor

    def __init__(self, head: nn.Module, units: Tensor, directions: Tensor) -> None:
        """`units` [A, D] have length 1 and are compared by the cosine; `directions` [B, D] are multiplied."""
        super().__init__()
        self.head = head
        self.register_buffer("units", units)
        self.register_buffer("directions", directions)

    def forward(self, features: Tensor) -> Tensor:
        """The outputs [N, K + A + B] of features [N, D]."""
        outputs = self.head(features)
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        cosines = functional.normalize(wide, dim=1) @ self.units.to(wide.dtype).T
        products = wide @ self.directions.to(wide.dtype).T
        return torch.cat([outputs, cosines.to(outputs.dtype), products.to(outputs.dtype)], 1)


class Headed(nn.Module):
    """A network of features with a head behind it."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        """What the head returns."""
        return self.head(self.network(inputs_nchw))


@dataclass(frozen=True)
class FeaturePlace:
    """Where a model's feature vector is."""

    path: str | None
    """Of the sub-module whose input it is; None: it is the output of the network, or of the one behind prompts."""

    def __str__(self) -> str:
        return "the output of the network" if self.path is None else f"the input of {self.path}"


def feature_place(adapter: ModelAdapter) -> FeaturePlace:
    """Where the feature vector of a model is, as `knn` has it. Raises ModelError for a model that has none."""
    if isinstance(adapter.module, Prompted):
        return FeaturePlace(None)
    banks = (name for name, one in adapter.module.named_modules() if isinstance(one, MemoryBank))
    path = next(banks, None) or head_path(adapter)
    if path == "":
        raise ModelError(f"model {adapter.name!r} is one linear layer, and has no feature vector before it")
    return FeaturePlace(path)


def features_of(adapter: ModelAdapter, inputs_nchw: Tensor, place: FeaturePlace) -> Tensor:
    """The feature vectors [N, D] of inputs, in float32 on the CPU. Raises ModelError if there is none."""
    found: list[Tensor] = []
    network = adapter.module.network if isinstance(adapter.module, Prompted) else adapter.module
    capture = nullcontext() if place.path is None else capture_input(network, place.path, found.append)
    with adapter.borrowed(), torch.inference_mode(), capture:
        output = network(inputs_nchw.contiguous(memory_format=torch.channels_last))
    own = found[-1] if found else output
    if not isinstance(own, Tensor) or own.dim() != 2 or len(own) != len(inputs_nchw):
        raise ModelError(f"model {adapter.name!r} has no feature vector: {place} is not one vector for each picture")
    return own.detach().float().cpu().clone()


def bank_of(adapter: ModelAdapter) -> MemoryBank:
    """The model's memory bank. Raises ModelError if it has none."""
    bank = next((one for one in adapter.module.modules() if isinstance(one, MemoryBank)), None)
    if bank is None:
        raise ModelError(
            f"model {adapter.name!r} has no memory bank, whose class a prototype is: make one with `blocksight bank` "
            f"and name knn({adapter.name})"
        )
    return bank


def with_features(
    adapter: ModelAdapter, features: Sequence[Atom], vectors: Sequence[Sequence[float]], place: FeaturePlace
) -> ModelAdapter:
    """The same model, whose module also returns the values of these features, those of cosines first.

    `vectors` [M, D] belong to `features`, those of cosines of length 1; the place is `feature_place` of the model. The
    classes' outputs stay what they were, which is tried on random pictures. Raises ModelError if they do not.
    """
    known = torch.tensor(vectors, dtype=torch.float32, device=adapter.device)
    count = sum(one.is_cosine for one in features)
    units, directions = known[:count].clone(), known[count:].clone()
    made = adapter.with_module(_extended(adapter.module, place, units, directions))
    made.features = tuple(features)
    _refuse_other_outputs(adapter, made, place, torch.cat([units, directions]))
    return made


def feature_vectors(adapter: ModelAdapter) -> tuple[tuple[float, ...], ...] | None:
    """The vectors [M, D] of the adapter's features, from which the same model can be made; None if it has none."""
    own = next((one for one in adapter.module.modules() if isinstance(one, WithFeatures)), None)
    return None if own is None else tuple(map(tuple, torch.cat([own.units, own.directions]).tolist()))


def _extended(module: nn.Module, place: FeaturePlace, units: Tensor, directions: Tensor) -> nn.Module:
    """A copy of the module, which is borrowed, with another head."""
    if place.path is not None:
        own = copy.deepcopy(module)
        own.set_submodule(place.path, WithFeatures(own.get_submodule(place.path), units, directions))
        return own
    if isinstance(module, Prompted):
        return Headed(module.network, WithFeatures(module.comparison(), units, directions))
    return Headed(module, WithFeatures(nn.Identity(), units, directions))


def _refuse_other_outputs(adapter: ModelAdapter, made: ModelAdapter, place: FeaturePlace, vectors: Tensor) -> None:
    """Raises ModelError if the features are not read as they should be, or if the classes' outputs moved."""
    own = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, *adapter.input_size), dtype=torch.uint8, generator=own)
    inputs, vectors = adapter.normalise(pixels), vectors.cpu()
    features = features_of(adapter, inputs, place)
    count = sum(one.is_cosine for one in made.features)
    wanted = [functional.normalize(features, dim=1) @ vectors[:count].T, features @ vectors[count:].T]
    try:
        with adapter.borrowed(), torch.inference_mode():
            before = adapter.logits(inputs).float().cpu()
        with made.borrowed(), torch.inference_mode():
            after = made.logits(inputs).float().cpu()
    except RuntimeError as error:
        raise ModelError(f"{_unread(adapter, place)}: {error}") from error
    if not are_near(after, torch.cat([before, *wanted], 1)):
        raise ModelError(f"{_unread(adapter, place)}: what comes behind it changes the outputs")


def _unread(adapter: ModelAdapter, place: FeaturePlace) -> str:
    return (
        f"the feature vector of model {adapter.name!r} is {place}, and it cannot be read beside the classes, so that "
        "similar:, prototype:, feature: and direction: have no meaning for it"
    )
