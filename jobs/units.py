"""Cuts an input into units: by records for loose images, by rows for tables, by bytes for tar shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from cluster.sizing import LEAST_UNIT_SECONDS, shrinking, unit_records
from jobs.config import JobConfig
from jobs.estimate import estimate
from storage.store import ObjectInfo, ObjectStore
from storage.survey import Layout, Survey
from storage.tables import count_rows
from storage.tars import sample_tar, tar_offset_after

SAMPLED_SHARDS = 8
"""Tar shards that are tried before the number of records is left open."""


@dataclass(frozen=True)
class Piece:
    """A unit before it has its place and its name."""

    objects: tuple[ObjectInfo, ...]
    start: int
    stop: int
    num_records: int


@dataclass(frozen=True)
class Workforce:
    """What a plan expects to run on; it shapes the units' sizes alone."""

    num_workers: int
    on_gpu: bool


def pieces(source: ObjectStore, found: Survey, config: JobConfig, workforce: Workforce) -> Iterator[Piece]:
    """The units of an input in order, before they have their names. Raises StoreError for an unreadable table."""
    if found.layout is Layout.IMAGES:
        return _image_pieces(found.objects[: config.limit], config, workforce)
    if found.layout is Layout.PARQUET:
        return _table_pieces(source, found.objects, config, workforce)
    return _tar_pieces(source, found.objects, config, workforce)


def _sizes(config: JobConfig, num_records: int, workforce: Workforce) -> tuple[int, int]:
    """Records of a full unit, and of the smallest one that is still worth its overhead."""
    guess = estimate(config, num_records, on_gpu=workforce.on_gpu)
    seconds = guess.seconds_per_record
    full = unit_records(seconds, guess.bytes_per_record, num_records, workforce.num_workers)
    return full, min(full, max(1, round(LEAST_UNIT_SECONDS / seconds)))


def _image_pieces(objects: Sequence[ObjectInfo], config: JobConfig, workforce: Workforce) -> Iterator[Piece]:
    full, floor = _sizes(config, len(objects), workforce)
    start = 0
    for size in shrinking(len(objects), full, floor, workforce.num_workers):
        chosen = tuple(objects[start : start + size])
        yield Piece(chosen, 0, len(chosen), len(chosen))
        start += size


def _table_pieces(
    source: ObjectStore, objects: Sequence[ObjectInfo], config: JobConfig, workforce: Workforce
) -> Iterator[Piece]:
    counts = _limited([count_rows(source, info) for info in objects], config.limit)
    full, _ = _sizes(config, sum(counts), workforce)
    for info, count in zip(objects, counts, strict=False):
        for start in range(0, count, full):
            stop = min(start + full, count)
            yield Piece((info,), start, stop, stop - start)


def _limited(counts: Sequence[int], limit: int | None) -> list[int]:
    """The first `limit` of records that lie in shards of these sizes, as sizes."""
    if limit is None:
        return list(counts)
    before = accumulate(counts, initial=0)
    return [max(0, min(count, limit - done)) for count, done in zip(counts, before, strict=False)]


def _tar_pieces(
    source: ObjectStore, objects: Sequence[ObjectInfo], config: JobConfig, workforce: Workforce
) -> Iterator[Piece]:
    """Byte ranges of the shards: a reader takes the records that begin in its range."""
    shards = list(_tar_shards(source, objects, config.limit))
    full, _ = _sizes(config, sum(count for _, _, count in shards), workforce)
    for info, stop, count in shards:
        parts = max(1, round(count / full))
        edges = [round(stop * part / parts) for part in range(parts + 1)]
        shares = [count * (part + 1) // parts - count * part // parts for part in range(parts)]
        for start, end, share in zip(edges, edges[1:], shares, strict=False):
            yield Piece((info,), start, end, share)


def _tar_shards(
    source: ObjectStore, objects: Sequence[ObjectInfo], limit: int | None
) -> Iterator[tuple[ObjectInfo, int, int]]:
    """Shard, end of its used bytes, number of records: counted under a limit, else guessed from the first."""
    if limit is None:
        per_byte = _records_per_byte(source, objects)
        yield from ((info, info.size, max(1, round(info.size * per_byte))) for info in objects)
        return
    left = limit
    for info in objects:
        if left <= 0:
            return
        stop, count = tar_offset_after(source, info, left)
        left -= count
        yield info, stop, count


def _records_per_byte(source: ObjectStore, objects: Sequence[ObjectInfo]) -> float:
    """From the first shard that tells; 0 where none of the first few does."""
    sampled = ((sample_tar(source, info), info.size) for info in objects[:SAMPLED_SHARDS])
    return next((count / size for count, size in sampled if count), 0.0)
