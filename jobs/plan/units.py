"""Cuts an input into units: by records for loose images, by rows for tables, by bytes for tar shards."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeVar

from blocksight.cluster.sizing import LEAST_UNIT_SECONDS, shrinking_sizes, unit_records
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.estimate import ROW_BYTES, SIDE, MeasuredRate, estimate
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.plan.text import counted
from blocksight.storage.inputs.survey import Layout, Survey
from blocksight.storage.inputs.tables import TableFacts, table_facts
from blocksight.storage.inputs.tars import TarSample, sample_tar, tar_offset_after
from blocksight.storage.stores.store import (
    DamagedError,
    ObjectInfo,
    ObjectStore,
    StoreError,
    UnavailableError,
    checked_key,
)

WHOLE_SHARD = 2**63 - 1
"""The end of a unit that takes all records of its shard."""

SAMPLED_SHARDS = 8
"""Tar shards that are sampled before the number of records is guessed."""
GUESSED_RECORD_BYTES = 100_000
"""Bytes per record of a tar shard, if no sample can be read."""

UNIT_ID = re.compile("[0-9a-f]{20}")

READERS = 32
"""Shards that are looked at together: each look is a request or two, which wait for the store."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Piece:
    """A unit before it has its ordinal and id."""

    objects: Sequence[ObjectInfo]
    start: int
    stop: int
    num_records: int
    """0 if the shard cannot be read."""
    trouble: str | None = None
    """Why the shard cannot be read."""
    unread: tuple[str, ...] = ()
    """Columns of a table whose type is never read, with the type."""
    number_names: tuple[str, ...] = ()
    """What a table calls the numbers of its labels."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Sentences on what of a shard was joined, split or left out, by kind."""


@dataclass(frozen=True)
class Workforce:
    """The workers that a plan expects; they decide the units' sizes only."""

    num_workers: int
    on_gpu: bool
    rate: MeasuredRate | None = None
    """Of one worker; None: not measured, so that constants decide."""
    input_size: tuple[int, int] | None = None
    """Height and width of the model's input; None: the model is not loaded yet."""

    @property
    def device(self) -> str:
        """`cuda` or `cpu`, as torch calls it."""
        return "cuda" if self.on_gpu else "cpu"


Shards = Sequence[TableFacts | StoreError] | Sequence[Piece]
"""What was read of each table, or a whole piece of each tar shard that is used; empty for loose images."""


def read_shards(source: ObjectStore, found: Survey, config: JobConfig) -> Shards:
    """What must be read of the shards of an input before it is cut.

    Raises StoreError if no shard can be read, and UnavailableError if the store does not answer.
    """
    if found.layout is Layout.IMAGES:
        return ()
    if found.layout is Layout.PARQUET:
        tables = _where_readable(found.objects, lambda info: table_facts(source, info))
        _refuse_unreadable(tables)
        return tables
    if config.limit is None:
        return _guessed_shards(source, found.objects)
    return _limited_shards(source, found.objects, config.limit)


def pieces(found: Survey, shards: Shards, config: JobConfig, workforce: Workforce) -> Iterator[Piece]:
    """The pieces of an input, in order; reads nothing. A shard that cannot be read is one piece with 0 records."""
    if found.layout is Layout.IMAGES:
        return _image_pieces(found.objects[: config.limit], config, workforce)
    if found.layout is Layout.PARQUET:
        tables = [one for one in shards if not isinstance(one, Piece)]
        return _table_pieces(found.objects, tables, config, workforce)
    return _tar_pieces([one for one in shards if isinstance(one, Piece)], config, workforce)


def seconds_per_record(config: JobConfig, num_records: int, workforce: Workforce) -> float:
    """Of one worker: measured, else by constants."""
    guess = estimate(config, num_records, on_gpu=workforce.on_gpu)
    return guess.seconds_per_record if workforce.rate is None else workforce.rate.seconds_per_record


def _sizes(config: JobConfig, num_records: int, workforce: Workforce) -> tuple[int, int]:
    """Records of a full unit, and of the smallest unit that is worth its overhead."""
    guess = estimate(config, num_records, on_gpu=workforce.on_gpu)
    seconds = seconds_per_record(config, num_records, workforce)
    height, width = workforce.input_size or config.input_size or (SIDE, SIDE)
    rows = ROW_BYTES * config.target_choice.most_targets
    num_bytes = rows + (guess.bytes_per_record - rows) * max(1.0, height * width / SIDE**2)  # a larger map takes more
    full = unit_records(seconds, num_bytes, num_records, workforce.num_workers, 3 * height * width)
    return full, min(full, max(1, round(LEAST_UNIT_SECONDS / seconds)))


def _image_pieces(objects: Sequence[ObjectInfo], config: JobConfig, workforce: Workforce) -> Iterator[Piece]:
    full, floor = _sizes(config, len(objects), workforce)
    start = 0
    for size in shrinking_sizes(len(objects), full, floor, workforce.num_workers):
        chosen = objects[start : start + size]
        yield Piece(chosen, 0, len(chosen), len(chosen))
        start += size


def _table_pieces(
    objects: Sequence[ObjectInfo], tables: Sequence[TableFacts | StoreError], config: JobConfig, workforce: Workforce
) -> Iterator[Piece]:
    left = WHOLE_SHARD if config.limit is None else config.limit
    num_rows = sum(table.num_rows for table in tables if isinstance(table, TableFacts))
    full, _ = _sizes(config, min(num_rows, left), workforce)
    for info, table in zip(objects, tables, strict=True):
        if left <= 0:
            return
        if isinstance(table, StoreError):
            yield Piece((info,), 0, WHOLE_SHARD if config.limit is None else left, 0, str(table))
            continue
        notes = {} if table.note is None else {"columns": table.note}
        used = min(table.num_rows, left)
        left -= used
        for start in range(0, used, full):
            stop = min(start + full, used)
            yield Piece(
                (info,), start, stop, stop - start, unread=table.unread, number_names=table.number_names, notes=notes
            )


def _where_readable(objects: Sequence[ObjectInfo], look: Callable[[ObjectInfo], Found]) -> list[Found | StoreError]:
    """The result or the StoreError of `look` for each shard, several at a time. Raises UnavailableError."""

    def found_of(info: ObjectInfo) -> Found | StoreError:
        try:
            return look(info)
        except UnavailableError:
            raise
        except StoreError as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(found_of, objects))  # the first error that is raised cancels what has not begun


def _refuse_unreadable(found: Sequence[object]) -> None:
    """Raises the first StoreError if no shard can be read."""
    first = found[0]
    if isinstance(first, StoreError) and all(isinstance(one, StoreError) for one in found):
        raise first


def _tar_pieces(shards: Sequence[Piece], config: JobConfig, workforce: Workforce) -> Iterator[Piece]:
    """Byte ranges of the shards: a reader takes the records that begin in its range."""
    full, _ = _sizes(config, sum(shard.num_records for shard in shards), workforce)
    for shard in shards:
        count, stop = shard.num_records, shard.stop
        parts = max(1, round(count / full))
        edges = [round(stop * part / parts) for part in range(parts + 1)]
        shares = [count * (part + 1) // parts - count * part // parts for part in range(parts)]
        for start, end, share in zip(edges, edges[1:], shares, strict=False):
            yield Piece(shard.objects, start, end, share, shard.trouble, notes=shard.notes)


def _guessed_shards(source: ObjectStore, objects: Sequence[ObjectInfo]) -> list[Piece]:
    """The whole shards; the first one that can be sampled gives the records per byte of all."""
    samples = _where_readable(objects[:SAMPLED_SHARDS], lambda info: sample_tar(source, info))
    if len(samples) == len(objects):
        _refuse_unreadable(samples)
    sampled = [*zip(objects, samples, strict=False)]
    per_byte = next(
        (one.num_records / info.size for info, one in sampled if isinstance(one, TarSample) and one.num_records),
        1 / GUESSED_RECORD_BYTES,
    )
    return [_guessed_shard(info, sample, per_byte) for info, sample in zip_longest(objects, samples)]


def _guessed_shard(info: ObjectInfo, sample: TarSample | StoreError | None, per_byte: float) -> Piece:
    if isinstance(sample, DamagedError):
        return Piece((info,), 0, info.size, 0, str(sample))
    trouble = str(sample) if isinstance(sample, StoreError) else None
    notes = sample.notes if isinstance(sample, TarSample) else {}
    return Piece((info,), 0, info.size, max(1, round(info.size * per_byte)), trouble, notes=notes)


def _limited_shards(source: ObjectStore, objects: Sequence[ObjectInfo], limit: int) -> list[Piece]:
    """The shards up to `limit` records, each with its used bytes and its counted records."""
    left, found = limit, []
    for info in objects:
        if left <= 0:
            break
        found.append(_limited_shard(source, info, left, is_sampled=len(found) < SAMPLED_SHARDS))
        left -= found[-1].num_records
    return found


def _limited_shard(source: ObjectStore, info: ObjectInfo, limit: int, *, is_sampled: bool) -> Piece:
    try:
        stop, count = tar_offset_after(source, info, limit)
        notes = sample_tar(source, info).notes if is_sampled else {}
    except UnavailableError:
        raise
    except StoreError as error:
        return Piece((info,), 0, info.size, 0, str(error))
    return Piece((info,), 0, stop, count, notes=notes)


def check_units(units: Sequence[Unit], layout: Layout) -> None:
    """Raises ValueError if units that were read back are not valid units of a plan."""
    for place, unit in enumerate(units):
        fault = _fault(unit, place, layout)
        if fault is not None:
            raise ValueError(f"unit {place}: {fault}")
    if len({unit.unit_id for unit in units}) < len(units):
        raise ValueError("two units have the same id")


def _fault(unit: Unit, place: int, layout: Layout) -> str | None:
    """The fault of one unit, if any: its id becomes part of keys, and its objects are read."""
    if None in (unit.ordinal, unit.unit_id, unit.start, unit.stop, unit.num_records):
        return "a value is missing"
    if unit.ordinal != place:
        return f"its place is given as {unit.ordinal}"
    if not UNIT_ID.fullmatch(unit.unit_id):
        return "its id is not 20 hex digits"
    if unit.layout != layout:
        return f"it holds {unit.layout}, and the plan {layout}"
    if not 0 <= unit.start <= unit.stop or unit.num_records < 0:
        return f"{counted(unit.num_records, 'record')} from {unit.start} to {unit.stop} are no range"
    count = len(unit.objects)
    if layout is Layout.IMAGES and not (unit.start == 0 < count == unit.stop == unit.num_records):
        return (
            f"{counted(unit.num_records, 'image')} from {unit.start} to {unit.stop} are no {counted(count, 'object')}"
        )
    if layout is not Layout.IMAGES and count != 1:
        return f"{counted(count, 'shard')}, wanted one"
    return next((fault for info in unit.objects if (fault := _object_fault(info)) is not None), None)


def _object_fault(info: ObjectInfo) -> str | None:
    if None in (info.key, info.size, info.etag):
        return "an object lacks its key, size or version"
    try:
        checked_key(info.key)
    except StoreError as error:
        return str(error)
    return None if info.size >= 0 else f"an object of {info.size} bytes"
