"""The README's snippets, run as they stand, and its list of reject codes."""

import re
from pathlib import Path

import pytest

from storage.rejects import RejectCode
from tests.jobs.jobs_of import ROOT, run_here
from tests.jobs.tiny import folder_of_images

README = (ROOT / "README.md").read_text()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- python: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no snippet {name}"
    return found[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an output named `maps`, as the README has it."""
    base = tmp_path_factory.mktemp("readme")
    run_here(folder_of_images(base / "photos"), base / "maps")
    return base


def test_pyarrow_reads_the_maps(place, monkeypatch):
    monkeypatch.chdir(place)
    names: dict = {}
    exec(snippet("pyarrow"), names)
    assert len(names["rows"]) == 7
    assert names["saliency"].shape == (32, 32)
    assert (names["saliency"].min(), names["saliency"].max()) == (0, 1)


def test_duckdb_reads_the_metrics(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(snippet("duckdb"), {})
    said = capsys.readouterr().out
    assert "mean_drop" in said
    assert any(name in said for name in ("ant", "bee", "cat", "dog", "eel"))


def test_pandas_reads_the_rejects(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(snippet("pandas"), {})
    said = capsys.readouterr().out
    for code in ("empty_file", "not_an_image", "truncated"):
        assert code in said


def test_the_readme_lists_every_reject_code():
    for code in RejectCode:
        assert f"`{code}`" in README


def test_the_readme_lists_every_parameter():
    from dataclasses import fields

    from engine.catalog import SiseParameters

    for field in fields(SiseParameters):
        assert re.search(rf"^\| `{field.name}` \| `{field.default}` \|", README, re.MULTILINE)
