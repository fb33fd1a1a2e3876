"""The configuration of the job that made an output, from its plan and from what the user names again."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blocksight.engine.catalog.entries import factory_of
from blocksight.jobs.plan.config import ConfigError, JobConfig, checked_config
from blocksight.jobs.plan.plan import Plan

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

    An output may come from a stranger. Its plan never chooses what is imported or which file is read: a model factory
    (`package.module:factory`, also within `knn(...)`) and a weights file must be named again, and the model's name
    must be that of the plan. Raises ConfigError with the option to type, or with both names.
    """
    known = {name: plan.identity[name] for name in JobConfig.model_fields if name in plan.identity}
    model = _model(plan.identity, named.model)
    weights = _weights(plan.identity["weights"], named.weights)
    config = checked_config(
        {**known, "output": output, "endpoint_url": named.endpoint_url, "model": model, "weights": weights}
    )
    if named.weights is None and config.weights != weights:
        raise ConfigError(
            f"the output's weights are {weights!r} of the model's own, and a file of this name lies here: run the "
            "command in another folder"
        )
    return config


def _model(identity: Mapping[str, Any], named: str | None) -> str:
    stored = identity["model"]
    if named is not None and named != stored:
        raise ConfigError(f"the output was made with model {stored!r}, and --model names {named!r}: they must be equal")
    if named is None and factory_of(stored) is not None:
        raise ConfigError(
            f"the output says that it was made with a model that is code, {stored!r}; nothing is imported because an "
            f"output says so. If you trust this code, name it again: --model {shlex.quote(stored)}"
        )
    return stored


def _weights(stored: str | None, named: str | None) -> str | None:
    """The weights file as the user names it, or one of the model's own weight names, which is no path."""
    if named is not None or stored is None:
        return named
    if len(stored) == SHA256_LENGTH:
        raise ConfigError(f"the model's weights came from a file (sha256 {stored[:16]}); name it with --weights")
    if not stored.isidentifier():
        raise ConfigError(f"the output names {stored!r} for weights, which is neither a name nor a hash of a file")
    return stored
