"""Finds the vectors of targets of features: of a picture, of a bank's class, of a file, or one unit."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.catalog.target_expressions import Atom
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.feature_targets import FeaturePlace, bank_of, feature_place, features_of, with_features
from blocksight.engine.scoring.setting_choice import drawn_pictures
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.target_files import file_bytes
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.rejects import Reject

Vectors = Sequence[Sequence[float]]
"""[M, D], one for each feature."""


def with_feature_targets(
    adapter: ModelAdapter, config: JobConfig, features: Sequence[Atom], vectors: Vectors | None
) -> ModelAdapter:
    """The model with the values of these features behind its classes; `vectors`, if they were computed before.

    Raises ModelError for a model without a feature vector, and ConfigError for a picture or file that gives none.
    """
    place = feature_place(adapter)
    return with_features(adapter, features, vectors or _vectors(adapter, config, features, place), place)


def _vectors(adapter: ModelAdapter, config: JobConfig, features: Sequence[Atom], place: FeaturePlace) -> Vectors:
    size = features_of(adapter, drawn_pictures(adapter)[:1], place).shape[1]
    found = torch.stack([_vector(adapter, config, one, place, size) for one in features])
    count = sum(one.is_cosine for one in features)
    return torch.cat([functional.normalize(found[:count], dim=1), found[count:]]).tolist()


def _vector(adapter: ModelAdapter, config: JobConfig, one: Atom, place: FeaturePlace, size: int) -> Tensor:
    if one.kind == "similar":
        return _of_picture(adapter, config, str(one.value), place)
    if one.kind == "prototype":
        return _usable(bank_of(adapter).centres[int(one.value)].float().cpu(), one, "the bank holds no picture of it")
    if one.kind == "feature":
        if int(one.value) >= size:
            raise ConfigError(f"target {one.text}: the feature vector of {adapter.name} has {size} numbers, from 0")
        return functional.one_hot(torch.tensor(int(one.value)), size).float()
    return _of_file(config, one, size)


def _of_picture(adapter: ModelAdapter, config: JobConfig, name: str, place: FeaturePlace) -> Tensor:
    try:
        found = decode(file_bytes(name, config))
    except Reject as reject:
        raise ConfigError(f"target: the picture {name} cannot be read: {reject.message} ({reject.code})") from reject
    pixels = torch.from_numpy(fit(found.pixels, adapter.input_size, config.resize).copy())
    own = features_of(adapter, adapter.normalise(pixels.permute(2, 0, 1)[None]), place)[0]
    return _usable(own, Atom("similar", name), "the model's feature of it is 0, or not finite")


def _of_file(config: JobConfig, one: Atom, size: int) -> Tensor:
    """A direction of length 1."""
    try:
        found = np.load(io.BytesIO(file_bytes(str(one.value), config)), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:  # a header may say any number
        raise ConfigError(f"target: the direction {one.value} is no .npy file of numbers: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.size != size:
        shape = " x ".join(map(str, getattr(found, "shape", ()))) or "no"
        raise ConfigError(f"target: the direction {one.value} holds {shape} numbers, and the feature vector has {size}")
    own = torch.from_numpy(found.astype(np.float64).reshape(-1))
    return functional.normalize(_usable(own, one, "it is 0, or not finite"), dim=0).float()


def _usable(vector: Tensor, one: Atom, reason: str) -> Tensor:
    if not vector.isfinite().all() or not vector.any():
        raise ConfigError(f"target {one.text} has no direction: {reason}")
    return vector
