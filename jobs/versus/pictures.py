"""Draws the contact sheet of a difference: image, A's map and B's map of the records that differ most."""

import heapq
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from blocksight.jobs.worker.rows import Output, Shown, images_of, rows_with, shown
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.pictures import Pixels, Tile, contact_sheet, one_line
from blocksight.storage.outputs.schema import OK

NUM_SHOWN = 12
SIDE = 320
"""Longer side of a tile, in pixels."""

Place = tuple[str, str]
"""Key and target."""


class Worst:
    """The rows to be shown: those that regressed and look elsewhere; if there are none, the least alike."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows with the columns of `DIFFERENCE`; keeps the first `NUM_SHOWN` in order."""
        comparable = [row for row in rows if row["spearman"] is not None]
        self.rows = heapq.nlargest(NUM_SHOWN, [*self.rows, *comparable], key=_strength)

    @property
    def chosen(self) -> list[Mapping[str, Any]]:
        """The rows to be shown, the least alike first."""
        flagged = [row for row in self.rows if row["regressed_and_looks_elsewhere"]]
        return flagged or self.rows

    @property
    def title(self) -> str:
        """The sheet's title, which says how its rows were chosen."""
        if any(row["regressed_and_looks_elsewhere"] for row in self.rows):
            return "regressed and looks elsewhere, the least alike first"
        return "the least alike maps; none regressed and looks elsewhere"


def _strength(row: Mapping[str, Any]) -> tuple[bool, float, str, str]:
    """The sort key; the record's key breaks ties, so that the sheet is the same each time."""
    return row["regressed_and_looks_elsewhere"], -row["spearman"], row["key"], row["target"]


def contact_sheet_of(
    a: Output, b: Output, endpoint_url: str | None, worst: Worst, truth: Truth | None = None
) -> bytes | None:
    """A PNG with a line of three tiles per chosen row, with boxes of `truth`; None if no row has two maps to show."""
    if not worst.chosen:
        return None
    places = {(row["key"], row["target"]): row for row in worst.chosen}
    ours, theirs = _rows(a, places), _rows(b, places)
    tiles: dict[Place, list[Tile]] = {}
    for key, image in _images(a, endpoint_url, {key for key, _ in places}):
        for place in places:
            if place[0] == key:
                one = shown(a.plan, ours[place], image, SIDE, truth)
                other = shown(b.plan, theirs[place], image, SIDE, truth)
                tiles[place] = _tiles(places[place], one, other)
    body = io.BytesIO()
    contact_sheet([tile for place in places for tile in tiles[place]], columns=3).save(body, "PNG")
    return body.getvalue()


def _images(a: Output, endpoint_url: str | None, keys: set[str]) -> Iterator[tuple[str, Pixels | None]]:
    """Yields each key with its image, one at a time, because originals are large; None if it can no longer be read."""
    missing = set(keys)
    for key, image in images_of(a.plan, endpoint_url, keys):
        missing.discard(key)
        yield key, image
    yield from ((key, None) for key in missing)


def _rows(output: Output, places: Collection[Place]) -> dict[Place, dict[str, Any]]:
    found = rows_with(output.store, output.plan, {key for key, _ in places})
    rows = {(row["key"], row["target"]): row for row in found if row["status"] == OK}
    return {place: rows[place] for place in places}


def _tiles(row: Mapping[str, Any], a: Shown, b: Shown) -> list[Tile]:
    label = f"label {one_line(row['label_name'])}; " if row["label_name"] is not None else ""
    facts = f"{label}spearman {row['spearman']:.2f}, moved {row['moved']:.2f}"
    target = one_line(row["target_name"])
    return [
        Tile(a.image, f"{one_line(row['key'])}\n{facts}"),
        Tile(a.overlay, f"A: {target}\n{_score_text(row, 'a')}"),
        Tile(b.overlay, f"B: {target}\n{_score_text(row, 'b')}"),
    ]


def _score_text(row: Mapping[str, Any], which: str) -> str:
    verdict = {True: ", right", False: ", wrong", None: ""}[row[f"is_right_{which}"]]
    rank = "" if row[f"rank_{which}"] is None else f", rank {row[f'rank_{which}']}"
    return f"score {row[f'score_{which}']:.3f}{rank}{verdict}"
