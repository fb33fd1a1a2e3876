"""Ground truth: the objects of each image, the record that they belong to, and their region in the model's input."""

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blocksight.storage.images.fitting import Fitting
from blocksight.storage.inputs.survey import IMAGE_SUFFIXES
from blocksight.storage.stores.store import StoreError

Box = tuple[float, float, float, float]
Polygon = tuple[tuple[float, float], ...]

SHARD_SUFFIXES = (".tar", ".parquet")
EVERY_TARGET = ""
"""The label of an object that belongs to every target: a table's object without a label."""


class AmbiguousTruthError(StoreError):
    """More than one annotation matches a record."""


@dataclass(frozen=True)
class Mask:
    """One object's pixels as run lengths, column by column from the top left, background first."""

    height: int
    width: int
    counts: bytes
    """Little-endian uint32; they sum to height times width."""

    def at(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.bool_]:
        """True where pixel (row, column) is in the object, shape [rows, columns]."""
        ends = np.cumsum(np.frombuffer(self.counts, "<u4"), dtype=np.int64)
        return np.searchsorted(ends, columns * self.height + rows[:, None], side="right") % 2 == 1


@dataclass(frozen=True)
class TruthObject:
    """One object of an image. Its shape is the mask, else the polygons, else the box. Not all are set."""

    label: str
    """Class name as the data set writes it; `EVERY_TARGET` if a table has no labels."""
    box: Box | None = None
    """Left, top, right, bottom in pixels of the upright original; pixel 0 spans 0 to 1."""
    polygons: tuple[Polygon, ...] | None = None
    """Outlines of its parts, (x, y) in the same coordinates."""
    mask: Mask | None = None
    difficult: bool = False
    """VOC's flag."""
    crowd: bool = False
    """COCO's `iscrowd`: many objects in one mask."""


@dataclass(frozen=True)
class ImageTruth:
    """The annotation of one image."""

    name: str
    """File name or key, from the annotation."""
    objects: tuple[TruthObject, ...]
    width: int | None = None
    """Pixels, from the annotation or a mask; None if neither states it."""
    height: int | None = None

    def fits(self, height: int, width: int) -> bool:
        """True if the annotated size is this size or unknown.

        An annotation of an image before EXIF's rotation has its sides swapped; `region` refuses it.
        """
        return self.height in (None, height) and self.width in (None, width)


@dataclass(frozen=True)
class Truth:
    """The ground truth of a data set."""

    images: tuple[ImageTruth, ...]
    """Sorted by name; each name once."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content in hex; the order of images and objects does not matter."""
        hashed = hashlib.sha256()
        for line in sorted(_canonical(image) for image in self.images):
            hashed.update(line.encode() + b"\n")
        return hashed.hexdigest()

    def find(self, record_key: str) -> ImageTruth | None:
        """The annotation of a record, or None if it has none.

        One path must end in the other, without shard names: `a.tar/cat/1.jpg` matches `cat/1.jpg`, `1.jpg` or
        `photos/cat/1.jpg`, and never `dog/1.jpg`. The longest match counts. If no name matches, names without
        their image suffix are compared, and at last both without what spelling leaves open: case, `_` for a space,
        and accents, which a Mac writes as characters of their own. Raises AmbiguousTruthError if two match equally
        well.
        """
        return self.find_exactly(record_key) or self._find(_bare(_loose(record_key)), self._by_spelling)

    def find_exactly(self, record_key: str) -> ImageTruth | None:
        """The same, without names in another spelling."""
        return self._find(parts_of(record_key), self._by_name) or self._find(_bare(record_key), self._by_stem)

    def _find(self, key: tuple[str, ...], index: "_Index") -> ImageTruth | None:
        overlaps = [(_overlap(key, name), image) for name, image in index.get(key[-1:], ())]
        best = max((overlap for overlap, _ in overlaps), default=0)
        found = [image for overlap, image in overlaps if overlap == best]
        if best and len(found) > 1:
            raise AmbiguousTruthError(
                f"record {'/'.join(key)} matches {found[0].name!r} and {found[1].name!r} of the ground truth; "
                "annotate with longer paths"
            )
        return found[0] if best else None

    @cached_property
    def _by_name(self) -> "_Index":
        return _index_by_last_part((parts_of(image.name), image) for image in self.images)

    @cached_property
    def _by_stem(self) -> "_Index":
        return _index_by_last_part((_bare(image.name), image) for image in self.images)

    @cached_property
    def _by_spelling(self) -> "_Index":
        return _index_by_last_part((_bare(_loose(image.name)), image) for image in self.images)


_Index = Mapping[tuple[str, ...], Sequence[tuple[tuple[str, ...], ImageTruth]]]
"""Paths with their images, by the path's last part."""


def region(
    image: ImageTruth,
    labels: Collection[str] | None,
    original_size: tuple[int, int],
    size: tuple[int, int],
    how: str,
) -> NDArray[np.bool_] | None:
    """The pixels of all objects with one of the labels (None: all objects), in the model's input: bool [height, width].

    The original (height, width) is resized to `size` as by `decode.fit`. A pixel belongs to an object if its
    centre lies in the shape: in a polygon by the even-odd rule, in a mask by the pixel below it. An object whose
    box holds no centre gets the pixel nearest to its middle. Crowds and difficult objects count, as in TorchRay's
    `voc_as_mask`. Returns None if no object has the label or the crop removes all of them. Raises StoreError if
    the annotation does not fit the original size.
    """
    _refuse_other_size(image, original_size)
    view = _view(original_size, size, how)
    covered = np.zeros(size, np.bool_)
    composed = None if labels is None else {_composed(label) for label in labels}
    for one in image.objects:
        if composed is None or one.label == EVERY_TARGET or _composed(one.label) in composed:
            covered |= view.pixels_of(one)
    return covered if covered.any() else None


def boxes_in(
    image: ImageTruth, original_size: tuple[int, int], size: tuple[int, int], how: str
) -> tuple[tuple[str, Box], ...]:
    """Label and box of each object, in pixels of the original (height, width) resized to `size` as by `decode.fit`.

    An object without a box has that of its polygons or mask. Boxes are cut at the picture's edges; objects beyond them
    are left out. Raises StoreError if the annotation does not fit the original size.
    """
    _refuse_other_size(image, original_size)
    view = _view(original_size, size, how)
    boxes = [(one.label, one.box or _bounds(one)) for one in image.objects]
    placed = [(label, view.placed(box)) for label, box in boxes if box is not None]
    return tuple((label, box) for label, box in placed if box[0] < box[2] and box[1] < box[3])


def _bounds(one: TruthObject) -> Box | None:
    """The smallest box around the object's polygons or mask; None if it has neither, or no pixel."""
    if one.polygons:
        points = np.concatenate([np.asarray(polygon) for polygon in one.polygons])
        return *points.min(0).tolist(), *points.max(0).tolist()
    if one.mask is None:
        return None
    inside = one.mask.at(np.arange(one.mask.height), np.arange(one.mask.width))
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not rows.size:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _refuse_other_size(image: ImageTruth, original_size: tuple[int, int]) -> None:
    """Raises StoreError if the annotation does not fit the original size."""
    if not image.fits(*original_size):
        raise StoreError(
            f"{image.name!r} was annotated at {image.width} x {image.height} pixels, and the upright image has "
            f"{original_size[1]} x {original_size[0]}; annotate it upright, as EXIF turns it, or at its own size"
        )


@dataclass(frozen=True)
class _View:
    """The part of the original that the model sees, and the centres of the model's pixels in it."""

    left: float
    top: float
    right: float
    bottom: float
    size: tuple[int, int]

    @cached_property
    def xs(self) -> NDArray[np.float64]:
        return _centres(self.left, self.right, self.size[1])

    @cached_property
    def ys(self) -> NDArray[np.float64]:
        return _centres(self.top, self.bottom, self.size[0])

    def placed(self, box: Box) -> Box:
        """The box in pixels of the view, cut at its edges."""
        height, width = self.size
        xs = [width * (x - self.left) / (self.right - self.left) for x in (box[0], box[2])]
        ys = [height * (y - self.top) / (self.bottom - self.top) for y in (box[1], box[3])]
        left, right = (min(max(x, 0.0), float(width)) for x in xs)
        top, bottom = (min(max(y, 0.0), float(height)) for y in ys)
        return left, top, right, bottom

    def pixels_of(self, one: TruthObject) -> NDArray[np.bool_]:
        """The object's pixels."""
        covered = self._shape(one)
        if one.box is not None and not covered.any() and not self._inside(one.box).any():
            self._mark_middle(covered, one.box)
        return covered

    def _shape(self, one: TruthObject) -> NDArray[np.bool_]:
        if one.mask is not None:
            return one.mask.at(self.ys.astype(np.intp), self.xs.astype(np.intp))
        if one.polygons is not None:
            return np.logical_or.reduce([_in_polygon(polygon, self.ys, self.xs) for polygon in one.polygons])
        return self._inside(one.box) if one.box is not None else np.zeros(self.size, np.bool_)

    def _inside(self, box: Box) -> NDArray[np.bool_]:
        left, top, right, bottom = box
        return np.outer((top <= self.ys) & (self.ys < bottom), (left <= self.xs) & (self.xs < right))

    def _mark_middle(self, covered: NDArray[np.bool_], box: Box) -> None:
        """Marks the pixel at the middle of a box, if the box has an area and its middle is in the view."""
        left, top, right, bottom = box
        x, y = (left + right) / 2, (top + bottom) / 2
        if left < right and top < bottom and self.left <= x < self.right and self.top <= y < self.bottom:
            covered[np.abs(self.ys - y).argmin(), np.abs(self.xs - x).argmin()] = True


def _centres(start: float, stop: float, number: int) -> NDArray[np.float64]:
    """The centres of `number` equal steps from `start` to `stop`."""
    return start + (np.arange(number, dtype=np.float64) + 0.5) * (stop - start) / number


def _view(original: tuple[int, int], size: tuple[int, int], how: str) -> _View:
    have, want = (original[1], original[0]), (size[1], size[0])
    return _View(*Fitting.parse(how).box(have, want), size)


def _in_polygon(polygon: Polygon, ys: NDArray[np.float64], xs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True where point (y, x) lies inside by the even-odd rule, shape [ys, xs].

    Pillow's polygons include every pixel on the outline: 8 % too large at 30 pixels' width, double at 3.
    """
    points = np.asarray(polygon)
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    edge, row = np.nonzero((y0[:, None] <= ys) != (y1[:, None] <= ys))
    crossing = x0[edge] + (ys[row] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    flips = np.zeros((len(ys), len(xs) + 1), np.intp)
    np.add.at(flips, (row, np.searchsorted(xs, crossing)), 1)
    return np.cumsum(flips[:, :-1], axis=1) % 2 == 1


def parts_of(path: str) -> tuple[str, ...]:
    """The parts of a path, without empty ones and `.`."""
    return tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", "."))


def _bare(path: str) -> tuple[str, ...]:
    """The path's parts without the image suffix: keys of a tar's records have none."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if path.lower().endswith(suffix)), "")
    return parts_of(path[: len(path) - len(suffix)])


def _composed(text: str) -> str:
    """The text with each accent in its letter: a Mac writes the two apart."""
    return unicodedata.normalize("NFC", text)


def _loose(path: str) -> str:
    """The path without what spelling leaves open."""
    return _composed(path).casefold().replace("_", " ")


def _inner(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The path inside its shard."""
    shards = [index for index, part in enumerate(parts) if part.lower().endswith(SHARD_SUFFIXES)]
    return parts[shards[-1] + 1 :] if shards else parts


def _overlap(key: tuple[str, ...], name: tuple[str, ...]) -> int:
    """How many parts agree from the end; 0 if neither path ends in the other."""
    pairs = enumerate(zip(reversed(key), reversed(name), strict=False))
    shared = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(key), len(name)))
    whole = {len(key), len(name)} if _inner(name) != name else {len(key), len(name), len(_inner(key))}
    return shared if shared in whole else 0


def _index_by_last_part(named: Iterable[tuple[tuple[str, ...], ImageTruth]]) -> _Index:
    index: dict[tuple[str, ...], list[tuple[tuple[str, ...], ImageTruth]]] = defaultdict(list)
    for path, image in named:
        index[path[-1:]].append((path, image))
    return index


def _canonical(image: ImageTruth) -> str:
    """The content as JSON text, with sorted objects."""
    objects = []
    for one in image.objects:
        mask = one.mask and [one.mask.height, one.mask.width, one.mask.counts.hex()]
        objects.append(json.dumps([one.label, one.box, one.polygons, mask, one.difficult, one.crowd]))
    objects.sort()
    return json.dumps([image.name, image.width, image.height, objects])
