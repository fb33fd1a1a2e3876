"""`cluster check --plan` says what of a planned job does not fit the machines of a file."""

from dataclasses import replace
from pathlib import Path

import pytest

from blocksight.cluster.checks.check import check_files
from blocksight.cluster.checks.fits import PlanFigures
from tests.cluster.checks.changing import PRODUCT
from tests.jobs.jobs_of import blocksight
from tests.jobs.tiny import MODEL, folder_of_images

CLUSTER = Path(__file__).parents[3] / "cluster"
PLAN = PlanFigures("s3://example-images", "s3://example-maps/run-1/", 5_000, 4 << 30, 3600.0 * 8)
FILES = (
    *("kuberay/overlays/gpu", "kuberay/overlays/cpu", "slurm/blocksight.sbatch", "slurm/blocksight-array.sbatch"),
    "skypilot/blocksight.yaml",
)


def unfit(file: str, figures: PlanFigures) -> list[str]:
    found = check_files([str(CLUSTER / file)], PRODUCT, figures)
    assert {one.rule for one in found} <= {"fit"}
    return [one.path for one in found]


@pytest.mark.parametrize("file", [*FILES, "slurm/job.toml"])
def test_a_job_that_fits(file):
    assert unfit(file, PLAN) == []


@pytest.mark.parametrize("file", FILES)
def test_a_driver_of_too_many_objects_does_not_fit(file):
    (path,) = unfit(file, replace(PLAN, driver_bytes=168 << 30))
    assert "memory" in path or path.startswith("line ")


@pytest.mark.parametrize("file", ["kuberay/overlays/gpu", "slurm/blocksight.sbatch"])
def test_a_job_that_takes_longer_than_it_may_does_not_fit(file):
    (path,) = unfit(file, replace(PLAN, work_seconds=3600.0 * 24 * 365))
    assert path == "spec.activeDeadlineSeconds" or path.startswith("line ")


def test_of_a_job_that_was_not_measured_no_time_is_said():
    assert unfit("slurm/blocksight.sbatch", replace(PLAN, work_seconds=None)) == []


def test_more_workers_than_units_stand_idle():
    (path,) = unfit("kuberay/overlays/gpu", replace(PLAN, num_units=3))
    assert path.endswith("maxReplicas")
    (path,) = unfit("kuberay/overlays/kueue", replace(PLAN, num_units=3))
    assert path.endswith(".replicas")


def test_actors_need_memory(tmp_path):
    text = (CLUSTER / "slurm/blocksight.sbatch").read_text()
    (tmp_path / "a.sbatch").write_text(text.replace("--mem=64G", "--mem=6G").replace("per-node=1\n", "per-node=4\n", 2))
    found = check_files([str(tmp_path / "a.sbatch")], PRODUCT, PLAN)
    assert "4 actors need" in " ".join(one.why for one in found if one.rule == "fit")


@pytest.mark.parametrize("file", ["kuberay/overlays/gpu", "slurm/job.toml"])
def test_the_configuration_names_the_places_of_the_plan(file):
    assert len(unfit(file, replace(PLAN, data="s3://other/", output="s3://elsewhere/"))) == 2


def test_the_command_reads_the_plan_of_an_output(tmp_path):
    photos = folder_of_images(tmp_path / "photos", 3)
    job = ("--data", photos, "--output", tmp_path / "maps", "--model", MODEL, "--runner", "local")
    assert blocksight("explain", *job).returncode == 0
    done = blocksight("cluster", "check", CLUSTER / "slurm/job.toml", "--plan", tmp_path / "maps")
    assert done.returncode == 2
    assert [line.split(": ")[2] for line in done.stdout.splitlines()] == ["fit", "fit"]
