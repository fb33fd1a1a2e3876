"""What a plan of loose images takes of the driver's memory, per image: from two lengths, so that constants drop out."""

import tracemalloc

from blocksight.jobs.plan.config import load_config
from blocksight.jobs.plan.estimate import MeasuredRate
from blocksight.jobs.plan.plan import FoundInput
from blocksight.jobs.plan.units import Workforce
from blocksight.storage.inputs.survey import survey
from blocksight.storage.stores.store import ObjectInfo
from tests.storage.memory import MemoryStore

MOST_BYTES = 330
"""Measured: 298, of which key and version of this length take 156 as Python's text."""


class Listed(MemoryStore):
    """Lists `count` images that are made while they are listed."""

    count = 0

    def list(self, prefix=""):
        for number in range(self.count):
            yield ObjectInfo(f"{prefix}n{number % 1000:04}/image_{number:08}.jpg", 100_000 + number, f'"{number:032x}"')


def peak_of(count) -> int:
    """Bytes at the peak of listing and cutting so many images."""
    config, _ = load_config(None, {"data": "s3://b/d", "output": "out"})
    store = Listed()
    store.count = count
    tracemalloc.start()
    try:
        found = FoundInput(config, config.identity(None), survey(store), (), None)
        plan = found.cut(Workforce(16, on_gpu=False, rate=MeasuredRate(0.05, "measured")))
        assert plan.num_records == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_peak_of_an_image_is_bounded():
    peak_of(100)
    assert (peak_of(12_000) - peak_of(4_000)) / 8_000 < MOST_BYTES
