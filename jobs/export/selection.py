"""Which maps an export takes: all, those of named records, or those that a condition of SQL picks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from blocksight.jobs.export.sql import METHOD, ask
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.worker.rows import nearest_keys
from blocksight.storage.stores.store import ObjectStore

MAP = ("key", "target")
"""Columns that name a map of an output."""


@dataclass(frozen=True)
class Selection:
    """The maps that are taken; without `maps` all of them."""

    maps: frozenset[tuple[Any, ...]] | None = None
    """Values of `MAP`."""

    @property
    def num_records(self) -> int | None:
        """Records of which a map is taken; None: all."""
        return None if self.maps is None else len({key for key, _ in self.maps})

    def takes(self, row: Mapping[str, Any]) -> bool:
        """True if the map of an explained row is taken."""
        return self.maps is None or tuple(row[name] for name in MAP) in self.maps


def selected(
    connection: duckdb.DuckDBPyConnection, store: ObjectStore, keys: Sequence[str], where: str | None
) -> Selection:
    """The maps of these keys, all for none, for which the condition holds.

    `where` is SQL over the columns of the views `maps` and `metrics`. Raises ConfigError for a key without a map, for
    a condition that is none, and where nothing is left.
    """
    if not keys and where is None:
        return Selection()
    names = ", ".join(MAP)
    found = [row for row in _picked(connection, names, where) if not keys or row[0] in set(keys)]
    if keys and where is None:
        _refuse_missing(store, keys, {row[0] for row in found})
    if not found:
        raise ConfigError(f"--where {where} holds for no map{' of these keys' if keys else ''}")
    return Selection(frozenset(found))


def _picked(connection: duckdb.DuckDBPyConnection, names: str, where: str | None) -> list[tuple[Any, ...]]:
    if where is None:
        return ask(connection, f"SELECT {names} FROM maps").fetchall()
    same = [name for name in METHOD if name != "target_index"]  # which is null for a sum, and null equals nothing
    joined = f"maps LEFT JOIN (SELECT * EXCLUDE (target_index) FROM metrics) USING ({', '.join(same)})"
    return ask(connection, f"SELECT {names} FROM {joined} WHERE (\n{where}\n)").fetchall()


def _refuse_missing(store: ObjectStore, keys: Sequence[str], found: set[str]) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        nearest = ", ".join(map(repr, nearest_keys(store, missing[0]))) or "none"
        raise ConfigError(f"no map of a record {missing[0]!r} in {store.uri}; nearest keys: {nearest}")
