"""The configuration of the job that made an output, from its plan and from what the user names again."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from blocksight.engine.catalog.entries import factory_of
from blocksight.engine.catalog.sources import place_of
from blocksight.jobs.plan.config import ConfigError, JobConfig, checked_config, normal_model
from blocksight.jobs.plan.context import sha256_of
from blocksight.jobs.plan.plan import Plan
from blocksight.storage.stores.locations import normal_place
from blocksight.storage.stores.opening import open_file
from blocksight.storage.stores.store import StoreError

WEIGHTS_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".tar"})
"""An output's plan cannot have other files read."""
SHA256_LENGTH = hashlib.sha256().digest_size * 2


@dataclass(frozen=True)
class NamedModel:
    """The model that made an output, as the user names it again."""

    model: str | None = None
    weights: str | None = None
    endpoint_url: str | None = None
    """Of the stores of output, data and weights. Never in a plan."""


def config_of(plan: Plan, output: str, named: NamedModel) -> JobConfig:
    """The configuration of the job that made an output.

    An output may come from a stranger. Its plan never chooses what is imported: a model factory
    (`package.module:factory`, also within `knn(...)`) must be named again, and the model's name must be that of the
    plan. Weights are data: the file that the plan names is read if it has the plan's hash, and lies on this machine
    or in the output's bucket. Raises ConfigError with the option to type, or with both names.
    """
    known = {name: plan.identity[name] for name in JobConfig.model_fields if name in plan.identity}
    model = _model(plan.identity, named.model and normal_model(named.model), output)
    weights = _weights(plan, output, named)
    config = checked_config(
        {**known, "output": output, "endpoint_url": named.endpoint_url, "model": model, "weights": weights}
    )
    if named.weights is None and config.weights != weights:
        raise ConfigError(
            f"the output's weights are {weights!r} of the model's own, and a file of this name lies here: run the "
            "command in another folder"
        )
    return config


def _model(identity: Mapping[str, Any], named: str | None, output: str) -> str:
    stored = identity["model"]
    if named is not None and named != stored:
        raise ConfigError(f"the output was made with model {stored!r}, and --model names {named!r}: they must be equal")
    if named is None and factory_of(stored) is not None:
        raise ConfigError(
            f"the output says that it was made with a model that is code, {stored!r}; nothing is imported because an "
            f"output says so. If you trust this code, name it again: --model {shlex.quote(stored)}"
        )
    place = place_of(stored)
    if named is None and place is not None and not _is_near(place, output):
        raise ConfigError(
            f"the output was made with the model at {place}, which is in another bucket than the output; if you trust "
            f"it, name it again: --model {shlex.quote(stored)}"
        )
    return stored


def _weights(plan: Plan, output: str, named: NamedModel) -> str | None:
    """The weights file as the user or the plan names it, or one of the model's own weight names, which is no path."""
    stored = plan.identity["weights"]
    if named.weights is not None or stored is None:
        return named.weights
    if place_of(plan.identity["model"]) is not None and len(stored) == SHA256_LENGTH:
        return plan.weights if plan.weights is None or _is_readable(plan.weights, output) else None
    if len(stored) == SHA256_LENGTH:
        missing = f"the model's weights came from a file (sha256 {stored[:16]})"
        if plan.weights is None:
            raise ConfigError(f"{missing}; name it with --weights")
        if _sha256_at(plan.weights, output, named.endpoint_url) != stored:
            raise ConfigError(f"{missing}, {plan.weights!r}, which is not there now; name it with --weights")
        return plan.weights
    if not stored.isidentifier():
        raise ConfigError(f"the output names {stored!r} for weights, which is neither a name nor a hash of a file")
    return stored


def _sha256_at(place: str, output: str, endpoint_url: str | None) -> str | None:
    """The hash of a weights file on this machine or in the output's bucket; None if it cannot be read."""
    if not _is_readable(place, output):
        return None
    if not place.startswith("s3://"):
        return _local_sha256(Path(place))
    store, name = open_file(place, endpoint_url)
    try:
        return sha256_of(store.read(name))
    except StoreError:
        return None


def _is_readable(place: str, output: str) -> bool:
    """True for a place of weights that an output's plan may have read."""
    return PurePosixPath(place).suffix.lower() in WEIGHTS_SUFFIXES and _is_near(place, output)


def _is_near(place: str, output: str) -> bool:
    """True on this machine and in the output's bucket."""
    return not place.startswith("s3://") or _bucket(place) == _bucket(normal_place(output))


def _local_sha256(file: Path) -> str | None:
    if not file.is_file():  # a pipe or a device would never end
        return None
    with file.open("rb") as body:
        return hashlib.file_digest(body, "sha256").hexdigest()


def _bucket(place: str) -> str:
    return place.removeprefix("s3://").partition("/")[0]
