"""Writes an audit by hand into a real output, with everything that a report draws from an audit."""

from typing import Any

import numpy as np

from blocksight.jobs.audit.examples import Example, place_of, write_examples
from blocksight.jobs.audit.result import (
    GATES,
    GRID,
    MEASURES,
    Audit,
    Cluster,
    Effect,
    Group,
    Oddity,
    Shortcut,
    Spread,
    write_audit,
)
from blocksight.jobs.audit.stream import committed, digest_of_fragments
from blocksight.jobs.plan.plan import existing_plan
from blocksight.storage.stores.store import ObjectStore
from tests.jobs.jobs_of import rows_in


def audited(store: ObjectStore, fragments: str | None = None, text: str = "in words") -> Audit:
    """Writes an audit of the output's rows; `text` is the value of all its texts."""
    rows = [row for row in rows_in(store) if row["status"] == "ok"]
    audit = Audit(
        fragments or digest_of_fragments(committed(store, existing_plan(store))),
        {"seed": 0},
        num_rows=len(rows),
        num_maps=len(rows),
        num_rejected=0,
        num_right=None,
        gates={name: number for number, name in enumerate(GATES)},
        groups=tuple(_groups(rows, text)),
        clusters=tuple(_cluster(rows, number) for number in range(2)),
        oddities=tuple(_oddity(row, text) for row in rows[:3]),
        shortcuts=(_shortcut(rows[0], True, text), _shortcut(rows[-1], False, text)),
        notes=(f"left out: {text}",),
    )
    write_examples(store, {place_of(one): (_example(one.members[0], text),) for one in audit.findings})
    write_audit(store, audit)
    return audit


def _example(key: str, donor: str) -> Example:
    return Example("pasted", key, donor, np.zeros((6, 8, 3), np.uint8), np.ones((6, 8, 3), np.uint8), 0.25, 0.75)


def _groups(rows: list[dict[str, Any]], text: str) -> list[Group]:
    grid = np.linspace(0, 1, GRID * GRID, dtype=np.float32).reshape(GRID, GRID)
    spreads = {name: Spread(0.5, 0.1, 0.3, 0.5, 0.7, 0.9, len(rows)) for name in list(MEASURES)[:8]}
    kinds = [
        ("all", None, None),
        ("class", rows[0]["label_name"], None),
        ("predicted", None, rows[0]["target_name"]),
        ("pair", text, rows[0]["target_name"]),
    ]
    return [Group(*kind, len(rows), spreads, grid, np.zeros_like(grid)) for kind in kinds]


def _cluster(rows: list[dict[str, Any]], number: int) -> Cluster:
    own, grid = rows[number], np.eye(GRID, dtype=np.float32)
    return Cluster(rows[0]["target_index"], rows[0]["target_name"], number, 1, 0.5, 0.9, grid, (own["key"],))


def _oddity(row: dict[str, Any], text: str) -> Oddity:
    return Oddity(
        row["key"], row["target_index"], row["target_name"], row["label_name"], row["score"], "outlier", text, 3.5
    )


def _shortcut(row: dict[str, Any], is_confirmed: bool, text: str) -> Shortcut:
    effect = Effect(1.25, 0.75, 1.5, 0.004, 40, -0.125)
    return Shortcut(
        row["target_index"],
        row["target_name"],
        "class",
        (0.7, 0.7, 1.0, 1.0),
        0.625,
        0.9375,
        3.0,
        0.5,
        0.0625 if is_confirmed else None,
        effect,
        effect if is_confirmed else None,
        is_confirmed,
        text,
        (row["key"],),
    )
