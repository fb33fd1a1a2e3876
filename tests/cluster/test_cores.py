"""The cores and GPUs that a job may use are those of its batch system or container, not of the whole machine."""

import os

import pytest

from blocksight.cluster import cores
from blocksight.cluster.cores import usable_cores, usable_gpus


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 128 cores and 8 GPUs, without a quota."""
    gpus = tmp_path / "gpus"
    for number in range(8):
        (gpus / f"0000:{number}").mkdir(parents=True)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(128)))
    monkeypatch.setattr(cores, "QUOTAS", ((tmp_path / "v2",), (tmp_path / "quota", tmp_path / "period")))
    monkeypatch.setattr(cores, "NVIDIA_GPUS", gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 128),
        ({"v2": "max 100000"}, 128),
        ({"v2": "400000 100000"}, 4),
        ({"v2": "50000 100000"}, 1),
        ({"quota": "-1", "period": "100000"}, 128),
        ({"quota": "250000", "period": "100000"}, 2),
        ({"v2": "no quota"}, 128),
    ],
)
def test_a_containers_quota_counts(machine, files, wanted):
    for name, text in files.items():
        (machine / name).write_text(f"{text}\n")
    assert usable_cores() == wanted


def test_the_cores_of_a_batch_job_count(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {3, 5, 7})
    assert usable_cores() == 3


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [(None, 8), ("", 0), ("2", 1), ("0,3", 2), ("-1", 0), ("0,-1,1", 1), ("GPU-7f3a, 1", 2), ("NoDevFiles", 0)],
)
def test_gpus_that_are_not_visible_do_not_count(machine, monkeypatch, visible, wanted):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_gpus() == wanted
    monkeypatch.setattr(cores, "NVIDIA_GPUS", machine / "none")
    assert usable_gpus() == 0
