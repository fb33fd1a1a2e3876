"""Runs a long lane of the suite in pieces, resumes where the last call stopped, and stores the result.

`python -m tests.lanes` lists the lanes with their stored results. `python -m tests.lanes chaos` runs one: it prints
a line for each piece (a planted fault, a mutant, a test, a round of chaos) with an estimate of the time that is
left, and ends within `--minutes`. Each finished piece is noted in `.lanes/`, so that the same command goes on with
the others. If a file that the lane tests or runs changes, it begins anew.

At its end each call writes `tests/figures/lane-NAME.json`: commit, date, how many of the pieces are done, what they
found, and the digests of the files. `--minutes 0` runs nothing and only writes it. Commit this file and the table of
`tests/README.md` that `tests/test_lanes.py` asks for. The list of lanes says how many files changed since.

Exit code 0: every piece is done, and none failed. 1: a piece failed. 2: the lane could not begin. 3: pieces
without a verdict are left.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tests.engine import zoo_table
from tests.faults import mutants
from tests.faults.mutations import tests_of
from tests.faults.planting import PACKAGES, copied, judge, load_heavy, run_tests
from tests.faults.table import MUTATIONS
from tests.lane_records import ROOT, Record, changed_since, digests, store, stored

STATES = ROOT / ".lanes"
GRACE_SECONDS = 60.0
"""The time that a process has to stop, with its servers and Ray sessions."""
NUM_MUTANTS = 400
"""Number of mutants drawn of each group."""
MUTMUT_MINUTES = 10.0
"""mutmut is restarted after this time, so that its results are stored. A start takes up to a minute."""
NUM_ROUNDS, ROUND_MINUTES = 8, 6
"""Minutes of a round of chaos. It takes up to twice as long, because the last job then finishes."""
SOUND_TREE = "no fault"
"""The piece that runs the tests of all faults on the sound tree. A red test means something only if these pass."""

SOUND_VERDICTS = {"green": "sound", "red": "broken", "broken": "broken"}
"""The piece's verdict, by the tests' verdict on the sound tree."""

Verdicts = Generator[tuple[str, str], None, None]
"""Pieces with their verdicts, each as soon as it is known."""
SecondsLeft = Callable[[], float]


@dataclass(frozen=True)
class Lane:
    """How one lane is cut into pieces, and run."""

    meaning: str
    files: Callable[[], Sequence[str]]
    """Files that it tests or runs, by their path below the root. If one of them changes, earlier verdicts are void."""
    pieces: Callable[[str, bool], list[str]]
    """All its pieces in the order of a seed. True: removes what earlier runs left."""
    run: Callable[[Sequence[str], SecondsLeft], Verdicts]
    """Runs these pieces, and ends early rather than late."""
    failures: frozenset[str]
    """Verdicts that are failures."""


@dataclass
class State:
    """The finished pieces of a lane, over all calls, for one seed and one version of its files."""

    seed: str
    files: dict[str, str]
    seconds: float = 0.0
    verdicts: dict[str, str] = field(default_factory=dict)
    """Verdict of each finished piece."""

    @classmethod
    def read(cls, path: Path, seed: str, files: dict[str, str]) -> "State":
        """The stored state; an empty one if the file is of another seed or of other code."""
        if path.exists():
            state = cls(**json.loads(path.read_text()))
            if (state.seed, state.files) == (seed, files):
                return state
        return cls(seed, files)

    def write(self, path: Path) -> None:
        """Replaces the file in one step, so that a killed call leaves a whole file."""
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(path)


def advance(
    lane: Lane, pieces: Sequence[str], state: State, path: Path, deadline: float, clock: Callable[[], float]
) -> None:
    """Runs pieces without a verdict. Stops if less time is left than the last piece took."""
    before = clock()
    todo = [piece for piece in pieces if piece not in state.verdicts]
    if not todo or before >= deadline:
        return
    with closing(lane.run(todo, lambda: deadline - clock())) as found:
        for piece, verdict in found:
            now = clock()
            seconds, before = now - before, now
            state.verdicts[piece] = verdict
            state.seconds += seconds
            state.write(path)
            is_failure = verdict in lane.failures
            print(progress(piece, verdict.upper() if is_failure else verdict, seconds, state, len(pieces)), flush=True)
            if deadline - now < seconds:
                return


def progress(piece: str, verdict: str, seconds: float, state: State, total: int) -> str:
    """The line of a finished piece, with an estimate of the time until all are done."""
    done = len(state.verdicts)
    left_minutes = state.seconds / done * (total - done) / 60
    return f"{done:4} of {total}  {verdict:9} {seconds:4.0f} s  about {left_minutes:.0f} min left  {piece}"


def record_of(name: str, lane: Lane, pieces: Sequence[str], state: State, commit: str) -> Record:
    """The record to store for the lane's present state."""
    verdicts = {piece: state.verdicts[piece] for piece in pieces if piece in state.verdicts}
    return Record(
        lane=name,
        commit=commit,
        date=time.strftime("%Y-%m-%d"),
        seed=state.seed,
        minutes=round(state.seconds / 60, 1),
        done=len(verdicts),
        total=len(pieces),
        verdicts=dict(sorted(Counter(verdicts.values()).items())),
        failed=sorted(piece for piece, verdict in verdicts.items() if verdict in lane.failures),
        files=state.files,
    )


def lanes() -> dict[str, Lane]:
    """All lanes, by name."""
    return {
        "planted-faults": PLANTED_FAULTS,
        **{f"mutants-{group}": _mutants_of(group) for group in mutants.groups()},
        "failure-tests": _tests_marked("faults", "processes, machines and stores that fail"),
        "sweeps": _tests_marked("sweep", "further cases of what faster tests prove on fewer"),
        "zoo": ZOO,
        "chaos": CHAOS,
    }


# ---------------------------------------------------------------- planted faults


def _planted_files() -> list[str]:
    tests = {f"tests/{test.split('::')[0]}" for test in tests_of(MUTATIONS)}
    tools = ["tests/faults/planting.py", "tests/faults/table.py"]
    return sorted({mutation.file for mutation in MUTATIONS} | tests) + tools


def _planted_pieces(seed: str, fresh: bool) -> list[str]:
    return [SOUND_TREE, *_shuffled([mutation.meaning for mutation in MUTATIONS], seed)]


def _plant(pieces: Sequence[str], seconds_left: SecondsLeft) -> Verdicts:
    by_meaning = {mutation.meaning: mutation for mutation in MUTATIONS}
    load_heavy()
    with copied(ROOT) as tree:
        for piece in pieces:
            is_sound = piece == SOUND_TREE
            found = run_tests(tree, tests_of(MUTATIONS)) if is_sound else judge(tree, by_meaning[piece])
            if found.seen != ("green" if is_sound else "red"):
                print(f"{piece}: {found.seen} {found.detail or 'no test noticed it'}")
            yield piece, SOUND_VERDICTS[found.seen] if is_sound else found.seen


PLANTED_FAULTS = Lane(
    "each fault of faults/table.py turns a test red",
    _planted_files,
    _planted_pieces,
    _plant,
    frozenset({"green", "broken"}),
)

# ---------------------------------------------------------------- mutants


def _mutants_of(group: str) -> Lane:
    return Lane(
        f"{NUM_MUTANTS} random changes of the code of {group}, and how many a test notices",
        partial(_mutated_files, group),
        partial(_mutant_pieces, group),
        partial(_mutate, group),
        frozenset({mutants.UNTRIED}),
    )


def _mutated_files(group: str) -> list[str]:
    wanted = mutants.groups()[group]
    tests = [test.split("::")[0] for test in wanted["tests"] if not test.startswith("--")]
    patterns = [f"{test}/**/*.py" if (ROOT / test).is_dir() else test for test in tests]
    left_out = set(wanted.get("do_not_mutate", []))
    return [*(set(_found(*wanted["only_mutate"], *patterns)) - left_out), "tests/faults/survivors.toml"]


def _mutant_pieces(group: str, seed: str, fresh: bool) -> list[str]:
    tree = mutants.prepare(group, fresh)
    mutants.generate(tree)
    return [mutant.name for mutant in mutants.drawn(tree, NUM_MUTANTS, seed)]


def _mutate(group: str, pieces: Sequence[str], seconds_left: SecondsLeft) -> Verdicts:
    tree = mutants.WORK / group
    by_name = {mutant.name: mutant for mutant in mutants.mutants_in(tree)}
    known = mutants.judged()
    todo = list(pieces)
    while todo:
        printed = mutants.run(tree, todo, min(seconds_left() / 60, MUTMUT_MINUTES))
        codes = mutants.codes_of(tree)
        tested = [name for name in todo if codes[name] is not None]
        yield from ((name, mutants.verdict_of(by_name[name], codes[name], known)) for name in tested)
        if not tested:
            print(f"mutmut tested no mutant:\n{printed}")
            return
        todo = [name for name in todo if codes[name] is None]


# ---------------------------------------------------------------- tests with a marker


def _tests_marked(marker: str, meaning: str) -> Lane:
    return Lane(
        f"{meaning}: `pytest -m {marker}`",
        partial(_marked_files, marker),
        partial(_marked_pieces, marker),
        partial(_run_marked, marker),
        frozenset({"failed"}),
    )


def _files_with(marker: str) -> list[str]:
    return [name for name in _found("tests/**/test_*.py") if f"mark.{marker}" in (ROOT / name).read_text()]


def _marked_files(marker: str) -> list[str]:
    tests = _files_with(marker)
    return [*_product(), *tests, *_helpers(*tests)]


def _pytest(marker: str, *arguments: str) -> list[str]:
    plain = ["-o", "addopts=", "--strict-markers", "-p", "no:cacheprovider", "-p", "no:nbmake", "-q", "-ra"]
    return [sys.executable, "-m", "pytest", *plain, "-m", marker, *arguments]


def _marked_pieces(marker: str, seed: str, fresh: bool) -> list[str]:
    done = subprocess.run(
        _pytest(marker, "--collect-only", *_files_with(marker)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"pytest could not collect the tests with the marker {marker}:\n{done.stdout[-3000:]}")
    return _shuffled([line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line], seed)


def _run_marked(marker: str, pieces: Sequence[str], seconds_left: SecondsLeft) -> Verdicts:
    for piece in pieces:
        code, printed = run_for(_pytest(marker, piece), seconds_left())
        if code is None:
            return
        if code != 0:
            print(printed[-3000:])
        passed = "skipped" if " passed" not in printed else "passed"
        yield piece, passed if code == 0 else "failed"


# ---------------------------------------------------------------- the zoo


def _zoo_files() -> list[str]:
    return [*_found("engine/model/**/*.py", "tests/engine/zoo*.py"), "tests/engine/zoo.txt"]


def _zoo_pieces(seed: str, fresh: bool) -> list[str]:
    return _shuffled(list(zoo_table.ENTRIES), seed)


def _visit(pieces: Sequence[str], seconds_left: SecondsLeft) -> Verdicts:
    for piece in pieces:
        yield piece, zoo_table.renewed(piece)


ZOO = Lane(
    "blocks of libraries' models are right by an oracle, or refused; each verdict goes to figures/zoo.json",
    _zoo_files,
    _zoo_pieces,
    _visit,
    zoo_table.FAULTY,
)

# ---------------------------------------------------------------- chaos


def _chaos_files() -> list[str]:
    return [*_product(), "tests/chaos.py", *_helpers()]


def _chaos_pieces(seed: str, fresh: bool) -> list[str]:
    return [f"--seed {lot} --minutes {ROUND_MINUTES}" for lot in random.Random(seed).sample(range(10**6), NUM_ROUNDS)]


def _strike(pieces: Sequence[str], seconds_left: SecondsLeft) -> Verdicts:
    for piece in pieces:
        code, printed = run_for([sys.executable, "-m", "tests.chaos", *piece.split()], seconds_left())
        if code is None:
            return
        print(printed[-3000:] if code else printed.splitlines()[-1])
        yield piece, {0: "sound", 1: "faulty"}.get(code, "broken off")


CHAOS = Lane(
    f"{NUM_ROUNDS} rounds of random kills under real jobs",
    _chaos_files,
    _chaos_pieces,
    _strike,
    frozenset({"faulty", "broken off"}),
)

# ---------------------------------------------------------------- shared by the lanes


def _shuffled(pieces: list[str], seed: str) -> list[str]:
    return random.Random(seed).sample(pieces, len(pieces))


def _found(*patterns: str) -> list[str]:
    return sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})


def _product() -> list[str]:
    return _found(*(f"{package}/**/*.py" for package in PACKAGES if package != "tests"))


def _helpers(*tests: str) -> list[str]:
    """Helpers of the failure tests and of chaos, and the modules without tests beside and above these tests."""
    folders = {"tests/faults", "tests/faults/startup", "tests/jobs"}
    folders |= {parent.as_posix() for test in tests for parent in Path(test).parents} - {"tests", "."}
    return [name for name in _found(*(f"{folder}/*.py" for folder in folders)) if "/test_" not in name]


def run_for(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """The command's exit code and output. The code is None if it was stopped after `seconds`."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None, _stopped(process)
    return process.returncode, printed


def _stopped(process: subprocess.Popen[str]) -> str:
    """Interrupts a process, and kills it if it does not end in time. Returns its output."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=GRACE_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------- the command


def listing() -> str:
    """Two lines for each lane: what it proves; its stored result, and how many of its files changed since."""
    return "\n".join(
        f"{name:20} {lane.meaning}\n{'':20} {_stored_result(name, lane)}" for name, lane in lanes().items()
    )


def _stored_result(name: str, lane: Lane) -> str:
    record = stored(name)
    if record is None:
        return "no stored result"
    now = digests(lane.files())
    age = f"{len(changed_since(record, now))} of {len(now)} files changed since"
    return f"{record.done} of {record.total} pieces at {record.commit[:12]}, {record.date}; {age}"


def run_lane(name: str, minutes: float, seed: str, fresh: bool) -> int:
    """Resumes a lane and stores its result. Returns the command's exit code."""
    deadline = time.monotonic() + 60 * minutes
    lane, path = lanes()[name], STATES / f"{name}.json"
    files = digests(lane.files())
    changed = _git("status", "--porcelain", "--", *files)
    if changed:
        print(f"Commit these files first: the result is stored with the commit.\n{changed}", file=sys.stderr)
        return 2
    if fresh:
        path.unlink(missing_ok=True)
    state = State.read(path, seed, files)
    pieces = lane.pieces(seed, not state.verdicts)
    print(f"{name}: {len(state.verdicts)} of {len(pieces)} pieces are done, seed {seed!r}", flush=True)
    advance(lane, pieces, state, path, deadline, time.monotonic)
    record = record_of(name, lane, pieces, state, _git("rev-parse", "HEAD").strip())
    figures = ", ".join(f"{count} {verdict}" for verdict, count in record.verdicts.items()) or "nothing"
    print(f"{name}: {record.done} of {record.total} in {record.minutes:g} minutes: {figures}")
    print(f"stored in {store(record).relative_to(ROOT)}")
    return 1 if record.failed else 0 if record.done == record.total else 3


def main(arguments: Sequence[str]) -> int:
    """Lists the lanes, or runs one."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lanes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lane", nargs="?", choices=lanes(), metavar="LANE", help=f"one of {', '.join(lanes())}")
    parser.add_argument("--minutes", type=float, default=150.0, help="after which it stops; 150 if not given")
    parser.add_argument("--seed", default="1", help="what the draw and the order depend on; 1 if not given")
    parser.add_argument("--fresh", action="store_true", help="forget the pieces that are done")
    options = parser.parse_args(arguments)
    if options.lane is None:
        print(listing())
        return 0
    return run_lane(options.lane, options.minutes, options.seed, options.fresh)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
