"""Plants faults in a copy of the tree, one at a time, and reports whether their tests go red.

The tree is copied once. Each fault is judged in a fork of this process, which has loaded the heavy libraries
and nothing of the project: the fork imports the project from the copy, and proves it (an installed project
could be found first). Only a test that fails while it runs has seen a fault. One that cannot be collected or
set up has not, and the verdict is then `broken`, as for a text that is not in its file.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.installed import put_together

PACKAGES = ("cluster", "engine", "jobs", "storage", "tests")
SITE = "build/site"
"""The folder of the tree that is on the import path."""
FILES = ("pyproject.toml", "README.md")
HEAVY = ("torch", "torchvision", "pyarrow.parquet", "pyarrow.dataset", "ray.data", "s3fs", "sklearn", "scipy.stats")
"""Libraries that take seconds to import, and that no fault is planted in."""
OPTIONS = (
    "-x", "-q", "--no-header", "-o", "addopts=", "--strict-markers", "--timeout=100",
    "-m", "not servers and not faults and not sweep and not zoo",
    "-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning",  # a plugin that a heavy library needs
    "-p", "no:cacheprovider", "-p", "no:nbmake", "-p", "no:xdist",
)  # fmt: skip
SEED = "--hypothesis-seed=1"
"""One seed for all runs: the sound tree passes with it, so a failure comes from the fault."""


@dataclass(frozen=True)
class Mutation:
    """One fault: a piece of one file, its replacement, and the tests that must go red."""

    meaning: str
    file: str
    sound: str
    broken: str
    tests: Sequence[str]
    """Below `tests/`, the cheapest first: node ids without parameters, of tests that run in seconds."""

    def plant(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError if the sound text is not there exactly once."""
        if text.count(self.sound) != 1:
            raise ValueError(f"{self.file} holds this {text.count(self.sound)} times, wanted once: {self.sound!r}")
        return text.replace(self.sound, self.broken)


@dataclass(frozen=True)
class Verdict:
    """The result of the tests of a tree."""

    seen: str
    """`red`: a test failed; `green`: all passed; `broken`: no verdict."""
    detail: str
    """The first test that failed, or why there is no verdict."""


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of what the tests need of the tree, while the body runs."""
    with tempfile.TemporaryDirectory(prefix="blocksight-faults-") as folder:
        tree = Path(folder).resolve() / "tree"
        for name in PACKAGES:
            if (root / name).exists():
                shutil.copytree(root / name, tree / name)
        for name in FILES:
            if (root / name).exists():
                shutil.copy2(root / name, tree / name)
        put_together(tree, tree / SITE)
        yield tree


def load_heavy() -> None:
    """Imports the heavy libraries and pytest's plugins, so that no fork has to."""
    for name in HEAVY:
        importlib.import_module(name)
    load_plugins()


def load_plugins() -> None:
    """Imports the plugins that each fork's pytest asks for, hypothesis among them: seconds of a start."""
    for plugin in entry_points(group="pytest11"):
        if f"no:{plugin.name}" not in OPTIONS:
            plugin.load()


def judge(tree: Path, mutation: Mutation) -> Verdict:
    """Runs the fault's tests on the tree with the fault, then removes the fault."""
    file = tree / mutation.file
    text = file.read_text()
    try:
        broken = mutation.plant(text)
        compile(broken, mutation.file, "exec")
    except (ValueError, SyntaxError) as error:
        return Verdict("broken", str(error))
    try:
        _write(file, broken)
        return run_tests(tree, mutation.tests, mutation.file)
    finally:
        _write(file, text)


def run_tests(tree: Path, tests: Sequence[str], file: str | None = None) -> Verdict:
    """Runs the tests of the tree in a fork; they must have imported `file` from the tree."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.close(read_end)
            os.write(write_end, json.dumps(_in_fork(tree, tests, file)).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    shutil.rmtree(tree / ".hypothesis", ignore_errors=True)  # no examples of one fault for the next
    return Verdict(*json.loads(answer)) if answer else Verdict("broken", "the process died without output")


def _write(file: Path, text: str) -> None:
    """Writes a source file and removes its bytecode: Python would reuse one of the same second and size."""
    file.write_text(text)
    for cached in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        cached.unlink()


class _Failures:
    """A plugin that notes the tests that fail while they run."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.failed:
            self.failed.append(report.nodeid)


def _in_fork(tree: Path, tests: Sequence[str], file: str | None) -> tuple[str, str]:
    log = tree.parent / "log"
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    _import_from(tree)
    failures = _Failures()
    code = pytest.main([*OPTIONS, SEED, *(f"tests/{test}" for test in tests)], plugins=[failures])
    sys.stdout.flush()
    problem = file and _import_problem(tree, file)
    if problem:
        return "broken", problem
    if code == pytest.ExitCode.TESTS_FAILED and failures.failed:
        return "red", failures.failed[0].removeprefix("tests/")
    if code == pytest.ExitCode.OK:
        return "green", ""
    return "broken", f"the tests did not run: {' | '.join(log.read_text().splitlines()[-5:])}"


def _import_from(tree: Path) -> None:
    """Makes the tree the place that the project is imported from, here and in processes that tests start."""
    os.chdir(tree)
    places = [str(tree / SITE), str(tree)]
    sys.path[:0] = places
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] in ("blocksight", "tests")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _import_problem(tree: Path, file: str) -> str | None:
    """Says where the file's module was imported from, if it was not the tree."""
    name = f"blocksight.{file}".removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    name = name.replace("blocksight.jobs.api", "blocksight")
    module = sys.modules.get(name)
    if module is None:
        return f"no test imported {name}"
    origin = Path(str(module.__file__))
    return None if origin.resolve() == tree / file else f"{name} was imported from {origin}, and not from the copy"
