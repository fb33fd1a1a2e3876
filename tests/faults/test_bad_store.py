"""Jobs on a store that loses replies, refuses, cuts and delays, dies and comes back, or stays away."""

import os

import pytest

from blocksight.jobs.ledger.reconcile import read_job_state
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.plan.records import UnfinishedError
from blocksight.jobs.run import job as run
from blocksight.jobs.run import local
from blocksight.storage.stores import retrying
from blocksight.storage.stores.opening import open_store
from tests.faults.cluster import FragileBucket
from tests.faults.processes import ended, started
from tests.faults.verifier import Watcher, assert_sound, contents, row_hashes
from tests.jobs.jobs_of import rows_in, run_here
from tests.jobs.tiny import folder_of_images, folder_of_tars

pytestmark = pytest.mark.faults

FAULTS = {
    "lost replies": {"lose_reply": 0.5},
    "503 storms": {"refuse": 0.3},
    "cut bodies": {"cut": 0.3},
    "a slow store": {"delay": 0.1},
    "everything": {"lose_reply": 0.2, "refuse": 0.2, "cut": 0.2, "delay": 0.02},
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with FragileBucket(tmp_path_factory.mktemp("bucket"), seed=5) as fragile:
        yield fragile


@pytest.fixture
def place(bucket):
    """A new prefix of the bucket; the proxy injects no fault yet."""
    bucket.proxy.lose_reply = bucket.proxy.refuse = bucket.proxy.cut = bucket.proxy.delay = 0.0
    return f"{bucket.uri}/{os.urandom(4).hex()}"


def fill(place, bucket, folder):
    source = open_store(f"{place}/in", bucket.endpoint_url)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        source.put(path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_bad_connection_costs_time_and_nothing_else(bucket, place, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 90.0)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(run, "SHORT_PATIENCE_SECONDS", 60.0)
    fill(place, bucket, folder_of_images(tmp_path / "in", 6))
    run_here(f"{place}/in", f"{place}/undisturbed", endpoint_url=bucket.endpoint_url)
    output = open_store(f"{place}/out", bucket.endpoint_url)
    before = bucket.proxy.counts.total()
    with Watcher(open_store(f"{place}/out", bucket.endpoint_url)) as watcher:
        for name, value in FAULTS[fault].items():
            setattr(bucket.proxy, name, value)
        outcome = run_here(f"{place}/in", f"{place}/out", endpoint_url=bucket.endpoint_url)
        bucket.proxy.lose_reply = bucket.proxy.refuse = bucket.proxy.cut = bucket.proxy.delay = 0.0
    assert outcome.manifest is not None
    assert fault == "a slow store" or bucket.proxy.counts.total() > before, "the fault had no effect"
    assert_sound(output, watcher.faults)
    assert row_hashes(output) == row_hashes(open_store(f"{place}/undisturbed", bucket.endpoint_url))
    assert contents(output) == contents(open_store(f"{place}/undisturbed", bucket.endpoint_url))


def test_a_store_that_dies_and_comes_back_is_waited_for(bucket, place, tmp_path):
    fill(place, bucket, folder_of_images(tmp_path / "in", 20, bad=False))
    output = open_store(f"{place}/out", bucket.endpoint_url)
    job = ["explain", "--data", f"{place}/in", "--output", f"{place}/out", "--model", "tests.jobs.tiny:make_slow"]
    process = started(*job, "--endpoint-url", bucket.endpoint_url, "--runner", "local", fault="unit=1")
    while not contents(output):
        assert process.poll() is None, process.communicate()
    with bucket.killed():
        assert process.poll() is None, process.communicate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert_sound(output)


def test_a_store_that_stays_away_ends_the_run_which_can_be_resumed(bucket, place, tmp_path, monkeypatch):
    monkeypatch.setattr(retrying, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 20.0)
    fill(place, bucket, folder_of_images(tmp_path / "in", 6, bad=False))
    output = open_store(f"{place}/out", bucket.endpoint_url)
    original = local.take_unit

    def cut_off_in_the_middle(unit, *arguments, **options):
        if unit.ordinal == 2:
            bucket.proxy.down = True
        return original(unit, *arguments, **options)

    monkeypatch.setattr(local, "take_unit", cut_off_in_the_middle)
    with pytest.raises(UnfinishedError, match=r"cannot be reached: .*goes on from there"):
        run_here(f"{place}/in", f"{place}/out", endpoint_url=bucket.endpoint_url)
    bucket.proxy.down = False
    monkeypatch.setattr(local, "take_unit", original)
    assert len(read_job_state(output, load_plan(output)).open_units) == 4
    assert run_here(f"{place}/in", f"{place}/out", endpoint_url=bucket.endpoint_url).manifest is not None
    assert_sound(output)


def test_a_shard_that_changes_after_the_plan_is_a_dead_letter(bucket, place, tmp_path):
    folder = folder_of_tars(tmp_path / "in")
    fill(place, bucket, folder)
    source = open_store(f"{place}/in", bucket.endpoint_url)
    job = ["--output", f"{place}/out", "--endpoint-url", bucket.endpoint_url]
    explain = ["explain", "--data", f"{place}/in", "--model", "tests.jobs.tiny:make", "--runner", "local", *job]
    code, printed = ended(*explain)
    assert code == 0, printed
    output = open_store(f"{place}/out", bucket.endpoint_url)
    for info in [*output.list("data/"), *output.list("_job/receipts/"), *output.list("_job/final/")]:
        output.delete(info.key)
    whole = source.read("a.tar")
    source.put("a.tar", whole + bytes(512))
    code, printed = ended(*explain)
    assert code == 3, printed
    assert "input_changed" in printed
    assert "retry" in printed
    assert_sound(output)
    assert all(row["shard"].endswith("b.tar") for row in rows_in(output))
    source.put("a.tar", whole)
    code, printed = ended("retry", f"{place}/out", "--endpoint-url", bucket.endpoint_url)
    assert code == 0
    assert "open again" in printed
    code, printed = ended(*explain)
    assert code == 0, printed
    assert_sound(output)
