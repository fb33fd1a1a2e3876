"""Memory of a command and of the processes below it: read from `/proc` while it runs, by what each process is."""

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
ROLES = (("MapWorker", "actor"), ("MapBatches", "actor"), ("ray::", "worker"), ("spawn_main", "worker"))
"""Words in the title of a process below the command, and what it is then; the rest are Ray's own servers.
A worker is a process of `audit`, or one of Ray's that holds no model."""
DRIVER, SERVER = "driver", "server"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, its share of what it shares with others; the object store's memory is not in it."""

    own: int
    """Anonymous: the heap, and arrays."""
    total: int
    """With the mapped files."""


@dataclass(frozen=True)
class Look:
    """One look at the processes of a command."""

    seconds: float
    """Since its start."""
    own_bytes: Mapping[str, int]
    """Of the largest process of each role."""


@dataclass
class Watched:
    """What became of a command."""

    log: Path
    """What it prints."""
    seconds: float = 0.0
    code: int | None = None
    looks: list[Look] = field(default_factory=list)
    own_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """The most of any process of each role, at any time."""
    sum_bytes: int = 0
    """The most of all processes together, with mapped files."""


def memory_of(pid: int) -> Memory | None:
    """The memory of a process; None if it is gone, or not ours to look at."""
    with suppress(OSError):
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
        values = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        return Memory(values["Pss_Anon"], values["Pss_Anon"] + values["Pss_File"])
    return None


def below(pid: int) -> list[int]:
    """The process ids of all descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                children[int((folder / "stat").read_text().rpartition(")")[2].split()[1])].append(int(folder.name))
    found, waiting = [], [pid]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return found


def role_of(pid: int) -> str:
    """What a process below a command is."""
    title = ""
    with suppress(OSError):
        title = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return next((role for word, role in ROLES if word in title), SERVER)


def watched(
    command: Sequence[str],
    every_seconds: float,
    tell: Callable[[Watched], None],
    log: Path,
    environment: Mapping[str, str],
) -> Watched:
    """Runs a command to its end and looks at its processes again and again; `tell` is called after each look.

    What it prints goes to `log`.
    """
    found, start = Watched(log), time.monotonic()
    with log.open("w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=dict(environment))
        try:
            while process.poll() is None:
                found.seconds = time.monotonic() - start
                _look(process.pid, found)
                tell(found)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(every_seconds)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    found.seconds, found.code = time.monotonic() - start, process.returncode
    return found


def _look(pid: int, found: Watched) -> None:
    own: dict[str, int] = defaultdict(int)
    sum_bytes = 0
    for one, role in [(pid, DRIVER), *((child, role_of(child)) for child in below(pid))]:
        memory = memory_of(one)
        if memory is not None:
            own[role] = max(own[role], memory.own)
            found.own_bytes[role] = max(found.own_bytes[role], memory.own)
            sum_bytes += memory.total
    found.sum_bytes = max(found.sum_bytes, sum_bytes)
    found.looks.append(Look(found.seconds, dict(own)))
