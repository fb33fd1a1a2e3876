"""Progress: counts images and says the time left, as a bar on a terminal and as a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.text import Text

from blocksight.jobs.plan.records import DeadLetter, Evaluated, Outcome, Receipt, UnitFailure, UnitReturned
from blocksight.jobs.plan.text import clock, counted, plural, printable

LINE_WIDTH = 80
"""Columns that a line has on any terminal."""
BAR_WIDTH = 10
BESIDE_LINE = BAR_WIDTH + 3
"""Columns of spinner, bar and the blanks between."""
PLAIN_SECONDS = 10.0
"""Before the first line if the output is no terminal, and at least between two."""
PLAIN_SHARE = 0.05
"""A line comes after this share more of the time so far: a log of a day has some hundred lines."""

T = TypeVar("T")
Update = Callable[[Outcome | Evaluated | int], None]


@dataclass
class Tally:
    """The counts of this run so far."""

    total_records: int
    """Records of this run."""
    guess_seconds: float | None
    """The plan's estimate, used until the first unit is done; None if there is no estimate for the model."""
    records: int = 0
    forwards: int = 0
    failures: int = 0
    dead: int = 0
    verb: str = "explain"
    """What the run does to the records."""
    noun: str = "image"
    """What is counted."""

    @property
    def stem(self) -> str:
        """The verb without its final e, for -ing and -ed."""
        return self.verb.removesuffix("e")

    def add(self, outcome: Outcome | Evaluated | int) -> None:
        """Counts one more unit, or so many records."""
        if isinstance(outcome, int):
            self.records += outcome
        if isinstance(outcome, Receipt | Evaluated):
            self.records += outcome.num_records
        if isinstance(outcome, Receipt):
            self.forwards += outcome.num_forwards
        self.failures += isinstance(outcome, UnitFailure)
        self.dead += isinstance(outcome, DeadLetter)
        # a tar's record count is an estimate: the end moves to the real count
        self.total_records = max(self.total_records, self.records)

    def left(self, elapsed: float) -> str:
        """The time left, from the speed so far, or from the estimate before the first unit is done."""
        if self.records:
            return f"{clock(elapsed * (self.total_records - self.records) / self.records)} left"
        if self.guess_seconds is None or elapsed >= self.guess_seconds:  # the start alone may take longer
            return "time left is known after the first unit"
        return f"about {clock(self.guess_seconds - elapsed)} left"

    def speed(self, elapsed: float) -> str:
        """What the method does in a second: masked forward passes, or images. Empty before the first unit is done."""
        if elapsed <= 0 or not self.records:
            return ""
        if self.forwards:
            return f"{self.forwards / elapsed:,.0f} masked forwards/s"
        rate = self.records / elapsed
        return f"{rate:,.3g} {plural(self.noun)}/s" if rate >= 1 else f"{1 / rate:,.2g} s each"

    def line(self, elapsed: float, most: int = LINE_WIDTH) -> str:
        """`explaining: 3/6 images, 84 masked forwards/s, 1:02 left`, in at most so many columns.

        What does not fit is left out: first the speed, then the time left.
        """
        return self._fitting(f"{self.stem}ing", self.speed(elapsed), self.left(elapsed), most)

    def last_line(self, elapsed: float, most: int = LINE_WIDTH) -> str:
        """`explained: 6/6 images, in 2:30`; a speed would count the start of the workers as work."""
        return self._fitting(f"{self.stem}ed", "", f"in {clock(elapsed)}", most)

    def _fitting(self, what: str, speed: str, duration: str, most: int) -> str:
        counts = f"{what}: {self.records:,}/{counted(self.total_records, self.noun)}"
        failed = f"{counted(self.failures, 'unit')} failed" if self.failures else ""
        dead = f"{counted(self.dead, 'unit')} dead" if self.dead else ""
        found = ""
        for parts in ((speed, duration), (duration,), ()):
            found = ", ".join(part for part in (counts, *parts, failed, dead) if part)
            if len(found) <= most:
                return found
        return found[:most]


class _TallyColumn(ProgressColumn):
    """The tally's line, redrawn at every refresh so that the time left counts down; its last line at the end."""

    def __init__(self, tally: Tally, width: int) -> None:
        super().__init__()
        self.tally, self.width, self.is_over = tally, width, False

    def render(self, task: Task) -> Text:
        line = self.tally.last_line if self.is_over else self.tally.line
        return Text(line(task.elapsed or 0.0, self.width), no_wrap=True)


@contextmanager
def progress(console: Console, tally: Tally) -> Iterator[Update]:
    """Shows the tally while the body runs; the body passes each unit's outcome to the yielded function."""
    if console.is_terminal:
        with _live(console, tally) as update:
            yield update
        return
    start = time.monotonic()
    with _plain(console, tally, start):
        yield tally.add
    console.print(tally.last_line(time.monotonic() - start), highlight=False)


class Notices:
    """Tells of workers that gave a unit back, each once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[str] = set()

    def tell(self, one: UnitReturned) -> None:
        """Prints the first of this worker."""
        if one.worker not in self._told:
            self._told.add(one.worker)
            self._console.print(f"[bold red]WARNING[/] {printable(one)}")


def tracked(console: Console, things: Iterable[T], total: int, verb: str, noun: str) -> Iterator[T]:
    """The things, with progress while they are taken."""
    with passing(console, Tally(total, None, verb=verb, noun=noun)) as update:
        for thing in things:
            yield thing
            update(1)


def passing(console: Console, tally: Tally) -> AbstractContextManager[Update]:
    """Progress of which nothing is left at the end, for a step that is no result by itself."""
    return _live(console, tally, is_kept=False) if console.is_terminal else _plain(console, tally, time.monotonic())


@contextmanager
def _live(console: Console, tally: Tally, *, is_kept: bool = True) -> Iterator[Update]:
    width = min(LINE_WIDTH, console.width) - BESIDE_LINE
    line = _TallyColumn(tally, width)
    columns = (SpinnerColumn(), BarColumn(BAR_WIDTH), line)
    with Progress(*columns, console=console, transient=not is_kept) as bar:
        task = bar.add_task("", total=tally.total_records)

        def update(outcome: Outcome | Evaluated | int) -> None:
            tally.add(outcome)
            bar.update(task, completed=tally.records, total=tally.total_records)

        yield update
        line.is_over = is_kept


@contextmanager
def _plain(console: Console, tally: Tally, start: float) -> Iterator[Update]:
    """Prints a line now and then, also while no unit ends."""
    is_over = Event()

    def report() -> None:
        pause = PLAIN_SECONDS
        while not is_over.wait(pause):
            elapsed = time.monotonic() - start
            console.print(tally.line(elapsed), highlight=False)
            pause = max(PLAIN_SECONDS, PLAIN_SHARE * elapsed)

    reporter = Thread(target=report, name="progress", daemon=True)
    reporter.start()
    try:
        yield tally.add
    finally:
        is_over.set()
        reporter.join()
