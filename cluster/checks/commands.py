"""Checks the commands of ours that a file runs: they exist, take these options, and name a file that is there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from blocksight.cluster.checks.findings import Finding, Place


@dataclass(frozen=True)
class Product:
    """What the checks must know of the program that the files start."""

    command_fault: Callable[[Sequence[str]], str | None]
    """Why `blocksight` refuses these arguments; None if it takes them."""
    configuration_fault: Callable[[str], str | None]
    """What is wrong with the text of a TOML file for `explain --config`; None if nothing is."""
    commit_seconds: float
    """What a worker may take to commit, once it is told to end."""
    metrics: Mapping[str, Mapping[str, Sequence[str]]]
    """What a job shows, by name: the values of each label."""
    histograms: Sequence[str]
    """Those of the metrics that are histograms."""


def command_findings(place: Place, words: Sequence[str], product: Product) -> Iterator[Finding]:
    """A finding if a command is none of ours, or has an option that is none."""
    if not words or words[0] != "blocksight":
        why = f"{' '.join(words[:1])!r} is no command of this project"
        yield place.finding("command", why, "write blocksight explain --config FILE")
        return
    fault = product.command_fault(words[1:])
    if fault is not None:
        yield place.finding("command", fault, "see blocksight explain --help")


def configuration_findings(place: Place, product: Product) -> Iterator[Finding]:
    """A finding if the text at a place is no configuration of a job that we take."""
    fault = product.configuration_fault(place.text)
    if fault is not None:
        yield place.finding("configuration", fault, "see the keys of `blocksight explain --config`")


def config_file(words: Sequence[str]) -> str | None:
    """The file that --config names; None without one."""
    for at, word in enumerate(words):
        if word == "--config" and at + 1 < len(words):
            return words[at + 1]
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None
