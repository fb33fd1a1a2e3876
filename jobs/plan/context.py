"""What a worker needs beside its unit: a plain value, sent once, from which each step builds its tools."""

import hashlib
import os
import sys
from dataclasses import dataclass

from blocksight.jobs.plan.config import JobConfig, is_weights_name
from blocksight.jobs.plan.records import ModelFacts
from blocksight.storage.stores.opening import open_file


@dataclass(frozen=True)
class JobContext:
    """One job as every worker sees it; holds no credential and no open connection."""

    config: JobConfig
    fingerprint: str
    run_id: str
    """Of this run: workers look there for the sign to stop."""
    facts: ModelFacts
    label_names: tuple[str, ...]
    """Class folders of loose images, sorted."""
    batch_size: int | None
    """Masked inputs per forward pass that the user asked for."""
    is_timed: bool
    """Timings may choose the forward setting: in long jobs on a GPU, and where the user says so."""
    num_threads: int
    """Of the explain step, so that CPU results have the same bits everywhere."""
    device: str
    import_path: str
    """The driver's working folder, where a model factory of the user's may lie."""
    rare_labels: frozenset[str] = frozenset()
    """Class folders with few of the planned records; empty for other layouts, whose labels no plan counts."""
    witnesses: tuple[str, ...] = ()
    """Keys of a few input objects: whether they can be read tells one object's trouble from the store's."""


def weights_bytes(config: JobConfig) -> bytes | None:
    """The bytes of the weights file; None where `weights` is a name or not given. Raises StoreError."""
    if config.weights is None or is_weights_name(config.weights):
        return None
    store, name = open_file(config.weights, config.endpoint_url)
    return store.read(name)


def sha256_of(data: bytes | None) -> str | None:
    """Hex digest, or None for None."""
    return hashlib.sha256(data).hexdigest() if data is not None else None


def let_import_from(folder: str) -> None:
    """Lets a model factory be imported from the folder, behind everything that is installed."""
    if folder not in sys.path:
        sys.path.append(folder)


def worker_name() -> str:
    """Host and process, for receipts."""
    return f"{os.uname().nodename}:{os.getpid()}"
