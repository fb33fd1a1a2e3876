"""Progress: shows records, masked forwards per second and the time left, live on a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from blocksight.jobs.plan.records import DeadLetter, Evaluated, Outcome, Receipt, UnitFailure
from blocksight.jobs.plan.text import clock, counted

PLAIN_SECONDS = 10.0
"""Between two lines if the output is no terminal."""


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

    def left(self, elapsed: float) -> str:
        """The time left, from the speed so far, or from the estimate before the first unit is done."""
        if self.records:
            return f"{clock(elapsed * (self.total_records - self.records) / self.records)} left"
        if self.guess_seconds is None:
            return "time left is known after the first unit"
        return f"about {clock(max(0.0, self.guess_seconds - elapsed))} left"

    def line(self, elapsed: float) -> str:
        """`3/6 records, 84 masked forwards/s, 1:02 left`."""
        rate = self.forwards / elapsed if elapsed > 0 else 0.0
        trouble = f", {counted(self.failures, 'unit')} failed" if self.failures else ""
        trouble += f", {counted(self.dead, 'unit')} dead" if self.dead else ""
        speed = f"{rate:,.0f} masked forwards/s, " if self.verb == "explain" else ""
        return f"{self.records:,}/{counted(self.total_records, 'record')}, {speed}{self.left(elapsed)}{trouble}"


class _TallyColumn(ProgressColumn):
    """The tally's line, redrawn at every refresh so that the time left counts down."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def render(self, task: Task) -> Text:
        return Text(self.tally.line(task.elapsed or 0.0))


@contextmanager
def progress(console: Console, tally: Tally) -> Iterator[Callable[[Outcome | Evaluated | int], None]]:
    """Shows the tally while the body runs; the body passes each unit's outcome to the yielded function."""
    show = _live if console.is_terminal else _plain
    with show(console, tally) as update:
        yield update


@contextmanager
def _live(console: Console, tally: Tally) -> Iterator[Callable[[Outcome | Evaluated | int], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn(f"{tally.stem}ing"),
        BarColumn(),
        TimeElapsedColumn(),
        _TallyColumn(tally),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=tally.total_records)

        def update(outcome: Outcome | Evaluated | int) -> None:
            tally.add(outcome)
            # a tar's record count is an estimate: the bar's end moves to the real count
            tally.total_records = max(tally.total_records, tally.records)
            bar.update(task, completed=tally.records, total=tally.total_records)

        yield update


@contextmanager
def _plain(console: Console, tally: Tally) -> Iterator[Callable[[Outcome | Evaluated | int], None]]:
    start = shown = time.monotonic()

    def update(outcome: Outcome | Evaluated | int) -> None:
        nonlocal shown
        tally.add(outcome)
        tally.total_records = max(tally.total_records, tally.records)
        if time.monotonic() - shown >= PLAIN_SECONDS:
            shown = time.monotonic()
            console.print(f"{tally.stem}ing: {tally.line(shown - start)}", highlight=False)

    yield update
    console.print(f"{tally.stem}ed: {tally.line(time.monotonic() - start)}", highlight=False)
