"""What is read of shards before they are cut: several at a time, in their order, with the reason of what fails."""

import threading

import pytest

from blocksight.jobs.plan.units import _where_readable
from blocksight.storage.stores.store import ObjectInfo, StoreError, UnavailableError

SHARDS = [ObjectInfo(f"{number:03d}.parquet", 10, "v") for number in range(70)]


def test_shards_are_looked_at_together_and_told_in_order():
    meeting = threading.Barrier(2, timeout=30)

    def look(info):
        if info in SHARDS[:2]:
            meeting.wait()  # one after the other would never meet
        if info is SHARDS[5]:
            raise StoreError("it is damaged")
        return info.key

    found = _where_readable(SHARDS, look)
    assert str(found[5]) == "it is damaged"
    assert [one for one in found if isinstance(one, str)] == [info.key for info in SHARDS if info is not SHARDS[5]]


def test_a_store_that_is_away_ends_the_looking():
    looked = []

    def look(info):
        looked.append(info)
        raise UnavailableError("the store is away")

    with pytest.raises(UnavailableError, match="the store is away"):
        _where_readable(SHARDS * 50, look)
    assert len(looked) < len(SHARDS) * 50
