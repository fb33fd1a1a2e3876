"""Ray with faults: workers, nodes and raylets that die or hang, poison, full memory, actors that do not start."""

import json
import os
import signal
import time

import pytest

from blocksight.storage.stores.local import LocalStore
from tests.faults.cluster import RayCluster
from tests.faults.processes import ended, started
from tests.faults.test_processes import markers_of_open_units
from tests.faults.verifier import Watcher, assert_sound, contents, row_hashes
from tests.jobs.jobs_of import rows_in, run_here
from tests.jobs.tiny import folder_of_images, red

pytestmark = pytest.mark.faults

SMALL_UNITS = "unit=1.5"
NUM_IMAGES = 60


def explain(data, output, model, *options):
    return ["explain", "--data", data, "--output", output, "--model", f"tests.jobs.tiny:{model}", *options]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("cluster") / "in", NUM_IMAGES)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The hashes of the rows of a run without faults."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_here(data, output, model="tests.jobs.tiny:make_slow")
    return row_hashes(LocalStore(output))


def wait_until(holds, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def wait_until_at_work(cluster, store, process, committed=2):
    """Waits until some fragments are committed and actors explain."""
    wait_until(lambda: len(contents(store)) >= committed and cluster.workers("_Work"), process)


def kill_workers(cluster, store, process):
    for title in ("_Work", "_Work", "Map"):
        wait_until_at_work(cluster, store, process)
        os.kill(cluster.workers(title)[0], signal.SIGKILL)
        time.sleep(2)


def kill_a_node(cluster, store, process):
    wait_until_at_work(cluster, store, process)
    cluster.kill_node(0)
    cluster.add_node()


def stop_a_raylet(cluster, store, process):
    """Stops a raylet so long that the head declares it dead. It learns this when it continues."""
    wait_until_at_work(cluster, store, process)
    raylet = cluster.raylets[-1]
    os.kill(raylet, signal.SIGSTOP)
    time.sleep(25)
    os.kill(raylet, signal.SIGCONT)


@pytest.mark.parametrize("fault", [kill_workers, kill_a_node, stop_a_raylet])
def test_a_death_in_a_cluster_costs_work_and_no_result(data, whole, tmp_path, fault):
    store = LocalStore(tmp_path / "out")
    with RayCluster() as cluster, Watcher(LocalStore(tmp_path / "out")) as watcher:
        job = explain(data, tmp_path / "out", "make_slow", "--address", cluster.address)
        process = started(*job, fault=SMALL_UNITS)
        fault(cluster, store, process)
        still_open = process.poll() is None
        printed, _ = process.communicate(timeout=200)
        assert process.returncode == 0, printed
    assert still_open, "the fault came too late to matter"
    assert_sound(store, watcher.faults)
    assert row_hashes(store) == whole


def test_a_poisonous_record_is_rejected_alone_and_the_run_goes_on(tmp_path):
    data = folder_of_images(tmp_path / "in", 10, bad=False)
    (data / "cat" / "poison.png").write_bytes(red())
    code, printed = ended(*explain(data, tmp_path / "out", "make_deadly"), fault=SMALL_UNITS)
    assert code == 0, printed
    store = LocalStore(tmp_path / "out")
    assert {row["key"]: row["reject_code"] for row in rows_in(store) if row["reject_code"]} == {
        "cat/poison.png": "process_died"
    }
    assert len(rows_in(store)) == 11
    assert_sound(store)


def test_an_actor_that_fails_to_start_once_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSIGHT_TEST_FLAG", str(tmp_path / "flag"))
    data = folder_of_images(tmp_path / "in", 6, bad=False)
    code, printed = ended(*explain(data, tmp_path / "out", "make_late"))
    assert code == 0, printed
    assert (tmp_path / "flag").exists()
    assert_sound(LocalStore(tmp_path / "out"))


def test_a_small_object_store_spills_and_nothing_is_lost(tmp_path):
    """The pixels and maps of a few units need more than the session's 80 MB, where tasks read and commit them."""
    data = folder_of_images(tmp_path / "in", 1200, bad=False)
    with RayCluster(0, num_cpus=3, object_store_memory=80 << 20) as cluster:
        arguments = explain(data, tmp_path / "out", "make_wide", "--address", cluster.address, "--workers", "1")
        code, printed = ended(*arguments, "-p", "mu=0.95", fault="unit=500;tasks")
        logs = cluster.logs()
    assert code == 0, printed
    assert "Spilled" in logs, "the pressure had no effect"
    store = LocalStore(tmp_path / "out")
    assert len(rows_in(store)) == 1200
    assert_sound(store)


def test_sigterm_ends_a_ray_run_within_the_grace_time(data, tmp_path):
    store = LocalStore(tmp_path / "out")
    process = started(*explain(data, tmp_path / "out", "make_slow"), fault=SMALL_UNITS)
    wait_until(lambda: len(contents(store)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 4, printed
    assert time.monotonic() - start < 30
    assert "Stopped: SIGTERM" in printed
    assert all(json.loads(store.read(key))["ended"] for key in markers_of_open_units(store))
    before = contents(store)
    code, printed = ended(*explain(data, tmp_path / "out", "make_slow"), fault=SMALL_UNITS)
    assert code == 0, printed
    assert before.items() < contents(store).items()
    assert_sound(store)


def test_two_drivers_at_once_do_the_work_once(data, whole, tmp_path):
    store = LocalStore(tmp_path / "out")
    job = explain(data, tmp_path / "out", "make_slow", "--workers", "1")
    with Watcher(LocalStore(tmp_path / "out")) as watcher:
        drivers = [started(*job, fault=SMALL_UNITS) for _ in range(2)]
        for driver in drivers:
            printed, _ = driver.communicate(timeout=200)
            assert driver.returncode == 0, printed
    assert_sound(store, watcher.faults)
    assert row_hashes(store) == whole
