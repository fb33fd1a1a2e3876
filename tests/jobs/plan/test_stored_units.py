"""Units cut and stored in columns are those of a slow twin, object by object; ids and order stay what they were."""

import hashlib
import json
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.cluster.sizing import shrinking_sizes
from blocksight.jobs.plan import stored_units
from blocksight.jobs.plan.config import load_config
from blocksight.jobs.plan.estimate import MeasuredRate
from blocksight.jobs.plan.plan import FoundInput, Plan
from blocksight.jobs.plan.stored_units import UNITS_SCHEMA, read_units, units_bytes
from blocksight.jobs.plan.units import Piece, Workforce
from blocksight.storage.inputs.survey import Layout, Survey, survey
from blocksight.storage.inputs.tables import TableFacts
from blocksight.storage.parquet.rows import parquet_of_rows
from blocksight.storage.stores.store import ObjectInfo
from tests.storage.memory import MemoryStore

NAMES = st.text(st.sampled_from("ab/. é水😀"), min_size=1, max_size=4).map(lambda name: f"{name}.png")
OBJECTS = st.lists(st.builds(ObjectInfo, NAMES, st.integers(0, 2**40), NAMES), min_size=1, unique_by=lambda i: i.key)


class Listed(MemoryStore):
    """Lists these objects."""

    def __init__(self, infos):
        super().__init__()
        self.infos = infos

    def list(self, prefix=""):
        yield from self.infos


def planned(found: Survey, shards=(), *, num_workers=2, **options) -> Plan:
    """The plan, under an identity that stays what it is."""
    config, _ = load_config(None, {"data": "s3://b/d", "output": "out", "explainer": "gradcam", **options})
    identity = {"schema": 5, "limit": config.limit}
    workforce = Workforce(num_workers, on_gpu=False, rate=MeasuredRate(4.0, "measured"))
    return FoundInput(config, identity, found, shards, None).cut(workforce)


def slow_rows(infos, fingerprint, sizes) -> list[dict]:
    """Rows of the units: a dictionary for each object."""
    left, rows = sorted(infos, key=lambda info: info.key), []
    for ordinal, size in enumerate(sizes):
        own, left = left[:size], left[size:]
        text = {"job": fingerprint, "inputs": [[*astuple(info)[:3]] for info in own], "start": 0, "stop": size}
        digest = hashlib.sha256(json.dumps(text, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        objects = [{"key": info.key, "size": info.size, "etag": info.etag} for info in own]
        values = (ordinal, digest[:20], "images", 0, size, size, objects)
        rows.append(dict(zip(UNITS_SCHEMA.names, values, strict=True)))
    return rows


@settings(deadline=None, max_examples=50)
@given(OBJECTS, st.integers(1, 4), st.integers(1, 40), st.integers(1, 20))
def test_units_are_those_of_the_slow_twin(infos, num_workers, limit, group_objects):
    kept = [info for info in infos if not {"", ".", ".."} & set(info.key.split("/")) and "/." not in f"/{info.key}"]
    if not kept:
        return
    plan = planned(survey(Listed(infos)), num_workers=num_workers, limit=limit)
    count = min(limit, len(kept))
    full = max((unit.num_records for unit in plan.units), default=1)
    rows = slow_rows(sorted(kept, key=lambda info: info.key), plan.fingerprint, [u.num_records for u in plan.units])
    assert [unit.num_records for unit in plan.units] == shrinking_sizes(count, full, min(full, 2), num_workers)
    assert (plan.num_objects, plan.num_bytes) == (count, sum(one["size"] for row in rows for one in row["objects"]))
    assert units_bytes(plan.units) == parquet_of_rows(rows, UNITS_SCHEMA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_units, "GROUP_OBJECTS", group_objects)
        assert read_units(units_bytes(plan.units), spread=True) == plan.units


INFOS = [ObjectInfo(f"{'cat' if number % 3 else 'dög'}/{number:03}", 9 * number, f'"{number}"') for number in range(40)]
SHARDS = INFOS[:4]
GOLDEN = {
    "images": (Survey(Layout.IMAGES, INFOS, {}), (), "4ec40365a7c2dd37c11a 0dd16aa33d1ece95edf6 35b119084eeaf0709bd4"),
    "parquet": (
        Survey(Layout.PARQUET, SHARDS, {}),
        [TableFacts(count, ()) for count in (7, 1, 30, 12)],
        "d8df853e3a0f72b1d8ae 198bdc71b4ee95f296ca f5db66ac39691571f94b",
    ),
    "tar": (
        Survey(Layout.TAR, SHARDS, {}),
        [Piece((info,), 0, 9_999, 6) for info in SHARDS],
        "40a4c8007b3adf75c68a fd13eeaa3d0393100131 6f3f734cae5fe4473b9d",
    ),
}
"""By layout: what was found, and the ids of the first two units and the last one, as they were before columns."""


@pytest.mark.parametrize("layout", GOLDEN)
def test_ids_stay_what_they_were(layout):
    found, shards, ids = GOLDEN[layout]
    units = planned(found, shards).units
    assert [units[place].unit_id for place in (0, 1, -1)] == ids.split()
