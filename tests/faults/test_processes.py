"""Real processes that die at each step of the protocol, race for one fragment, hang, or read a poisonous record."""

import json
import os
import signal
import subprocess
import time
from hashlib import sha256

import pytest
from safetensors.torch import load

from blocksight.jobs.explain.learned import LEARNED_KEY
from blocksight.jobs.ledger import attempt_markers
from blocksight.jobs.worker.attempts import CAREFUL_DEATHS
from blocksight.storage.stores.local import LocalStore
from tests.faults.processes import ended, environment, started
from tests.faults.startup.sitecustomize import POISON
from tests.faults.verifier import Watcher, assert_sound, contents
from tests.jobs.jobs_of import ROOT, command, rows_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images, red

pytestmark = pytest.mark.faults

PREFLIGHT_DEATHS = 1
"""The model is examined on a few images of the data set, until one of them kills the process."""


def explain(data, output, *options, model=MODEL):
    return ["explain", "--data", data, "--output", output, "--model", model, "--runner", "local", *options]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("processes") / "in", 4)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The fragments of a run without faults."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_here(data, output)
    return contents(LocalStore(output))


@pytest.mark.parametrize(
    "fault",
    [
        "die-after=create _job/plan/plan.json",
        "die=create _job/attempts/../.*/0.json",
        "die-after=create _job/attempts/../.*/0.json",
        "die=create data/",
        "die-after=create data/",
        "die=create _job/receipts/",
        "die=create _job/final/",
        "die-after=create _job/final/",
    ],
)
def test_killed_at_a_step_of_the_protocol(data, whole, tmp_path, fault):
    code, _ = ended(*explain(data, tmp_path / "out"), fault=fault)
    assert code == -signal.SIGKILL
    store = LocalStore(tmp_path / "out")
    assert contents(store).items() <= whole.items()
    run_here(data, tmp_path / "out")
    assert_sound(store)
    assert contents(store) == whole


LEARNING = {"explainer": "bee", "parameters": {"draws": 3, "images": 4, "pool": 2, "steps": 2, "noise_steps": 2}}
OPTIONS = ("--explainer", "bee", *(f"-p{name}={value}" for name, value in LEARNING["parameters"].items()))


@pytest.mark.parametrize("fault", ["die-after=create _job/attempts/first-pass/", "die-after=create _job/plan/learned"])
def test_killed_in_the_first_pass_or_behind_it(data, tmp_path, fault):
    run_here(data, tmp_path / "whole", **LEARNING)
    code, _ = ended(*explain(data, tmp_path / "out", *OPTIONS), fault=fault)
    assert code == -signal.SIGKILL
    store = LocalStore(tmp_path / "out")
    run_here(data, tmp_path / "out", **LEARNING)
    assert_sound(store)
    assert contents(store) == contents(LocalStore(tmp_path / "whole"))
    assert store.read(LEARNED_KEY) == LocalStore(tmp_path / "whole").read(LEARNED_KEY)
    assert list(store.list("_job/attempts/first-pass/")) == []


def test_an_image_that_kills_the_first_pass_is_left_out(tmp_path):
    data = folder_of_images(tmp_path / "in", 3, bad=False)
    (data / "cat" / "poison.png").write_bytes(red())
    arguments = explain(data, tmp_path / "out", *OPTIONS, model="tests.jobs.tiny:make_deadly")
    for _ in range(PREFLIGHT_DEATHS + 2 * CAREFUL_DEATHS):  # then in the first pass, and then in the unit
        code, printed = ended(*arguments)
        assert code == -signal.SIGABRT, printed
    code, printed = ended(*arguments)
    assert code == 0, printed
    store = LocalStore(tmp_path / "out")
    assert int(load(store.read(LEARNED_KEY))["bandit.counts"].sum()) == 3
    assert statuses(store)["cat/poison.png"] == "process_died"
    assert list(statuses(store).values()).count(None) == 3
    assert_sound(store)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_complete(process):
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed


@pytest.mark.parametrize("order", ["together", "a zombie comes late"])
def test_two_processes_at_one_fragment(data, whole, tmp_path, order):
    """Both have computed the first unit. They commit at the same time, or one long after the other has finished."""
    store = LocalStore(tmp_path / "out")
    first, second = (started(*explain(data, tmp_path / "out"), fault=f"hold={tmp_path / name}") for name in "ab")
    with Watcher(LocalStore(tmp_path / "out")) as watcher:
        for name, process in (("a", first), ("b", second)):
            wait_for(tmp_path / f"{name}.held", process)
        (tmp_path / "a").touch()
        if order == "together":
            (tmp_path / "b").touch()
        assert_complete(first)
        before = contents(store)
        (tmp_path / "b").touch()
        assert_complete(second)
    assert contents(store) == whole
    assert order == "together" or before == whole
    assert_sound(store, watcher.faults)


def test_sigterm_ends_cleanly_and_loses_no_finished_unit(tmp_path):
    data = folder_of_images(tmp_path / "in", 40, bad=False)
    process = started(*explain(data, tmp_path / "out"))
    store = LocalStore(tmp_path / "out")
    while not contents(store):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 4, printed
    assert "SIGTERM" in printed
    assert "goes on from there" in printed
    assert 0 < len(contents(store)) < 40
    assert all(json.loads(store.read(key))["ended"] for key in markers_of_open_units(store))
    run_here(data, tmp_path / "out")
    assert list(store.list("_job/attempts/")) == []
    assert_sound(store)


def markers_of_open_units(store):
    done = {key.partition("-")[2].removesuffix(".parquet") for key in contents(store)}
    return [info.key for info in store.list("_job/attempts/") if attempt_markers.unit_of(info.key) not in done]


def statuses(store):
    return {row["key"]: row["reject_code"] for row in rows_in(store)}


@pytest.mark.parametrize("stage", ["decode", "explain", "encode", "hang"])
def test_a_poisonous_record_is_rejected_alone(tmp_path, stage):
    """With the local runner, poison ends the whole program: each run is one attempt."""
    data = folder_of_images(tmp_path / "in", 3, bad=False)
    (data / "cat" / "poison.png").write_bytes(red() + (POISON if stage == "decode" else b""))
    fault, model = {
        "decode": ("decode", MODEL),
        "explain": ("", "tests.jobs.tiny:make_deadly"),
        "encode": (f"encode={digest_of_poison(data, tmp_path)}", MODEL),
        "hang": ("hang=6", "tests.jobs.tiny:make_hanging"),
    }[stage]
    arguments = explain(data, tmp_path / "out", model=model)
    deaths_before = 0 if stage == "encode" else PREFLIGHT_DEATHS  # no map is encoded in the preflight
    for _ in range(deaths_before + CAREFUL_DEATHS):
        code, printed = ended(*arguments, fault=fault)
        assert code == (1 if stage == "hang" else -signal.SIGABRT), printed
    code, printed = ended(*arguments, fault=fault)
    assert code == 0, printed
    store = LocalStore(tmp_path / "out")
    assert statuses(store) == {"ant/000.png": None, "bee/001.png": None, "cat/002.png": None} | {
        "cat/poison.png": "process_died"
    }
    row = next(row for row in rows_in(store) if row["reject_code"])
    assert row["reject_stage"] == ("explain" if stage == "hang" else stage)
    assert ("exit code 1" if stage == "hang" else "Aborted") in row["error"]
    assert_sound(store)


def digest_of_poison(data, tmp_path):
    run_here(data, tmp_path / "undisturbed")
    (row,) = (row for row in rows_in(LocalStore(tmp_path / "undisturbed")) if "poison" in row["key"])
    return sha256(row["map"]).hexdigest()


def test_a_full_disk_names_the_path_and_leaves_nothing_half_written(data, whole, tmp_path):
    """Mounts a file system of 64 kB, which no other process sees."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    (tmp_path / "disk").mkdir()
    arguments = " ".join(map(str, command(*explain(data, tmp_path / "disk" / "out"))))
    script = (
        f"mount -t tmpfs -o size=64k none {tmp_path}/disk && {arguments}; echo code $?; "
        f"mount -o remount,size=8m {tmp_path}/disk && {arguments} && cp -a {tmp_path}/disk/out {tmp_path}/out"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert "No space left on device" in printed, printed
    assert str(tmp_path / "disk" / "out") in printed
    assert "Traceback" not in printed
    assert done.returncode == 0, printed
    store = LocalStore(tmp_path / "out")
    assert_sound(store)
    assert contents(store) == whole
