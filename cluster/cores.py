"""Counts the CPU cores and GPUs of this machine that a job may use, before Ray is asked."""

import os
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

QUOTAS = (
    (Path("/sys/fs/cgroup/cpu.max"),),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)
"""Files of a container's quota: CPU time per period, in microseconds; of cgroups 2 and 1."""
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""The NVIDIA driver lists its GPUs here; read without importing torch."""


def usable_cores() -> int:
    """CPU cores that this process may use, at least 1.

    A batch system (Slurm, taskset, a cpuset) may allow some cores of the machine, and a container a part of their time.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, int(_quota_cores() or allowed)))


def usable_gpus() -> int:
    """GPUs of NVIDIA's driver that this process may use, by CUDA_VISIBLE_DEVICES."""
    found = len(list(NVIDIA_GPUS.iterdir())) if NVIDIA_GPUS.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, sum(1 for _ in takewhile(_is_gpu, visible.split(","))))


def _is_gpu(name: str) -> bool:
    """True for an entry of CUDA_VISIBLE_DEVICES that may name a GPU; the first that does not ends the list."""
    return name.strip().isdecimal() or name.strip().startswith(("GPU-", "MIG-"))


def compiler_threads(*, on_gpu: bool) -> int:
    """Threads that a compiler may use in one actor: its share of this machine's cores, at least 1.

    An actor sees its own GPU alone, so that those of the machine are counted.
    """
    gpus = len(list(NVIDIA_GPUS.iterdir())) if NVIDIA_GPUS.is_dir() else 0
    return max(1, usable_cores() // max(1, gpus)) if on_gpu else 1


def _quota_cores() -> float | None:
    """The cores that the container's quota is worth; None without a quota."""
    for files in QUOTAS:
        with suppress(OSError, ValueError):  # `max` is no number
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
            if quota > 0 < period:  # -1: none
                return quota / period
    return None
