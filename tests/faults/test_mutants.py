"""Mutants are drawn and counted correctly, and each judged survivor still has its code."""

import ast
import json
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.faults.mutants import KILLED, ROOT, Mutant, drawn, groups, judged, mutants_in, report

MUTATED = """
async def x_sent__mutmut_orig(value):
    return await value
async def x_sent__mutmut_1(value):
    return await None
def x_half__mutmut_orig(value):
    if value > 0:
        return value / 2
    raise ValueError("no")
def x_half__mutmut_1(value):
    if value >= 0:
        return value / 2
    raise ValueError("no")
def x_half__mutmut_2(value):
    if value > 0:
        return value / 3
    raise ValueError("no")
def x_half__mutmut_3(value):
    if value > 0:
        return value / 2
    raise ValueError(None)
class Pair:
    def xǁPairǁfirst__mutmut_orig(self):
        return self.get(1, key=lambda: 2)
    def xǁPairǁfirst__mutmut_1(self):
        return self.get(1, )
"""
SOUND, BROKEN = "value > 0", "value >= 0"


@pytest.fixture
def tree(tmp_path):
    """The files that mutmut leaves for a module with two functions."""
    folder = tmp_path / "mutants" / "storage"
    folder.mkdir(parents=True)
    (folder / "half.py").write_text(MUTATED)
    names = [f"blocksight.storage.half.x_half__mutmut_{number}" for number in (1, 2, 3)]
    names += ["blocksight.storage.half.x_sent__mutmut_1", "blocksight.storage.half.xǁPairǁfirst__mutmut_1"]
    codes = dict.fromkeys(names)
    (folder / "half.py.meta").write_text(json.dumps({"exit_code_by_key": codes}))
    return tmp_path


def test_a_mutant_is_its_function_and_what_differs_and_messages_are_left_out(tree):
    assert {mutant.key for mutant in mutants_in(tree)} == {
        ("half", SOUND, BROKEN),
        ("half", "return value / 2", "return value / 3"),
        ("sent", "return await value", "return await None"),
        ("Pair.first", "return self.get(1, key=lambda: 2)", "return self.get(1)"),
    }


def test_a_draw_of_mutants_is_its_seeds_and_grows(tree):
    assert drawn(tree, 3, "a") == drawn(tree, 3, "a")
    assert drawn(tree, 2, "a") == drawn(tree, 3, "a")[:2]
    assert len({tuple(drawn(tree, 3, str(seed))) for seed in range(20)}) > 1


def test_a_report_counts_what_was_noticed_and_lists_what_was_not(monkeypatch, capsys):
    mutants = [Mutant(str(number), "half", f"{number}", "other", is_message=False) for number in range(5)]
    codes = {"0": 1, "1": 36, "2": 0, "3": 33, "4": 1}
    entry = {"function": "half", "sound": "2", "broken": "other", "equivalent": "why"}
    monkeypatch.setattr("tests.faults.mutants.judged", lambda: {("half", "2", "other"): entry})
    assert report("storage", mutants, codes, 5) is True
    printed = capsys.readouterr().out
    assert "75.0% of 5 mutants noticed (5 drawn): 1 equivalent, 2 killed, 1 survived, 1 timed out" in printed
    assert "half: 3" in printed
    assert "half: 2" not in printed
    assert report("storage", mutants, codes | {"0": 0}, 5) is False
    assert 0 not in KILLED


def test_a_mutant_whose_tests_did_not_run_is_no_survivor_and_no_kill(capsys):
    mutants = [Mutant(str(number), "half", f"{number}", "other", is_message=False) for number in range(5)]
    assert report("storage", mutants, {"0": 1, "1": 1, "2": 1, "3": 255, "4": 1}, 5) is False
    assert "BROKEN, the tests of these mutants did not run: 3" in capsys.readouterr().out


def test_the_groups_files_and_tests_are_there():
    for wanted in groups().values():
        for pattern in wanted["only_mutate"]:
            assert list(ROOT.glob(pattern)), pattern
        for test in wanted["tests"]:
            assert test.startswith("--") or (ROOT / test.split("::")[0]).exists(), test


def test_mutmut_takes_a_groups_patterns_as_they_are_read_here():
    """mutmut matches with fnmatch: its `*` spans folders, and `a/**/b` is never `a/b`."""
    files = [file for name in ("engine", "jobs", "storage") for file in ROOT.glob(f"{name}/**/*.py")]
    product = [str(file.relative_to(ROOT)) for file in files]
    for wanted in groups().values():
        patterns = wanted["only_mutate"]
        read_here = {str(file.relative_to(ROOT)) for pattern in patterns for file in ROOT.glob(pattern)}
        assert {name for name in product if any(fnmatch(name, pattern) for pattern in patterns)} == read_here


def test_each_judged_survivor_is_of_a_function_that_has_the_code():
    code = _code_by_function()
    for (function, sound, _), entry in judged().items():
        assert any(sound in text for text in code.get(function, ())), f"{function} has no {sound!r}: judge it anew"
        assert ("equivalent" in entry) != ("killed_by" in entry), f"{function}: one judgement"
        if "killed_by" in entry:
            file, name = entry["killed_by"].split("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), entry["killed_by"]


def _code_by_function() -> dict[str, list[str]]:
    """The code of every function that may be mutated, as `ast` writes it, by `Class.method` or name."""
    code: dict[str, list[str]] = {}
    files = {file for wanted in groups().values() for pattern in wanted["only_mutate"] for file in ROOT.glob(pattern)}
    for file in sorted(files):
        tree = ast.parse(Path(file).read_text())
        for node in tree.body:
            own = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for each in own:
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                    code.setdefault(prefix + each.name, []).append(ast.unparse(each))
    return code
