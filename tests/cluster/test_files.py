"""`cluster print` gives every file of the package; `cluster check` ends with 0 or 2 and says each fault in a line."""

import tomllib
from pathlib import Path

import pytest
import yaml

from blocksight.cluster.files import FILES, OVERLAYS
from tests.jobs.jobs_of import blocksight

CLUSTER = Path(__file__).parents[2] / "cluster"
NOT_FOR_USERS = ("checks", "__pycache__")


def test_every_file_in_a_folder_for_users_is_listed():
    folders = [folder for folder in CLUSTER.iterdir() if folder.is_dir() and folder.name not in NOT_FOR_USERS]
    found = {file.relative_to(CLUSTER).as_posix() for folder in folders for file in folder.rglob("*") if file.is_file()}
    assert found == set(FILES)


def test_the_list_has_one_line_for_each():
    done = blocksight("cluster", "print")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*FILES, *OVERLAYS]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_printed_as_it_is(name):
    done = blocksight("cluster", "print", name)
    assert (done.returncode, done.stdout) == (0, (CLUSTER / name).read_text())


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_printed_as_one_yaml_that_is_right(name, tmp_path):
    done = blocksight("cluster", "print", name)
    assert "RayJob" in {one["kind"] for one in yaml.safe_load_all(done.stdout)}
    (tmp_path / "job.yaml").write_text(done.stdout)
    assert blocksight("cluster", "check", tmp_path / "job.yaml").returncode == 0


def test_an_unknown_name_says_what_to_do():
    done = blocksight("cluster", "print", "kuberay/rayjob.yaml")
    assert done.returncode == 2
    assert "blocksight cluster print" in done.stderr


def test_a_fault_is_one_line_and_exit_code_2(tmp_path):
    text = blocksight("cluster", "print", "kuberay/overlays/gpu").stdout
    (tmp_path / "job.yaml").write_text(text.replace("submissionMode: K8sJobMode", "submissionMode: K8sMode"))
    done = blocksight("cluster", "check", tmp_path / "job.yaml")
    (line,) = done.stdout.splitlines()
    assert done.returncode == 2
    assert line.startswith(f"{tmp_path}/job.yaml: spec.submissionMode: enum: ")


def test_what_is_left_to_fill_in_is_said(tmp_path):
    done = blocksight("cluster", "check", CLUSTER / "kuberay/overlays/gpu")
    assert "yours to fill in: registry.example, sha256:000" in done.stdout
    (tmp_path / "job.toml").write_text('data = "s3://photos/"\noutput = "s3://maps/"\n')
    assert blocksight("cluster", "check", tmp_path / "job.toml").stdout == "nothing is wrong with 1 file\n"


def test_every_file_is_in_the_wheel():
    settings = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        file.relative_to(CLUSTER).as_posix()
        for pattern in settings["package-data"]["blocksight.cluster"]
        for file in CLUSTER.glob(pattern)
    }
    assert set(FILES) <= found
