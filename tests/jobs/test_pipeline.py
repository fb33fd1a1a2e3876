"""Ray against the in-process runner, on local folders and through a real bucket; kills in the middle."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jobs.plan import load_plan
from jobs.reconcile import check
from storage.local import LocalStore
from storage.stores import open_store
from tests.jobs.jobs_of import ROOT, blocksight, command, fragments_in, rows_in, run_here, started
from tests.jobs.tiny import MODEL, folder_of_images, folder_of_tars

pytestmark = pytest.mark.servers


def explain(data, output, *options):
    return ["explain", "--data", data, "--output", output, "--model", MODEL, *options]


def assert_sound(store):
    assert [fault for _, found in check(store, load_plan(store)) for fault in found] == []


def ways(store):
    """How masks were scored, by the receipts."""
    return {json.loads(store.read(info.key))["forward"] for info in store.list("_job/receipts/")}


def test_ray_leaves_the_same_bytes_as_one_process(tmp_path):
    for kind, make in (("images", folder_of_images), ("tars", folder_of_tars)):
        data = make(tmp_path / kind)
        run_here(data, tmp_path / f"{kind}-here", target="top-2")
        done = started(*explain(data, tmp_path / f"{kind}-ray", "--target", "top-2"))
        assert done.returncode == 0, done.stderr
        here, ray = (LocalStore(tmp_path / f"{kind}-{where}") for where in ("here", "ray"))
        assert fragments_in(here) == fragments_in(ray)
        assert ways(here) == ways(ray) == {"eager float32, 4 per pass"}
        assert_sound(ray)


def test_through_a_bucket(tmp_path, bucket):
    prefix = f"{bucket.uri}/{os.urandom(4).hex()}"
    source = open_store(f"{prefix}/in", bucket.endpoint_url)
    for path in folder_of_tars(tmp_path / "in").iterdir():
        source.put(path.name, path.read_bytes())
    endpoint = ("--endpoint-url", bucket.endpoint_url)
    done = started(*explain(f"{prefix}/in", f"{prefix}/out", *endpoint, "--workers", "1"))
    assert done.returncode == 0, done.stderr
    run_here(f"{prefix}/in", f"{prefix}/here", endpoint_url=bucket.endpoint_url)
    stores = [open_store(f"{prefix}/{name}", bucket.endpoint_url) for name in ("out", "here")]
    assert fragments_in(stores[0]) == fragments_in(stores[1])
    assert_sound(stores[0])
    for name in ("status", "verify"):
        said = blocksight(name, f"{prefix}/out", *endpoint)
        assert said.returncode == 0, said.stderr
        assert "8" in said.stdout
    everything = b"".join(stores[0].read(info.key) for info in stores[0].list())
    for secret in (bucket.access_key, bucket.secret_key):
        assert secret.encode() not in everything
        assert secret not in done.stdout + done.stderr


WAVES = """
import sys
sys.modules["openvino"] = None  # as this process does without it
from rich.console import Console
from jobs import pipeline
from jobs.config import Execution
from jobs.run import run_job
from tests.jobs.jobs_of import config_of
pipeline.WAVE_UNITS = 4
run_job(config_of(sys.argv[1], sys.argv[2]), Execution(workers=1), Console(quiet=True))
"""


def test_waves_leave_the_same_bytes(tmp_path):
    data = folder_of_images(tmp_path / "in")
    run_here(data, tmp_path / "here")
    program = [sys.executable, "-c", WAVES, data, tmp_path / "waves"]
    subprocess.run(program, cwd=ROOT, check=True, capture_output=True)
    rows = {row["key"]: {**row, "unit_id": ""} for row in rows_in(LocalStore(tmp_path / "here"))}
    assert {row["key"]: {**row, "unit_id": ""} for row in rows_in(LocalStore(tmp_path / "waves"))} == rows
    assert len(fragments_in(LocalStore(tmp_path / "waves"))) > 4


def test_a_model_that_fails_on_the_workers_is_one_sentence(tmp_path):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    done = started(*explain(data, tmp_path / "out", "--workers", "1"), "--model", "tests.jobs.tiny:make_fragile")
    assert done.returncode == 2
    assert "no such model on this node" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: Ray gave the job up:")


@pytest.mark.parametrize(
    "moment", [pytest.param(0.0, marks=pytest.mark.faults), 0.35, pytest.param(0.8, marks=pytest.mark.faults)]
)
def test_a_killed_process_group_changes_nothing_in_the_end(tmp_path, moment):
    """`moment` is the share of fragments that stand when the whole process group is killed."""
    data = folder_of_images(tmp_path / "in", 30)
    run_here(data, tmp_path / "whole")
    whole = fragments_in(LocalStore(tmp_path / "whole"))
    arguments = explain(data, tmp_path / "out")
    victim = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    store = LocalStore(tmp_path / "out")
    wait_for(lambda: store.head("_job/plan/plan.json") is not None, victim)
    wait_for(lambda: len(fragments_in(store)) >= moment * len(whole), victim)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert len(fragments_in(store)) < len(whole), "the kill came too late to matter"
    again = started(*arguments)
    assert again.returncode == 0, again.stderr
    assert fragments_in(store) == whole
    assert len(rows_in(store)) == 33
    assert_sound(store)


def wait_for(holds, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.02)
