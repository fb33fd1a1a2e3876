"""The stored results of the long lanes are sound, and the README shows them; a lane that was stopped resumes."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from tests.faults import mutants
from tests.faults.mutants import SLICE, Mutant, share_noticed
from tests.lane_records import FIGURES, Record, changed_since, digests, path_of, problems, result_lines, store, stored
from tests.lanes import ROOT, SOUND_TREE, Lane, State, advance, lanes, progress, record_of, run_for

LANES = lanes()


RESULTS = {name: stored(name) for name in LANES}


def test_the_stored_results_are_sound():
    for name, record in RESULTS.items():
        if record is not None:
            assert record.lane == name
            assert list(problems(record)) == [], name
            assert share_noticed(record.verdicts) >= SLICE, name


def test_the_readme_shows_the_stored_results():
    table = "\n".join(("<!-- figures: lanes -->", *result_lines(RESULTS)))
    assert f"{table}\n\n" in (ROOT / "tests" / "README.md").read_text(), f"put this table in place:\n{table}"


def test_every_stored_result_is_of_a_lane():
    assert {path.name for path in FIGURES.glob("lane-*.json")} <= {path_of(name).name for name in LANES}


def test_a_lane_speaks_of_files_that_exist_and_of_its_tests():
    for name, lane in LANES.items():
        files = lane.files()
        assert set(digests(files)) == set(files), name
    assert {"storage/parquet/reader.py", "tests/storage/stores/test_stores.py"} <= set(LANES["mutants-storage"].files())
    assert "storage/outputs/drawings.py" not in LANES["mutants-storage"].files()
    assert {"tests/faults/test_cluster.py", "tests/faults/verifier.py"} <= set(LANES["failure-tests"].files())
    assert "tests/faults/test_verifier.py" not in LANES["failure-tests"].files()
    assert {"tests/engine/nets.py", "tests/engine/explainers/test_twin.py"} <= set(LANES["sweeps"].files())


# ---------------------------------------------------------------- made-up results


FILES = {"a.py": "a = 1\n", "b.py": "b = 2\n"}


@pytest.fixture
def root(tmp_path):
    """A small tree with the files of a lane."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def result(root, **differs):
    whole = {
        "lane": "chaos",
        "commit": "0123456789ab" + 28 * "0",
        "date": "2026-11-30",
        "seed": "1",
        "minutes": 2.5,
        "done": 3,
        "total": 3,
        "verdicts": {"sound": 3},
        "failed": [],
        "files": digests(FILES, root),
    }
    return Record(**whole | differs)


def test_a_fresh_whole_result_is_as_it_should_be(root):
    record = result(root)
    assert list(problems(record)) == []
    assert changed_since(record, digests(FILES, root)) == []
    store(record, root)
    assert stored("chaos", root) == record
    assert stored("another", root) is None


def test_a_file_that_differs_is_new_or_is_gone_has_changed(root):
    record = result(root)
    for name in ("b.py", "c.py"):
        (root / name).write_text("other\n")
    assert changed_since(record, digests(["b.py", "c.py"], root)) == ["a.py", "b.py", "c.py"]


def test_a_result_that_was_cut_short_is_sound_and_the_table_says_its_share(root):
    record = result(root, done=1, verdicts={"sound": 1})
    assert list(problems(record)) == []
    assert list(result_lines({"chaos": record, "zoo": None}))[2:] == [
        "| `chaos` | 1 of 3 | 1 sound | 2026-11-30 | `0123456789ab` |",
        "| `zoo` | none stored | | | |",
    ]


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        ({"failed": ["--seed 1"]}, "these pieces failed: --seed 1"),
        ({"done": 2}, "2 of 3 pieces are done, and 3 have a verdict"),
        ({"total": 2}, "3 of 2 pieces are done, and 3 have a verdict"),
    ],
)
def test_a_result_with_a_problem_names_it(root, differs, expected):
    assert list(problems(result(root, **differs))) == [expected]


@pytest.mark.parametrize(
    "differs",
    [
        {"commit": "main"},
        {"date": "yesterday"},
        {"done": -1},
        {"files": {"a.py": "?"}},
        {"verdicts": {"sound": "three"}},
        {"more": 1},
    ],
)
def test_a_malformed_result_is_refused(root, differs):
    with pytest.raises(ValidationError):
        result(root, **differs)
    text = result(root).model_dump_json().replace('"seed"', '"seeds"')
    (root / "lane-chaos.json").write_text(text)
    with pytest.raises(ValidationError):
        stored("chaos", root)


# ---------------------------------------------------------------- a made-up lane


PIECES = ["one", "two", "three", "four"]


def all_pieces(seed, fresh):
    return PIECES


class Clock:
    """A clock that a test moves by minutes."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def lane_of(clock, verdicts=None, ran=None):
    """A lane whose pieces take a minute each."""

    def run(pieces, seconds_left):
        for piece in pieces:
            clock.seconds += 60
            if ran is not None:
                ran.append(piece)
            yield piece, (verdicts or {}).get(piece, "passed")

    return Lane("made up", lambda: list(FILES), all_pieces, run, frozenset({"failed"}))


def test_a_lane_stops_in_time_and_goes_on_where_it_stopped(root, capsys):
    path, files, clock, ran = root / ".lanes" / "made-up.json", digests(FILES, root), Clock(), []
    lane = lane_of(clock, ran=ran)
    for minutes, done in [(2.0, 2), (0.0, 2), (1.5, 3), (150.0, 4), (150.0, 4)]:
        state = State.read(path, "1", files)
        advance(lane, PIECES, state, path, clock.seconds + 60 * minutes, clock)
        record = record_of("made-up", lane, PIECES, state, 40 * "0")
        assert (record.done, record.total, record.verdicts) == (done, 4, {"passed": done})
        assert (record.minutes, record.failed, record.files) == (done, [], files)
    assert ran == PIECES
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "   2 of 4  passed      60 s  about 2 min left  two"
    assert len(lines) == 4


def test_a_lane_takes_no_piece_that_may_not_end_in_time(root, capsys):
    clock, state = Clock(), State("1", {})
    advance(lane_of(clock), PIECES, state, root / "state.json", 174.0, clock)
    assert list(state.verdicts) == ["one", "two"]
    assert clock.seconds == 120


def test_a_call_that_dies_loses_the_piece_that_it_was_at(root, capsys):
    clock, path = Clock(), root / "state.json"

    def run(pieces, seconds_left):
        yield "one", "passed"
        raise KeyboardInterrupt

    lane = Lane("made up", list, all_pieces, run, frozenset())
    with pytest.raises(KeyboardInterrupt):
        advance(lane, PIECES, State("1", {}), path, 9000.0, clock)
    assert State.read(path, "1", {}).verdicts == {"one": "passed"}


def test_a_state_of_other_code_or_of_another_seed_is_not_gone_on_with(root):
    path, files = root / "state.json", digests(FILES, root)
    State("1", files, 60.0, {"one": "passed"}).write(path)
    assert State.read(path, "1", files).verdicts == {"one": "passed"}
    assert State.read(path, "2", files).verdicts == {}
    (root / "a.py").write_text("a = 2\n")
    assert State.read(path, "1", digests(FILES, root)).verdicts == {}


def test_a_piece_that_fails_is_loud_and_is_stored_by_name(root, capsys):
    clock, state = Clock(), State("1", digests(FILES, root))
    lane = lane_of(clock, {"three": "failed"})
    advance(lane, PIECES, state, root / "state.json", 9000.0, clock)
    assert "3 of 4  FAILED" in capsys.readouterr().out
    record = record_of("made-up", lane, PIECES, state, 40 * "0")
    assert (record.failed, record.verdicts) == (["three"], {"failed": 1, "passed": 3})
    assert list(problems(record)) == ["these pieces failed: three"]


def test_the_estimate_is_the_mean_of_all_calls():
    state = State("1", {}, 600.0, {str(number): "passed" for number in range(5)})
    assert "5 of 20  passed      30 s  about 30 min left  here" in progress("here", "passed", 30.0, state, 20)


# ---------------------------------------------------------------- the lanes that there are


@pytest.mark.parametrize("name", ["planted-faults", "chaos"])
def test_pieces_are_the_seeds_and_each_is_there_once(name):
    pieces = LANES[name].pieces("1", False)
    assert pieces == LANES[name].pieces("1", False) != LANES[name].pieces("2", False)
    assert len(set(pieces)) == len(pieces)
    assert SOUND_TREE not in pieces[1:]


def test_mutants_are_tested_in_several_starts_of_mutmut(monkeypatch, capsys):
    names, codes = ["a", "b", "c", "d"], dict.fromkeys("abcd")
    starts = iter([{"a": 1, "b": 0}, {"c": 255}, {}])

    def start(tree, todo, minutes):
        codes.update(next(starts))
        return "nothing left to do"

    made = [Mutant(name, "half", name, "other", is_message=False) for name in names]
    monkeypatch.setattr(mutants, "run", start)
    monkeypatch.setattr(mutants, "codes_of", lambda _: codes)
    monkeypatch.setattr(mutants, "mutants_in", lambda _: made)
    found = LANES["mutants-masks"].run(names, lambda: 60.0)
    assert list(found) == [("a", "killed"), ("b", "survived"), ("c", mutants.UNTRIED)]
    assert mutants.UNTRIED in LANES["mutants-masks"].failures
    assert capsys.readouterr().out == "mutmut tested no mutant:\nnothing left to do\n"


@pytest.mark.parametrize(
    ("lane", "answers", "verdicts"),
    [
        (
            "failure-tests",
            [(0, "1 passed in 3 s"), (0, "1 skipped"), (1, "1 failed"), (None, "")],
            ["passed", "skipped", "failed"],
        ),
        ("chaos", [(0, "SOUND"), (1, "FAULTY"), (2, "BROKEN OFF"), (None, "")], ["sound", "faulty", "broken off"]),
    ],
)
def test_a_commands_exit_code_is_the_verdict_and_one_that_was_stopped_has_none(monkeypatch, lane, answers, verdicts):
    replies = iter(answers)
    monkeypatch.setattr("tests.lanes.run_for", lambda *_: next(replies))
    found = dict(LANES[lane].run(PIECES, lambda: 60.0))
    assert list(found.values()) == verdicts
    assert verdicts[-1] in LANES[lane].failures


def test_a_command_that_takes_too_long_is_stopped_and_has_no_code(monkeypatch):
    monkeypatch.setattr("tests.lanes.GRACE_SECONDS", 1.0)  # a command started in the background ignores the interrupt
    assert run_for([sys.executable, "-c", "print('all')"], 60.0) == (0, "all\n")
    code, _ = run_for([sys.executable, "-c", "import time; time.sleep(200)"], 0.0)
    assert code is None


def test_without_a_lane_the_command_lists_them():
    done = subprocess.run([sys.executable, "-m", "tests.lanes"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[::2]] == list(LANES)
    assert "files changed since" in done.stdout
