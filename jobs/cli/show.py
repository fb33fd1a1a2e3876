"""Shows one record of an output: its facts as a table, and a picture or a sheet of pictures per target."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console, RenderableType

from blocksight.jobs.cli.record_tables import record_table
from blocksight.jobs.explain.block_tiles import block_tiles, overlay_of, refuse_without_blocks
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.preflight import readout_of
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.plan.text import counted
from blocksight.jobs.report.products import Sizes, parts_of, products_of
from blocksight.jobs.worker.rows import PICTURE_SIDE, Output, Shown, images_of, refuse_other_inputs, rows_of, shown
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.file_names import file_name
from blocksight.storage.outputs.pictures import (
    Pixels,
    Tile,
    contact_sheet,
    in_panels,
    one_line,
)
from blocksight.storage.outputs.schema import OK

if TYPE_CHECKING:
    from blocksight.engine.explainers.explanation import Explanation

SHEET_COLUMNS = 6
SHEET_SIDE = 288
"""Longer side of a sheet's tiles, in pixels."""
MAX_FILM, MAX_COLUMNS = 48, 7
"""Accumulated maps that are drawn, and tiles in a row: with the map itself, those of 12 blocks fill two rows."""

Row = dict[str, Any]


@dataclass(frozen=True)
class SheetRequest:
    """The maps that a sheet shows in addition to the stored one."""

    blocks: bool = False
    """Whether to show the block maps and their fusion, by a replay."""
    explainers: str | None = None
    """Names joined by commas of explainers whose maps are computed now."""
    beside: tuple[Output, ...] = ()
    """Other outputs of the same data."""
    weights: str | None = None
    """The weights file, if the model came from one."""
    model: str | None = None
    """The model; needed if it is the user's code."""
    truth: Truth | None = None
    """Ground truth whose boxes are drawn."""

    @property
    def names(self) -> list[str]:
        """The explainers, each once. Raises ConfigError if none is named."""
        if self.explainers is None:
            return []
        names = list(dict.fromkeys(name.strip() for name in self.explainers.split(",") if name.strip()))
        if not names:
            raise ConfigError("--explainers names none; see `blocksight list explainers`")
        return names

    @property
    def is_sheet(self) -> bool:
        """Whether the picture is a sheet, with more than the stored map."""
        return self.blocks or self.explainers is not None or bool(self.beside)


def render_record(
    output: Output, key: str, endpoint_url: str | None, path: Path | None, request: SheetRequest, notes: Console
) -> tuple[RenderableType, list[Path]]:
    """Writes a picture per target and returns the record's table and the pictures' paths.

    A picture is image, overlay and map side by side, or a sheet. A second picture shows the side products, if there
    are any. A rejected record has no picture. Raises ConfigError if no record has the key, a picture cannot be
    written, or a requested map cannot be computed; ModelError.
    """
    _check(output, request)
    rows = rows_of(output.store, output.plan, key)
    explained = [row for row in rows if row["status"] == OK]
    if not explained:
        return record_table(rows, readout_of(output.store)), []
    image = dict(images_of(output.plan, endpoint_url, {key})).get(key)
    pictures = (
        _sheets(output, explained, image, endpoint_url, request, notes)
        if request.is_sheet
        else _plain(output, explained, image, request.truth)
    )
    table, written, alone = record_table(rows, readout_of(output.store)), [], len(explained) == 1
    named = path and path.with_name(f"{path.stem}.products{path.suffix}")
    for row, picture in zip(explained, pictures, strict=True):
        beside = _products(output, row, image)
        own = _path(path, key, row, alone=alone, kind="sheet" if request.is_sheet else "map")
        drawn = (
            {own: picture}
            if beside is None
            else {
                own: picture,
                _path(named, key, row, alone=alone, kind="products"): beside,
            }
        )
        for target, one in drawn.items():
            _save(one, target)
        written += drawn
    return table, written


def _products(output: Output, row: Row, image: Pixels | None) -> Image.Image | None:
    """The sheet of the side products, with the map first; None if nothing can be drawn."""
    sizes = Sizes(film=SHEET_SIDE, single=PICTURE_SIDE, most=MAX_FILM)
    parts = parts_of(
        products_of(row),
        (row["map_height"], row["map_width"]),
        lambda side: shown(output.plan, row, image, side).pixels,
        sizes,
    )
    tiles = [tile for part in parts for tile in part.tiles]
    if not tiles:
        return None
    base = shown(output.plan, row, image, sizes.film if all(part.is_film for part in parts) else sizes.single)
    summary = "; ".join(part.summary for part in parts)
    first = Tile(base.overlay, f"{one_line(row['target_name'])}, {row['score']:.3f}\n{summary}")
    num_rows = -(-(1 + len(tiles)) // MAX_COLUMNS)
    return contact_sheet([first, *tiles], -(-(1 + len(tiles)) // num_rows), is_signed=base.is_signed)


def _check(output: Output, request: SheetRequest) -> None:
    """Raises ConfigError if the sheet can never be drawn."""
    refuse_other_inputs([output, *request.beside])
    if request.blocks:
        refuse_without_blocks(output.plan.identity["explainer"], "--blocks", output.name)


def _plain(output: Output, rows: Sequence[Row], image: Pixels | None, truth: Truth | None) -> Iterator[Image.Image]:
    for row in rows:
        own = shown(output.plan, row, image, truth=truth)
        yield in_panels((own.image, own.overlay, own.colours), is_signed=own.is_signed)


def _sheets(
    output: Output,
    rows: Sequence[Row],
    image: Pixels | None,
    endpoint_url: str | None,
    request: SheetRequest,
    notes: Console,
) -> Iterator[Image.Image]:
    """Yields a sheet per row: the image, its blocks, the stored map, other explainers' maps, other outputs' maps."""
    key, names = rows[0]["key"], request.names
    others = [(one, _by_target(one, key)) for one in request.beside]
    explanations: dict[str | None, list[Explanation]] = {}
    if request.blocks or names:
        if image is None:
            raise ConfigError(f"the image of {key!r} cannot be read any more, or changed: no map of it can be computed")
        explanations = dict(_replayed(output, rows, image, endpoint_url, request, notes))
    for place, row in enumerate(rows):
        base = shown(output.plan, row, image, SHEET_SIDE, request.truth)
        of_job = explanations[None][place] if request.blocks else None
        tiles = [Tile(base.image, f"{one_line(key)}\n{_label(row)}")]
        if of_job is not None:
            tiles += block_tiles(base.pixels, of_job, output.plan.identity["parameters"])
        tiles.append(_stored_tile(base, row, output, of_job))
        tiles += [_made_tile(base.pixels, name, explanations[name][place], row) for name in names]
        tiles += [_beside_tile(base.pixels, one, own.get(row["target"]), row, image) for one, own in others]
        yield contact_sheet(tiles, min(SHEET_COLUMNS, len(tiles)), is_signed=base.is_signed)


def _by_target(output: Output, key: str) -> Mapping[str, Row]:
    return {row["target"]: row for row in rows_of(output.store, output.plan, key) if row["status"] == OK}


def _replayed(
    output: Output,
    rows: Sequence[Row],
    image: Pixels,
    endpoint_url: str | None,
    request: SheetRequest,
    notes: Console,
) -> "Iterator[tuple[str | None, list[Explanation]]]":
    """Replays the rows with each named explainer, and under None with the job's own if its blocks are shown."""
    from blocksight.jobs.explain.replay import Replay  # needs torch, which a stored map does not

    named = NamedModel(request.model, request.weights, endpoint_url)
    replay = Replay(output.store, output.plan, named, notes)
    configs = {
        name: replay.config_of_explainer(name) for name in request.names
    }  # all are checked before the first runs
    if request.blocks:
        yield None, replay.explanations(replay.config_of_row(rows[0]), rows, image)
    for name, config in configs.items():
        yield name, replay.explanations(config, rows, image)


def _label(row: Row) -> str:
    return "no label" if row["label_name"] is None else f"label {one_line(row['label_name'])}"


def _stored_tile(base: Shown, row: Row, output: Output, explanation: "Explanation | None") -> Tile:
    fact = f"{one_line(row['target_name'])}, {row['score']:.3f}"
    if explanation is not None:
        from blocksight.jobs.explain.replay import replay_error

        error = replay_error(explanation, row)
        fact = "the fused map equals it" if error is None else f"the fused map differs by up to {error:.3f}"
    return Tile(base.overlay, f"{output.plan.identity['explainer']}, as stored\n{fact}")


def _made_tile(pixels: Pixels, name: str, explanation: "Explanation", row: Row) -> Tile:
    forwards = counted(explanation.num_forwards, "masked forward")
    return Tile(
        overlay_of(pixels, explanation.saliency_hw), f"{name}, made now\n{one_line(row['target_name'])}, {forwards}"
    )


def _beside_tile(pixels: Pixels, output: Output, own: Row | None, row: Row, image: Pixels | None) -> Tile:
    head = f"{output.plan.identity['explainer']}, {output.plan.identity['model']}"
    if own is None:
        return Tile(pixels, f"{output.name}\nholds no map of {one_line(row['target_name'])}")
    other = shown(output.plan, own, image, SHEET_SIDE)
    fact = f"{one_line(own['target_name'])}, {own['score']:.3f}; {head}"
    return Tile(other.overlay, f"{output.name}\n{fact}")


def _path(path: Path | None, key: str, row: Row, *, alone: bool, kind: str) -> Path:
    """The requested file, or one in the current folder that is named after the key."""
    base = path or Path(f"{file_name(key)}.{kind}.png")  # never the name of the image itself
    return base if alone else base.with_name(f"{base.stem}-{file_name(row['target'])}{base.suffix}")


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path, "PNG")
    except OSError as error:
        raise ConfigError(f"the picture {path} cannot be written: {error.strerror or error}") from error
