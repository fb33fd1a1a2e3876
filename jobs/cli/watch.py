"""`status --watch`: looks at an output again and again, and says what changed, until the job has ended."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar

from blocksight.jobs.ledger.reconcile import JobState
from blocksight.jobs.plan.text import clock as as_clock
from blocksight.jobs.plan.text import counted, printable
from blocksight.jobs.worker.progress import Tally

BAR_WIDTH = 60
QUIET_SECONDS = 60.0
"""So long after the last change, a terminal says how long nothing has changed."""

Found = tuple[int, int, int, dict[str, int]]
"""What a line tells of the output: committed units, dead units, records, and rejects by code."""


def states(
    look: Callable[[], JobState], is_final: Callable[[], bool], pause: Callable[[], object]
) -> Iterator[JobState]:
    """What each look finds, with a pause between two. The last look finds that the job has ended.

    A job has ended with its final manifest. Without one, a second look finds no unit open: the driver may be about
    to write the manifest at the first.
    """
    was_done = False
    while True:
        job_state = look()
        yield job_state
        is_done = not job_state.open_units
        if is_done and (was_done or is_final()):
            return
        was_done = is_done
        pause()


@dataclass
class Watched:
    """What the looks found so far. Speed and time left count from the first look."""

    clock: Callable[[], float]
    """Seconds; only differences count."""
    _start: float = 0.0
    _changed: float = 0.0
    """When a look last found something new."""
    _records: int = 0
    """Of the first look."""
    _forwards: int = 0
    _last: Found | None = None

    def add(self, job_state: JobState) -> bool:
        """Takes what one more look found; True if it is new."""
        found = _found(job_state)
        if self._last is None:
            self._start = self.clock()
            self._records, self._forwards = job_state.total("num_records"), job_state.total("num_forwards")
        is_new = found != self._last
        if is_new:
            self._changed, self._last = self.clock(), found
        return is_new

    def line(self, job_state: JobState) -> str:
        """`40/100 images, 4 images/s, 0:15 left; 3 units committed, 5 open; 2 rejected (2 empty_file)`."""
        committed, num_dead, records, rejects = _found(job_state)
        done, left = f"{records:,}/{counted(records + _num_left(job_state), 'image')}", len(job_state.open_units)
        units = f"{counted(committed, 'unit')} committed, {left:,} open"
        codes = ", ".join(f"{count:,} {printable(code)}" for code, count in sorted(rejects.items()))
        parts = [
            ", ".join(part for part in (done, *(self._pace(job_state) if left else ())) if part),
            units + (f", {num_dead:,} dead" if num_dead else ""),
            *([f"{sum(rejects.values()):,} rejected ({codes})"] if rejects else []),
        ]
        return "; ".join(parts)

    def quiet(self) -> str:
        """`nothing new for 12:00`; empty as long as that is short."""
        seconds = self.clock() - self._changed
        return f"nothing new for {as_clock(seconds)}" if seconds >= QUIET_SECONDS else ""

    def _pace(self, job_state: JobState) -> tuple[str, str]:
        """Speed and time left."""
        seen = job_state.total("num_records") - self._records
        forwards = job_state.total("num_forwards") - self._forwards
        tally = Tally(seen + _num_left(job_state), None, records=seen, forwards=forwards)
        elapsed = self.clock() - self._start
        return tally.speed(elapsed), tally.left(elapsed) if seen else "time left is known after the next unit"


def _found(job_state: JobState) -> Found:
    return len(job_state.receipts), len(job_state.dead), job_state.total("num_records"), dict(job_state.rejects)


def _num_left(job_state: JobState) -> int:
    """Records of open units; of a tar an estimate."""
    return sum(unit.num_records for unit in job_state.open_units)


def show(console: Console, looks: Iterable[JobState], clock: Callable[[], float]) -> JobState:
    """Shows at least one look: a bar on a terminal, elsewhere a line per change. Returns what the last look found."""
    watched, last = Watched(clock), None
    with Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext() as live:
        for job_state in looks:
            last = job_state
            is_new = watched.add(job_state)
            if live is not None:
                live.update(_picture(watched, job_state), refresh=True)
            elif is_new:
                console.print(watched.line(job_state))
    assert last is not None
    return last


def _picture(watched: Watched, job_state: JobState) -> Group:
    """The bar, and the line below it."""
    records = job_state.total("num_records")
    bar = ProgressBar(max(records + _num_left(job_state), 1), records, width=BAR_WIDTH)
    return Group(bar, watched.line(job_state), *([quiet] if (quiet := watched.quiet()) else []))
