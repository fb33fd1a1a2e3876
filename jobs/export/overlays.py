"""Writes a picture per map: the overlay as PNG, or a GIF over the blocks or over other outputs."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from typing_extensions import override

from blocksight.jobs.export.parts import FormOfRecords, Part, place
from blocksight.jobs.export.records import ExplainedMap, ExplainedRecord, ExplainedRecords, Row
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.worker.rows import PICTURE_SIDE, Output, Shown, existing_output, rows_with, shown
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


@dataclass(frozen=True)
class Pictures(FormOfRecords):
    """A picture per map, PNG or a GIF with the frames that `outputs` or a replay give, and an index of them."""

    truth: Truth | None = None
    outputs: tuple[str, ...] = ()
    """Names of other outputs whose maps are frames."""
    endpoint_url: str | None = None
    replayed: Frames | None = None
    """Frames by a replay on the model, in this process alone."""

    def write_records(self, records: Iterator[ExplainedRecord], reader: ExplainedRecords, folder: Path) -> None:
        """Writes the pictures by number, and a line of JSON for each. One picture is in memory at once."""
        frames, number = self._frames(), 0
        with (folder / INDEX).open("w", encoding="utf-8") as index:
            for record in records:
                for one in record.maps:
                    self._draw(record, one, reader, folder / str(number), frames)
                    index.write(json.dumps({"file": file_name(record.key), **_facts(one)}) + "\n")
                    number += 1

    @override
    def join(self, parts: Iterator[Part], reader: ExplainedRecords, folder: Path) -> Sequence[str]:
        """Names a file by its number and the record's key, as far as a key is a valid name."""
        number, suffix = 0, ".png" if self._frames() is None else ".gif"
        with (folder / INDEX).open("w", encoding="utf-8") as index:
            for part in parts:
                with (part.folder / INDEX).open(encoding="utf-8") as lines:
                    for own, line in enumerate(islice(lines, part.num_maps)):
                        facts = json.loads(line)
                        facts["file"] = f"{number:06d}-{facts['file']}{suffix}"
                        place(part.folder / str(own), folder / facts["file"])
                        index.write(json.dumps(facts) + "\n")
                        number += 1
        return [f"{number:,} pictures; {INDEX} has a line of JSON for each: file, key, target, score"]

    def _frames(self) -> Frames | None:
        if not self.outputs:
            return self.replayed
        return output_frames([existing_output(name, self.endpoint_url) for name in self.outputs], self.truth)

    def _draw(
        self, record: ExplainedRecord, one: ExplainedMap, reader: ExplainedRecords, file: Path, frames: Frames | None
    ) -> None:
        base = shown(reader.plan, dict(one.row), record.pixels, PICTURE_SIDE, self.truth)
        if frames is None:
            Image.fromarray(base.overlay).save(file, "PNG")
        else:
            _save_gif(_tiles(record, one, base, frames), file, is_signed=base.is_signed)


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
