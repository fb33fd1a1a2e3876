"""Writes the maps of an output as arrays, NumPy's or Zarr's, with an index that says which map is where."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blocksight.jobs.export.array_file import ArrayFile
from blocksight.jobs.export.records import COLUMNS
from blocksight.jobs.export.selection import Selection
from blocksight.jobs.ledger.output import fragment_of, map_of, negative_map_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.text import counted
from blocksight.storage.outputs.schema import OK, SCHEMA
from blocksight.storage.parquet.rows import table_of_rows
from blocksight.storage.stores.store import ObjectStore

INDEX = "index.parquet"
MAPS_PER_FILE = 1_024
"""Maps of one NumPy file: 205 MB at 224 x 224 pixels."""
MAPS_PER_CHUNK = 16
ROWS_AT_ONCE = 64
MAPS, NEGATIVE = "maps", "maps_negative"
"""Names of the arrays: the maps, and of a signed output what speaks against their targets, in the same rows."""
KEPT = [name for name in COLUMNS if name not in ("map", "map_negative", "map_codec", "map_height", "map_width")]
PLACE = [pa.field("file", pa.string()), pa.field("row", pa.int64())]

Map = NDArray[np.float32]
Update = Callable[[int], None]


class Sink(ABC):
    """Takes maps one by one."""

    def __init__(self, folder: Path, array: str = MAPS) -> None:
        """`array` names what is written."""
        self.folder, self.array_name, self.count = folder, array, 0

    def append(self, saliency_hw: Map) -> tuple[str, int]:
        """Writes one map and returns its file, below the folder, and its row there."""
        place = self._write(saliency_hw)
        self.count += 1
        return place

    @abstractmethod
    def _write(self, saliency_hw: Map) -> tuple[str, int]: ...

    @abstractmethod
    def close(self) -> None:
        """Writes what is left."""

    @property
    @abstractmethod
    def lines(self) -> list[str]:
        """Lines of Python that read the maps."""


class NumpySink(Sink):
    """Files of `MAPS_PER_FILE` maps [n, H, W], float32 in [0, 1]."""

    file: ArrayFile | None = None

    def _write(self, saliency_hw: Map) -> tuple[str, int]:
        number, row = divmod(self.count, MAPS_PER_FILE)
        name = f"{self.array_name}-{number:05d}.npy"
        if self.file is None or row == 0:
            self.close()
            self.file = ArrayFile(self.folder / name, saliency_hw.shape, np.float32)
        self.file.append(saliency_hw)
        return name, row

    def close(self) -> None:
        if self.file is not None:
            self.file.__exit__()

    @property
    def lines(self) -> list[str]:
        return [
            "import numpy as np, pandas as pd",
            f"folder = {str(self.folder)!r}; index = pd.read_parquet(f'{{folder}}/{INDEX}')",
            "maps = np.load(f'{folder}/maps-00000.npy', mmap_mode='r')  # [n, H, W] in 0..1; index.file and index.row",
        ]


class ZarrSink(Sink):
    """One Zarr array [N, H, W], float32 in [0, 1], compressed in chunks of `MAPS_PER_CHUNK` maps."""

    def __init__(self, folder: Path, array: str = MAPS) -> None:
        super().__init__(folder, array)
        self.name = f"{array}.zarr"
        self.waiting: list[Map] = []
        self.array: Any = None

    def _write(self, saliency_hw: Map) -> tuple[str, int]:
        self.waiting.append(saliency_hw)
        if len(self.waiting) == MAPS_PER_CHUNK:
            self._flush()
        return self.name, self.count

    def _flush(self) -> None:
        import zarr

        block = np.stack(self.waiting)
        if self.array is None:
            size = block.shape[1:]
            self.array = zarr.create_array(
                str(self.folder / self.name), shape=(0, *size), chunks=(MAPS_PER_CHUNK, *size), dtype="float32"
            )
        self.array.append(block)
        self.waiting = []

    def close(self) -> None:
        if self.waiting:
            self._flush()

    @property
    def lines(self) -> list[str]:
        return [
            "import pandas as pd, zarr",
            f"folder = {str(self.folder)!r}; index = pd.read_parquet(f'{{folder}}/{INDEX}')",
            "maps = zarr.open_array(f'{folder}/maps.zarr', mode='r')  # [N, H, W] in 0..1; index.row says which",
        ]


def sink_of(form: str) -> type[NumpySink | ZarrSink]:
    """What writes the format. Raises ConfigError if its package is not installed."""
    if form == "numpy":
        return NumpySink
    if find_spec("zarr") is None:
        raise ConfigError("zarr cannot be imported: pip install '.[export]', or take numpy, which needs no package")
    return ZarrSink


def write(
    store: ObjectStore,
    plan: Plan,
    make: Callable[[Path, str], Sink],
    folder: Path,
    selection: Selection,
    limit: int | None,
    update: Update,
) -> list[str]:
    """Writes the maps and the index, fragment by fragment, and returns lines for the user; `make` makes a sink.

    The index has the rows of the output in their order, without side products: of a rejected record `file` is null.
    With a selection or a limit it has the rows of what is taken alone. Raises ConfigError if there is no map,
    StoreError, and UnreconciledError for damage.
    """
    schema = pa.schema([*PLACE, *(SCHEMA.field(name) for name in KEPT)])
    sink = make(folder, MAPS)
    negative = make(folder, NEGATIVE) if plan.identity.get("signed") else None
    records = num_rejected = 0
    with pq.ParquetWriter(folder / INDEX, schema, compression="zstd") as index:
        for rows in _batches(store, plan, update):
            taken = []
            for record in _records(rows):
                own = [row for row in record if row["status"] != OK or selection.takes(row)]
                has_map = any(row["status"] == OK for row in own)
                if limit is not None and records >= limit:
                    break
                if has_map or (own and selection.maps is None):
                    records += has_map
                    num_rejected += not has_map
                    taken += [_placed(row, sink, negative) for row in own]
            if taken:
                index.write_table(table_of_rows(taken, schema))
            if limit is not None and records >= limit:
                break
    for one in filter(None, (sink, negative)):
        one.close()
    if not sink.count:
        raise ConfigError(
            f"nothing of {store.uri} can be exported: it has no map, and {counted(num_rejected, 'rejected record')}"
        )
    told = f"{counted(sink.count, 'map')} of {counted(records, 'record')} exported; {num_rejected:,} rejected"
    also = (
        []
        if negative is None
        else [f"# {NEGATIVE}: what speaks against each target, in files and rows of the same numbers"]
    )
    return [told, *sink.lines, *also]


def _batches(store: ObjectStore, plan: Plan, update: Update) -> Iterator[list[dict[str, Any]]]:
    """The rows of each fragment, in the plan's order."""
    committed = {info.key for info in store.list("data/")}
    for unit in plan.units:
        if unit.fragment_key in committed:
            yield fragment_of(store, unit.fragment_key, COLUMNS).to_pylist()
            update(unit.num_records)


def _records(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for _, own in groupby(rows, itemgetter("shard", "shard_index")):
        yield list(own)


def _placed(row: Mapping[str, Any], sink: Sink, negative: Sink | None) -> dict[str, Any]:
    file, number = (None, None) if row["status"] != OK else sink.append(map_of(row))
    if row["status"] == OK and negative is not None:
        negative.append(negative_map_of(row))
    return {"file": file, "row": number, **{name: row[name] for name in KEPT}}
