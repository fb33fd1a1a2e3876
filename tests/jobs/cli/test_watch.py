"""`status --watch`: a job that goes on is shown look by look, and the watch ends with it, by status's exit code."""

import io
import shutil
import subprocess
from dataclasses import replace

import pytest
from rich.console import Console

from blocksight.jobs.cli import job_commands
from blocksight.jobs.cli.watch import QUIET_SECONDS, Watched, show, states
from blocksight.jobs.ledger.reconcile import read_job_state
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.plan.records import DeadLetter
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import ROOT, blocksight, command, run_here
from tests.jobs.tiny import folder_of_images


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("watch")
    run_here(folder_of_images(root / "in", 3), root / "out", explainer="gradcam")
    return root


@pytest.fixture
def undone(base, tmp_path):
    """A copy of the output whose units are all open again."""
    shutil.copytree(base / "out", tmp_path / "out")
    for place in ("data", "_job/receipts", "_job/final"):
        shutil.rmtree(tmp_path / "out" / place, ignore_errors=True)
    return tmp_path / "out"


@pytest.fixture
def looks(base, undone):
    """The state before any unit, and after all."""
    return [read_job_state(store, load_plan(store)) for store in (LocalStore(undone), LocalStore(base / "out"))]


class Clock:
    """Seconds that the test sets."""

    now = 0.0

    def __call__(self):
        return self.now


def shown(looks, *, seconds=10.0, terminal=False):
    """What is printed of looks that lie so many seconds apart."""
    printed, clock = io.StringIO(), Clock()
    console = Console(file=printed, force_terminal=terminal, width=200, color_system=None)

    def one_by_one():
        for look in looks:
            yield look
            clock.now += seconds

    assert show(console, one_by_one(), clock) is looks[-1]
    return printed.getvalue()


def test_a_line_per_change_without_a_terminal(looks):
    before, after = looks
    planned = before.plan.num_records
    assert shown([before, before, after, after]).splitlines() == [
        f"0/{planned} images, time left is known after the next unit; 0 units committed, 1 open",
        f"{planned}/{planned} images; 1 unit committed, 0 open; 3 rejected "
        f"({', '.join(f'1 {code}' for code in sorted(after.rejects))})",
    ]


def test_speed_and_time_left_count_from_the_first_look(looks):
    """What was committed before the watch began says nothing about the speed."""
    before, after = looks
    (receipt,) = after.receipts.values()
    units = [replace(before.plan.units[0], unit_id=f"{number}", ordinal=number) for number in range(4)]
    plan = replace(before.plan, units=tuple(units))
    states_of = [replace(before, plan=plan, receipts={f"{k}": receipt for k in range(done)}) for done in (1, 2)]
    watched = Watched(clock := Clock())
    watched.add(states_of[0])
    clock.now = 2.0
    watched.add(states_of[1])
    records = receipt.num_records
    assert watched.line(states_of[1]).startswith(
        f"{2 * records}/{4 * records} images, {records / 2:.3g} images/s, 0:04 left; 2 units committed, 2 open"
    )


def test_a_terminal_says_that_nothing_is_new(looks):
    assert "nothing new" not in shown([looks[0]] * 2, seconds=QUIET_SECONDS - 1, terminal=True)
    assert "nothing new for 1:00" in shown([looks[0]] * 2, seconds=QUIET_SECONDS, terminal=True)
    assert "nothing new" not in shown(looks, seconds=QUIET_SECONDS, terminal=True)


def test_reject_codes_cannot_steer_the_terminal(looks):
    receipt = replace(next(iter(looks[1].receipts.values())), rejects={"\x1b[2Jbad": 1})
    line = Watched(Clock()).line(replace(looks[1], receipts={receipt.unit_id: receipt}))
    assert "\x1b" not in line


def test_the_watch_ends_with_the_manifest_or_at_the_second_look_without_an_open_unit(looks):
    before, after = looks
    for is_final, wanted in ((True, [before, after]), (False, [before, after, after])):
        found = iter([before, after, after, after])
        assert list(states(lambda found=found: next(found), lambda is_final=is_final: is_final, lambda: None)) == wanted


def test_exit_codes_are_those_of_status(base, undone, monkeypatch):
    """Complete 0; a dead unit that no manifest accepts 3, after a second look."""
    monkeypatch.setattr(job_commands.time, "sleep", lambda _: None)
    assert blocksight("status", base / "out", "--watch").returncode == 0
    store = LocalStore(undone)
    job_state = read_job_state(store, load_plan(store))
    (unit,) = job_state.plan.units
    letter = DeadLetter(unit.unit_id, unit.ordinal, "x", "failed", "read", "gone", 1)
    monkeypatch.setattr(job_commands, "read_job_state", lambda *_: replace(job_state, dead={unit.unit_id: letter}))
    ended = blocksight("status", undone, "--watch")
    assert ended.returncode == 3
    assert "0 units committed, 0 open, 1 dead" in ended.stdout


def test_a_pause_without_a_watch_is_refused(base):
    """Nobody waits for a watch that does not come."""
    refused = blocksight("status", base / "out", "--every", "30")
    assert refused.returncode == 2
    assert "--every 30 is the pause between two looks of --watch, which is not given; give both" in " ".join(
        refused.stderr.split()
    )


def test_a_job_that_goes_on_is_watched_to_its_end(base, undone):
    """One process watches, another explains; the lines go to standard error where the figures are JSON."""
    watching = subprocess.Popen(
        command("status", undone, "--watch", "--every", "1", "--json"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with watching:
        assert watching.stderr is not None
        try:
            assert "0 units committed, 1 open" in watching.stderr.readline()
            run_here(base / "in", undone, explainer="gradcam")
            figures, lines = watching.communicate(timeout=60)
        finally:
            watching.kill()
    assert watching.returncode == 0
    assert "1 unit committed, 0 open" in lines
    assert '"open": 0' in figures
