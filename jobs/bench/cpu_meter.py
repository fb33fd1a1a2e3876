"""Counts the CPU time of this process and of all that it started, by the kernel's figures in /proc."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOOK_SECONDS = 0.25
"""A process that ends loses at most what it did since the last look."""


@dataclass(frozen=True)
class _Process:
    """A process as /proc describes it."""

    pid: int
    parent: int
    started: int
    """With the pid its identity: pids are given again."""
    seconds: float
    """CPU time so far, user's and system's."""


class CpuMeter:
    """The CPU time of this process and of all below it while the body runs; those that end keep what they had."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_again, name="blocksight-cpu-meter", daemon=True)

    def __enter__(self) -> "CpuMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def seconds(self) -> float:
        """All of it so far; differences are what counts."""
        with self._lock:
            self._seconds |= {(one.pid, one.started): one.seconds for one in _family(os.getpid())}
            return sum(self._seconds.values())

    def _look_again(self) -> None:
        while not self._is_over.wait(LOOK_SECONDS):
            self.seconds()


def _family(pid: int) -> Iterator[_Process]:
    """The process and all below it."""
    found = {one.pid: one for one in _processes()}
    children: dict[int, list[int]] = {}
    for one in found.values():
        children.setdefault(one.parent, []).append(one.pid)
    waiting = [pid]
    while waiting:
        number = waiting.pop()
        yield found[number]
        waiting += children.get(number, [])


def _processes() -> Iterator[_Process]:
    """Every process that can be read."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it ended meanwhile
                yield _process(int(folder.name), (folder / "stat").read_text())


def _process(pid: int, stat: str) -> _Process:
    """A process from its `stat`; the name, in brackets, may hold anything."""
    fields = stat.rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])
    return _Process(pid, int(fields[1]), int(fields[19]), (user + system) / os.sysconf("SC_CLK_TCK"))
