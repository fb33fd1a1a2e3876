"""An evaluation: metrics of stored maps; its settings, its folder and its fragments."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blocksight.engine.catalog.entries import METRICS
from blocksight.jobs.ledger.output import values_in
from blocksight.jobs.plan.class_map import ClassMap, class_map_file, class_map_of
from blocksight.jobs.plan.config import CODE_VERSION, ConfigError, digest_of
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Unit
from blocksight.storage.inputs.ground_truth import Truth, region
from blocksight.storage.outputs.schema import MAX_ERROR_LENGTH
from blocksight.storage.stores.retrying import is_probe
from blocksight.storage.stores.store import AlreadyExistsError, ObjectStore, StoreError

FOLDER = "evaluations/"
NEEDS_TRUTH = ("ebpg", "miou", "bbox", "pointing")
"""Metrics that need ground truth."""
"""The beginning of a metric's cost in the catalogue, if it runs the model."""
NEVER_IN_ALL = ("sanity",)
"""Metrics that explain each record several times: not part of `all`."""


@dataclass(frozen=True)
class Evaluation:
    """Which metrics are measured of which maps; every field changes the result."""

    metrics: tuple[str, ...]
    """Sorted names."""
    share: float
    """Of the records, chosen by a hash of seed and key."""
    controls: bool
    """The controls' maps are measured too."""
    seed: int
    baseline: str = "zero"
    """Replaces a removed pixel; the same for all methods, so that their values can be compared."""
    class_map: ClassMap = ()
    truth_digest: str | None = None

    def identity(self, plan: Plan) -> dict[str, Any]:
        """Plain JSON values that identify this evaluation of this job."""
        return {
            "job": plan.fingerprint,
            "metrics": list(self.metrics),
            "share": self.share,
            "controls": self.controls,
            "seed": self.seed,
            "baseline": self.baseline,
            "class_map": {label: list(classes) for label, classes in self.class_map},
            "truth": self.truth_digest,
            "code": CODE_VERSION,
        }

    def folder(self, plan: Plan) -> str:
        """Its folder below the output's root."""
        return f"{FOLDER}{digest_of(self.identity(plan))[:16]}/"

    def includes(self, key: str) -> bool:
        """True if the record belongs to the share."""
        number = int.from_bytes(hashlib.sha256(f"{self.seed}/{key}".encode()).digest()[:8], "big")
        return number < self.share * 2**64


def forwards_per_map(metrics: Iterable[str]) -> int:
    """Forward passes for one map; those that metrics share count once."""
    return sum({METRICS[name].evaluation or name: METRICS[name].forwards for name in metrics}.values())


def labels_of(class_map: ClassMap, target_index: int, target_name: str) -> set[str]:
    """The ground truth's labels of the target class."""
    if not class_map:
        return {target_name, *target_name.split(", "), str(target_index)}
    return {label for label, classes in class_map if target_index in classes}


def region_of(
    truth: Truth | None,
    key: str,
    labels: set[str],
    original: tuple[int, int],
    resize: str,
    input_size: tuple[int, int],
) -> NDArray[np.bool_] | str | None:
    """The mask [H, W] of a record's objects of these labels in the model's input, or why its annotation is unusable.

    None if there is no annotation. `original` is the image's height and width, `resize` how it was fitted to the input.
    """
    try:
        image = truth.find(key) if truth is not None else None
        return image and region(image, labels, original, input_size, resize)
    except StoreError as error:  # only this record's annotation is affected
        return str(error)[:MAX_ERROR_LENGTH]


def chosen_metrics(text: str, *, has_truth: bool) -> tuple[str, ...]:
    """Metric names joined by commas, or `all`: every metric whose inputs are given. Raises ConfigError."""
    if text == "all":
        return tuple(
            sorted(name for name in METRICS if name not in NEVER_IN_ALL and (has_truth or name not in NEEDS_TRUTH))
        )
    names = sorted({name.strip() for name in text.split(",") if name.strip()})
    for name in names:
        if name not in METRICS:
            near = get_close_matches(name, METRICS, n=1, cutoff=0.5)
            raise ConfigError(f"metric {name!r} is not known; known: {', '.join(near or METRICS)}")
        if name in NEEDS_TRUTH and not has_truth:
            raise ConfigError(f"metric {name} needs --truth: the objects' places (VOC XML, COCO JSON or Parquet)")
    if not names:
        raise ConfigError("--metrics names none; see `blocksight list metrics`")
    return tuple(names)


def read_class_map(file: Path | None) -> ClassMap:
    """The class map of a JSON file, empty for None. Raises ConfigError."""
    try:
        return () if file is None else class_map_of(class_map_file(file), f"the class map {file}")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fragment_key(folder: str, unit: Unit) -> str:
    """The key of a unit's values below the output's root."""
    return f"{folder}{unit.fragment_key}"


def ensure_evaluation(store: ObjectStore, plan: Plan, evaluation: Evaluation) -> str:
    """Writes the evaluation's settings once and returns its folder."""
    folder = evaluation.folder(plan)
    with suppress(AlreadyExistsError):
        store.create(f"{folder}evaluation.json", json.dumps(evaluation.identity(plan), indent=1).encode())
    return folder


def open_units(store: ObjectStore, plan: Plan, folder: str) -> list[Unit]:
    """The committed units of the job that have no values yet."""
    explained = {info.key for info in store.list("data/")}
    measured = {info.key for info in store.list(folder)}
    return [
        unit for unit in plan.units if unit.fragment_key in explained and fragment_key(folder, unit) not in measured
    ]


def evaluation_folders(store: ObjectStore) -> list[str]:
    """The folders of an output's evaluations."""
    return sorted({"/".join(info.key.split("/")[:2]) + "/" for info in store.list(FOLDER)})


def value_tables(store: ObjectStore, folder: str) -> Iterator[pa.Table]:
    """The rows of an evaluation, one table per fragment, in order.

    Raises StoreError, and UnreconciledError if a fragment is damaged.
    """
    for info in sorted(store.list(f"{folder}data/"), key=lambda info: info.key.rpartition("/")[2]):
        if not is_probe(info.key):
            yield values_in(store, info.key)


@dataclass(frozen=True)
class EvaluationContext:
    """What a worker needs besides its unit."""

    job: JobContext
    """The job that made the maps."""
    evaluation: Evaluation
    folder: str
    truth: Truth | None


def ground_truth_protocol(evaluation: Evaluation, job: JobContext) -> Mapping[str, Any]:
    """The ground truth's part of the localisation metrics' protocol."""
    return {
        "truth": evaluation.truth_digest,
        "class_map": digest_of(dict(evaluation.class_map))[:16],
        "input": list(job.facts.input_size),
        "resize": job.config.resize,
    }
