"""Places regions of a model's input in the original picture, and writes them as COCO JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blocksight.storage.images.fitting import Fitting
from blocksight.storage.limits import MAX_CLASSES, MAX_COCO_BYTES

Runs = NDArray[np.int64]
"""Run lengths of a mask, column by column from the top left, background first."""

DIGIT_BITS, FIRST_DIGIT = 5, 48
"""COCO's compressed run lengths: 5 bits per character from `0` on; the sixth bit says that more follow."""
SIGN, MORE = 1 << DIGIT_BITS - 1, 1 << DIGIT_BITS


@dataclass(frozen=True)
class PlacedRegion:
    """A region in pixels of the upright original; pixel 0 spans 0 to 1."""

    left: int
    top: int
    right: int
    bottom: int
    area: int
    """Pixels."""
    counts: str
    """The pixels as COCO's compressed run lengths."""


def placed(mask_hw: NDArray[np.bool_], original_size: tuple[int, int], how: str) -> PlacedRegion:
    """A region [H, W] of the model's input in the original (height, width) that was brought to it as by `decode.fit`.

    A pixel of the original is inside if its centre lies in a pixel of the region; a region that holds no centre gets
    the pixel nearest to its middle. Memory grows with the runs and not with the picture. Raises ValueError for an
    empty region.
    """
    if not mask_hw.any():
        raise ValueError("a region without a pixel has no place")
    height, width = original_size
    box = Fitting.parse(how).box((width, height), (mask_hw.shape[1], mask_hw.shape[0]))
    rows = _Axis(height, mask_hw.shape[0], box[1], box[3])
    columns = _Axis(width, mask_hw.shape[1], box[0], box[2])
    starts, stops = _runs(mask_hw, rows, columns)
    if not len(starts):
        row, column = (axis.nearest(np.asarray(mask_hw.any(1 - at))) for at, axis in enumerate((rows, columns)))
        starts = np.array([column * height + row])
        stops = starts + 1
    tops, bottoms = starts % height, (stops - 1) % height + 1
    return PlacedRegion(
        left=int(starts[0]) // height,
        top=int(tops.min()),
        right=(int(stops[-1]) - 1) // height + 1,
        bottom=int(bottoms.max()),
        area=int((stops - starts).sum()),
        counts=compressed(_lengths(starts, stops, height * width)),
    )


class _Axis:
    """One axis of the original: which cell of the map each of its pixels lies in."""

    def __init__(self, pixels: int, cells: int, low: float, high: float) -> None:
        """`low` and `high`: the edges of the map in the original, in pixels."""
        self.pixels, self.low, self.scale = pixels, low, (high - low) / cells
        centres = np.arange(pixels) + 0.5
        inside = np.flatnonzero((centres >= low) & (centres < high))
        self.first = int(inside[0]) if len(inside) else 0
        found = np.floor((centres[inside] - low) / self.scale).astype(np.intp)
        self.cells = np.minimum(found, cells - 1)
        """Of the pixels from `first` on."""

    def pixel_of(self, cells: NDArray[np.intp]) -> NDArray[np.intp]:
        """The first pixel that lies in each of these cells or behind it."""
        return self.first + np.searchsorted(self.cells, cells)

    def nearest(self, is_inside: NDArray[np.bool_]) -> int:
        """The pixel nearest to the middle of the cells that are inside."""
        own = np.flatnonzero(is_inside)
        middle = self.low + self.scale * (own[0] + own[-1] + 1) / 2
        return int(min(max(middle, 0), self.pixels - 1))


def _runs(mask_hw: NDArray[np.bool_], rows: _Axis, columns: _Axis) -> tuple[Runs, Runs]:
    """Where the runs of the region start and stop in the original, column by column, each one alone in its column."""
    padded = np.pad(mask_hw, ((1, 1), (0, 0))).astype(np.int8)
    edges = np.diff(padded, axis=0).T  # [W, H + 1]
    in_column, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    first, last = rows.pixel_of(starts), rows.pixel_of(stops)
    kept = last > first
    in_column, first, last = in_column[kept], first[kept], last[kept]
    per_cell = np.bincount(in_column, minlength=mask_hw.shape[1])
    counts = per_cell[columns.cells]
    offsets = (per_cell.cumsum() - per_cell)[columns.cells]
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    chosen = np.repeat(offsets, counts) + within
    base = np.repeat(np.arange(columns.first, columns.first + len(counts)), counts) * rows.pixels
    return base + first[chosen], base + last[chosen]


def _lengths(starts: Runs, stops: Runs, total: int) -> Runs:
    """The run lengths of a whole picture; runs that touch at a column's end are one."""
    is_new = np.concatenate([[True], starts[1:] != stops[:-1]])
    edges = np.stack([starts[is_new], stops[np.append(np.flatnonzero(is_new)[1:] - 1, len(stops) - 1)]], 1).ravel()
    ends = np.append(edges, total) if edges[-1] < total else edges
    return np.diff(ends, prepend=0)


def compressed(lengths: Runs) -> str:
    """Run lengths as COCO's text: from the fourth on, the difference to the last but one."""
    left = lengths.astype(np.int64)
    left[3:] -= lengths[1:-2]
    digits, goes_on = [], np.ones(len(left), np.bool_)
    taken = []
    while goes_on.any():
        low = left & MORE - 1
        left = left >> DIGIT_BITS
        has_more = np.where(low & SIGN, left != -1, left != 0)
        digits.append(np.where(has_more, low | MORE, low) + FIRST_DIGIT)
        taken.append(goes_on)
        goes_on = goes_on & has_more
    return np.stack(digits, 1)[np.stack(taken, 1)].astype(np.uint8).tobytes().decode()


class CocoWriter:
    """Collects pictures and regions into COCO documents of bounded size."""

    def __init__(self, info: Mapping[str, Any], max_bytes: int = MAX_COCO_BYTES) -> None:
        """`info` is the documents' own: what the regions are of."""
        self.info, self.max_bytes = info, max_bytes
        self.categories: dict[tuple[int | None, str], int] = {}
        """The number of each target: its class number, where that is free."""
        self.num_images = self.num_regions = 0
        self._begin()

    def _begin(self) -> None:
        self.images: list[str] = []
        self.annotations: list[str] = []
        self.named: dict[int, str] = {}
        self.num_bytes = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
        """Adds one record's rows of `schema.REGIONS`, one per target; yields a document that is full before it."""
        texts = [self._image(rows[0]), *(self._annotation(row, part) for row in rows for part in row["parts"])]
        size = sum(map(len, texts))
        if self.images and self.num_bytes + size > self.max_bytes:
            yield self.document()
            self._begin()
        self.images.append(texts[0])
        self.annotations += texts[1:]
        self.named |= {self._category(row): row["target_name"] for row in rows if row["target_name"] is not None}
        self.num_bytes += size

    def _image(self, row: Mapping[str, Any]) -> str:
        self.num_images += 1
        sides = {name: row[name] for name in ("width", "height")}
        return json.dumps({"id": self.num_images, "file_name": row["key"], **sides})

    def _annotation(self, row: Mapping[str, Any], part: Mapping[str, Any]) -> str:
        self.num_regions += 1
        left, top = part["left"], part["top"]
        return json.dumps(
            {
                "id": self.num_regions,
                "image_id": self.num_images,
                "category_id": self._category(row),
                "bbox": [left, top, part["right"] - left, part["bottom"] - top],
                "area": part["pixels"],
                "segmentation": {"size": [row["height"], row["width"]], "counts": part["counts"]},
                "iscrowd": 0,
                "score": row["score"],
                "energy": part["energy"],
            }
        )

    def _category(self, row: Mapping[str, Any]) -> int:
        target = (row["target_index"], row["target_name"])
        if target not in self.categories:
            taken = set(self.categories.values())
            others = (number for number in range(MAX_CLASSES, MAX_CLASSES + len(taken) + 1) if number not in taken)
            is_free = target[0] is not None and target[0] not in taken
            self.categories[target] = target[0] if is_free and target[0] is not None else next(others)
        return self.categories[target]

    def document(self) -> bytes:
        """The document of what was added since the last full one."""
        categories = [json.dumps({"id": number, "name": name}) for number, name in sorted(self.named.items())]
        parts = {"categories": categories, "images": self.images, "annotations": self.annotations}
        lists = ",\n".join(f'"{name}": [\n{_joined(texts)}]' for name, texts in parts.items())
        return f'{{"info": {json.dumps(self.info)},\n{lists}}}\n'.encode()


def _joined(texts: Sequence[str]) -> str:
    return ",\n".join(texts) + ("\n" if texts else "")
