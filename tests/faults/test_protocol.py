"""The protocol as a state machine: attempts of several processes, interleaved call by call, over a store that lies.

Each attempt runs the in-process runner's own way of a unit in a thread that waits before every call to the
store; the machine says which goes next, and whether its call is done, refused, done with its reply lost, or
its last. Attempts give other bytes each, as GPUs may, so that a fragment which is written twice shows.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from blocksight.jobs.ledger.reconcile import check, final_manifest, finalize, read_job_state
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.plan import ensure_plan, make_plan
from blocksight.jobs.plan.records import DeadLetter, ModelFacts, Receipt, Unit, UnitResult, UnreconciledError
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.run import local
from blocksight.jobs.worker import attempts
from blocksight.jobs.worker.attempts import WorkerStores
from blocksight.storage.outputs.map_codec import quantised
from blocksight.storage.stores import retrying
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.store import UnavailableError
from tests.faults.stores import Crash, InterceptedStore
from tests.faults.verifier import COMMITTED, verify
from tests.jobs.jobs_of import config_of
from tests.jobs.tiny import folder_of_images
from tests.storage.memory import MemoryStore

DONE, REFUSED, REPLY_LOST, DEAD_BEFORE, DEAD_AFTER = "done", "refused", "reply lost", "dead before", "dead after"
NUM_UNITS = 2


class Process:
    """One attempt in a thread of its own, which stands still before each of its calls to the store."""

    def __init__(self, unit: Unit, run: Callable[[Unit, InterceptedStore], Any], store: MemoryStore) -> None:
        self.verdicts: SimpleQueue[str] = SimpleQueue()
        self.at_call = threading.Semaphore(0)
        self.is_over = False
        self.result: Any = None
        self._thread = threading.Thread(target=self._live, args=(unit, run, store), daemon=True)
        self._thread.start()
        self.at_call.acquire()

    def step(self, verdict: str) -> None:
        """Lets the call that it waits at end like this, and waits for the next one, or its end."""
        self.verdicts.put(verdict)
        self.at_call.acquire()

    def _live(self, unit: Unit, run: Callable[[Unit, InterceptedStore], Any], store: MemoryStore) -> None:
        try:
            self.result = run(unit, InterceptedStore(store, self._call))
        except Crash:
            pass
        finally:
            self.is_over = True
            self.at_call.release()

    def _call(self, name: str, key: str, call: Callable[[], Any]) -> Any:
        self.at_call.release()
        verdict = self.verdicts.get()
        if verdict == DEAD_BEFORE:
            raise Crash
        if verdict == REFUSED:
            raise UnavailableError("503")
        result = call()
        if verdict == DEAD_AFTER:
            raise Crash
        if verdict == REPLY_LOST:
            raise UnavailableError("the reply was lost")
        return result


class Protocol(RuleBasedStateMachine):
    """Attempts come and go; whatever is committed stays as it is, and in the end every record stands once."""

    world: "World"

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.processes: list[Process] = []
        self.seen: dict[str, bytes] = {}
        self.is_final = False
        ensure_plan(self.store, self.world.plan)

    @precondition(lambda self: len(self.processes) < 4)
    @rule(unit=st.integers(0, NUM_UNITS - 1))
    def start(self, unit: int) -> None:
        self.processes.append(Process(self.world.plan.units[unit], self.world.run, self.store))

    @precondition(lambda self: self.processes)
    @rule(
        which=st.integers(0, 3),
        steps=st.integers(1, 8),
        verdict=st.sampled_from([DONE, DONE, DONE, REFUSED, REPLY_LOST, DEAD_BEFORE, DEAD_AFTER]),
    )
    def step(self, which: int, steps: int, verdict: str) -> None:
        """Some calls that go well, and one that ends as drawn."""
        process = self.processes[which % len(self.processes)]
        for number in range(steps):
            if process.is_over:
                break
            process.step(verdict if number == steps - 1 else DONE)
        if process.is_over:
            self.processes.remove(process)

    @rule()
    def drivers_look(self) -> None:
        """Another driver reads how far it is, and finalizes what is settled."""
        job_state = read_job_state(self.store, self.world.plan)
        if not job_state.open_units:
            self.finalize_or_report()

    def finalize_or_report(self) -> None:
        """A slow attempt that commits a unit after a manifest gave it up is not prevented: it is reported."""
        job_state = read_job_state(self.store, self.world.plan)
        given_up = {dead["unit_id"] for dead in (final_manifest(self.store, self.world.plan) or {"dead": []})["dead"]}
        late = sorted(receipt.fragment for unit_id, receipt in job_state.receipts.items() if unit_id in given_up)
        wanted = [f"{key} exists and is not in the final manifest: its unit was given up there" for key in late]
        assert [fault for _, faults in check(self.store, self.world.plan) for fault in faults] == wanted
        if late:
            with pytest.raises(UnreconciledError, match="was given up there"):
                finalize(self.store, job_state)
        else:
            finalize(self.store, job_state)
            assert not self.is_final or verify(self.store, source_keys=self.world.keys) == []

    @invariant()
    def what_is_committed_stays(self) -> None:
        now = {info.key: self.store.read(info.key) for info in self.store.list() if info.key.startswith(COMMITTED)}
        assert now.items() >= self.seen.items(), "a committed object has changed or gone"
        self.seen = now

    def teardown(self) -> None:
        for process in self.processes:
            while not process.is_over:
                process.step(DONE)
        job_state = read_job_state(self.store, self.world.plan)
        for unit in job_state.open_units:
            assert isinstance(self.world.run(unit, self.store), Receipt | DeadLetter)
        job_state = read_job_state(self.store, self.world.plan)
        assert job_state.total("num_ok") or not job_state.receipts, "no attempt has explained anything"
        self.is_final = True
        self.finalize_or_report()
        self.what_is_committed_stays()


class World:
    """A tiny job whose explainer gives other numbers at every call."""

    def __init__(self, folder: Any, seed: int = 0) -> None:
        data = folder_of_images(folder / "in", 4)
        self.config = config_of(data, folder / "out")
        self.plan = replace_units(make_plan(self.config, weights_sha256=None, workforce=Workforce(1, False)))
        self.keys = sorted(info.key for unit in self.plan.units for info in unit.objects)
        self.source = LocalStore(data)
        facts = ModelFacts("w", 5, (8, 8))
        self.context = JobContext(self.config, self.plan.fingerprint, "run", facts, (), 1, 1, "cpu", "")
        self.levels = np.random.default_rng(seed)

    def run(self, unit: Unit, output: Any) -> Any:
        stores = WorkerStores(self.source, PatientStore(output, seconds=1e9), "run")
        return local.run_unit(unit, self.context, stores, lambda: self.explain)

    def explain(self, unit_input: Any, *, careful: bool = False) -> UnitResult:
        rows = []
        pixels = iter(unit_input.pixels)
        for record in unit_input.records:
            row = {"key": record.key, "shard": record.shard, "shard_index": record.shard_index}
            row |= {"unit_id": unit_input.unit.unit_id, "sha256": record.sha256}
            if record.reject_code is None:
                next(pixels)
                saliency = self.levels.random((8, 8), dtype=np.float32)
                row |= {"status": "ok", "score": 0.5, "target_index": 1, "map": quantised(saliency), "num_forwards": 1}
                row |= {"metrics": {"drop": float(saliency.mean()), "increase": False, "protocol": "p"}}
            else:
                row |= {"status": "rejected", "reject_code": record.reject_code, "error": record.error}
                row |= {"metrics": None, "num_forwards": None}
            rows.append(row)
        return UnitResult(unit_input.unit, tuple(rows), len(rows), 0.1)


def replace_units(plan: Any) -> Any:
    """The plan's images in two units, whatever the estimate says."""
    objects = [info for unit in plan.units for info in unit.objects]
    half = len(objects) // NUM_UNITS
    parts = [tuple(objects[:half]), tuple(objects[half:])]
    units = tuple(
        replace(
            plan.units[0], ordinal=number, unit_id=f"{number:020x}", objects=own, stop=len(own), num_records=len(own)
        )
        for number, own in enumerate(parts)
    )
    return replace(plan, units=units)


@pytest.mark.parametrize("num_interleavings", [60, pytest.param(400, marks=pytest.mark.sweep)])
def test_every_interleaving_ends_with_every_record_once(tmp_path, monkeypatch, num_interleavings):
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "MAX_DEATHS", 2)  # units are given up while slow attempts still live
    monkeypatch.setattr(attempts, "CAREFUL_DEATHS", 99)
    Protocol.world = World(tmp_path)
    quiet = settings(
        max_examples=num_interleavings,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # threads make shrinking slow; a failure prints its steps all the same
    )
    run_state_machine_as_test(Protocol, settings=quiet)
