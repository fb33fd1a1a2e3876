"""Reads every README: its blocks of code, its tables, its links and the code within its lines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cluster", "engine", "jobs", "notebooks", "storage", "tests")
READMES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *(found for folder in FOLDERS for found in (ROOT / folder).rglob("README.md")))
}
"""The text of each README, by path from the root."""

FENCED = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
TABLE = re.compile(r"^(?P<head>\|.*)\n\|[-| ]+\|\n(?P<body>(?:\|.*\n)+)", re.MULTILINE)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a README."""

    readme: str
    line: int
    """Number of its first line of code, from 1."""
    mark: str | None
    """The text of a comment right above it, such as `python: duckdb`."""
    language: str
    code: str

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.readme}:{self.line}"


def blocks_of(readme: str) -> list[Block]:
    """The fenced blocks in their order."""
    text = READMES[readme]
    return [
        Block(readme, text.count("\n", 0, found.start("code")) + 1, found["mark"], found["language"], found["code"])
        for found in FENCED.finditer(text)
    ]


def without_blocks(readme: str) -> str:
    """A README's prose and tables."""
    return FENCED.sub("", READMES[readme])


def commands_of(block: Block) -> Iterator[str]:
    """The commands of a shell block: continued lines are joined, chained commands split, comments removed."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield from (part.strip() for part in line.split(" && "))


def tables(head: str) -> list[list[list[str]]]:
    """The rows of cells of every table, in any README, whose header begins with `head`."""
    return [
        [[cell.strip() for cell in row.strip("|").split(" | ")] for row in found["body"].splitlines()]
        for text in READMES.values()
        for found in TABLE.finditer(text)
        if found["head"].startswith(f"| {head} |")
    ]


def names_in(cell: str) -> list[str]:
    """The names that a cell shows as code."""
    return INLINE.findall(cell)
