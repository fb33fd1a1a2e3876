"""One package is installed, `blocksight`: all of its folders, under no other name, and cheap to import."""

import ast
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import blocksight
from blocksight.engine.errors import ModelError
from blocksight.engine.model.loading import load_model
from tests.installed import package_folders
from tests.jobs.tiny import picture
from tests.readmes import READMES, blocks_of

ROOT = Path(__file__).resolve().parent.parent
BARE = ("engine", "jobs", "storage", "cluster")
"""Folders at the top of the checkout: from there they could be imported a second time, as other modules."""


BARE_MODULE = re.compile(rf"(?:{'|'.join(BARE)})(?:\.(?!(?:py|md|json|toml|html|yaml)$)\w+)*")
FROM = re.compile(r"\bfrom (\S+) import\b")
IMPORT = re.compile(r"(?:^|[;:\n\"'])\s*import ([\w., ]+)")


def imported(node: ast.AST) -> list[str]:
    """Modules that a node names: an import, or a string that holds a program or a module's dotted name."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            return [node.module or ""]
        case ast.Constant(value=str(text)):
            return [*named_in(text), *([text] if "." in text else [])]
    return []


def named_in(program: str) -> list[str]:
    """Modules that a program imports which stands in a string or in a block of shell."""
    plain = [name.split(" as ")[0].strip() for names in IMPORT.findall(program) for name in names.split(",")]
    return [*FROM.findall(program), *plain]


def bare_imports(text: str) -> list[str]:
    """Modules that Python code names by a name of BARE."""
    found = [name for node in ast.walk(ast.parse(text)) for name in imported(node)]
    return [name for name in found if BARE_MODULE.fullmatch(name)]


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of all Python code here: modules, tests, cells of notebooks, snippets of READMEs."""
    for folder in (*BARE, "tests"):
        for file in sorted({*(ROOT / folder).rglob("*.py")} - {Path(__file__).resolve()}):  # which holds examples
            yield str(file.relative_to(ROOT)), file.read_text()
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        yield file.name, code
    for file in (ROOT / "README.md", *(path for folder in (*BARE, "tests") for path in (ROOT / folder).rglob("*.md"))):
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)):
            yield f"{file.relative_to(ROOT)}, snippet {number}", code


def test_nothing_is_imported_by_a_bare_name():
    found = {name: bare for name, text in sources() if (bare := bare_imports(text))}
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "import engine",
        "from jobs.plan import config",
        "def f():\n    import storage.limits as limits",
        'code = "import sys; from cluster import sizing; print(1)"',
        'code = "import engine as e"',
        'code = "import sys, engine"',
        'importlib.import_module("engine.model.taps")',
        '__import__("jobs.plan.text")',
        'monkeypatch.setattr("jobs.plan.text.counted", None)',
    ],
)
def test_a_bare_import_is_seen(text):
    assert bare_imports(text)


@pytest.mark.parametrize("text", ["from blocksight.engine import errors", "import blocksight", "'jobs import slowly'"])
def test_and_other_imports_are_not(text):
    assert not bare_imports(text)


def test_no_block_of_shell_imports_a_bare_name():
    for readme in READMES:
        for block in blocks_of(readme):
            if block.language == "bash":
                assert not [name for name in named_in(block.code) if BARE_MODULE.fullmatch(name)], block.place


def imports_of_the_top(text: str) -> list[str]:
    """Imports of `blocksight` itself, or of its folder: it is the highest room, and no other may import it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name == "blocksight" or name.startswith("blocksight.jobs.api")]
    return found


def test_no_module_imports_the_public_names():
    """The layers of import-linter do not see the package's own file."""
    files = [file for folder in BARE for file in (ROOT / folder).rglob("*.py") if file.parent != ROOT / "jobs/api"]
    assert {str(file): found for file in files if (found := imports_of_the_top(file.read_text()))} == {}
    assert imports_of_the_top("def f():\n    from blocksight import explain")
    assert imports_of_the_top("import blocksight.jobs.api")


def test_every_folder_of_modules_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = package_folders(ROOT)
    tops = {folder: name for name, folder in folders.items()}
    found = {"blocksight"}
    for folder, name in tops.items():
        for module in folder.rglob("*.py"):
            if module.parent not in tops:
                found.add(".".join([name, *module.parent.relative_to(folder).parts]))
            elif name != "blocksight":
                found.add(name)
    assert listed == sorted(found)


def test_every_public_name_is_there():
    for name, place in blocksight.NAMES.items():
        module, _, attribute = place.partition(":")
        assert getattr(blocksight, name) is getattr(import_module(module), attribute or name)
    assert set(blocksight.NAMES) <= set(dir(blocksight))
    with pytest.raises(AttributeError, match=r"offers .*ModelAdapter"):
        blocksight.heatmap  # noqa: B018


def in_a_process(code: str, folder: Path) -> str:
    """What a program prints that is run in a folder; the folder is on its import path, as with `python -c`."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    said = in_a_process(
        """
        import sys
        import blocksight
        print({"torch", "ray", "pyarrow", "numpy", "pydantic", "rich"} & set(sys.modules))
        """,
        tmp_path,
    )
    assert said == "set()"


# ---------------------------------------------------------------- a user's own modules of the same names

THEIRS = {
    "engine.py": """
        from torch import nn

        def network():
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        """,
    "storage.py": "SIZE = (32, 32)\n",
    "cluster.py": "NAME = 'theirs'\n",
    "jobs/__init__.py": "",
    "jobs/models.py": """
        import cluster
        from engine import network
        from storage import SIZE

        from blocksight import ModelAdapter

        assert cluster.NAME == "theirs"

        def make():
            return ModelAdapter(network(), input_size=SIZE, class_names=["a", "b", "c"])
        """,
}


@pytest.fixture
def their_folder(tmp_path: Path) -> Path:
    """A folder with modules of the names of our folders, a factory that imports them, and two pictures."""
    for name, text in THEIRS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    (tmp_path / "photos").mkdir()
    for name in ("one.png", "two.png"):
        (tmp_path / "photos" / name).write_bytes(picture(0))
    return tmp_path


JOB = ("--data", "photos", "--model", "jobs.models:make", "--explainer", "gradient", "--workers", "1")


@pytest.mark.servers
@pytest.mark.parametrize("runner", [pytest.param("local", marks=pytest.mark.sweep), "ray"])
def test_a_factory_finds_the_users_own_modules(their_folder, runner):
    """In the driver, and in Ray's workers."""
    command = [sys.executable, "-m", "blocksight", "explain", *JOB, "--output", "maps", "--runner", runner]
    done = subprocess.run(command, cwd=their_folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(their_folder / "maps/data").column("status").to_pylist() == ["ok", "ok"]


def test_a_notebook_has_both(their_folder):
    said = in_a_process(
        """
        import engine, jobs, storage, cluster
        import blocksight
        from rich.console import Console

        job = blocksight.JobConfig(data="photos", output="maps", model="jobs.models:make", explainer="gradient")
        blocksight.run_job(job, blocksight.Execution(runner="local", workers=1), Console(quiet=True))
        print(engine.network.__module__, storage.SIZE, cluster.NAME, jobs.__path__[0].endswith("jobs"))
        """,
        their_folder,
    )
    assert said == "engine (32, 32) theirs True"


def test_an_import_by_an_old_name_says_the_new_one(tmp_path, monkeypatch):
    (tmp_path / "mine_of_old.py").write_text("from engine.models import ModelAdapter\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "engine").exists()])
    with pytest.raises(ModelError, match=r"as `blocksight\.engine`.*`from blocksight import ModelAdapter`"):
        load_model("mine_of_old:make")


def test_the_top_level_is_fixed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.partition("/")[0] for name in listed.splitlines()}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "jobs", "engine", "storage", "cluster", "tests", "notebooks"}
    assert {name for name in top if not name.startswith(".")} == allowed
