"""How often a unit may kill its process is bounded, by what stands in the bucket alone: each process begins anew."""

from collections import Counter

import pyarrow as pa
import pytest

from blocksight.jobs.ledger.reconcile import finalize, read_job_state
from blocksight.jobs.plan.plan import UNIT_FOLDERS, ensure_plan
from blocksight.jobs.plan.records import DeadLetter, Receipt
from blocksight.jobs.run import local, pipeline
from blocksight.jobs.worker import attempts
from blocksight.jobs.worker.attempts import CAREFUL_DEATHS, WorkerStores
from blocksight.storage.stores.retrying import PatientStore
from tests.faults.stores import Crash, InterceptedStore
from tests.faults.test_protocol import World
from tests.faults.verifier import verify
from tests.storage.memory import MemoryStore

MAX_DEATHS = 4
"""Fewer than in a job: a careful attempt starts child processes."""


class Process:
    """Works on units until it dies; a dead one makes no call to the store."""

    def __init__(self, world, bucket, seen=None):
        self.world, self.seen, self.is_dead = world, Counter() if seen is None else seen, False
        output = PatientStore(InterceptedStore(bucket, self._call), unit_folders=UNIT_FOLDERS)
        self.stores = WorkerStores(world.source, output, "run")

    def _call(self, name, key, call):
        if self.is_dead:
            raise Crash
        self.seen[name] += 1
        return call()

    def die(self):
        self.is_dead = True
        raise Crash

    def explain(self, taken, *, careful):
        return self.world.explain(taken, careful=careful)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def bucket(world):
    store = MemoryStore()
    ensure_plan(store, world.plan)
    return store


def in_one_process(process, unit, explain):
    return local.run_unit(unit, process.world.context, process.stores, lambda: explain)


@pytest.fixture
def in_three(monkeypatch):
    """The stages of a session with GPUs: each unit is read, explained and committed by other processes."""

    def run(process, unit, explain):
        monkeypatch.setattr(pipeline, "open_worker_stores", lambda _: process.stores)
        monkeypatch.setattr(pipeline, "_STORES", {})
        actor = pipeline._Explain.__new__(pipeline._Explain)
        actor.input_size, actor.stores = process.world.context.facts.input_size, process.stores
        actor.held = pipeline._Held(lambda: explain)
        read = pipeline._read(pa.table({"unit": [pipeline._json(unit)]}), process.world.context)
        made = pipeline._commit(actor(read), process.world.context)
        return pipeline._outcome(made.to_pylist()[0])

    return run


@pytest.fixture(params=["one process", "three processes"])
def run(request):
    return in_one_process if request.param == "one process" else request.getfixturevalue("in_three")


def assert_finished(bucket, world):
    finalize(bucket, read_job_state(bucket, world.plan))
    assert verify(bucket, source_keys=world.keys if not read_job_state(bucket, world.plan).dead else None) == []


def test_a_job_of_which_every_first_attempt_dies_is_done_by_the_second(world, bucket, run):
    for unit in world.plan.units:
        first, care = Process(world, bucket), []
        with pytest.raises(Crash):
            run(first, unit, lambda *_, dying=first, **__: dying.die())
        second = Process(world, bucket)

        def explain(taken, *, careful, process=second, care=care):
            care.append(careful)
            return process.explain(taken, careful=careful)

        assert isinstance(run(second, unit, explain), Receipt)
        assert care == [False]
    assert_finished(bucket, world)


def test_a_unit_of_which_every_attempt_dies_is_given_up_and_the_others_are_done(world, bucket, run, monkeypatch):
    monkeypatch.setattr(attempts, "MAX_DEATHS", MAX_DEATHS)
    deadly, other = world.plan.units
    care = []
    for _ in range(MAX_DEATHS):
        process = Process(world, bucket)

        def explain(taken, *, careful, process=process):
            care.append(careful)
            process.die()

        with pytest.raises(Crash):
            run(process, deadly, explain)
    process = Process(world, bucket)
    letter = run(process, deadly, process.explain)
    assert isinstance(letter, DeadLetter)
    assert letter.cause == "poison"
    assert care == [False] * CAREFUL_DEATHS + [True] * (MAX_DEATHS - CAREFUL_DEATHS)
    assert isinstance(run(process, other, process.explain), Receipt)
    assert_finished(bucket, world)


WRITES = {"one process": 2, "three processes": 4}


def test_a_unit_costs_few_writes_and_no_listing(world, bucket, run, request):
    seen = Counter()
    for unit in world.plan.units:
        process = Process(world, bucket, seen)
        assert isinstance(run(process, unit, process.explain), Receipt)
    wanted = next(count for name, count in WRITES.items() if name in request.node.name)
    assert {name: count / len(world.plan.units) for name, count in seen.items() if name != "head"} == {"create": wanted}
