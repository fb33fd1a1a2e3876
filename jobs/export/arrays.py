"""Writes the maps of an output as arrays, NumPy's or Zarr's, with an index that says which map is where."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from typing_extensions import override

from blocksight.jobs.export.array_file import ArrayFile
from blocksight.jobs.export.parts import Account, Form, Part, PartFacts
from blocksight.jobs.export.records import COLUMNS, ExplainedRecords
from blocksight.jobs.ledger.output import fragment_of, map_of, negative_map_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.plan.text import counted
from blocksight.storage.outputs.fragments import read_rows
from blocksight.storage.outputs.schema import OK, SCHEMA
from blocksight.storage.parquet.rows import table_of_rows

INDEX = "index.parquet"
MAPS_PER_FILE = 1_024
"""Maps of one NumPy file: 205 MB at 224 x 224 pixels."""
MAPS_PER_CHUNK = 16
ROWS_AT_ONCE = 64
MAPS, NEGATIVE = "maps", "maps_negative"
"""Names of the arrays: the maps, and of a signed output what speaks against their targets, in the same rows."""
KEPT = [name for name in COLUMNS if name not in ("map", "map_negative", "map_codec", "map_height", "map_width")]
PLACE = [pa.field("file", pa.string()), pa.field("row", pa.int64())]

STORED = pa.schema([SCHEMA.field(name) for name in KEPT])

Map = NDArray[np.float32]


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


@dataclass(frozen=True)
class Arrays(Form):
    """The maps as arrays, and an index of the output's rows in their order, without side products.

    Of a rejected record `file` is null. With a selection or a limit the index has the rows of what is taken alone.
    """

    sink: type[NumpySink | ZarrSink]
    is_signed: bool

    def write_part(self, reader: ExplainedRecords, unit: Unit, folder: Path) -> PartFacts:
        """Writes the unit's maps as plain arrays, and the rows of the index. Raises UnreconciledError for damage."""
        taken, facts = list[dict[str, Any]](), PartFacts(records=[], num_rejected=0, num_gone=0)
        num_maps = 0
        for record in _records(fragment_of(reader.store, unit.fragment_key, COLUMNS).to_pylist()):
            own = [row for row in record if row["status"] != OK or reader.selection.takes(row)]
            maps = sum(row["status"] == OK for row in own)
            if maps or (own and reader.selection.maps is None):
                taken += own
                facts["num_rejected"] += not maps
                num_maps += maps
                if maps:
                    facts["records"].append((num_maps, facts["num_rejected"], 0))
            if len(facts["records"]) == reader.limit:
                break
        rows = [{name: row[name] for name in KEPT} for row in taken]
        pq.write_table(table_of_rows(rows, STORED), folder / INDEX, compression="zstd")
        _write_maps(folder / f"{MAPS}.npy", (map_of(row) for row in taken if row["status"] == OK))
        if self.is_signed:
            _write_maps(folder / f"{NEGATIVE}.npy", (negative_map_of(row) for row in taken if row["status"] == OK))
        return facts

    @override
    def told(self, account: Account) -> str:
        if not account.num_maps:
            return f"it has no map, and {counted(account.num_rejected, 'rejected record')}"
        maps, records = counted(account.num_maps, "map"), counted(account.num_records, "record")
        return f"{maps} of {records} exported; {account.num_rejected:,} rejected"

    @override
    def join(self, parts: Iterator[Part], reader: ExplainedRecords, folder: Path) -> Sequence[str]:
        """Writes the maps and the index, and returns the lines of Python that read them."""
        sink = self.sink(folder, MAPS)
        negative = self.sink(folder, NEGATIVE) if self.is_signed else None
        schema = pa.schema([*PLACE, *STORED])
        with pq.ParquetWriter(folder / INDEX, schema, compression="zstd") as index:
            for part in parts:
                maps = iter(_read_maps(part, MAPS))
                against = iter(_read_maps(part, NEGATIVE) if self.is_signed else ())
                rows = list(_placed(part, maps, against, sink, negative))
                if rows:
                    index.write_table(table_of_rows(rows, schema))
        for one in filter(None, (sink, negative)):
            one.close()
        also = f"# {NEGATIVE}: what speaks against each target, in files and rows of the same numbers"
        return [*sink.lines, *([also] if self.is_signed else [])]


def _write_maps(file: Path, maps: Iterator[Map]) -> None:
    first = next(maps, None)
    if first is not None:
        with ArrayFile(file, first.shape, np.float32) as made:
            for one in chain([first], maps):
                made.append(one)


def _read_maps(part: Part, name: str) -> Iterable[Map]:
    return np.load(part.folder / f"{name}.npy", mmap_mode="r") if part.num_maps else ()


def _placed(
    part: Part,
    maps: Iterator[Map],
    against: Iterator[Map],
    sink: Sink,
    negative: Sink | None,
) -> Iterator[dict[str, Any]]:
    """The part's rows, up to the last record that the limit leaves, with the places that the sink gives their maps."""
    num_records = 0
    for record in _records(read_rows((part.folder / INDEX).read_bytes(), STORED, str(part.folder)).to_pylist()):
        if part.ends and num_records == part.num_records:
            return
        num_records += record[0]["status"] == OK
        for row in record:
            file, number = (None, None) if row["status"] != OK else sink.append(next(maps))
            if row["status"] == OK and negative is not None:
                negative.append(next(against))
            yield {"file": file, "row": number, **row}


def _records(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for _, own in groupby(rows, itemgetter("shard", "shard_index")):
        yield list(own)
