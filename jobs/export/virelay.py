"""Writes a ViRelAy project: HDF5 databases of images, maps and the audit's clusters, and a label map."""

import json
import math
import shlex
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.audit.result import GRID
from blocksight.jobs.export.records import ExplainedMap, ExplainedRecord, ExplainedRecords, Row
from blocksight.jobs.ledger.output import map_of, model_facts
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan
from blocksight.storage.images.decode import fit
from blocksight.storage.outputs.pictures import resized

NUM_CELLS = GRID * GRID
NUM_COMPONENTS = 8
"""Components of the embedding; the viewer draws any two of them."""
ROWS_AT_ONCE = 4096
"""Pooled maps in memory at once: 8 MiB."""

CHUNK_NUMBERS = 4096
"""Numbers in a chunk of a database, if a row is not longer: adding a row compresses its chunk again."""

DATASET, ATTRIBUTIONS, ANALYSIS = "dataset.h5", "attributions.h5", "analysis.h5"
LABELS, PROJECT = "label-map.json", "project.yaml"
CLUSTERING, EMBEDDING = "audit", "pca"
NO_ANALYSIS = "it has no analysis: no class has clusters of an audit (`blocksight audit` makes them)"


def check_installed() -> None:
    """Raises ConfigError if h5py is not installed."""
    try:
        import h5py  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError("a ViRelAy project is HDF5, and h5py is not installed: pip install '.[export]'") from error


def write(shown: Iterable[ExplainedRecord], records: ExplainedRecords, folder: Path) -> Sequence[str]:
    """Writes the project and returns the command that opens it. `shown` yields the records with progress.

    ViRelAy has one map per image, so an image with several targets is stored several times.
    """
    import h5py

    facts = model_facts(records.store)
    names, classes = _Names(facts["num_classes"]), _Classes()
    with ExitStack() as files:
        images, maps = (files.enter_context(h5py.File(folder / name, "w")) for name in (DATASET, ATTRIBUTIONS))
        pooled = files.enter_context(TemporaryFile())
        tables = _tables(images, maps, tuple(facts["input_size"]), facts["num_classes"])
        for record in shown:
            fitted = fit(record.pixels, tuple(facts["input_size"]), records.plan.identity["resize"])
            scores = _scores(record, facts["num_classes"])
            for one in record.maps_of_classes:
                classes.add(one, len(tables["index"]))
                pooled.write(_pooled(one))
                _append(tables, fitted, one.row, scores, names)
        has_analysis = bool(classes.members)
        if has_analysis:
            analysis = files.enter_context(h5py.File(folder / ANALYSIS, "w"))
            _write_analysis(analysis, classes, pooled)
    (folder / LABELS).write_text(json.dumps(names.entries(), indent=1) + "\n", encoding="utf-8")
    project = _project(records.plan, facts, has_analysis=has_analysis)
    (folder / PROJECT).write_text(json.dumps(project, indent=1) + "\n", encoding="utf-8")  # JSON is YAML too
    opened = f"virelay {shlex.quote(str(folder / PROJECT))}"
    return [opened] if has_analysis else [NO_ANALYSIS, opened]


class _Names:
    """Collects the names of the classes from the rows."""

    def __init__(self, num_classes: int) -> None:
        self.unknown = num_classes
        """The index of an unknown label, after all classes."""
        self.labels: dict[int, str] = {num_classes: "no known label"}
        self.targets: dict[int, str] = {}

    def add(self, row: Row) -> int:
        """Adds a row's names, and returns the index of its label."""
        self.targets[row["target_index"]] = row["target_name"]
        if row["label"] is None:
            return self.unknown
        self.labels.setdefault(row["label"], row["label_name"])
        return row["label"]

    def entries(self) -> list[Mapping[str, Any]]:
        """The label map. A class's index is its WordNet id too, which finds the categories of an analysis."""
        named = {**self.labels, **self.targets}
        return [{"index": index, "word_net_id": str(index), "name": name} for index, name in sorted(named.items())]


class _Classes:
    """Collects the maps of each class that the audit has clustered."""

    def __init__(self) -> None:
        self.members: dict[int, tuple[array[int], array[int]]] = {}
        """Indices of maps and their clusters, by class."""

    def add(self, one: ExplainedMap, place: int) -> None:
        """Adds the map with the index `place`, if it has a cluster."""
        if one.audited is not None and one.audited["cluster"] is not None and one.audited["pooled"] is not None:
            places, clusters = self.members.setdefault(one.row["target_index"], (array("L"), array("l")))
            places.append(place)
            clusters.append(one.audited["cluster"])


def _pooled(one: ExplainedMap) -> bytes:
    """A map's 256 cells; zeros without an audit, so that every map has a row."""
    pooled = None if one.audited is None else one.audited["pooled"]
    return bytes(NUM_CELLS) if pooled is None else pooled


def _scores(record: ExplainedRecord, num_classes: int) -> NDArray[np.float32]:
    """The model's known scores, [num_classes]: an output holds those of explained classes only.

    ViRelAy needs a number for every class; 0 means unknown, so that the class is no prediction.
    """
    scores = np.zeros(num_classes, np.float32)
    for one in record.maps_of_classes:
        scores[one.row["target_index"]] = one.row["score"]
    return scores


def _tables(images: Any, maps: Any, size: tuple[int, int], num_classes: int) -> Mapping[str, Any]:
    """Makes the databases' empty tables: `data` and `label` of the images; `index` to `prediction` of the maps."""
    return {
        "data": _table(images, "data", (3, *size), np.uint8),
        "label": _table(images, "label", (), np.uint32),
        "index": _table(maps, "index", (), np.uint32),
        "attribution": _table(maps, "attribution", (3, *size), np.float32),
        "target": _table(maps, "label", (), np.uint32),
        "prediction": _table(maps, "prediction", (num_classes,), np.float32),
    }


def _table(file: Any, name: str, shape: tuple[int, ...], kind: type[np.generic]) -> Any:
    """Makes an empty table that is extended row by row."""
    chunk = (max(1, CHUNK_NUMBERS // math.prod(shape)), *shape)
    return file.create_dataset(name, (0, *shape), kind, maxshape=(None, *shape), chunks=chunk, compression="gzip")


def _append(
    tables: Mapping[str, Any], pixels: NDArray[np.uint8], row: Row, scores: NDArray[np.float32], names: _Names
) -> None:
    """Adds an image with its map.

    The viewer sums a map over three colour channels, so each channel gets a third of it.
    """
    place, saliency = len(tables["index"]), resized(map_of(row), pixels.shape[:2])
    values = {
        "data": pixels.transpose(2, 0, 1),
        "label": names.add(row),
        "index": place,
        "attribution": np.stack([saliency / 3] * 3),
        "target": row["target_index"],
        "prediction": scores,
    }
    for name, value in values.items():
        tables[name].resize(place + 1, axis=0)
        tables[name][place] = value


def _write_analysis(analysis: Any, classes: _Classes, pooled: IO[bytes]) -> None:
    """Writes a category per class: indices of its maps, their clusters and their principal components."""
    pooled.flush()
    cells = np.memmap(pooled, np.uint8, "r").reshape(-1, NUM_CELLS)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for target, (places, clusters) in classes.members.items():
        own = np.array(places, np.int64)
        embedding, variances = principal_components(cells, own)
        category = analysis.create_group(str(target))
        category["index"] = own.astype(np.uint32)
        category.create_group("cluster")[CLUSTERING] = np.array(clusters, np.int64)
        category.create_group("embedding")[EMBEDDING] = embedding
        category["embedding"][EMBEDDING].attrs["eigenvalue"] = variances


def principal_components(
    cells: NDArray[np.uint8], places: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The first principal components of the rows at `places`, [n, k], and their variances [k], in falling order.

    Rows are bytes that mean 0 to 1. Signs are such that each component's largest part is positive.
    """
    total, squares = np.zeros(cells.shape[1]), np.zeros((cells.shape[1],) * 2)
    for rows in _in_batches(cells, places):
        total += rows.sum(0)
        squares += rows.T @ rows
    mean = total / len(places)
    variances, axes = np.linalg.eigh(squares / len(places) - np.outer(mean, mean))
    variances, axes = variances[::-1][:NUM_COMPONENTS], axes[:, ::-1][:, :NUM_COMPONENTS]
    axes = axes * np.where(axes.max(0) >= -axes.min(0), 1, -1)
    embedding = np.concatenate([(rows - mean) @ axes for rows in _in_batches(cells, places)])
    return embedding.astype(np.float32), variances.clip(0).astype(np.float32)


def _in_batches(cells: NDArray[np.uint8], places: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(places), ROWS_AT_ONCE):
        yield cells[places[start : start + ROWS_AT_ONCE]] / 255.0


def _project(plan: Plan, facts: Mapping[str, Any], *, has_analysis: bool) -> Mapping[str, Any]:
    height, width = facts["input_size"]
    by_label = plan.identity["target"] == "label"
    project = {
        "name": f"blocksight {plan.fingerprint[:8]}",
        "model": plan.identity["model"],
        "label_map": LABELS,
        "dataset": {
            "name": plan.identity["data"],
            "type": "hdf5",
            "path": DATASET,
            "input_width": width,
            "input_height": height,
            "up_sampling_method": "none",
            "down_sampling_method": "none",
        },
        "attributions": {
            "attribution_method": plan.identity["explainer"],
            "attribution_strategy": "true_label" if by_label else "predicted_label",
            "sources": [ATTRIBUTIONS],
        },
    }
    analyses = [{"analysis_method": "blocksight audit", "sources": [ANALYSIS]}]
    return {"project": {**project, **({"analyses": analyses} if has_analysis else {})}}
