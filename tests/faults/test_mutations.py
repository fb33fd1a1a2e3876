"""The table of faults fits the tree, and the tool that plants them gives the right verdicts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mutations import ROOT, drawn
from tests.faults.table import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.meaning)
def test_every_fault_can_be_planted_and_has_its_tests(mutation):
    broken = mutation.plant((ROOT / mutation.file).read_text())
    compile(broken, mutation.file, "exec")
    assert mutation.tests
    for test in mutation.tests:
        file, name = test.split("::")
        functions = {node.name for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text())) if _is_test(node)}
        assert name in functions, f"{file} has no {name}"


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def test_a_fault_is_planted_once_and_has_its_own_name():
    assert len({mutation.meaning for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.sound, mutation.broken) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_draw_is_its_seeds():
    assert drawn((), 8, "a") == drawn((), 8, "a")
    assert drawn((), 8, "a") != drawn((), 8, "b")
    assert len({mutation.meaning for mutation in drawn((), 8, "a")}) == 8
    assert drawn((), None, "a") == list(MUTATIONS)
    assert [mutation.meaning for mutation in drawn(("marker is never",), 8, "a")] == [
        "the attempt marker is never written"
    ]


SCRIPT = """
import sys
from pathlib import Path
from tests.faults.planting import Mutation, copied, judge, load_plugins, run_tests
load_plugins()
with copied(Path(sys.argv[1])) as tree:
    print(run_tests(tree, ["test_sums.py::test_sum"]).seen)
    for file, sound, broken, test in [
        ("storage/sums.py", "a + b", "a - b", "test_sum"),
        ("storage/sums.py", "a + b", "b + a", "test_sum"),
        ("storage/sums.py", "a + b", "a +", "test_sum"),
        ("storage/sums.py", "a + b", "a - b", "test_that_is_gone"),
        ("storage/sums.py", "a + b", "a - b", "test_with_a_fixture"),
        ("storage/unused.py", "1", "2", "test_sum"),
    ]:
        print(judge(tree, Mutation("", file, sound, broken, [f"test_sums.py::{test}"])).seen)
    print(run_tests(tree, ["test_sums.py::test_sum"]).seen)
    sys.meta_path.insert(0, Elsewhere := type("Elsewhere", (), {})())
    import importlib.util
    Elsewhere.find_spec = lambda name, path=None, target=None: importlib.util.spec_from_file_location(
        name, Path(sys.argv[1]) / "storage" / "sums.py") if name == "blocksight.storage.sums" else None
    print(judge(tree, Mutation("", "storage/sums.py", "a + b", "a - b", ["test_sums.py::test_sum"])).detail)
"""


def test_a_verdict_is_red_green_or_broken(tmp_path):
    """On a small project: only a test that fails while it runs has seen a fault, and only in the copy's code."""
    for name, text in {
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-n 2'\n"
        "markers = ['servers: ', 'faults: ', 'sweep: ', 'zoo: ']\n"
        "[tool.setuptools.package-dir]\nblocksight = 'jobs/api'\n'blocksight.storage' = 'storage'\n",
        "jobs/api/__init__.py": "",
        "storage/__init__.py": "",
        "storage/sums.py": "def sum_of(a, b):\n    return a + b\n",
        "storage/unused.py": "ONE = 1\n",
        "tests/__init__.py": "",
        "tests/test_sums.py": "import pytest\nfrom blocksight.storage.sums import sum_of\n\ndef test_sum():\n"
        "    assert sum_of(1, 2) == 3\n\n@pytest.fixture\ndef three():\n    assert sum_of(1, 2) == 3\n\n"
        "def test_with_a_fixture(three):\n    pass\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    *verdicts, other = done.stdout.splitlines() or [done.stderr]
    assert verdicts == ["green", "red", "green", "broken", "broken", "broken", "broken", "green"], done.stderr
    assert (
        other
        == f"blocksight.storage.sums was imported from {Path(tmp_path) / 'storage/sums.py'}, and not from the copy"
    )
