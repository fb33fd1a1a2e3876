"""Reads the side products of a row's map: checks them, describes each in a line, and draws captioned tiles."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blocksight.engine.catalog.entries import METRICS
from blocksight.engine.catalog.side_products import Crop, Fixation, GridMap, SideProducts
from blocksight.engine.saliency import minmax
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.text import counted
from blocksight.storage.outputs.drawings import Cell, bars, framed, with_cells, with_path
from blocksight.storage.outputs.pictures import Pixels, Tile, one_line, overlay, resized

MAX_BEST = 12
"""Maps of a family that are drawn."""
MAX_FIXATIONS = 50
MAX_CROPS = 1024
MAX_SCORE = 1e6
"""Largest amount of a crop's score: with `--readout identity` it is no probability."""
MAX_NAME = 60
"""Characters of a name in a line."""
NUM_CHANNELS = 10
"""Feature maps that are named, the most important ones."""
CONTRAST = 5.0
"""Contrast of accumulated maps: Liao et al. show sigmoid(5 z) - 0.5, so that early blocks are visible."""
MAX_RATIO = 8.0
"""Largest ratio of a map to the last one's greatest value; the display saturates long before."""

Row = Mapping[str, Any]
Floats = NDArray[np.float64]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Sizes:
    """Sizes of tiles, and how many are drawn."""

    film: int
    """Longer side of a map among several, in pixels."""
    single: int
    """Longer side of a single picture, in pixels."""
    most: int
    """Most accumulated maps that are drawn."""


@dataclass(frozen=True)
class Part:
    """One kind of side product of a row, drawn."""

    title: str
    summary: str
    """How many there are, and which are drawn."""
    meaning: str
    """A sentence that follows the title and a colon."""
    tiles: tuple[Tile, ...]
    is_film: bool = False
    """Whether it is several maps, not one picture."""


def products_of(row: Row) -> SideProducts:
    """The side products of an explained row. Raises UnreconciledError if a column is damaged."""

    def read(name: str, check: Callable[[Any], Value]) -> Value | None:
        try:
            return None if row[name] is None else check(row[name])
        except (TypeError, ValueError) as error:
            raise UnreconciledError(
                f"the column {name} of {row['key']!r} for class {row['target_index']} is damaged, "
                f"`blocksight verify` names its fragment: {error}"
            ) from error

    return SideProducts(
        channel_importance=read("channel_importance", _importances),
        crops=read("crops", lambda found: _all(found, lambda one: _crop(one, row["map_height"], row["map_width"]))),
        scan_path=read("scan_path", lambda found: _all(found, _fixation)),
        accumulated_maps=read("accumulated_maps", lambda found: _all(found, _grid)),
        map_family=read("map_family", lambda found: _all(found, _grid)),
        selected_by=read("selected_by", _metric),
        edge_detector=read("edge_detector", _brief),
    )


def _all(found: Sequence[Any], check: Callable[[Any], Value]) -> tuple[Value, ...]:
    if not found:
        raise ValueError("the list is empty")
    if any(one is None for one in found):
        raise ValueError("an entry is null")
    return tuple(map(check, found))


def _finite(*values: float) -> None:
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")


def _importances(found: Sequence[float]) -> NDArray[np.float32]:
    (values,) = _all([found], lambda own: np.asarray(own, np.float32))
    if not values.size:
        raise ValueError("the list is empty")
    _finite(*values)
    return values


def _crop(one: Row, height: int, width: int) -> Crop:
    crop = Crop(**one)
    _finite(crop.score, crop.weight)
    if abs(crop.score) > MAX_SCORE:
        raise ValueError(f"a score of {crop.score:g} is out of range")
    inside = 0 <= crop.top < crop.top + crop.height <= height and 0 <= crop.left < crop.left + crop.width <= width
    if not inside:
        raise ValueError(f"a crop of {crop.height} x {crop.width} pixels does not lie in the input")
    return crop


def _fixation(one: Row) -> Fixation:
    fixation = Fixation(**one)
    _finite(fixation.loss)
    if not max(abs(fixation.row), abs(fixation.column)) <= 1:
        raise ValueError(f"a fixation at {fixation.row:g}, {fixation.column:g} does not lie in the picture")
    return fixation


def _grid(one: Row) -> GridMap:
    values, size = np.asarray(one["values"], np.float32), (one["height"], one["width"])
    if min(size) < 1 or values.size != size[0] * size[1]:
        raise ValueError(f"a map of {size[0]} x {size[1]} cells has {values.size:,} values")
    _finite(*values, *([] if one["value"] is None else [one["value"]]))
    return GridMap(one["name"], values.reshape(size), one["value"])


def _metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"{name!r} is no metric of ours")
    return name


# ---------------------------------------------------------------- in words


def said_of(products: SideProducts) -> Iterator[tuple[str, str]]:
    """Yields a name and a line of text for each side product of the row."""
    if products.scan_path is not None:
        path = products.scan_path
        yield "scan path", f"{counted(len(path), 'fixation')}, {_losses(path)}"
    if products.crops is not None:
        best, worst = _ends([crop.score for crop in products.crops])
        yield "crops", f"{counted(len(products.crops), 'crop')}, score {figure(best)} at best, {figure(worst)} at worst"
    if products.accumulated_maps is not None:
        yield "accumulated maps", _formation(products.accumulated_maps)
    if products.map_family is not None or products.selected_by is not None:
        yield "selected by", _selection(products)
    if products.channel_importance is not None:
        values = products.channel_importance
        first = int(_order(values)[0])
        above = f"{(values > 0).sum():,} of {counted(values.size, 'channel')} above 0"
        yield "channel importance", f"{above}; the most important: {first} ({values[first]:.3g})"
    if products.edge_detector is not None:
        yield "edges", f"by {products.edge_detector}"


def figure(value: float) -> str:
    """A number in a few characters, however large or small: `0.40`, `3.1e-05`."""
    return f"{value:.2f}" if value == 0 or 0.005 <= abs(value) < 1000 else f"{value:.2g}"


def _brief(name: str) -> str:
    return one_line(name[:MAX_NAME])


def _losses(path: Sequence[Fixation]) -> str:
    return f"loss {figure(path[0].loss)} at the first, {figure(path[-1].loss)} at the last"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return max(values), min(values)


def _formation(maps: Sequence[GridMap]) -> str:
    """Names the block by which half of the last map's mass is there."""
    shares = _shares(maps)
    half = next((one.name for one, share in zip(maps, shares, strict=True) if share >= 0.5), None)
    where = "" if half is None else f"; half of the map's mass is there from {_brief(half)} on"
    return f"of {counted(len(maps), 'block')}{where}"


def _shares(maps: Sequence[GridMap]) -> list[float]:
    """Each map's mass as a share of the last one's; zeros if the last one has none."""
    masses = [float(one.values_hw.sum(dtype=np.float64)) for one in maps]
    return [mass / masses[-1] if masses[-1] > 0 else 0.0 for mass in masses]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if abs(share) < 100 else f"{100 * share:.2g} %"


def _selection(products: SideProducts) -> str:
    family, metric = products.map_family, products.selected_by
    if family is None:
        return f"{metric}, which therefore says nothing about its quality"
    names = Counter(_brief(one.name) for one in family)
    shown = ", ".join(f"{name} ({count:,})" for name, count in names.most_common(MAX_BEST))
    among = f"among {counted(len(family), 'map')}, of {shown}"
    ordered, chosen = _ranked(family, metric)
    if not chosen:
        return f"no metric {among}"
    return f"{metric} {among}; chosen: {_brief(ordered[0].name)} ({figure(ordered[0].value or 0.0)})"


def _ranked(family: Sequence[GridMap], metric: str | None) -> tuple[list[GridMap], bool]:
    """The maps, the best first (equal ones in the order drawn), and whether the first is the chosen one."""
    if metric is None:
        return list(family), False
    sign = 1.0 if METRICS[metric].better == "lower" else -1.0
    ordered = sorted(family, key=lambda one: np.inf if one.value is None else sign * one.value)
    return ordered, ordered[0].value is not None


def _order(values: NDArray[np.float32]) -> NDArray[np.intp]:
    """Indices from the greatest value to the least."""
    return np.argsort(-values, kind="stable")


# ---------------------------------------------------------------- as tiles

OF_BLOCKS = (
    "the sum up to each block, shallow to deep; the last is the map. Each has a scale of its own that makes faint "
    "places visible; percentages are of the last map's mass."
)
OF_PATH = (
    "the places that the method looked at, in order; the first is coloured. The line below gives the model's loss with "
    "each place seen sharply. It may rise: only part of the earlier places stays visible."
)
OF_CROPS = (
    "the parts of the picture that were explained alone, each with the class's score at its middle. The frame shows "
    "the best one's extent."
)
OF_FAMILY = (
    "the candidates for the map, one per baseline, with the value of the metric that chose the framed one. That metric "
    "therefore says nothing about its quality."
)
OF_CHANNELS = (
    "what each feature map of the last block adds to the score, the greatest first, with the numbers of the most "
    "important ones."
)


def parts_of(
    products: SideProducts, map_size: tuple[int, int], picture_at: Callable[[int], Pixels], sizes: Sizes
) -> list[Part]:
    """The drawings of a row's side products.

    `map_size` is the height and width of the model's input; `picture_at` gives the image by its longer side.
    """
    film, single = partial(picture_at, sizes.film), partial(picture_at, sizes.single)
    drawn: list[Part] = []
    if products.accumulated_maps is not None:
        drawn.append(_film(products.accumulated_maps, film(), sizes.most))
    if products.scan_path is not None:
        drawn.append(_path(products.scan_path, single()))
    if products.crops is not None:
        drawn.append(_crops(products.crops, map_size, single()))
    if products.map_family is not None:
        drawn.append(_family(products.map_family, products.selected_by, film()))
    if products.channel_importance is not None:
        drawn.append(_importance(products.channel_importance, single()))
    return drawn


def _some(num: int, most: int, what: str, which: str) -> str:
    return counted(num, what) if num <= most else f"{most:,} of {counted(num, what)}, {which}"


def _film(maps: Sequence[GridMap], pixels: Pixels, most: int) -> Part:
    shares = _shares(maps)
    places = np.linspace(0, len(maps) - 1, min(len(maps), most)).round().astype(int).tolist()
    names = _short_names([one_line(one.name) for one in maps])
    tiles = (
        Tile(_over(pixels, _displayed(maps[place], maps[-1])), f"{names[place]}\n{_percent(shares[place])} of the mass")
        for place in places
    )
    summary = _some(len(maps), most, "block", "evenly spaced")
    return Part("Accumulated maps", summary, OF_BLOCKS, tuple(tiles), is_film=True)


def _short_names(names: Sequence[str]) -> Sequence[str]:
    """Names of places in a network without the dotted parts that all of them begin or end with."""
    parts = [name.split(".") for name in names]
    if len(names) < 2 or not all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    shortest = min(map(len, parts)) - 1
    begin = next((i for i in range(shortest) if len({own[i] for own in parts}) > 1), shortest)
    end = next((i for i in range(shortest - begin) if len({own[-1 - i] for own in parts}) > 1), shortest - begin)
    short = [".".join(own[begin : len(own) - end]) for own in parts]
    return [f"block {own}" if own.isdigit() else own for own in short]


def _displayed(one: GridMap, last: GridMap) -> Floats:
    """A map for display, 0 to 1: sigmoid(5 z) - 0.5 of its ratio z to the last map's greatest value (Liao et al.)."""
    top = float(last.values_hw.max())
    if top <= 0:
        return np.zeros(one.values_hw.shape)
    ratio = (one.values_hw.astype(np.float64) / top).clip(-MAX_RATIO, MAX_RATIO)
    return minmax(1 / (1 + np.exp(-CONTRAST * ratio)) - 0.5)


def _over(pixels: Pixels, saliency_hw: Floats) -> Pixels:
    return overlay(pixels, resized(saliency_hw, (pixels.shape[0], pixels.shape[1])))


def _path(path: Sequence[Fixation], pixels: Pixels) -> Part:
    shown = path[:MAX_FIXATIONS]
    height, width = pixels.shape[:2]
    points = [((one.column + 1) / 2 * (width - 1), (one.row + 1) / 2 * (height - 1)) for one in shown]
    summary = _some(len(path), MAX_FIXATIONS, "fixation", "the first ones")
    caption = f"{_losses(path)}\n{' '.join(figure(one.loss) for one in shown)}"
    return Part("Scan path", summary, OF_PATH, (Tile(with_path(pixels, points), caption),))


def _crops(crops: Sequence[Crop], map_size: tuple[int, int], pixels: Pixels) -> Part:
    ordered = sorted(crops, key=lambda crop: -crop.score)
    shown, (best, worst) = ordered[:MAX_CROPS], _ends([crop.score for crop in crops])
    scales = tuple(side / own for side, own in zip(pixels.shape[:2], map_size, strict=True))
    reach = tuple(_spacing(middles) for middles in zip(*(_middle(crop) for crop in shown), strict=True))
    cells = [_cell(crop, reach, scales, (crop.score - worst) / ((best - worst) or 1.0)) for crop in shown]
    first = shown[0]
    frame = (first.left, first.top, first.left + first.width - 1, first.top + first.height - 1)
    summary = _some(len(crops), MAX_CROPS, "crop", "the best")
    left, top, right, bottom = (edge * scales[1 - place % 2] for place, edge in enumerate(frame))
    caption = f"{summary}: each one's score at its middle\nbest {figure(best)} (framed), worst {figure(worst)}"
    return Part("Crops", summary, OF_CROPS, (Tile(with_cells(pixels, cells, (left, top, right, bottom)), caption),))


def _middle(crop: Crop) -> tuple[float, float]:
    return crop.top + crop.height / 2, crop.left + crop.width / 2


def _spacing(middles: Sequence[float]) -> float | None:
    """The least distance of two middles along an axis; None if there is only one."""
    steps = np.diff(np.unique(np.round(middles, 3)))
    return float(steps.min()) if steps.size else None


def _cell(crop: Crop, reach: Sequence[float | None], scales: Sequence[float], level: float) -> Cell:
    """The crop's cell on a grid without overlaps, in the picture's pixels."""
    (y, x), sides = _middle(crop), (crop.height, crop.width)
    tall, wide = (min(side, side if step is None else step) for side, step in zip(sides, reach, strict=True))
    box = (
        (x - wide / 2) * scales[1],
        (y - tall / 2) * scales[0],
        (x + wide / 2) * scales[1],
        (y + tall / 2) * scales[0],
    )
    return Cell(box, level, figure(crop.score).removeprefix("0"))


def _family(family: Sequence[GridMap], metric: str | None, pixels: Pixels) -> Part:
    ordered, is_chosen = _ranked(family, metric)
    which = "the first ones drawn" if metric is None else f"the best by {metric}"
    tiles = [_candidate(one, pixels, is_chosen=is_chosen and not place) for place, one in enumerate(ordered[:MAX_BEST])]
    summary = _some(len(family), MAX_BEST, "map", which)
    return Part("Map family", summary, OF_FAMILY, tuple(tiles), is_film=True)


def _candidate(one: GridMap, pixels: Pixels, *, is_chosen: bool) -> Tile:
    positive = one.values_hw.astype(np.float64).clip(min=0)
    drawn = _over(pixels, positive / (positive.max() or 1.0))
    value = "no value" if one.value is None else figure(one.value)
    return Tile(
        framed(drawn) if is_chosen else drawn, f"{'chosen: ' if is_chosen else ''}{one_line(one.name)}\n{value}"
    )


def _importance(values: NDArray[np.float32], pixels: Pixels) -> Part:
    order = _order(values)
    lines = [f"channel {place}: {values[place]:.3g}" for place in order[:NUM_CHANNELS].tolist()]
    picture = bars(values[order].astype(np.float64), lines, (pixels.shape[0], pixels.shape[1]))
    summary = counted(values.size, "channel")
    caption = f"{(values > 0).sum():,} of {summary} above 0\nall, sorted; below, the most important"
    return Part("Channel importance", summary, OF_CHANNELS, (Tile(picture, caption),))
