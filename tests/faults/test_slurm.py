"""The scripts of Slurm on a real Slurm of two nodes: an array, the signal before the limit, a job over both nodes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksight.jobs.ledger.reconcile import check
from blocksight.jobs.plan.plan import existing_plan
from blocksight.storage.stores.local import LocalStore
from tests.faults.slurm import Slurm, missing, slurm
from tests.jobs.jobs_of import ROOT, fragments_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images

pytestmark = [pytest.mark.faults, pytest.mark.skipif(missing() is not None, reason=f"Slurm: {missing()}")]

MANY = 10
"""Copies of each image: the signal must come before the last unit."""
SCRIPTS = ROOT / "cluster" / "slurm"


@pytest.fixture
def cluster(tmp_path) -> Iterator[Slurm]:
    """With data in `in`, and a job's file for it."""
    (tmp_path / "lab").mkdir()
    folder_of_images(tmp_path / "in")
    with slurm(tmp_path / "lab") as running:
        yield running


def job_file(cluster: Slurm, **options: object) -> Path:
    """A job of the tiny model that writes to `out`."""
    place = cluster.folder.parent
    facts = {"data": str(place / "in"), "output": str(place / "out"), "model": MODEL, "explainer": "gradcam", **options}
    job = cluster.folder / "job.toml"
    job.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in facts.items()))
    return job


def assert_as_one_process_would(cluster: Slurm) -> None:
    """The output is complete, sound, and the same bytes as of a job without Slurm."""
    place = cluster.folder.parent
    store = LocalStore(place / "out")
    assert [fault for _, faults in check(store, existing_plan(store)) for fault in faults] == [], cluster.logs()
    run_here(place / "in", place / "alone", explainer="gradcam")
    assert fragments_in(store) == fragments_in(LocalStore(place / "alone")) != {}


def test_an_array_explains_each_part_once(cluster):
    job = job_file(cluster, runner="local")
    number = cluster.submit(SCRIPTS / "blocksight-array.sbatch", job, options=("--array=0-2",))
    cluster.ended()
    said = [(cluster.folder / f"slurm-{number}_{part}.out").read_text() for part in range(3)]
    assert ["1 of 1 committed" in text for text in said].count(True) == 1
    assert_as_one_process_would(cluster)


def test_a_job_that_is_told_of_its_limit_is_queued_again_and_goes_on(cluster):
    """The signal comes in the middle of the first run."""
    data = cluster.folder.parent / "in"
    for place in sorted(data.rglob("*.png")):
        for copy in range(MANY):
            shutil.copy(place, place.with_name(f"{copy}-{place.name}"))
    job = job_file(cluster, runner="local", explainer="rise", **{"parameters.num_masks": 2_000})
    number = cluster.submit(SCRIPTS / "blocksight-array.sbatch", job, options=("--array=0-0",))
    said = cluster.folder / f"slurm-{number}_0.out"
    cluster.until(lambda: said.exists() and "masks are scored" in said.read_text(), "the first unit")
    cluster.call("scancel", "--signal=TERM", "--batch", f"{number}_0")
    cluster.until(lambda: "Restarts=1" in cluster.call("scontrol", "show", "job", number), "the second run")
    cluster.ended()
    text = said.read_text()
    assert text.count("masks are scored") == 2, text
    store = LocalStore(cluster.folder.parent / "out")
    assert [fault for _, faults in check(store, existing_plan(store)) for fault in faults] == []


def test_a_job_over_two_nodes_is_one_ray(cluster):
    job = job_file(cluster, device="cpu", workers=2)
    number = cluster.submit(SCRIPTS / "blocksight.sbatch", job)
    cluster.ended()
    said = (cluster.folder / f"slurm-{number}.out").read_text()
    assert "1 of 1 committed" in said, cluster.logs()
    assert not list((cluster.folder / ".blocksight").glob("*/token"))
    assert_as_one_process_would(cluster)
