"""Units of one shard read its bytes once: a counting store compares the bytes read with the shard's."""

import io
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.storage.inputs import tables
from blocksight.storage.inputs.tables import read_table
from blocksight.storage.inputs.tars import read_tar
from blocksight.storage.parquet.reader import ParquetTable
from blocksight.storage.stores.store import DamagedError
from blocksight.storage.stores.streamed_file import StreamedFile
from tests.storage.inputs.test_tars import archive
from tests.storage.memory import MemoryStore

NUM_RECORDS = 100
IMAGES = [np.random.default_rng(number).bytes(200_000) for number in range(NUM_RECORDS)]


class CountingStore(MemoryStore):
    """A store that adds up the bytes that are read."""

    num_bytes = 0

    def read(self, key: str, **how) -> bytes:
        data = super().read(key, **how)
        self.num_bytes += len(data)
        return data


def tar_store() -> CountingStore:
    store = CountingStore()
    store.put("s", archive([(f"{number:03}.png", image) for number, image in enumerate(IMAGES)]))
    return store


def table_store() -> CountingStore:
    store, sink = CountingStore(), io.BytesIO()
    keys = [f"k{number:03}" for number in range(NUM_RECORDS)]
    pq.write_table(pa.table({"image": IMAGES, "key": keys}), sink, row_group_size=50, compression="none")
    store.put("s", sink.getvalue())
    return store


def edges_of(store: MemoryStore, num_units: int, *, is_tar: bool) -> list[tuple[int, int]]:
    size = store.head("s").size if is_tar else NUM_RECORDS
    return [*pairwise(round(size * number / num_units) for number in range(num_units + 1))]


@pytest.mark.parametrize("is_tar", [True, False], ids=["tar", "table"])
def test_the_units_of_a_shard_read_its_bytes_once(is_tar: bool):
    store = tar_store() if is_tar else table_store()
    reader, info = read_tar if is_tar else read_table, store.head("s")
    records = [one for edge in edges_of(store, 20, is_tar=is_tar) for one in reader(store, info, *edge)]
    assert [record.data for record in records] == IMAGES
    assert store.num_bytes < (1.1 if is_tar else 1.5) * info.size  # the windows of two columns overlap


@pytest.mark.parametrize("is_tar", [True, False], ids=["tar", "table"])
def test_a_process_that_reads_every_third_unit_reads_no_byte_twice(is_tar: bool):
    store = tar_store() if is_tar else table_store()
    reader, info = read_tar if is_tar else read_table, store.head("s")
    chosen = edges_of(store, 20, is_tar=is_tar)[1::3]
    found = [one.data for edge in chosen for one in reader(store, info, *edge)]
    assert store.num_bytes < (1.1 if is_tar else 1.5) * info.size  # the windows of two columns overlap
    fresh = tar_store() if is_tar else table_store()
    assert found == [one.data for edge in reversed(chosen) for one in [*reader(fresh, info, *edge)][::-1]][::-1]


@pytest.mark.parametrize("is_tar", [True, False], ids=["tar", "table"])
def test_a_unit_that_broke_off_or_is_read_again_is_read_from_its_beginning(is_tar: bool):
    store = tar_store() if is_tar else table_store()
    reader, info = read_tar if is_tar else read_table, store.head("s")
    first, second, *_ = edges_of(store, 10, is_tar=is_tar)
    wanted = [one.data for one in reader(store, info, *second)]
    broken = reader(store, info, *second)
    next(broken)
    broken.close()
    assert [one.data for one in reader(store, info, *second)] == wanted
    before = [one.data for one in reader(store, info, *first)]
    assert before + wanted == IMAGES[: len(before + wanted)]


def test_the_unit_of_the_last_rows_checks_the_end_of_the_table(monkeypatch: pytest.MonkeyPatch):
    """A row group with more rows than the footer says raises behind its last batch."""
    whole = ParquetTable.rows

    def rows(*arguments):
        yield from whole(*arguments)
        raise DamagedError("has 101 rows")

    store = table_store()
    info = store.head("s")
    monkeypatch.setattr(ParquetTable, "rows", rows)
    monkeypatch.setattr(tables, "_keys_before", lambda *_: set())
    assert len([*read_table(store, info, 0, 60)]) == 60
    with pytest.raises(DamagedError, match="101 rows"):
        list(read_table(store, info, 60, NUM_RECORDS))


def test_another_version_of_a_shard_gets_its_own_reader():
    store = table_store()
    old = store.head("s")
    assert len([*read_table(store, old, 0, 10)]) == 10
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [b"new"] * NUM_RECORDS}), sink)
    store.put("s", sink.getvalue())
    assert next(read_table(store, store.head("s"), 10, 20)).data == b"new"


@settings(max_examples=150)
@given(st.binary(max_size=40), st.integers(1, 8), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12))))
def test_a_streamed_file_reads_as_one_in_memory(data: bytes, window_bytes: int, steps: list[tuple[int, int]]):
    store = MemoryStore()
    store.put("x", data)
    file = StreamedFile(store, store.head("x"), window_bytes)
    for start, size in steps:
        assert file.read_at(start, size) == data[start : start + size]
