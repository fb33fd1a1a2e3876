"""What a worker needs besides its unit: a plain value, sent once."""

import hashlib
import os
import sys
from dataclasses import dataclass

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.catalog.sources import place_of, source_of
from blocksight.jobs.plan.config import JobConfig, is_weights_name
from blocksight.jobs.plan.records import ModelFacts
from blocksight.storage.stores.opening import open_file


@dataclass(frozen=True)
class JobContext:
    """One job as every worker sees it; holds no credential and no open connection."""

    config: JobConfig
    fingerprint: str
    run_id: str
    """Id of this run; names its stop request."""
    facts: ModelFacts
    label_names: tuple[str, ...]
    """Class folders of loose images, sorted."""
    batch_size: int | None
    """Masked inputs per forward pass that the user asked for."""
    num_threads: int
    """Threads of the explain step; fixed, so that CPU results have the same bits everywhere."""
    device: str
    import_path: str
    """The driver's working folder, which may hold the user's model factory."""
    rare_labels: frozenset[str] = frozenset()
    """Class folders with few planned records; empty for layouts without class folders."""
    readout: ReadoutName = "softmax"
    """How scores are read from the model's output."""
    number_names: tuple[str, ...] = ()
    """What a table calls the numbers of its labels."""
    witnesses: tuple[str, ...] = ()
    """Keys of a few input objects: if they can be read, a failure is of one object and not of the store."""


def weights_bytes(config: JobConfig) -> bytes | None:
    """The bytes of the weights file; of a model that is named by its place also its files, packed as one value.

    None if `weights` is a name or not given. Raises StoreError, and ConfigError for a place without a model.
    """
    body = _file_bytes(config)
    source, place = source_of(config.model), place_of(config.model)
    if source is None or place is None:
        return body
    from blocksight.jobs.plan.model_files import packed_model

    return packed_model(source[0], place, config.endpoint_url, body, drawn=config.weights is not None)


def settings_bytes(config: JobConfig) -> bytes | None:
    """The files of a model that is named by its place without its weights, packed; None for another model."""
    source, place = source_of(config.model), place_of(config.model)
    if source is None or place is None:
        return None
    from blocksight.jobs.plan.model_files import packed_model

    return packed_model(source[0], place, config.endpoint_url, None, drawn=True)


def _file_bytes(config: JobConfig) -> bytes | None:
    if config.weights is None or is_weights_name(config.weights):
        return None
    store, name = open_file(config.weights, config.endpoint_url)
    return store.read(name)


def sha256_of(data: bytes | None) -> str | None:
    """Hex digest, or None for None."""
    return hashlib.sha256(data).hexdigest() if data is not None else None


def let_import_from(folder: str) -> None:
    """Adds the folder to the end of `sys.path`, for a model factory."""
    if folder not in sys.path:
        sys.path.append(folder)


def worker_name() -> str:
    """Host and process, for receipts."""
    return f"{os.uname().nodename}:{os.getpid()}"
