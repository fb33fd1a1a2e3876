"""Ray against the in-process runner: jobs, evaluations and first passes, on folders and through a bucket; kills.

All jobs but those that are killed run on one session, which spares its start and that of its processes.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import ray
import safetensors.torch
import torch

from blocksight.cluster.nodes import NodeWatch, joined_nodes
from blocksight.cluster.session import ray_session
from blocksight.cluster.sizing import Device, Sizing, size_for
from blocksight.jobs.explain.learned import LEARNED_KEY
from blocksight.jobs.ledger.reconcile import check
from blocksight.jobs.ledger.stop_request import Stop
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.run import pipeline
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.opening import open_store
from tests.cluster.policies import NOT_USED_HERE, WatchingProxy, refused, unused
from tests.jobs.jobs_of import ROOT, blocksight, command, fragments_in, receipts_in, rows_in, run_here
from tests.jobs.outputs import evaluated
from tests.jobs.tiny import MODEL, folder_of_images, folder_of_tars
from tests.storage.memory import MemoryStore

pytestmark = [
    pytest.mark.servers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray's driver warns of its own settings
]


@pytest.fixture(scope="module", autouse=True)
def one_session(bucket) -> Iterator[None]:
    """A Ray session for all jobs of this process; its workers know the bucket."""

    @contextmanager
    def joined(address: str | None, num_actors: int | None, device: Device, *_: object) -> Iterator[Sizing]:
        yield size_for(joined_nodes(), num_actors, device)

    with ray_session(num_actors=2), pytest.MonkeyPatch.context() as patch:
        patch.setattr("blocksight.cluster.session.ray_session", joined)
        yield


def explain(data, output, *options):
    """With one worker, if `options` do not say otherwise: each loads torch anew."""
    return ["explain", "--data", data, "--output", output, "--model", MODEL, "--workers", 1, *options]


def assert_done(done):
    assert done.returncode == 0, done.stdout + done.stderr


def assert_sound(store):
    assert [fault for _, found in check(store, load_plan(store)) for fault in found] == []


def ways(store):
    """How masks were scored, by the receipts."""
    return {receipt["forward"] for receipt in receipts_in(store)}


def test_ray_leaves_the_same_bytes_as_one_process(tmp_path):
    data = folder_of_images(tmp_path / "in")
    run_here(data, tmp_path / "here", target="top-2")
    assert_done(blocksight(*explain(data, tmp_path / "ray", "--target", "top-2", "--workers", 2)))
    here, ray = (LocalStore(tmp_path / where) for where in ("here", "ray"))
    assert fragments_in(here) == fragments_in(ray)
    assert ways(here) == ways(ray) == {"eager float32, 4 per pass"}
    assert_sound(ray)


def test_tasks_that_read_and_commit_beside_a_gpu_leave_the_same_bytes(tmp_path, monkeypatch):
    """The pipeline of a session with GPUs; its actor computes on the CPU here."""
    dataset, actors = pipeline._explain_dataset, pipeline._actors
    monkeypatch.setattr(pipeline, "_actors", lambda *given: {**actors(*given), "num_gpus": 0})
    shapes = []

    def three_stages(units, context, weights, sizing, unfit):
        made = dataset(units, context, weights, replace(sizing, gpus_per_actor=1.0), unfit)
        shapes.append(str(made))
        return made

    monkeypatch.setattr(pipeline, "_explain_dataset", three_stages)
    data = folder_of_images(tmp_path / "in")
    run_here(data, tmp_path / "here", target="top-2")
    assert_done(blocksight(*explain(data, tmp_path / "ray", "--target", "top-2")))
    here, ray = (LocalStore(tmp_path / where) for where in ("here", "ray"))
    assert fragments_in(here) == fragments_in(ray)
    assert_sound(ray)
    assert all(name in shapes[0] for name in ("_read", "_Explain", "_commit"))


def test_shards_through_a_bucket(tmp_path, bucket, capfd):
    """The bytes are those of one process, no secret is told, and each role asks for what its policy allows."""
    names = ("example-images", "example-maps/run-1", "example-maps/here")  # as the policies have them
    images, out, here = (f"{bucket.uri}/{name}" for name in names)
    endpoint = ("--endpoint-url", bucket.endpoint_url)
    source = open_store(images, bucket.endpoint_url)
    for path in folder_of_tars(tmp_path / "in").iterdir():
        source.put(path.name, path.read_bytes())
    with WatchingProxy(bucket.port) as proxy:
        done = blocksight(*explain(images, out, "--endpoint-url", proxy.endpoint_url))
    assert_done(done)
    for role, seen in proxy.seen.items():
        assert refused(role, seen) == set()
        assert unused(role, seen) <= NOT_USED_HERE
    run_here(images, here, endpoint_url=bucket.endpoint_url)
    stores = [open_store(place, bucket.endpoint_url) for place in (out, here)]
    assert fragments_in(stores[0]) == fragments_in(stores[1])
    assert_sound(stores[0])
    for name in ("status", "verify"):
        said = blocksight(name, out, *endpoint)
        assert said.returncode == 0, said.stderr
        assert "8" in said.stdout
    beside = "".join(capfd.readouterr())  # what processes wrote past this one's streams
    everything = b"".join(stores[0].read(info.key) for info in stores[0].list())
    for secret in (bucket.access_key, bucket.secret_key):
        assert secret.encode() not in everything
        assert secret not in done.stdout + done.stderr + beside


def test_waves_leave_the_same_bytes(tmp_path, monkeypatch):
    data = folder_of_images(tmp_path / "in", 4)
    run_here(data, tmp_path / "here")
    monkeypatch.setattr(pipeline, "WAVE_UNITS", 4)
    assert_done(blocksight(*explain(data, tmp_path / "waves")))
    rows = {row["key"]: {**row, "unit_id": ""} for row in rows_in(LocalStore(tmp_path / "here"))}
    assert {row["key"]: {**row, "unit_id": ""} for row in rows_in(LocalStore(tmp_path / "waves"))} == rows
    assert len(fragments_in(LocalStore(tmp_path / "waves"))) > 4


def sleeping(batch):
    time.sleep(60)
    return batch


def test_a_run_that_is_left_early_leaves_no_thread_and_no_work(monkeypatch):
    """After the end of the session a thread that still iterates would start or join another one."""
    monkeypatch.setattr("blocksight.jobs.ledger.stop_request.GRACE_SECONDS", 2.0)
    asked = Stop(MemoryStore(), "run")
    wave = ray.data.from_items([{"n": 1}, {"n": 2}]).map_batches(sleeping, batch_format="pyarrow")
    outcomes = pipeline._wave_outcomes([None], lambda _units, _unfit: wave, asked, 60, 1, NodeWatch(print))
    asked.request("SIGINT")
    began = time.monotonic()
    assert list(outcomes) == []
    assert time.monotonic() < began + 30
    left = [thread.name for thread in threading.enumerate()]
    assert not [name for name in left if name == pipeline.READER or name.startswith("StreamingExecutor")]


def test_a_model_that_fails_on_the_workers_is_one_sentence(tmp_path):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    done = blocksight(*explain(data, tmp_path / "out"), "--model", "tests.jobs.tiny:make_fragile")
    assert done.returncode == 2
    assert "no such model on this node" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: Ray failed:")


def test_an_evaluation_leaves_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.3)  # a few records a unit
    data, output = folder_of_images(tmp_path / "in"), tmp_path / "out"
    run_here(data, output, target="top-2", explainer="gradcam")
    here = evaluated(output, metrics="insertion,pos,entropy", controls=True)
    bytes_here = measured_in(output / here.folder)
    for file in (output / here.folder / "data").rglob("*.parquet"):
        file.unlink()
    asked = ("--model", MODEL, "--metrics", "insertion,pos,entropy", "--controls", "--workers", 1, "--seed", 0)
    assert_done(blocksight("evaluate", output, *asked))
    assert measured_in(output / here.folder) == bytes_here


def measured_in(folder):
    return {file.name: file.read_bytes() for file in (folder / "data").rglob("*.parquet")}


def test_a_first_pass_learns_the_same(tmp_path):
    data = folder_of_images(tmp_path / "in", 9)
    parameters = {"draws": 3, "images": 6, "pool": 3, "steps": 2, "noise_steps": 2}
    run_here(data, tmp_path / "here", explainer="bee", parameters=parameters)
    options = [f"-p{name}={value}" for name, value in parameters.items()]
    assert_done(blocksight(*explain(data, tmp_path / "ray", "--explainer", "bee", *options)))
    one, other = (safetensors.torch.load((tmp_path / name / LEARNED_KEY).read_bytes()) for name in ("here", "ray"))
    assert all(torch.equal(own, other[name]) for name, own in one.items())
    by_key = [{row["key"]: row["map"] for row in rows_in(LocalStore(tmp_path / name))} for name in ("here", "ray")]
    assert by_key[0] == by_key[1]


@pytest.mark.faults
@pytest.mark.parametrize("moment", [0.0, 0.35, 0.8])
def test_a_killed_process_group_changes_nothing_in_the_end(tmp_path, moment):
    """`moment` is the fraction of fragments that exist when the whole process group is killed."""
    data = folder_of_images(tmp_path / "in", 30)
    run_here(data, tmp_path / "whole")
    whole = fragments_in(LocalStore(tmp_path / "whole"))
    arguments = explain(data, tmp_path / "out", "--workers", 2)  # as many as the units of the whole job were cut for
    victim = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    store = LocalStore(tmp_path / "out")
    wait_for(lambda: store.head("_job/plan/plan.json") is not None, victim)
    wait_for(lambda: len(fragments_in(store)) >= moment * len(whole), victim)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert len(fragments_in(store)) < len(whole), "the kill came too late to matter"
    assert_done(blocksight(*arguments))
    assert fragments_in(store) == whole
    assert len(rows_in(store)) == 33
    assert_sound(store)


def wait_for(holds, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.02)
