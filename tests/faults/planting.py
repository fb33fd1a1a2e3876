"""Plants faults in a copy of the tree, one at a time, and says whether the tests that guard the place go red.

The tree is copied once. Each fault is judged in a fork of this process, which has loaded the heavy libraries
and nothing of the project: the fork imports the project from the copy, and proves it (an installed project
could stand before it). Only a test that fails while it runs has seen a fault. One that cannot be collected or
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
from pathlib import Path
from typing import Any

import pytest

from tests.installed import put_together

PACKAGES = ("cluster", "engine", "jobs", "storage", "tests")
SITE = "build/site"
"""Of the tree, what stands on the import path."""
FILES = ("pyproject.toml", "README.md")
HEAVY = ("torch", "torchvision", "pyarrow.parquet", "pyarrow.dataset", "ray.data", "s3fs", "sklearn", "scipy.stats")
"""Libraries that take seconds to import, and that no fault is planted in."""
OPTIONS = (
    "-x", "-q", "--no-header", "-o", "addopts=", "--strict-markers", "--timeout=100",
    "-m", "not servers and not faults and not sweep",
    "-p", "no:cacheprovider", "-p", "no:nbmake", "-p", "no:xdist",
)  # fmt: skip
SEED = "--hypothesis-seed=1"
"""One seed for all: what the sound tree passes with it, a broken one does not fail by bad luck."""


@dataclass(frozen=True)
class Mutation:
    """One fault: a piece of one file, what is put in its place, and who must notice."""

    meaning: str
    file: str
    sound: str
    broken: str
    tests: Sequence[str]
    """Below `tests/`, the cheapest first: node ids without parameters, of tests that run in seconds."""

    def plant(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError where the sound text is not there exactly once."""
        if text.count(self.sound) != 1:
            raise ValueError(f"{self.file} holds this {text.count(self.sound)} times, wanted once: {self.sound!r}")
        return text.replace(self.sound, self.broken)


@dataclass(frozen=True)
class Verdict:
    """What the tests made of a tree."""

    seen: str
    """`red`: a test failed; `green`: all passed; `broken`: no verdict."""
    said: str
    """The first test that failed, or why there is no verdict."""


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of what the tests need of the tree, for as long as the body runs."""
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
    """Imports the heavy libraries, so that no fork has to."""
    for name in HEAVY:
        importlib.import_module(name)


def judge(tree: Path, mutation: Mutation) -> Verdict:
    """What the fault's own tests make of the tree with the fault, which is taken out again."""
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
    """Runs the tests of the tree in a fork; `file` is what they must have imported from it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.close(read_end)
            os.write(write_end, json.dumps(_in_fork(tree, tests, file)).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    shutil.rmtree(tree / ".hypothesis", ignore_errors=True)  # examples of one fault are no business of the next
    return Verdict(*json.loads(said)) if said else Verdict("broken", "the process died without a word")


def _write(file: Path, text: str) -> None:
    """Writes a source file; bytecode of the same second and size would be taken for its own."""
    file.write_text(text)
    for cached in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        cached.unlink()


class _Witness:
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
    witness = _Witness()
    code = pytest.main([*OPTIONS, SEED, *(f"tests/{test}" for test in tests)], plugins=[witness])
    sys.stdout.flush()
    stranger = file and _stranger(tree, file)
    if stranger:
        return "broken", stranger
    if code == pytest.ExitCode.TESTS_FAILED and witness.failed:
        return "red", witness.failed[0].removeprefix("tests/")
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


def _stranger(tree: Path, file: str) -> str | None:
    """Says where the file's module was imported from, if that was not the tree."""
    name = f"blocksight.{file}".removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    name = name.replace("blocksight.jobs.api", "blocksight")
    module = sys.modules.get(name)
    if module is None:
        return f"no test imported {name}"
    origin = Path(str(module.__file__))
    return None if origin.resolve() == tree / file else f"{name} was imported from {origin}, and not from the copy"
