"""Runs jobs of a thousand to a million records, and measures whether memory grows with the data set.

`python -m tests.faults.million --output DIR` makes shards of tiny pictures, explains them on Ray by the command line,
and runs `verify`, `report` and `audit` on each output. It looks at the memory of the driver, of each actor and of each
command, as the kernel counts it. Shards that are there are kept, and a command that was measured is not run again
without `--again`. `--figures FILE` gets what was measured, as JSON. On a machine that others use, RAY_worker_niceness=0
lets the actors have their share: Ray's processes otherwise give way to all others.

`--bucket` keeps the maps in a SeaweedFS bucket on loopback. A million takes 6 GB of disk, of which `--tidy` gives 4 GB
back.

Exit code 0: the promises hold. 1: one does not: a command failed, or at a million records the driver or an actor holds
more than 50 bytes more for each further record than at 10,000. Below a million a growth is told and not judged: two
runs of one size differ by as much.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocksight.cluster.bucket import EmbeddedBucket
from blocksight.jobs.plan.text import clock, counted
from blocksight.storage.stores.opening import open_store
from tests.faults.coloured import MODEL, write_shards
from tests.faults.process_memory import DRIVER, Watched, watched

ROOT = Path(__file__).resolve().parents[2]
SIZES = (1_000, 10_000, 100_000, 1_000_000)
BASE_RECORDS = 10_000
"""Below it the sizes of units still grow, and with them an actor's memory."""
JUDGED_RECORDS = 1_000_000
MOST_BYTES_PER_RECORD = 50.0
ROLES = (DRIVER, "actor")
"""Of which memory is promised; the others are Ray's own processes."""
KEPT_LOOKS = 12
LINE_SECONDS = 15.0
MIB = float(1 << 20)


@dataclass(frozen=True)
class Step:
    """What one command took."""

    command: str
    commit: str
    """That was checked out when it began."""
    code: int
    seconds: float
    own_mib: Mapping[str, float]
    """The most anonymous memory of a process of each role."""
    sum_mib: float | None
    """Of all its processes together, with mapped files; None: not known."""
    looks: Sequence[Mapping[str, float]] = ()
    """Some looks in order: `seconds`, and the anonymous MiB of each role."""


@dataclass(frozen=True)
class Size:
    """What one size took."""

    records: int
    steps: Sequence[Step]


def commands(data: Path, output: str, workers: int) -> Iterator[Sequence[str]]:
    """The command lines of one size, in their order."""
    yield (
        *("explain", "--data", str(data), "--output", output, "--model", MODEL, "--explainer", "gradcam"),
        *("--workers", str(workers)),
    )
    yield "verify", output
    yield "report", output
    yield "audit", output, "--model", MODEL


def step_of(command: str, commit: str, found: Watched) -> Step:
    """The figures of a command that was watched."""
    every = max(1, len(found.looks) // KEPT_LOOKS)
    looks = [{"seconds": round(one.seconds, 1), **_in_mib(one.own_bytes)} for one in found.looks[::every]]
    assert found.code is not None  # it ended
    return Step(
        command,
        commit,
        found.code,
        round(found.seconds, 1),
        _in_mib(found.own_bytes),
        round(found.sum_bytes / MIB, 1),
        looks,
    )


def _in_mib(num_bytes: Mapping[str, int]) -> dict[str, float]:
    return {role: round(one / MIB, 1) for role, one in sorted(num_bytes.items())}


def faults(sizes: Sequence[Size]) -> Iterator[str]:
    """A sentence for each promise that does not hold."""
    for size in sizes:
        for step in size.steps:
            if step.code:
                yield f"{counted(size.records, 'record')}: {step.command} ended with exit code {step.code}"
    is_judged = max(size.records for size in sizes) >= JUDGED_RECORDS
    for role, growth in growths(sizes).items():
        if is_judged and growth > MOST_BYTES_PER_RECORD:
            yield f"{role}: {growth:.1f} bytes more a record; promised are at most {MOST_BYTES_PER_RECORD:g}"


def growths(sizes: Sequence[Size]) -> dict[str, float]:
    """Bytes of memory for each further record from `BASE_RECORDS` to the largest size, by role of `explain`."""
    ordered = sorted((one for one in sizes if one.records >= BASE_RECORDS), key=lambda one: one.records)
    if len(ordered) < 2:
        return {}
    first, last = ordered[0], ordered[-1]
    small, large = (next(step for step in one.steps if step.command == "explain").own_mib for one in (first, last))
    further = last.records - first.records
    return {role: (large[role] - small[role]) * MIB / further for role in ROLES}


def table(sizes: Sequence[Size]) -> Iterator[str]:
    """The figures for people: a row for each size and command."""
    yield f"{'records':>9}  {'command':<8}{'seconds':>9}{'driver MiB':>12}{'actor MiB':>11}{'all MiB':>9}"
    for size in sizes:
        for step in size.steps:
            own = [f"{step.own_mib[role]:,.0f}" if role in step.own_mib else "" for role in ROLES]
            whole = "" if step.sum_mib is None else f"{step.sum_mib:,.0f}"
            yield f"{size.records:>9,}  {step.command:<8}{step.seconds:>9,.0f}{own[0]:>12}{own[1]:>11}{whole:>9}"
    for role, growth in growths(sizes).items():
        yield f"{role}: {growth:.1f} bytes a further record"


class Runs:
    """The runs of all sizes below one folder."""

    def __init__(
        self,
        folder: Path,
        workers: int,
        *,
        again: bool = False,
        tidy: bool = False,
        bucket: str | None = None,
        every_seconds: float = 1.0,
    ) -> None:
        """`bucket`: URI of the bucket that gets the maps; None: they are in the folder."""
        self.folder, self.workers, self.again, self.tidy, self.bucket = folder, workers, again, tidy, bucket
        self.every_seconds = every_seconds

    def size(self, records: int) -> Size:
        """The figures of a size: of each command those that are stored, or new ones."""
        folder = self.folder / (str(records) if self.bucket is None else f"{records}-bucket")
        maps = str(folder / "maps") if self.bucket is None else f"{self.bucket}/{records}"
        if self.again:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        data = self.folder / f"data-{records}"
        asked = list(commands(data, maps, self.workers))
        if not all(_stored_step(folder, command[0]).exists() for command in asked):
            _show(write_shards(data, records), records, f"{records:,}: making pictures")
        if not _stored_step(folder, "explain").exists():  # what resumes would do a part of the work
            _clear(maps)
        steps = [self._step(records, command, folder) for command in asked]
        if self.tidy and not any(step.code for step in steps):
            _clear(maps)
            shutil.rmtree(data, ignore_errors=True)
        return Size(records, steps)

    def _step(self, records: int, command: Sequence[str], folder: Path) -> Step:
        """A command's figures; only those of one that succeeded are stored."""
        name = command[0]
        stored = _stored_step(folder, name)
        if stored.exists():
            return Step(**json.loads(stored.read_text()))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        full, commit = [sys.executable, "-m", "blocksight", *command], _commit()
        found = watched(full, self.every_seconds, _telling(f"{records:,}: {name}"), folder / f"{name}.log", environment)
        if found.code:
            print(found.log.read_text(errors="replace")[-3000:])
        step = step_of(name, commit, found)
        print(f"{records:,}: {name} ended with {step.code} after {clock(step.seconds)}, {step.own_mib} MiB", flush=True)
        if not step.code:
            stored.write_text(json.dumps(asdict(step)))
        return step


def _clear(maps: str) -> None:
    """Removes an output."""
    if not maps.startswith("s3://"):
        shutil.rmtree(maps, ignore_errors=True)
        return
    store = open_store(maps)
    store.delete_many([info.key for info in store.list()])


def _stored_step(folder: Path, command: str) -> Path:
    return folder / f"{command}.json"


def _show(counts: Iterable[int], total: int, what: str) -> None:
    """Prints how far it is and the time left, now and then."""
    start = told = time.monotonic()
    for count in counts:
        now = time.monotonic()
        if now > told + LINE_SECONDS:
            told = now
            print(f"{what}, {count:,} of {total:,}, {clock((now - start) * (total - count) / count)} left", flush=True)


def _telling(what: str) -> Callable[[Watched], None]:
    """Prints the memory now and then; the command's own progress is in its log."""
    told = 0.0

    def tell(found: Watched) -> None:
        nonlocal told
        if found.seconds > told + LINE_SECONDS:
            told = found.seconds
            own = ", ".join(f"{role} {one / MIB:,.0f} MiB" for role, one in found.looks[-1].own_bytes.items())
            print(f"{what}, {clock(found.seconds)}: {own}; {_last_line(found.log)}", flush=True)

    return tell


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or [""])[-1].strip()


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


@contextmanager
def _bucket_in(folder: Path) -> Iterator[str]:
    """The URI of a bucket whose data are in the folder, with its credentials in the environment."""
    before = dict(os.environ)
    with EmbeddedBucket("blocksight-million", folder / "bucket") as bucket:
        os.environ.update(bucket.environment)
        try:
            yield bucket.uri
        finally:
            os.environ.clear()
            os.environ.update(before)


def main() -> int:
    """Runs the sizes from small to large. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for shards, outputs and figures")
    sizes = ",".join(map(str, SIZES))
    parser.add_argument("--records", default=sizes, help="with commas (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="explain actors (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run again what was measured")
    parser.add_argument("--bucket", action="store_true", help="keep the maps in a bucket of an S3 server on loopback")
    parser.add_argument("--tidy", action="store_true", help="remove shards and maps of a size that was measured")
    parser.add_argument("--figures", type=Path, help="file for the figures, as JSON")
    asked = parser.parse_args()
    output = asked.output.resolve()
    with _bucket_in(output) if asked.bucket else nullcontext() as bucket:
        runs = Runs(output, asked.workers, again=asked.again, tidy=asked.tidy, bucket=bucket)
        sizes = [runs.size(int(records)) for records in sorted(asked.records.split(","), key=int)]
    print("\n".join(table(sizes)))
    if asked.figures is not None:
        made = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
            "workers": asked.workers,
            "bytes_per_record": growths(sizes),
            "sizes": [asdict(one) for one in sizes],
        }
        asked.figures.write_text(json.dumps(made, indent=1) + "\n")
    found = list(faults(sizes))
    print("\n".join(found) or "the promises hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
