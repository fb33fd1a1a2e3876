"""Reads shell scripts of jobs as far as a check needs: their commands of ours, their variables, what they install."""

import re
import shlex
from collections.abc import Iterator

from blocksight.cluster.checks.commands import Product, command_findings, config_file
from blocksight.cluster.checks.findings import Finding, Place

INSTALLS = re.compile(
    r"\b(pip3?|uv|conda|mamba|apt|apt-get|yum|dnf)\b[^;|&\n]*\binstall\b|\b(curl|wget)\b[^;&\n]*\|\s*(ba)?sh\b"
)
"""Commands that fetch programs."""
VARIABLE = re.compile(r"\$\{?(?P<name>[A-Za-z_]\w*)")
SET = re.compile(r"(?:^|[\s;])(?:export\s+|local\s+|for\s+|read\s+)?(?P<name>[A-Za-z_]\w*)(?:=|\s+in\b)")
STANDARD = ("HOME", "PATH", "USER", "TMPDIR", "PWD", "HOSTNAME", "RANDOM", "SECONDS")
PART = re.compile(r"[^\s\"']*\$[^\s\"']*")


def script_lines(text: str) -> list[str]:
    """The lines of a script, with continued ones joined."""
    return text.replace("\\\n", " ").splitlines()


def our_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of ours in a script, in which a value that the shell computes is a plain word.

    A `--part` that the shell computes is the first of two.
    """
    for line in script_lines(text):
        if re.match(r"\s*#", line) or re.search(r"\bblocksight\s+[a-z]", line) is None:
            continue
        command = re.split(r"[;|&]|\s>", line[line.index("blocksight ") :])[0]
        try:
            words = shlex.split(command, comments=True)
        except ValueError:
            continue
        yield [_plain(word, before) for before, word in zip(["", *words], words, strict=False)]


def _plain(word: str, before: str) -> str:
    if "$" not in word:
        return word
    return "0/2" if before == "--part" else PART.sub("computed", word)


def our_command_findings(place: Place, text: str, product: Product) -> Iterator[Finding]:
    """A script must run a command of ours, with options that it has."""
    commands = list(our_commands(text))
    for words in commands:
        yield from command_findings(place, words, product)
    if not commands:
        yield place.finding("command", "no command of this project is run", "write blocksight explain --config FILE")


def config_files(text: str) -> list[str]:
    """The files that the commands of ours in a script name as their configuration."""
    return [file for words in our_commands(text) if (file := config_file(words)) is not None]


def unset_variables(text: str, known: Iterator[str]) -> list[str]:
    """The variables that a script uses, and neither sets itself nor gets from outside."""
    given = {*known, *STANDARD, *(found["name"] for found in SET.finditer(text))}
    used = dict.fromkeys(found["name"] for found in VARIABLE.finditer(_without_defaults(text)))
    return [name for name in used if name not in given]


def _without_defaults(text: str) -> str:
    """The text without `${NAME:-default}` and the like, which may be unset, and without comments."""
    bare = re.sub(r"\$\{\w+:?[-?+=]", "", text)
    return re.sub(r"(^|\s)#.*", " ", bare, flags=re.MULTILINE)
