"""The tables that `blocksight list` prints: explainers with their parameters, metrics and models."""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Group, RenderableType
from rich.table import Table

from blocksight.engine.catalog import entries
from blocksight.engine.catalog.entries import RECONSTRUCTED
from blocksight.engine.catalog.sources import EXTRA_OF, is_installed
from blocksight.jobs.cli.tables import facts_table, grid_table
from blocksight.jobs.plan.config import ConfigError


def catalog_table(what: str) -> RenderableType:
    """The table of `explainers`, `metrics` or `models`."""
    if what == "metrics":
        return grid_table(
            ["metric", "meaning", "unit", "better", "cost"],
            [[name, own.meaning, own.unit, own.better, own.cost] for name, own in entries.METRICS.items()],
        )
    if what == "models":
        return grid_table(
            ["model", "meaning", "needs", "installed", "example"],
            [[name, own.meaning, own.needs, _installed(name), own.example] for name, own in entries.MODELS.items()],
        )
    explainers = grid_table(
        ["explainer", "needs", "cost", "source"],
        [[_listed(name, own), own.needs, own.cost, own.source] for name, own in entries.EXPLAINERS.items()],
    )
    chosen = {name: own for name, own in entries.EXPLAINERS.items() if fields(own.parameters)}
    return Group(explainers, *_legend(), *(_parameters(name, own) for name, own in chosen.items()))


def _installed(model: str) -> str:
    """`yes`, or the command that installs what models of this kind come from."""
    prefix = model.partition(":")[0]
    return "yes" if is_installed(prefix) else f"no: pip install '.[{EXTRA_OF[prefix]}]'"


def entry_table(what: str, name: str) -> RenderableType:
    """One explainer with its parameters, one metric or one model. Raises ConfigError with the nearest names."""
    known = entries.CATALOGUE[what]
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
        raise ConfigError(f"there is no {what[:-1]} {name!r}; nearest: {', '.join(near)}")
    entry = known[name]
    texts = [(field.name, getattr(entry, field.name)) for field in fields(entry)]
    facts = facts_table([(field, text) for field, text in texts if isinstance(text, str) and text], name)
    if what != "explainers" or not fields(entry.parameters):
        return facts
    return Group(facts, _parameters(name, entry))


def _listed(name: str, entry: entries.ExplainerEntry) -> str:
    """The explainer's name with its marks."""
    return f"{name}{'(...)' if entry.wraps else ''}{' *' if entry.is_reconstruction else ''}"


def _legend() -> Iterator[str]:
    """The meanings of the marks in the list of explainers."""
    defaults = ", ".join(f"{name}({own.wraps})" for name, own in entries.EXPLAINERS.items() if own.wraps)
    yield "(...) wraps another explainer, such as ucag(sise) or ucag(smoothgrad(gradcam)); where none is named:"
    yield f"    {defaults}"
    yield f"* {RECONSTRUCTED}"
    yield "-p NAME=VALUE sets a parameter, -p base.NAME=VALUE one of what is wrapped; --preset sets the others"
    yield "    as below: where fast says nothing, as in paper"


def _parameters(explainer: str, entry: entries.ExplainerEntry) -> Table:
    """Parameters with their values by preset; one column if the presets are the same."""
    rows, hints = [], get_type_hints(entry.parameters)
    for field in fields(entry.parameters):
        paper = "" if field.default is MISSING else _value(field.default)
        fast = _value(entry.fast[field.name]) if field.name in entry.fast else ""
        rows.append([field.name, paper, *([fast] if entry.fast else []), _meaning(field, hints[field.name])])
    presets = ["paper", "fast"] if entry.fast else ["default"]
    return grid_table([f"{explainer}: -p NAME=VALUE", *presets, "meaning"], rows)


def _meaning(field: Field[Any], hint: Any) -> str:
    """The help of a parameter, with its allowed words if the help does not name them."""
    help_text, words = str(field.metadata["help"]), list(_words(hint))
    missing = [word for word in words if not re.search(rf"\b{re.escape(word)}\b", help_text) and word != field.default]
    return f"{help_text} ({', '.join(words)})" if missing else help_text


def _words(hint: Any) -> Iterator[str]:
    """The literal strings of a type."""
    if get_origin(hint) is Literal:
        yield from (word for word in get_args(hint) if isinstance(word, str))
    else:
        for inner in get_args(hint):
            yield from _words(inner)


def _value(value: Any) -> str:
    """A parameter's value as it is given with -p."""
    if isinstance(value, tuple):
        return ",".join(value) if all(isinstance(one, str) for one in value) else json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
