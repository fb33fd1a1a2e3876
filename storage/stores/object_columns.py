"""The objects of a listing in columns: a listing of millions takes some 90 bytes an object, not 300."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from blocksight.storage.stores.store import ObjectInfo

SCHEMA = pa.schema([("key", pa.binary()), ("size", pa.int64()), ("etag", pa.binary())])
"""Text is kept as bytes, for the name of a file may be no UTF-8."""
BATCH_OBJECTS = 4096
"""Objects of a batch: so many are plain objects at once."""
FEW_OBJECTS = 256
TAKEN_OBJECTS = 1 << 14

Thing = TypeVar("Thing")


class _Batches:
    """The columns, which slices share."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self.batches = tuple(batches)
        self.ends = tuple(accumulate(batch.num_rows for batch in self.batches))

    def rows(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows [start, stop), without a copy."""
        for place in range(bisect_right(self.ends, start), len(self.batches)):
            batch, first = self.batches[place], self.ends[place - 1] if place else 0
            if first >= stop:
                return
            skipped = max(0, start - first)
            yield batch.slice(skipped, stop - first - skipped)


class ObjectColumns(Sequence[ObjectInfo]):
    """Objects without their metadata. An object that is asked for is made anew; a slice copies nothing.

    Equal to any sequence of equal objects. A copy, also in another process, is a tuple of them.
    """

    __slots__ = ("_columns", "_start", "_stop")

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        """`batches`: in the columns of `SCHEMA`."""
        self._columns = _Batches(batches)
        self._start, self._stop = 0, self._columns.ends[-1] if self._columns.ends else 0

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, place: int) -> ObjectInfo: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ObjectInfo]: ...
    def __getitem__(self, place: int | slice) -> ObjectInfo | Sequence[ObjectInfo]:
        wanted = range(len(self))[place]
        if isinstance(wanted, int):
            return next(iter(self._cut(wanted, wanted + 1)))
        if wanted.step != 1:
            return [self[one] for one in wanted]
        return self._cut(wanted.start, max(wanted.start, wanted.stop))

    def __iter__(self) -> Iterator[ObjectInfo]:
        for batch in self.batches():
            yield from map(_info, *(column.to_pylist() for column in batch.columns))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __deepcopy__(self, memo: Any) -> tuple[ObjectInfo, ...]:
        return tuple(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The objects in the columns of `SCHEMA`, at most `BATCH_OBJECTS` together."""
        for batch in self._columns.rows(self._start, self._stop):
            for start in range(0, batch.num_rows, BATCH_OBJECTS):
                yield batch.slice(start, BATCH_OBJECTS)

    def drained(self) -> Iterator[ObjectInfo]:
        """The objects; each batch is given up once it was gone through, and this holds none from the first on."""
        batches = deque(self.batches())
        self._columns, self._start, self._stop = _Batches(()), 0, 0
        while batches:
            yield from ObjectColumns([batches.popleft()])

    def in_order(self) -> "ObjectColumns":
        """The objects by key, in order of its bytes, which is that of its characters; equal keys stay as they are."""
        keys = (key for batch in self.batches() for key in batch.column(0).to_pylist())
        if all(one <= other for one, other in pairwise(keys)):
            return self
        batches = [*self.batches()]
        every = pa.chunked_array([batch.column(0) for batch in batches])
        order = pc.sort_indices(every).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        return ObjectColumns(_taken(batches, order))

    def _cut(self, start: int, stop: int) -> "ObjectColumns":
        part = object.__new__(ObjectColumns)
        part._columns, part._start, part._stop = self._columns, self._start + start, self._start + stop
        return part


class ObjectCollector:
    """Collects objects one by one into columns."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._waiting: list[tuple[bytes | None, int | None, bytes | None]] = []

    def add(self, key: str, size: int | None, etag: str | None) -> None:
        """Adds an object. What is None is null."""
        self._waiting.append((_bytes(key), size, _bytes(etag)))
        if len(self._waiting) == BATCH_OBJECTS:
            self._end_batch()

    def extend(self, objects: Sequence[ObjectInfo]) -> None:
        """Adds objects. Many in columns are not copied; few are, so that a batch is not for a few alone."""
        if isinstance(objects, ObjectColumns) and len(objects) >= FEW_OBJECTS:
            self._end_batch()
            self._batches += objects.batches()
            return
        for info in objects:
            self.add(info.key, info.size, info.etag)

    def objects(self) -> ObjectColumns:
        """What was added, in that order."""
        self._end_batch()
        return ObjectColumns(self._batches)

    def _end_batch(self) -> None:
        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
            self._waiting = []


def collected(infos: Iterable[ObjectInfo]) -> ObjectColumns:
    """The objects in columns, in their order."""
    collector = ObjectCollector()
    for info in infos:
        collector.add(info.key, info.size, info.etag)
    return collector.objects()


def _taken(batches: Sequence[pa.RecordBatch], order: NDArray[np.uint64]) -> Iterator[pa.RecordBatch]:
    """The rows in this order. Arrow's own `take` of a table makes a second copy of its columns first."""
    ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.uint64)
    for start in range(0, len(order), TAKEN_OBJECTS):
        rows = order[start : start + TAKEN_OBJECTS]
        numbers = np.searchsorted(ends, rows, side="right")
        parts = [
            batches[number].take(pa.array(rows[numbers == number] + batches[number].num_rows - ends[number]))
            for number in np.unique(numbers)
        ]
        in_parts = np.argsort(np.argsort(numbers, kind="stable"))
        yield from pa.Table.from_batches(parts).take(pa.array(in_parts)).combine_chunks().to_batches()


def evenly_spread(things: Callable[[], Iterable[Thing]], count: int) -> list[Thing]:
    """`count` of the things, or all if they are fewer, evenly spread; goes through them twice and keeps no others."""
    total = sum(1 for _ in things())
    places = {total * place // count for place in range(count)}
    return [thing for place, thing in enumerate(things()) if place in places]


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _text(data: bytes | None) -> Any:
    return None if data is None else data.decode("utf-8", "surrogatepass")


def _info(key: bytes | None, size: Any, etag: bytes | None) -> ObjectInfo:
    return ObjectInfo(_text(key), size, _text(etag))
