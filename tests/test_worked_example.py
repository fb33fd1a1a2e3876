"""The worked example of this folder's README passes its tests in a copy of the repository."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.faults.planting import SITE, copied
from tests.readmes import ROOT, blocks_of, commands_of

BLOCKS = blocks_of("tests/README.md")
CHANGES = [block for block in BLOCKS if (block.mark or "").startswith(("new: ", "change: "))]
(GREEN,) = (block for block in BLOCKS if block.mark == "green")
UNIVERSAL = 12
"""The least number of tests that have every explainer as a parameter."""


def changed(text: str, diff: str) -> str:
    """Applies a diff of whole lines, in hunks separated by `@@`. Raises ValueError if a hunk does not fit."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if not line.startswith("+"))
        after = "".join(line[1:] for line in lines if not line.startswith("-"))
        if text.count(before) != 1:
            raise ValueError(f"the file holds this {text.count(before)} times, wanted once:\n{before}")
        text = text.replace(before, after)
    return text


def test_a_diff_is_applied_where_its_lines_are():
    assert changed("a\nb\nc\n", " a\n+x\n@@\n-c\n+d\n") == "a\nx\nb\nd\n"
    with pytest.raises(ValueError, match="holds this 2 times, wanted once"):
        changed("a\na\n", " a\n+b\n")


def test_the_example_ends_green():
    (command,) = commands_of(GREEN)
    with copied(ROOT) as tree:
        for block in CHANGES:
            kind, _, name = str(block.mark).partition(": ")
            file = tree / name
            assert file.exists() == (kind == "change"), block.place
            file.write_text(block.code if kind == "new" else changed(file.read_text(), block.code))
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": f"{tree / SITE}{os.pathsep}{tree}"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > UNIVERSAL
