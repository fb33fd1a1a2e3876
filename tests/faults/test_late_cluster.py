"""A cluster that is still coming: a job waits for its nodes, grows and shrinks with them, and leaves no request."""

import json
import signal
import time

import pytest

from blocksight.storage.stores.local import LocalStore
from tests.faults.cluster import RayCluster
from tests.faults.processes import ended, started
from tests.faults.verifier import assert_sound, contents, row_hashes
from tests.jobs.jobs_of import run_here
from tests.jobs.tiny import folder_of_images

pytestmark = pytest.mark.faults

SMALL_UNITS = "unit=1.5"


def explain(data, output, cluster, *options):
    job = ["explain", "--data", data, "--output", output, "--model", "tests.jobs.tiny:make_slow"]
    return [*job, "--address", cluster.address, *options]


def asked_of(cluster):
    """What the cluster's autoscaler is asked for: the persistent hint."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
        from ray.experimental.internal_kv import _internal_kv_get

        return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("late") / "in", 300)


def wait_for_line(process, words):
    """Reads the process's output up to a line with these words; returns what was read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if words in line:
            return "".join(read)
    raise AssertionError(f"no line with {words!r}: {''.join(read)}")


def test_a_job_waits_for_nodes_and_grows_and_shrinks_with_them(data, tmp_path):
    """The head has no CPU. A node joins late, two more during the work, and one of them is killed."""
    run_here(data, tmp_path / "whole", model="tests.jobs.tiny:make_slow")
    store = LocalStore(tmp_path / "out")
    with RayCluster(0, num_cpus=0) as cluster:
        process = started(*explain(data, tmp_path / "out", cluster, "--wait", "2m"), fault=SMALL_UNITS)
        wait_for_line(process, "waiting for 1 explain actor: 1 node with 0 CPUs")
        assert asked_of(cluster) == [{"CPU": 1.0}]
        cluster.add_node()
        wait_for_line(process, "1 explain actor, a CPU core each")
        deadline = time.monotonic() + 100
        while len(contents(store)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster.add_node()
        cluster.add_node()
        printed = wait_for_line(process, "the Ray cluster has")
        while len(cluster.workers("_Work")) < 2:
            assert process.poll() is None, "the job ended before it grew"
            time.sleep(0.1)
        cluster.kill_node(0)
        rest, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed + rest
        assert not asked_of(cluster)
    assert_sound(store, [])
    assert row_hashes(store) == row_hashes(LocalStore(tmp_path / "whole"))


def test_a_job_that_waits_in_vain_says_so_and_leaves_no_request(data, tmp_path):
    with RayCluster(0, num_cpus=0) as cluster:
        code, printed = ended(*explain(data, tmp_path / "out", cluster, "--wait", "3s", "--min-workers", "2"))
        assert code == 4, printed
        assert "0 of 2 explain actors fit on the Ray cluster" in printed
        assert not asked_of(cluster)
        process = started(*explain(data, tmp_path / "out", cluster, "--wait", "2m"))
        wait_for_line(process, "waiting for 1 explain actor")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
        assert not asked_of(cluster)
    assert not list(LocalStore(tmp_path / "out").list("")), "something was written before a worker came"


def test_the_workers_get_a_copy_of_a_users_package(tmp_path):
    """Its folder is on no import path of the workers; a helper module of the package comes with it."""
    package = tmp_path / "elsewhere" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from mine.helper import make\n")
    (package / "helper.py").write_text("from tests.jobs.tiny import make_other as make\n")
    data = folder_of_images(tmp_path / "in", 3, bad=False)
    with RayCluster(0) as cluster:
        job = ["explain", "--data", data, "--output", tmp_path / "out", "--model", "mine:make", "--workers", "1"]
        code, printed = ended(*job, "--address", cluster.address)
        assert code == 2, printed
        code, printed = ended(*job, "--address", cluster.address, "--py-modules", package)
    assert code == 0, printed
    assert len(row_hashes(LocalStore(tmp_path / "out"))) == 3
