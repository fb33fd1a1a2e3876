"""Progress: lines that fit a terminal, count what a method does, and go on where there is no terminal."""

import io
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from blocksight.jobs.plan.records import DeadLetter, Receipt, UnitFailure
from blocksight.jobs.worker import progress as module
from blocksight.jobs.worker.progress import LINE_WIDTH, Tally, progress, tracked

COUNTS = st.integers(0, 10**8)


def receipt(records, forwards=0):
    return Receipt("u", 0, "f", 1, "s", records, records, records, 0, {}, forwards, {})


def printed(console, text, times=1):
    """Waits until another thread has printed the text; False if it does not within ten seconds."""
    end = time.monotonic() + 10
    while console.file.getvalue().count(text) < times and time.monotonic() < end:
        time.sleep(0.001)
    return console.file.getvalue().count(text) >= times


@pytest.mark.parametrize(
    ("records", "forwards", "seconds", "wanted"),
    [
        (40, 0, 10, "explaining: 40/100 images, 4 images/s, 0:15 left"),
        (4, 0, 10, "explaining: 4/100 images, 2.5 s each, 4:00 left"),
        (4, 800, 20, "explaining: 4/100 images, 40 masked forwards/s, 8:00 left"),
        (0, 0, 10, "explaining: 0/100 images, time left is known after the first unit"),
    ],
)
def test_a_line_counts_what_the_method_does(records, forwards, seconds, wanted):
    tally = Tally(100, None)
    tally.add(receipt(records, forwards))
    assert tally.line(seconds) == wanted


@settings(max_examples=50)
@given(records=COUNTS, more=COUNTS, forwards=COUNTS, failures=COUNTS, dead=COUNTS, seconds=st.floats(0, 1e7))
def test_every_line_fits_and_keeps_what_matters_most(records, more, forwards, failures, dead, seconds):
    tally = Tally(records + more, 1e6, records, forwards, failures, dead)
    for line in (tally.line(seconds), tally.last_line(seconds), tally.line(seconds, 60)):
        assert len(line) <= LINE_WIDTH
        assert f"{records:,}/" in line
    assert len(tally.line(seconds, 60)) <= 60


def test_a_guess_that_was_too_short_is_dropped():
    """A job of seconds spends most of its time in the start of its workers: `about 0:00 left` is no time."""
    tally = Tally(12, 3.0)
    assert tally.line(1.0) == "explaining: 0/12 images, about 0:02 left"
    assert tally.line(3.0) == "explaining: 0/12 images, time left is known after the first unit"


def test_the_last_line_gives_no_speed_of_a_start():
    assert Tally(12, None, records=12).last_line(20.0) == "explained: 12/12 images, in 0:20"


def test_what_does_not_fit_is_the_speed_and_never_the_failures():
    tally = Tally(1_281_167, None, 640_000, 4_000_000)
    tally.add(UnitFailure("u", 1, "x", "read", "gone"))
    tally.add(DeadLetter("u", 1, "x", "failed", "read", "gone", 1))
    assert tally.line(1e5) == "explaining: 640,000/1,281,167 images, 27:49:42 left, 1 unit failed, 1 unit dead"


def test_a_bar_fits_80_columns():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with progress(console, Tally(1_281_167, None)) as update:
        update(receipt(640_000, 4_000_000))
    lines = console.file.getvalue().replace("\r", "\n").splitlines()
    assert any("640,000/1,281,167 images" in line for line in lines)
    assert any("explained: 640,000/1,281,167 images, in 0:00" in line for line in lines)
    assert max(len(line.encode("ascii", "ignore")) for line in lines) <= 100  # with codes of the terminal
    assert all("…" not in line for line in lines)


def test_lines_come_without_a_terminal_also_while_no_unit_ends(monkeypatch):
    """One unit may take an hour: a log that says nothing looks like a job that hangs."""
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.01)
    console = Console(file=io.StringIO(), width=200)
    with progress(console, Tally(10, None)) as update:
        assert printed(console, "explaining: 0/10 images", times=2)
        update(receipt(10))
    assert console.file.getvalue().splitlines()[-1].startswith("explained: 10/10 images")


def test_a_short_step_leaves_nothing_in_a_log():
    console = Console(file=io.StringIO())
    assert list(tracked(console, "abc", 3, "verify", "unit")) == ["a", "b", "c"]
    assert console.file.getvalue() == ""


def test_a_long_step_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.01)
    console = Console(file=io.StringIO())
    for number, _ in enumerate(tracked(console, "abc", 3, "verify", "unit")):
        assert number != 1 or printed(console, "verifying: 1/3 units")
