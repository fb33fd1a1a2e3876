"""How a model is fed: reads `model.toml` beside the weights, and says who set what."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from blocksight.jobs.plan.config import MODEL_INPUT, OWN, ConfigError, JobConfig, is_weights_name, with_input
from blocksight.jobs.plan.text import counted
from blocksight.storage.images.fitting import Fitting
from blocksight.storage.limits import MAX_MODEL_FILE_BYTES
from blocksight.storage.stores.opening import open_file
from blocksight.storage.stores.store import MissingError, StoreError, UnavailableError

MODEL_FILE = "model.toml"


def with_model_file(config: JobConfig) -> JobConfig:
    """The configuration, with what `model.toml` beside the weights file says and the configuration does not.

    The file is data: only its keys are read. How pictures are resized is resolved as well: as the model's own
    library does it, and with the interpolation that was asked for. Raises ConfigError in one sentence if the file
    cannot be used, or if the library's way is not known, and ModelError.
    """
    config = _with_file(config)
    if config.resize == OWN:
        from blocksight.jobs.plan.own_fitting import own_fitting

        fitting = own_fitting(config)
    elif config.interpolation is None:
        return config
    else:
        fitting = Fitting.parse(config.resize)
    asked = config.interpolation or fitting.interpolation
    resize = str(replace(fitting, interpolation=asked))
    return config.model_copy(update={"resize": resize, "interpolation": None})


def _with_file(config: JobConfig) -> JobConfig:
    if config.weights is None or is_weights_name(config.weights):
        return config
    body = _file_beside(config.weights, config.endpoint_url)
    if body is None:
        return config
    try:
        values = _read(body)
        with_input(config, values)  # also what the command line replaces is checked
    except ConfigError as error:
        raise ConfigError(f"{MODEL_FILE} beside the weights: {error}") from error
    return with_input(config, {name: value for name, value in values.items() if getattr(config, name) is None})


def _file_beside(weights: str, endpoint_url: str | None) -> bytes | None:
    """The file's bytes; None if there is none, or if the store does not show it."""
    store, _ = open_file(weights, endpoint_url)
    try:
        return store.read(MODEL_FILE, length=MAX_MODEL_FILE_BYTES + 1)
    except MissingError:
        return None
    except UnavailableError:
        raise
    except StoreError:
        return None  # S3 refuses to say that an object is missing to those who may not list


def _read(body: bytes) -> Mapping[str, Any]:
    if len(body) > MAX_MODEL_FILE_BYTES:
        raise ConfigError(f"it is larger than {MAX_MODEL_FILE_BYTES:,} bytes")
    try:
        return tomllib.loads(body.decode())
    except (ValueError, RecursionError) as error:  # errors of TOML and of Unicode are kinds of ValueError
        raise ConfigError(f"it cannot be read: {error}") from error


def input_text(job: JobConfig, identity: Mapping[str, Any]) -> str:
    """How a plan says that the model is fed, and who says so; `job` is what was asked for."""
    parts = []
    for name in MODEL_INPUT:
        value = identity.get(name)
        if value is not None:
            source = "as asked" if getattr(job, name) is not None else f"{MODEL_FILE} says so"
            parts.append(f"{name.replace('_', ' ')} {_shown(name, value)} ({source})")
    own = "the rest as its own configuration says" if parts else "as its own configuration says"
    return ", ".join(parts if len(parts) == len(MODEL_INPUT) else [*parts, own])


def fed_text(input_size: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None) -> str:
    """How a model was fed: `32 x 32 pixels, mean 0.5 0.5 0.5, std 0.25 0.25 0.25`."""
    values = [("mean", mean), ("std", std)]
    known = [f"{name} {_shown(name, value)}" for name, value in values if value is not None]
    return ", ".join([f"{_shown('input_size', input_size)} pixels", *known])


def _shown(name: str, value: Any) -> str:
    """`64 x 64`, `0.5 0.5 0.5`, or the number of names."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return str(value)
    if name == "class_names":
        return f"for {counted(len(value), 'class')}"
    return (" x " if name == "input_size" else " ").join(f"{number:g}" for number in value)
