"""What a plan of loose images takes of the driver's memory, per image: from two lengths, so that constants drop out."""

import gc
import io
import tracemalloc
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.jobs.plan import stored_units
from blocksight.jobs.plan.config import load_config
from blocksight.jobs.plan.estimate import MeasuredRate
from blocksight.jobs.plan.plan import FoundInput, Plan, ensure_plan, existing_plan
from blocksight.jobs.plan.units import Workforce
from blocksight.storage.inputs.survey import survey
from blocksight.storage.stores import object_columns
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.store import ObjectInfo
from tests.storage.memory import MemoryStore

MOST_BYTES = 200
"""Measured: 74 as S3 lists, 175 as a folder lists, 77 to read it."""
COLUMN_BYTES = 80
"""Of the columns of a plan, with key and version of this length: 63 as bytes, and 156 as Python's text."""


class Listed(MemoryStore):
    """Lists `count` images that are made while they are listed, in order of key or the other way round."""

    def __init__(self, count: int, is_in_order: bool) -> None:
        super().__init__()
        self.numbers = range(count) if is_in_order else range(count)[::-1]

    def list(self, prefix=""):
        for number in self.numbers:
            key = f"{prefix}n{number // 1300:04}/image_{number:08}.jpg"
            yield ObjectInfo(key, 100_000 + number, f'"{number * 7919 % 2**64:032x}"')


def planned(store: Listed) -> Plan:
    config, _ = load_config(None, {"data": "s3://b/d", "output": "out"})
    found = FoundInput(config, config.identity(None), survey(PatientStore(store)), (), None)
    return found.cut(Workforce(16, on_gpu=False, rate=MeasuredRate(0.05, "measured")))


POOLS = []
"""Arrow's pools of earlier measurements: a buffer may outlive its measurement, and needs its pool."""


def peak_of(work: Callable[[], object]) -> int:
    """Bytes at the peaks of Python's memory and of Arrow's, together."""
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def slope(of_count: Callable[[int], int]) -> float:
    """Bytes per image between two lengths."""
    few, many = 4_096, 12_288
    of_count(few)  # what is made once
    return (of_count(many) - of_count(few)) / (many - few)


@pytest.mark.parametrize("is_in_order", [True, False], ids=["as S3 lists", "as a folder lists"])
def test_the_peak_of_listing_and_cutting_is_bounded(is_in_order, monkeypatch):
    monkeypatch.setattr(object_columns, "TAKEN_OBJECTS", 1 << 10)
    assert slope(lambda count: peak_of(lambda: planned(Listed(count, is_in_order)))) < MOST_BYTES


def test_the_peaks_of_writing_and_reading_a_plan_are_bounded(monkeypatch):
    monkeypatch.setattr(stored_units, "GROUP_OBJECTS", 1 << 10)
    reading = {}

    def peak(count: int) -> int:
        output, plan = MemoryStore(), planned(Listed(count, is_in_order=True))
        writing = peak_of(lambda: ensure_plan(output, plan))
        reading[count] = peak_of(lambda: existing_plan(output))
        return writing

    assert slope(peak) < MOST_BYTES - COLUMN_BYTES
    assert slope(reading.__getitem__) < MOST_BYTES


def test_a_plan_has_so_many_row_groups_at_most(monkeypatch):
    monkeypatch.setattr(stored_units, "GROUP_OBJECTS", 1)
    monkeypatch.setattr(stored_units, "MOST_GROUPS", 10)
    units = planned(Listed(5_000, is_in_order=True)).units
    body = stored_units.units_bytes(units)
    assert len(units) > 10 >= pq.read_metadata(io.BytesIO(body)).num_row_groups > 5
