"""Writes a picture per map: the overlay as PNG, or a GIF over the blocks or over other outputs."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from blocksight.jobs.export.records import ExplainedMap, ExplainedRecord, ExplainedRecords, Row
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.worker.rows import PICTURE_SIDE, Output, Shown, rows_with, shown
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.file_names import file_name
from blocksight.storage.outputs.pictures import Tile, contact_sheet, one_line
from blocksight.storage.outputs.schema import OK

if TYPE_CHECKING:
    from blocksight.jobs.explain.replay import Replay  # which needs torch

INDEX = "index.jsonl"
INDEXED = ("key", "target", "target_index", "target_name", "target_rank", "score", "label_name", "explainer", "is_flat")
"""Columns of the output that the index has of each picture."""
FRAME_MILLISECONDS = 1_200

Frames = Callable[[ExplainedRecord, Row, Shown], Iterator[Tile]]
"""The tiles of a GIF between the picture and the stored map, of one map of a record."""


def write(
    shown_records: Iterable[ExplainedRecord],
    records: ExplainedRecords,
    folder: Path,
    truth: Truth | None = None,
    frames: Frames | None = None,
) -> Sequence[str]:
    """Writes a picture per map and an index of them, and returns lines for the user. One picture is in memory at once.

    A file is named by its number and the record's key, as far as a key is a valid name. With `frames` the picture is a
    GIF.
    """
    number = 0
    with (folder / INDEX).open("w", encoding="utf-8") as index:
        for record in shown_records:
            for one in record.maps:
                base = shown(records.plan, dict(one.row), record.pixels, PICTURE_SIDE, truth)
                name = f"{number:06d}-{file_name(record.key)}{'.png' if frames is None else '.gif'}"
                if frames is None:
                    Image.fromarray(base.overlay).save(folder / name, "PNG")
                else:
                    _save_gif(_tiles(record, one, base, frames), folder / name, is_signed=base.is_signed)
                index.write(json.dumps({"file": name, **_facts(one)}) + "\n")
                number += 1
    return [f"{number:,} pictures; {INDEX} has a line of JSON for each: file, key, target, score"]


def _facts(one: ExplainedMap) -> dict[str, Any]:
    return {name: one.row[name] for name in INDEXED} | dict(one.metrics)


def _tiles(record: ExplainedRecord, one: ExplainedMap, base: Shown, frames: Frames) -> Iterator[Tile]:
    row = one.row
    label = "no label" if row["label_name"] is None else f"label {one_line(row['label_name'])}"
    yield Tile(base.image, f"{one_line(record.key)}\n{label}")
    yield Tile(base.overlay, f"{row['explainer']}, as stored\n{one_line(row['target_name'])}, {row['score']:.3f}")
    yield from frames(record, row, base)


def _save_gif(tiles: Iterable[Tile], path: Path, *, is_signed: bool) -> None:
    first, *others = (_with_palette(contact_sheet([tile], 1, is_signed=is_signed)) for tile in tiles)
    first.save(path, "GIF", save_all=True, append_images=others, duration=FRAME_MILLISECONDS, loop=0)


def _with_palette(frame: Image.Image) -> Image.Image:
    """The frame in 256 colours of its own, spread so that the legend's steps are not seen as levels of the map."""
    palette = frame.quantize(256, Image.Quantize.MAXCOVERAGE)
    return frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def block_frames(plan: Plan, replay: "Replay") -> Frames:
    """Frames with each block's map and their fusion, by a replay of the record."""
    from blocksight.jobs.explain.block_tiles import block_tiles

    def frames(record: ExplainedRecord, row: Row, base: Shown) -> Iterator[Tile]:
        (explanation,) = replay.explanations(replay.config_of_row(row), [row], record.pixels)
        yield from block_tiles(base.pixels, explanation, plan.identity["parameters"])

    return frames


def output_frames(outputs: Sequence[Output], truth: Truth | None = None) -> Frames:
    """Frames with the maps that other outputs of the same data have of the same target."""

    def frames(record: ExplainedRecord, row: Row, base: Shown) -> Iterator[Tile]:
        for output in outputs:
            rows = (one for one in rows_with(output.store, output.plan, {record.key}) if one["status"] == OK)
            own = next((one for one in rows if one["target"] == row["target"]), None)
            by = output.plan.identity["explainer"]
            if own is None:
                yield Tile(base.pixels, f"{by}, {output.name}\nholds no map of {one_line(row['target_name'])}")
                continue
            drawn = shown(output.plan, dict(own), record.pixels, PICTURE_SIDE, truth)
            caption = f"{by}, {one_line(output.name)}\n{one_line(own['target_name'])}, {own['score']:.3f}"
            yield Tile(drawn.overlay, caption)

    return frames
