"""Shards on a bucket with faulty replies: only the affected shard fails, and the others are read."""

import io
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.jobs.plan.plan import _unit
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.worker.attempts import WorkerStores, attempted, begin
from blocksight.jobs.worker.unit import read_unit
from blocksight.storage.inputs.survey import survey
from blocksight.storage.stores.opening import probe_reads
from blocksight.storage.stores.retrying import PatientStore, witnesses_of
from tests.jobs.jobs_of import config_of, pieces_of
from tests.jobs.tiny import picture, tar_bytes
from tests.storage.loopback import Asked, Reply, etag_of, refused, served
from tests.storage.memory import MemoryStore


def table_bytes(first: int) -> bytes:
    body = io.BytesIO()
    pq.write_table(pa.table({"image": [picture(first), picture(first + 1)]}), body)
    return body.getvalue()


SHARDS = {
    "parquet": {f"d/{number}.parquet": table_bytes(2 * number) for number in range(3)},
    "tar": {f"d/{number}.tar": tar_bytes(2 * number, 2) for number in range(3)},
}
READ = ["ok", "ok"]


@pytest.fixture(scope="module")
def connected():
    with served() as both:
        yield both


@pytest.fixture(params=SHARDS)
def layout(request):
    return request.param


@pytest.fixture
def bucket(connected, layout, monkeypatch):
    """Three shards of two images each."""
    monkeypatch.setattr("blocksight.storage.stores.retrying.FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("blocksight.storage.stores.s3.ATTEMPTS", 2)
    connected[0].reset(SHARDS[layout])
    return connected[0]


def nothing():
    """The default: nothing happens between plan and run."""


def read_all(store, meanwhile: Callable[[], object] = nothing) -> list[list[str] | str]:
    """The result of each unit: the reject codes of its records, or the cause of its dead letter."""
    found = survey(store)
    patient = PatientStore(store, 5.0, witnesses=witnesses_of(lambda: found.objects))
    probe_reads(patient, found.objects)
    config = config_of("in", "out", explainer="gradient")
    cut = list(pieces_of(patient, found, config, Workforce(1, on_gpu=False)))
    meanwhile()
    stores = WorkerStores(patient, MemoryStore(), "run")
    return [
        became(_unit(number, "job", found.layout, piece, spread=True), stores, config)
        for number, piece in enumerate(cut)
    ]


def became(unit, stores, config) -> list[str] | str:
    made = attempted(
        unit, "read", stores, begin(unit, stores), lambda _: read_unit(unit, stores.source, config, (32, 32))
    )
    return getattr(made, "cause", None) or [record.reject_code or "ok" for record in made.records]


def of_the_second(change: Callable[[Asked, Reply], Reply], times: int = 1 << 30) -> Callable[[Asked, Reply], Reply]:
    """Changes the first `times` replies with a part of the second shard."""
    left = [times]

    def manners(asked: Asked, reply: Reply) -> Reply:
        is_meant = asked.method == "GET" and asked.key.startswith("d/1.") and len(reply.body) > 1
        if not is_meant or left[0] == 0:
            return reply
        left[0] -= 1
        return change(asked, reply)

    return manners


def short(_asked: Asked, reply: Reply) -> Reply:
    return Reply(reply.status, {**reply.headers, "Content-Length": None}, reply.body[: len(reply.body) // 2])


def test_a_body_that_ends_short_is_asked_for_again(bucket, connected):
    bucket.manners = of_the_second(short, times=1)
    assert read_all(connected[1]) == [READ] * 3


def whole(asked: Asked, _reply: Reply) -> Reply:
    held = SHARDS[asked.key.rpartition(".")[2]][asked.key]
    return Reply(200, {"ETag": etag_of(held)}, held)


UNREADABLE, CHANGED, MISSING = (["input_unreadable"] * 2, ["input_changed"] * 2, ["input_missing"] * 2)

LASTING = {
    "short": (short, UNREADABLE),
    "longer": (lambda _, reply: replace(reply, body=reply.body + b"more"), UNREADABLE),
    "another version": (lambda _, reply: replace(reply, headers={**reply.headers, "ETag": '"other"'}), CHANGED),
    "no range": (whole, ["input_unreadable", READ]),  # this tar is read whole at once
    "500": (lambda *_: refused(500, "InternalError"), UNREADABLE),
    "403": (lambda *_: refused(403, "AccessDenied"), UNREADABLE),
    "400": (lambda *_: refused(400, "BadRequest"), UNREADABLE),
    "404": (lambda *_: refused(404, "NoSuchKey"), MISSING),
    "an error inside": (lambda *_: Reply(200, {}, b"<Error><Code>InternalError</Code></Error>"), UNREADABLE),
    "a page": (lambda *_: Reply(200, {}, b"<html>log in</html>"), UNREADABLE),
}
"""A change of all replies for a shard, and the result for a table and for a tar."""


@pytest.mark.parametrize("name", LASTING)
def test_a_shard_that_is_served_badly_is_given_up_alone(bucket, connected, layout, name):
    change, expected = LASTING[name]
    bucket.manners = of_the_second(change)
    assert read_all(connected[1]) == [READ, expected[layout == "tar"], READ]


def test_a_shard_that_is_overwritten_after_the_plan_is_given_up_alone(bucket, connected, layout):
    key = f"d/1.{layout}"

    def overwrite():
        bucket.objects[key] = SHARDS[layout][f"d/2.{layout}"]

    assert read_all(connected[1], overwrite) == [READ, "input_changed", READ]


def test_a_shard_that_drips_is_given_up_alone(bucket, connected, monkeypatch):
    monkeypatch.setattr("blocksight.storage.stores.s3.MAX_LAG_SECONDS", 0.3)
    monkeypatch.setattr("blocksight.storage.stores.retrying.MAX_SECONDS_PER_OBJECT", 0.5)
    drip = of_the_second(lambda _asked, reply: replace(reply, pause=0.2))
    assert read_all(connected[1], lambda: setattr(bucket, "manners", drip)) == [READ, "input_unreadable", READ]
