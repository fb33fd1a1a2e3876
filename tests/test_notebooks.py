"""The notebooks are stripped, use public names only, and hold no path of a machine."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.jobs.jobs_of import ROOT

NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
OURS = {"blocksight"}
PLAIN = {"duckdb", "matplotlib", "numpy", "PIL", "rich", "torch"}
"""What comes with the package."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ABSOLUTE = re.compile(r"""(?<![\w.:/<}])(/(?!/)[\w.-]+|[A-Za-z]:\\|~/)|file://""")
"""A path from a root, a drive or a home; a division has a blank behind its slash, and an address two slashes."""

each = pytest.mark.parametrize("notebook", NOTEBOOKS.values(), ids=NOTEBOOKS)


def sources(notebook: dict[str, Any], kind: str = "code") -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def nodes(notebook: dict[str, Any]) -> Iterator[ast.AST]:
    for source in sources(notebook):
        yield from ast.walk(ast.parse(source))


def imported(notebook: dict[str, Any]) -> Iterator[str]:
    """Modules, by their full names."""
    for node in nodes(notebook):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, "an import is absolute"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def named(notebook: dict[str, Any]) -> Iterator[str]:
    """Everything that the code names: variables, attributes, modules, what is taken from them, keywords."""
    for node in nodes(notebook):
        match node:
            case ast.Name():
                yield node.id
            case ast.Attribute():
                yield node.attr
            case ast.alias():
                yield from node.name.split(".")
            case ast.ImportFrom():
                yield from (node.module or "").split(".")
            case ast.keyword(arg=str(name)):
                yield name


def test_there_are_three():
    assert list(NOTEBOOKS) == ["audit-a-run", "compare-two", "explain-one-image"]
    assert {path.suffix for path in (ROOT / "notebooks").iterdir()} == {".ipynb", ".md"}


@each
def test_nothing_of_a_run_is_kept(notebook):
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@each
def test_metadata_says_the_language_and_no_more(notebook):
    assert notebook["metadata"] == METADATA
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}


@each
def test_imports_come_from_here_or_with_the_package(notebook):
    written_here = set(re.findall(r'"(\w+)\.py"\)\.write_text', "\n".join(sources(notebook))))
    known = OURS | PLAIN | written_here | set(sys.stdlib_module_names)
    assert {name.partition(".")[0] for name in imported(notebook)} <= known


@each
def test_no_private_name_is_used(notebook):
    private = {name for name in named(notebook) if name.startswith("_") and name != "_"}
    assert not private


@each
def test_no_path_is_absolute(notebook):
    for kind in ("code", "markdown"):
        for source in sources(notebook, kind):
            assert not ABSOLUTE.findall(re.sub(r"https?://\S+", "", source))


@pytest.mark.parametrize("text", ['"/tmp/maps"', "see /home/me/x", "~/maps", r"C:\maps", "file:///x", "f'/data/{x}'"])
def test_absolute_paths_are_known_when_met(text):
    assert ABSOLUTE.search(text)


@pytest.mark.parametrize(
    "text", ["a / b", "'photos/dog.jpg'", "s3://bucket/maps", "1/510", "f'{place}/data/**/*.parquet'"]
)
def test_and_nothing_else_is_taken_for_one(text):
    assert not ABSOLUTE.search(text)


@each
def test_every_cell_of_code_is_introduced(notebook):
    """A title first; then no more than two cells of code in a row, and sentences last."""
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert sources(notebook, "markdown")[0].startswith("# ")
    assert kinds[0] == kinds[-1] == "markdown"
    assert "code code code" not in " ".join(kinds)


@each
def test_a_user_may_name_something_of_their_own_first(notebook):
    first = ast.parse(sources(notebook)[0]).body
    assert first
    for statement in first:
        assert isinstance(statement, ast.Assign)
        assert ast.literal_eval(statement.value) is None


def test_the_suite_runs_them():
    """`python -m pytest` alone: CI has no other command for them."""
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["notebooks", "tests"]' in settings
    assert "--nbmake" in settings
