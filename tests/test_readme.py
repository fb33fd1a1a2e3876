"""The README's snippets, run as they stand, and its list of reject codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.records import Cause
from storage.rejects import RejectCode
from tests.jobs.jobs_of import ROOT, run_here
from tests.jobs.tiny import folder_of_images

README = (ROOT / "README.md").read_text()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- python: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no snippet {name}"
    return found[1]


IN_THIS_PROCESS = ("pyarrow", "duckdb", "pandas")
"""Snippets with a test of their own."""
OTHERS = [name for name in re.findall(r"<!-- python: (\S+) -->", README) if name not in IN_THIS_PROCESS]


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


@pytest.mark.servers
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_snippet_runs_and_says_something(place, name):
    """In a process of its own, for Ray leaves a session behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}  # not a cluster that is here already
    command = [sys.executable, "-c", snippet(name)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("kind", "head"), [(RejectCode, "rejected record"), (Cause, "dead unit")])
def test_the_readme_lists_every_reason(kind, head):
    table = re.search(rf"^\| {head} \| .*\n\|.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table
    named = re.findall(r"`(\w+)`", "".join(line.split(" | ")[0] for line in table[1].splitlines()))
    assert sorted(named) == sorted(kind)


def test_the_readme_lists_every_parameter():
    from dataclasses import fields

    from engine.parameters import SiseParameters

    for field in fields(SiseParameters):
        assert re.search(rf"^\| `{field.name}` \| `{field.default}` \|", README, re.MULTILINE)


# ---------------------------------------------------------------- measured figures

FIGURES = ROOT / "tests" / "figures"


def curve_lines(rows) -> list[str]:
    """The README's table of a fidelity curve."""
    head = "| method | forwards | images | blocks | SSIM | top 15 % | ins - del, less SISE's | Drop, less SISE's | |"
    return [head, "| --- " * 9 + "|", *map(_curve_line, rows)]


def _curve_line(row) -> str:
    similar = [row[name][0] for name in ("block_correlation", "ssim", "iou_15")]
    said = ["-" if mean is None else f"{mean:.3f}" for mean in similar]
    said += [_difference(row, "insertion_minus_deletion", 3), _difference(row, "drop", 1)]
    verdict = "no loss" if row.get("loses_nothing") else ""
    return f"| {row['method']} | {row['forwards']:.0f} | {row['images']} | {' | '.join(said)} | {verdict} |"


def _difference(row, measure, digits) -> str:
    paired = row.get(f"{measure}_difference")
    if paired is None:
        return f"({row[measure][0]:.{digits}f})"
    mean, low, high = paired
    return "-" if mean is None or low is None else f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def race_lines(rows) -> list[str]:
    """The README's table of a race."""
    head = "| one image | job | how | forwards | forwards/s | seconds | we are ahead per forward |"
    lines = [
        f"| {row['name']} | {row['job']} | {row['how']} | {row['forwards']} | {row['forwards_per_second']:.1f} "
        f"| {row['forwards'] / row['forwards_per_second']:.1f} | {row['we_are_ahead']:.2f} x |"
        for row in rows
    ]
    return [head, "| --- " * 7 + "|", *lines]


@pytest.mark.parametrize(
    ("name", "file", "lines"),
    [
        ("efficientnet_lite0", "curve-efficientnet_lite0", curve_lines),
        ("tiny_darknet", "curve-tiny_darknet", curve_lines),
        ("race", "race", race_lines),
    ],
)
def test_the_readmes_figures_are_the_stored_ones(name, file, lines):
    stored = json.loads((FIGURES / f"{file}.json").read_text())
    assert f"<!-- figures: {name} -->\n" + "\n".join(lines(stored)) + "\n" in README
