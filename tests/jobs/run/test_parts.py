"""A job in parts, each with a driver of its own: the same fragments as one driver's, completed by the last to end."""

import time

import pytest

from blocksight.jobs.explain.preflight import STEP
from blocksight.jobs.ledger.attempt_markers import FOLDER
from blocksight.jobs.ledger.reconcile import MANIFEST_KEY, check
from blocksight.jobs.plan.config import ConfigError, Execution, Part, execution_of
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.run import job
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, config_of, fragments_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images
from tests.storage.memory import MemoryStore

NUM_IMAGES = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("parts") / "in", NUM_IMAGES, bad=False)


@pytest.fixture(autouse=True)
def _units_of_two(monkeypatch):
    sizes = lambda num_records, *_: [min(2, num_records - at) for at in range(0, num_records, 2)]  # noqa: E731
    monkeypatch.setattr("blocksight.jobs.plan.units.shrinking_sizes", sizes)


def explain(data, output, part):
    return blocksight(
        *("explain", "--data", data, "--output", output, "--model", MODEL, "--runner", "local", "--part", part)
    )


def test_parts_make_what_one_driver_makes_and_the_last_completes_it(data, tmp_path):
    run_here(data, tmp_path / "whole")
    store = LocalStore(tmp_path / "out")
    first = explain(data, tmp_path / "out", "1/3")
    assert first.returncode == 0, first.stderr
    assert "Part 1/3 is complete; 3 units of other parts still open." in first.stdout
    assert "2 of 2 committed" in first.stdout
    assert blocksight("status", tmp_path / "out").returncode == 4
    assert "nothing to do" not in explain(data, tmp_path / "out", "1/3").stdout
    assert explain(data, tmp_path / "out", "0/3").returncode == 0
    assert store.head(MANIFEST_KEY) is None
    last = explain(data, tmp_path / "out", "2/3")
    assert (last.returncode, "5 of 5 committed" in last.stdout) == (0, True)
    assert store.head(MANIFEST_KEY) is not None
    assert fragments_in(store) == fragments_in(LocalStore(tmp_path / "whole"))
    assert [fault for _, faults in check(store, load_plan(store)) for fault in faults] == []


def test_more_parts_than_units_leave_some_drivers_without_work(data, tmp_path):
    for number in range(8):
        assert explain(data, tmp_path / "out", f"{number}/8").returncode == 0
    assert LocalStore(tmp_path / "out").head(MANIFEST_KEY) is not None


def test_each_unit_is_of_one_part(data, tmp_path):
    run_here(data, tmp_path / "out")
    plan = load_plan(LocalStore(tmp_path / "out"))
    for of in (1, 2, 3, 5, 7):
        parts = [plan.part(Part(number, of)) for number in range(of)]
        assert [unit for part in parts for unit in part.units] == list(plan.units)
        assert sum(part.num_records for part in parts) == NUM_IMAGES
        assert {part.fingerprint for part in parts} == {plan.fingerprint}


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "1/0", "a/b", "1/2/3"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ConfigError, match="is no part of a job; wanted NUMBER/PARTS"):
        execution_of({"part": text})
    assert execution_of({"part": "0/1"}).part == Part(0, 1)


def test_units_are_cut_for_the_workers_of_all_parts(data, tmp_path, monkeypatch):
    seen, plan_for = [], job.plan_for
    monkeypatch.setattr(job, "plan_for", lambda made, workforce: seen.append(workforce) or plan_for(made, workforce))
    execution = Execution(runner="local", workers=3, part="3/4")
    job.run_job(config_of(data, tmp_path / "out", limit=1), execution, job.Console(quiet=True))
    assert [workforce.num_workers for workforce in seen] == [1, 12]


def test_drivers_that_begin_together_examine_the_model_once(monkeypatch):
    """The second one waits while the first is at it, and not for one that has ended."""
    monkeypatch.setattr(job, "PREFLIGHT_SECONDS", 0.3)
    monkeypatch.setattr(job, "PREFLIGHT_POLL_SECONDS", 0.01)
    store = MemoryStore()
    began = time.monotonic()
    assert job.awaited_preflight(store) is None
    assert time.monotonic() - began < 0.2
    store.put(f"{FOLDER}{STEP}-0.json", b"{}")
    asked = []
    monkeypatch.setattr(job, "stored_preflight", lambda _: asked.append(1) or ("found" if len(asked) == 3 else None))
    assert job.awaited_preflight(store) == "found"
    store.delete(f"{FOLDER}{STEP}-0.json")
    asked[:] = [1] * 9
    assert job.awaited_preflight(store) is None
    assert len(asked) == 10
