"""Attempts, isolation, dead letters, retry, budgets and garbage collection, in this process and a child."""

import json
import os
import pickle
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from blocksight.jobs.ledger import attempt_markers
from blocksight.jobs.ledger.attempt_markers import Attempt, Marker
from blocksight.jobs.ledger.dead_letters import give_up, read_letters
from blocksight.jobs.ledger.garbage import collect_garbage
from blocksight.jobs.ledger.receipts import receipt_of
from blocksight.jobs.ledger.reconcile import MANIFEST_KEY, UnreconciledError, check, finalize, read_job_state
from blocksight.jobs.ledger.retry import reopen
from blocksight.jobs.ledger.stop_request import stop_request_key
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.plan import Plan, ensure_plan, load_plan
from blocksight.jobs.plan.records import Cause, DeadLetter, Receipt, UnitFailure, UnitSkipped
from blocksight.jobs.run.budgets import NUM_FIRST_UNITS, Budget, FirstUnits, exceeded_budgets
from blocksight.jobs.run.job import plan_job, run_job
from blocksight.jobs.worker import attempts
from blocksight.jobs.worker.attempts import CAREFUL_DEATHS, WorkerStores
from blocksight.jobs.worker.error_classes import UnfitWorkerError
from blocksight.jobs.worker.isolation import Isolated, ProcessDiedError, ProcessStartError
from blocksight.jobs.worker.unit import commit_unit
from blocksight.storage.rejects import Reject, RejectCode
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    DamagedError,
    MissingError,
    ObjectError,
    StoreError,
    UnavailableError,
)
from tests.jobs.jobs_of import blocksight, config_of, fragments_in, rows_in, run_here
from tests.jobs.tiny import folder_of_images, folder_of_tables, folder_of_tars, picture, red
from tests.jobs.worker.isolated import cannot_be_made, fatal, itself
from tests.jobs.worker.test_commit import UNIT, result
from tests.storage.memory import MemoryStore


def worker_stores(output=None):
    return WorkerStores(MemoryStore(), output or MemoryStore(), "run")


def attempted(unit, stage, place, work):
    """A step of an attempt that begins with it."""
    return attempts.attempted(unit, stage, place, attempts.begin(unit, place), work)


def raising(error):
    def work(careful):
        raise error

    return work


def markers_in(store):
    return [info.key for info in store.list(attempt_markers.FOLDER)]


def documents_in(store):
    """The markers by their names below the unit's folder: True if it is marked as ended."""
    prefix = attempt_markers.prefix_of(UNIT.unit_id)
    found = {info.key: json.loads(store.read(info.key)) for info in store.list(prefix)}
    return {key.removeprefix(prefix): marker["ended"] for key, marker in sorted(found.items())}


def dead_attempts(store, unit_id, number, name=""):
    """Begins so many attempts that leave only their markers."""
    for _ in range(number):
        marker = Marker("of a dead run", "w:1", 0.0, os.urandom(4).hex())
        attempt = attempt_markers.begun(store, unit_id, marker)
        if name:
            attempt_markers.step_begun(store, attempt, name, marker)


# ---------------------------------------------------------------- attempts


def test_a_marker_is_written_before_a_step_works_and_a_finished_unit_needs_no_mark():
    place = WorkerStores(MemoryStore(), MemoryStore(), "run", clock=lambda: 7.0)
    assert attempted(UNIT, "read", place, lambda careful: (careful, documents_in(place.output))) == (
        False,
        {"0.json": False},
    )
    (key,) = markers_in(place.output)
    assert key == f"_job/attempts/{UNIT.unit_id[:2]}/{UNIT.unit_id}/0.json"
    marker = json.loads(place.output.read(key))
    assert (marker["run_id"], marker["started"], marker["worker"]) == (
        "run",
        7.0,
        f"{os.uname().nodename}:{os.getpid()}",
    )


@pytest.mark.parametrize(
    "error", [ValueError("x"), StoreError("denied"), MissingError("gone"), UnfitWorkerError("gpu")]
)
def test_an_attempt_that_fails_alive_is_no_death(error):
    place = worker_stores()
    for number in range(CAREFUL_DEATHS + 1):
        attempted(UNIT, "read", place, raising(error))
        assert documents_in(place.output) == {f"{n}.json": True for n in range(number + 1)}
    assert attempted(UNIT, "read", place, lambda careful: careful) is False


@pytest.mark.parametrize(("deaths", "careful"), [(0, False), (1, False), (2, True), (11, True)])
def test_deaths_at_a_unit_make_all_steps_of_its_next_attempt_careful(deaths, careful):
    place = worker_stores()
    dead_attempts(place.output, UNIT.unit_id, deaths)
    dead_attempts(place.output, "b" * 20, deaths + 1)
    attempt = attempts.begin(UNIT, place)
    assert attempt.num_deaths == deaths
    for stage in ("read", "explain", "commit"):
        assert attempts.attempted(UNIT, stage, place, attempt, lambda careful: careful) is careful
        assert attempts.attempted(UNIT, stage, place, passed_on(place, stage, attempt), lambda c: c) is careful


def passed_on(place, stage, attempt):
    """The attempt, as another process goes on with it."""
    return attempts.go_on(UNIT, stage, place, Attempt(**json.loads(json.dumps(asdict(attempt)))))


def test_a_step_that_killed_its_process_counts_when_ray_starts_it_again():
    place = worker_stores()
    dead_attempts(place.output, UNIT.unit_id, 1)
    attempt = attempts.begin(UNIT, place)
    seen = [passed_on(place, "explain", attempt).num_deaths for _ in range(attempts.MAX_DEATHS - 1)]
    assert seen == list(range(1, attempts.MAX_DEATHS))
    letter = passed_on(place, "explain", attempt)
    assert isinstance(letter, DeadLetter)
    assert (letter.cause, letter.stage) == ("poison", "explain")
    assert passed_on(place, "commit", attempt).num_deaths == 1


def test_a_step_that_fails_alive_ends_the_whole_attempt():
    place = worker_stores()
    attempt = attempts.begin(UNIT, place)
    going_on = passed_on(place, "explain", attempt)
    assert documents_in(place.output) == {"0.json": False, "0-explain-0.json": False}
    attempts.attempted(UNIT, "explain", place, going_on, raising(MemoryError()))
    assert documents_in(place.output) == {"0.json": True, "0-explain-0.json": True}
    assert attempts.begin(UNIT, place).num_deaths == 0


def test_a_unit_that_keeps_killing_its_process_is_a_dead_letter():
    place = worker_stores()
    dead_attempts(place.output, UNIT.unit_id, attempts.MAX_DEATHS)
    letter = attempted(UNIT, "read", place, lambda _: "never called")
    assert isinstance(letter, DeadLetter)
    assert (letter.cause, letter.stage, letter.inputs) == ("poison", "read", "t.parquet")
    assert read_letters(place.output, [UNIT]) == {UNIT.unit_id: letter}


def test_a_lost_reply_to_a_marker_is_no_death():
    class Losing(MemoryStore):
        def create(self, key, data, *, metadata=None):
            super().create(key, data, metadata=metadata)
            if key.endswith("/0.json"):
                raise AlreadyExistsError("the client asked twice")

    assert attempts.begin(UNIT, worker_stores(Losing())).num_deaths == 0


def test_a_damaged_marker_counts_as_a_death_and_one_that_vanishes_does_not():
    place = worker_stores()
    prefix = attempt_markers.prefix_of(UNIT.unit_id)
    place.output.put(f"{prefix}0.json", b"{}")
    assert attempts.begin(UNIT, place).num_deaths == 1

    class Vanishing(MemoryStore):
        def read(self, key, **options):
            raise MissingError(key)

    store = Vanishing()
    store.put(f"{prefix}0.json", b"{}")
    assert attempts.begin(UNIT, worker_stores(store)).num_deaths == 0


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MissingError("gone"), "input_missing"),
        (ChangedError("other"), "input_changed"),
        (ObjectError("archived"), "input_unreadable"),
        (DamagedError("broken"), "container_corrupt"),
        (ProcessDiedError("SIGSEGV"), "poison"),
    ],
)
def test_what_is_wrong_with_an_input_is_a_dead_letter_with_its_cause(error, cause):
    letter = attempted(UNIT, "read", worker_stores(), raising(error))
    assert isinstance(letter, DeadLetter)
    assert (letter.cause, letter.error) == (cause, str(error))


@pytest.mark.parametrize(
    ("stage", "error", "away"),
    [
        ("commit", MissingError("gone"), False),
        ("explain", MemoryError(), False),
        ("read", StoreError("denied"), False),
        ("commit", UnavailableError("503"), True),
    ],
)
def test_other_errors_leave_the_unit_open(stage, error, away):
    place = worker_stores()
    failure = attempted(UNIT, stage, place, raising(error))
    assert isinstance(failure, UnitFailure)
    assert failure.store_is_away is away
    assert read_letters(place.output, [UNIT]) == {}


def test_a_run_that_was_asked_to_stop_takes_no_unit_and_keeps_what_is_explained():
    place = worker_stores()
    place.output.put(stop_request_key("another"), b"")
    attempt = attempts.begin(UNIT, place)
    assert isinstance(attempt, Attempt)
    place.output.put(stop_request_key("run"), b"SIGTERM")
    assert attempts.begin(UNIT, place) == UnitSkipped(UNIT.unit_id)
    assert attempts.attempted(UNIT, "commit", place, attempt, lambda _: "worked") == "worked"
    assert documents_in(place.output) == {"0.json": False}
    assert attempts.attempted(UNIT, "explain", place, attempt, lambda _: "worked") == UnitSkipped(UNIT.unit_id)
    assert documents_in(place.output) == {"0.json": True}


def test_what_an_interrupted_run_had_in_hand_are_no_deaths():
    place = worker_stores()
    units = [replace(UNIT, unit_id=f"{number:020x}") for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        attempted(UNIT, "read", place, raising(KeyboardInterrupt()))
    assert documents_in(place.output) == {"0.json": True}
    for unit in units[:2]:
        dead_attempts(place.output, unit.unit_id, 1)
        attempts.begin(unit, place)
    attempt_markers.end_interrupted(place.output, units, "run")
    assert [attempts.begin(unit, place).num_deaths for unit in units] == [1, 1, 0]


def test_units_that_were_not_begun_are_not_all_looked_at():
    asked = []

    class Counting(MemoryStore):
        def read(self, key, **options):
            asked.append(key)
            return super().read(key, **options)

    units = [replace(UNIT, unit_id=f"{number:020x}") for number in range(3 * attempt_markers.UNITS_AT_ONCE)]
    place = worker_stores(Counting())
    attempts.begin(units[9], place)
    attempt_markers.end_interrupted(place.output, units, "run")
    assert len(asked) == 2 * attempt_markers.UNITS_AT_ONCE + 1
    assert attempts.begin(units[9], place).num_deaths == 0


# ---------------------------------------------------------------- isolation


def test_a_child_process_dies_alone_and_its_end_is_reported():
    with Isolated(partial(itself, fatal)) as apart:
        first = apart("fine")
        assert first[0] == "fine"
        assert first[1] != os.getpid()
        assert apart("still")[1] == first[1]
        with pytest.raises(ProcessDiedError, match="2 processes that worked on it died: Aborted"):
            apart("abort")
        with pytest.raises(ZeroDivisionError, match="by nothing"):
            apart("raise")
        with pytest.raises(Reject, match="one of ours") as caught:
            apart("reject")
        assert caught.value.code is RejectCode.CORRUPT
        with pytest.raises(RuntimeError, match="OddError: it does not pickle"):
            apart("odd")
        with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
            apart("result")
        with pytest.raises(MemoryError):
            apart("much")
        last = apart("fine again")[1]
    assert last != first[1]
    deadline = time.monotonic() + 5
    while Path(f"/proc/{last}").exists():
        assert time.monotonic() < deadline, "the child process lives on"


@pytest.mark.parametrize(("make", "how"), [(cannot_be_made, "OSError|no such weights"), (os.abort, "Aborted")])
def test_a_child_process_that_does_not_start_blames_no_item(make, how):
    with Isolated(make) as apart, pytest.raises(ProcessStartError, match=how):
        apart("innocent")


# ---------------------------------------------------------------- dead letters, retry, budgets


def test_the_first_dead_letter_is_kept():
    store = MemoryStore()
    give_up(store, UNIT, "read", Cause.POISON, "the first")
    give_up(store, UNIT, "read", Cause.INPUT_MISSING, "the second")
    assert read_letters(store, [UNIT])[UNIT.unit_id].error == "the first"


def test_a_retry_begins_without_the_deaths_before_it():
    place = worker_stores()
    plan = SimpleNamespace(units=(UNIT,))
    dead_attempts(place.output, UNIT.unit_id, attempts.MAX_DEATHS)
    attempted(UNIT, "read", place, lambda _: "never called")
    assert [letter.cause for letter in reopen(place.output, plan)] == ["poison"]
    assert attempted(UNIT, "read", place, lambda careful: careful) is False


def test_a_fragment_outweighs_a_dead_letter():
    store = MemoryStore()
    assert isinstance(give_up(store, UNIT, "read", Cause.POISON, "x"), DeadLetter)
    receipt = commit_unit(result(), store, "job")
    assert isinstance(give_up(store, UNIT, "read", Cause.POISON, "x"), Receipt)
    assert receipt_of(UNIT, store.read(UNIT.fragment_key)).sha256 == receipt.sha256
    job_state = read_job_state(store, Plan({}, UNIT.layout, (UNIT,), 1, 9, 2, {}))
    assert (job_state.receipts.keys(), job_state.dead, job_state.outweighed) == ({UNIT.unit_id}, {}, [UNIT.unit_id])
    assert finalize(store, job_state)["dead"] == []
    assert read_letters(store, [UNIT]).keys() == {UNIT.unit_id}  # no right to delete is needed


@pytest.fixture
def with_dead_unit(tmp_path):
    """A run over shards of which one was gone, and a function that restores the shard."""
    data = folder_of_tars(tmp_path / "in")
    whole = (data / "a.tar").read_bytes()
    times = (data / "a.tar").stat().st_mtime_ns
    output, plan = plan_job(config_of(data, tmp_path / "out"), Execution(runner="local"))
    ensure_plan(output, plan)
    (data / "a.tar").unlink()
    outcome = run_here(data, tmp_path / "out")

    def restore_shard():
        (data / "a.tar").write_bytes(whole)
        os.utime(data / "a.tar", ns=(times, times))

    return data, LocalStore(tmp_path / "out"), outcome, restore_shard


def test_a_dead_unit_is_a_failure_until_it_is_retried_or_allowed(with_dead_unit, tmp_path):
    data, store, outcome, restore_shard = with_dead_unit
    assert outcome.manifest is None
    assert outcome.exceeded_budgets[0] == f"{len(outcome.job_state.dead)} dead units, and --max-dead-units allows 0"
    letters = list(outcome.job_state.dead.values())
    assert {(letter.cause, letter.inputs, letter.stage) for letter in letters} == {("input_missing", "a.tar", "read")}
    assert [row["shard"].endswith("b.tar") for row in rows_in(store)] == [True] * 4
    with pytest.raises(ConfigError, match="cause 'posion' is not known; known: input_missing"):
        reopen(store, load_plan(store), "posion")
    assert reopen(store, load_plan(store), "poison") == []
    restore_shard()
    assert reopen(store, load_plan(store)) == letters
    assert run_here(data, tmp_path / "out").manifest["dead"] == []
    run_here(data, tmp_path / "undisturbed")
    assert fragments_in(store) == fragments_in(LocalStore(tmp_path / "undisturbed"))
    with pytest.raises(ConfigError, match="is finished"):
        reopen(store, load_plan(store))


def test_a_manifest_names_the_dead_units_that_were_allowed(with_dead_unit):
    _, store, outcome, _ = with_dead_unit
    manifest = finalize(store, outcome.job_state)
    assert {(dead["cause"], dead["inputs"]) for dead in manifest["dead"]} == {("input_missing", "a.tar")}
    assert {dead["unit_id"] for dead in manifest["dead"]} == outcome.job_state.dead.keys()
    (share,) = exceeded_budgets(outcome.job_state, Budget(0.5, len(outcome.job_state.dead)))
    lost = sum(letter.num_records for letter in outcome.job_state.dead.values())
    assert share.startswith(f"{lost + outcome.job_state.total('num_rejected'):,} of")
    assert exceeded_budgets(outcome.job_state, Budget(1.0, len(outcome.job_state.dead))) == []


def test_a_job_that_was_finished_without_its_dead_units_is_complete(with_dead_unit, tmp_path):
    data, _, outcome, _ = with_dead_unit
    out, dead = tmp_path / "out", len(outcome.job_state.dead)
    assert blocksight("finalize", out).returncode == 3
    assert blocksight("finalize", out, "--max-dead-units", dead).returncode == 0
    for command in (["finalize", out], ["status", out], ["verify", out]):
        done = blocksight(*command)
        assert done.returncode == 0, done.stdout
        assert "retry" not in done.stdout
    assert run_here(data, out).exceeded_budgets == excess_of_share(outcome)


def excess_of_share(outcome):
    return tuple(exceeded_budgets(outcome.job_state, Budget(0.5, len(outcome.job_state.dead))))


def test_open_units_decide_the_exit_code_before_dead_units(with_dead_unit, tmp_path):
    _, store, outcome, _ = with_dead_unit
    store.delete(next(iter(outcome.job_state.receipts.values())).fragment)
    for name in ("finalize", "status", "verify"):
        assert blocksight(name, tmp_path / "out").returncode == 4, name


def test_a_retry_that_a_manifest_overtakes_opens_nothing(with_dead_unit, monkeypatch):
    _, store, outcome, _ = with_dead_unit
    asked = iter([None, {"dead": []}])
    monkeypatch.setattr("blocksight.jobs.ledger.retry.final_manifest", lambda *_: next(asked))
    with pytest.raises(ConfigError, match="finished meanwhile"):
        reopen(store, outcome.job_state.plan)
    assert read_letters(store, outcome.job_state.plan.units) == outcome.job_state.dead


def test_finalize_compares_sets_and_metadata(tmp_path):
    run_here(folder_of_tables(tmp_path / "in"), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    store.delete(MANIFEST_KEY)
    job_state = read_job_state(store, load_plan(store))
    store.put("data/999999-00.parquet", b"x")
    (fragment,) = (key for key in fragments_in(store) if "/000000-" in key)
    body = store.read(fragment)
    store.delete(fragment)
    store.create(fragment, body, metadata={"sha256": "0" * 64})
    with pytest.raises(UnreconciledError, match=r"999999-00.parquet was not planned\n.*sha256 is .* and 0000"):
        finalize(store, replace(job_state, strangers=read_job_state(store, job_state.plan).strangers))
    assert store.head(MANIFEST_KEY) is None


def test_a_job_of_which_nothing_is_explained_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 1.0)
    (tmp_path / "in").mkdir()
    for number in range(NUM_FIRST_UNITS + 4):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"no picture")
    outcome = run_here(tmp_path / "in", tmp_path / "out")
    patient = execute(tmp_path / "in", tmp_path / "patient", max_reject_fraction=1.0)
    assert (patient.ran.stopped, patient.exceeded_budgets, patient.job_state.open_units) == (None, (), [])
    assert outcome.ran.is_hopeless
    assert outcome.ran.stopped == "no record of the first 5 units was explained (5 not_an_image)"
    assert len(outcome.job_state.open_units) == 4
    (tmp_path / "in" / "5.png").write_bytes(picture(1))
    assert run_here(tmp_path / "in", tmp_path / "other").manifest is None
    (tmp_path / "in" / "0.png").write_bytes(picture(1))
    done = run_here(tmp_path / "in", tmp_path / "third")
    assert done.manifest is not None
    assert done.exceeded_budgets == ("7 of 9 records rejected or in dead units, and --max-reject-fraction allows 0.5",)


def execute(data, output, **execution):
    return run_job(config_of(data, output), Execution(runner="local", **execution), Console(quiet=True))


def test_first_units_are_not_hopeless_once_a_record_is_explained():
    opening = FirstUnits(is_over=False)
    bad = receipt(num_ok=0, rejects={"corrupt": 2})
    for _ in range(NUM_FIRST_UNITS - 1):
        opening.add(bad)
    opening.add(UnitFailure("x", 0, "x", "read", "x"))
    opening.add(DeadLetter("x", 0, "x", "input_missing", "read", "x", 7))
    assert not opening.is_hopeless
    opening.add(bad)
    assert opening.is_hopeless
    assert opening.verdict() == "no record of the first 5 units was explained (10 corrupt)"
    opening.add(receipt(num_ok=1, rejects={}))
    assert not opening.is_hopeless


def receipt(num_ok, rejects):
    return Receipt("u", 0, "f", 1, "s", 2, 2, num_ok, 2 - num_ok, rejects, 0, {})


# ---------------------------------------------------------------- a model that fails over one record


def test_a_record_that_the_model_raises_over_is_rejected_alone(tmp_path):
    data = folder_of_images(tmp_path / "in", 3, bad=False)
    (data / "cat" / "red.png").write_bytes(red())
    run_here(data, tmp_path / "out", model="tests.jobs.tiny:make_raising")
    rows = {row["key"]: row for row in rows_in(LocalStore(tmp_path / "out"))}
    assert rows["cat/red.png"]["reject_code"] == "model_failed"
    assert rows["cat/red.png"]["error"] == "RuntimeError: this model sees red"
    run_here(data, tmp_path / "calm")
    calm = {row["key"]: row for row in rows_in(LocalStore(tmp_path / "calm"))}
    for key in ("ant/000.png", "bee/001.png", "cat/002.png"):
        assert rows[key]["map"] == calm[key]["map"]


def few_images(root):
    return folder_of_images(root, 3)


@pytest.mark.parametrize("make", [few_images, folder_of_tables, pytest.param(folder_of_tars, marks=pytest.mark.sweep)])
def test_a_careful_unit_has_the_same_bytes(tmp_path, monkeypatch, make):
    """After two deaths in every step, every step runs record by record, in child processes."""
    for place in ("blocksight.cluster.sizing", "blocksight.jobs.plan.units"):
        monkeypatch.setattr(f"{place}.LEAST_UNIT_SECONDS", 600.0)  # all records of a shard in one unit
    data = make(tmp_path / "in")
    output, plan = plan_job(config_of(data, tmp_path / "plain", target="top-2"), Execution(runner="local"))
    ensure_plan(output, plan)
    if make is few_images:
        (data / plan.units[0].objects[0].key).unlink()
    run_here(data, tmp_path / "plain", target="top-2")
    store, plain = LocalStore(tmp_path / "out"), LocalStore(tmp_path / "plain")
    for unit in load_plan(plain).units:
        for stage in ("read", "explain", "commit"):
            for number in range(2):
                store.put(f"_job/attempts/{unit.unit_id}/{stage}-{number}.json", b"{}")
    for info in plain.list("_job/plan/"):
        store.put(info.key, plain.read(info.key))
    run_here(data, tmp_path / "out", target="top-2")
    assert fragments_in(store) == fragments_in(plain)
    assert make is not few_images or "input_missing" in {row["reject_code"] for row in rows_in(store)}


# ---------------------------------------------------------------- garbage collection


def test_garbage_is_removed_and_results_stay(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 3), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    facts = {info.key: info.etag for info in store.list()}
    plan = load_plan(store)
    letter = asdict(give_up(MemoryStore(), plan.units[0], "read", Cause.POISON, "x"))
    left = [
        f"{attempt_markers.prefix_of(plan.units[0].unit_id)}0.json",
        f"_job/dead/{plan.units[0].unit_id}.json",
        "_job/plan/units-0000.parquet",
        "_job/probe-1-twice",
        "_job/runs/r/stop",
        "data/_probe-1",
        "_job/receipts/_probe-2",
    ]
    for key in left:
        store.put(key, json.dumps(letter).encode())
    old = tmp_path / "out/data/.writing-00"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    (tmp_path / "out/data/.writing-01").write_bytes(b"being written now")
    (tmp_path / "out/data/.metadata+77-none.parquet.json").write_bytes(b"{}")
    os.utime(tmp_path / "out/data/.metadata+77-none.parquet.json", (0, 0))
    expected = sorted([*left, "data/.writing-00", "data/.metadata+77-none.parquet.json"])
    job_state = read_job_state(store, plan)
    assert job_state.strangers == []
    assert [faults for _, faults in check(store, plan) if faults] == []
    assert sorted(collect_garbage(store, job_state, dry_run=True)) == expected
    assert old.exists()
    assert sorted(collect_garbage(store, job_state)) == expected
    assert {info.key: info.etag for info in store.list()} == facts
    assert not old.exists()
    assert (tmp_path / "out/data/.writing-01").exists()
    assert collect_garbage(store, job_state) == []


def test_garbage_of_a_job_that_may_run_stays(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 3), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    store.delete(MANIFEST_KEY)
    store.put("_job/probe-1-twice", b"x")
    store.put("_job/runs/r/stop", b"x")
    store.put(f"{attempt_markers.prefix_of('c' * 20)}0.json", b"{}")
    assert collect_garbage(store, read_job_state(store, load_plan(store))) == []
