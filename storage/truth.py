"""Ground truth: where the objects of an image are, from Pascal VOC XML, COCO JSON or columns of a table."""

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from storage.images import DEFAULT_LIMITS, _centred_box
from storage.records import WindowedFile, as_text
from storage.store import ObjectInfo, ObjectStore, StoreError
from storage.stores import open_store
from storage.survey import IMAGE_SUFFIXES

Box = tuple[float, float, float, float]
Polygon = tuple[tuple[float, float], ...]

XML, JSON, TABLE = ".xml", ".json", ".parquet"
MAX_BYTES = {XML: 1 << 20, JSON: 2 << 30, TABLE: 64 << 30}
"""Of one file, by kind; a larger one is refused unread. A table is read a few rows at a time."""
MAX_COORDINATE = 1e9
MAX_POINTS = 100_000
"""Of one polygon."""
MAX_DIGITS = 7
"""Of one compressed run length: 35 bits, where 27 hold any that fits an image."""
READERS = 16
"""XML files that are fetched at once: they are many and small."""
BATCH_ROWS = 64
SHARD_SUFFIXES = (".tar", ".parquet")
EVERY_TARGET = ""
"""The label of an object that belongs to every target, where a table names none."""

BOXES, LABELS, MASK, LABEL, KEY = "boxes", "labels", "mask", "label", "key"
COLUMNS = {
    KEY: pa.string(),
    BOXES: pa.list_(pa.list_(pa.float64())),
    LABELS: pa.list_(pa.string()),
    MASK: pa.binary(),
    LABEL: pa.string(),
}
"""What each column of a table is cast to."""


class AmbiguousTruthError(StoreError):
    """More than one annotation could be the record's; none is chosen."""


@dataclass(frozen=True)
class Mask:
    """One object's pixels as run lengths, column by column from the top left, background first."""

    height: int
    width: int
    counts: bytes
    """Little-endian uint32; they sum to height times width."""

    def at(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Whether the object has pixel (row, column), as [rows, columns]."""
        ends = np.cumsum(np.frombuffer(self.counts, "<u4"), dtype=np.int64)
        return np.searchsorted(ends, columns * self.height + rows[:, None], side="right") % 2 == 1


@dataclass(frozen=True)
class TruthObject:
    """One object of an image. Its shape is the mask, else the polygons, else the box."""

    label: str
    """Class name as the data set writes it; `EVERY_TARGET` where a table has no labels."""
    box: Box | None = None
    """Left, top, right, bottom in pixels of the upright original; pixel 0 reaches from 0 to 1."""
    polygons: tuple[Polygon, ...] | None = None
    """Outlines of its pieces, (x, y) in the same coordinates."""
    mask: Mask | None = None
    difficult: bool = False
    """VOC's flag."""
    crowd: bool = False
    """COCO's `iscrowd`: many objects in one mask."""


@dataclass(frozen=True)
class ImageTruth:
    """What one annotated image shows."""

    name: str
    """File name or key, as annotated."""
    objects: tuple[TruthObject, ...]
    width: int | None = None
    """As annotated; None where the annotation does not say (nor does a mask)."""
    height: int | None = None

    def fits(self, height: int, width: int) -> bool:
        """Whether the annotation was made on an image of this size, as far as it says.

        A picture that EXIF turns has its sides swapped; `region` refuses what does not fit.
        """
        return self.height in (None, height) and self.width in (None, width)


@dataclass(frozen=True)
class Truth:
    """The ground truth of a data set."""

    images: tuple[ImageTruth, ...]
    """In order of name; each name once."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content in hex, whatever the order of images and of objects."""
        hashed = hashlib.sha256()
        for line in sorted(_canonical(image) for image in self.images):
            hashed.update(line.encode() + b"\n")
        return hashed.hexdigest()

    def find(self, record_key: str) -> ImageTruth | None:
        """The annotation of a record, or None where it has none.

        One path must end in the other, shard names apart: `a.tar/cat/1.jpg` has the annotation `cat/1.jpg`,
        `1.jpg` or `photos/cat/1.jpg`, and never `dog/1.jpg`. The longest agreement counts; where no name
        agrees, names without their image suffix are compared. Raises AmbiguousTruthError where two agree
        equally well.
        """
        return self._find(_parts(record_key), self._by_name) or self._find(_bare(record_key), self._by_stem)

    def _find(self, key: tuple[str, ...], index: "_Index") -> ImageTruth | None:
        overlaps = [(_overlap(key, name), image) for name, image in index.get(key[-1:], ())]
        best = max((overlap for overlap, _ in overlaps), default=0)
        found = [image for overlap, image in overlaps if overlap == best]
        if best and len(found) > 1:
            raise AmbiguousTruthError(
                f"record {'/'.join(key)} could be {found[0].name!r} or {found[1].name!r} of the ground truth; "
                "annotate with longer paths"
            )
        return found[0] if best else None

    @cached_property
    def _by_name(self) -> "_Index":
        return _indexed((_parts(image.name), image) for image in self.images)

    @cached_property
    def _by_stem(self) -> "_Index":
        return _indexed((_bare(image.name), image) for image in self.images)


_Index = Mapping[tuple[str, ...], Sequence[tuple[tuple[str, ...], ImageTruth]]]
"""Paths and their images by the path's last part."""


def open_truth(uri: str, endpoint_url: str | None = None) -> Truth:
    """The ground truth at a path or URI: one file by its suffix, else all below a prefix. Raises StoreError."""
    uri = uri.rstrip("/")
    if PurePosixPath(uri).suffix.lower() in MAX_BYTES and not Path(uri).is_dir():
        folder, _, name = uri.rpartition("/")
        return read_truth(open_store(folder or ".", endpoint_url), name)
    return read_truth(open_store(uri, endpoint_url))


def read_truth(store: ObjectStore, name: str = "") -> Truth:
    """The ground truth in one file of a store, or in all of its files where no name is given.

    .xml is Pascal VOC, one file per image; .json is COCO, one file; .parquet is a table with `key` and either
    `boxes` (lists of left, top, right, bottom; `labels` alongside if there are classes) or `mask` (PNG, not
    zero where the object is; `label`), rows of one key together. Raises StoreError where there is no file or
    more than one kind, and where one is malformed.
    """
    infos = _files(store, name)
    kind = PurePosixPath(infos[0].key).suffix.lower()
    if kind == XML:
        with ThreadPoolExecutor(READERS) as pool:
            images = list(pool.map(lambda info: _voc(store, info), infos))
    else:
        images = _coco(store, infos[0]) if kind == JSON else _tables(store, infos)
    return Truth(_once_each(store, images))


def region(
    image: ImageTruth,
    labels: Collection[str] | None,
    original_size: tuple[int, int],
    size: tuple[int, int],
    how: Literal["squash", "crop"],
) -> NDArray[np.bool_] | None:
    """Where the objects with one of the labels are (None: all), at the model's input size: bool [height, width].

    The original (height, width) goes to `size` as `storage.images.fit` takes it. A pixel belongs to an object
    whose shape holds its centre; of a polygon, by the even-odd rule; of a mask, the pixel it falls on. An
    object whose box is too small to hold any centre has the pixel nearest to its middle. Crowds and difficult
    objects count, as in TorchRay's `voc_as_mask`. None where no object has the label or the crop leaves
    nothing of them. Raises StoreError where the annotation does not fit the original size.
    """
    if not image.fits(*original_size):
        raise StoreError(
            f"{image.name!r} was annotated at {image.width} x {image.height} pixels, and the upright image has "
            f"{original_size[1]} x {original_size[0]}; annotate it upright, as EXIF turns it, or at its own size"
        )
    view = _view(original_size, size, how)
    covered = np.zeros(size, np.bool_)
    for one in image.objects:
        if labels is None or one.label == EVERY_TARGET or one.label in labels:
            covered |= view.of(one)
    return covered if covered.any() else None


@dataclass(frozen=True)
class _View:
    """The part of the original that the model sees, and its pixels' centres there."""

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

    def of(self, one: TruthObject) -> NDArray[np.bool_]:
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
        """Marks the pixel that holds the middle of a box, if the box has an area and the view holds it."""
        left, top, right, bottom = box
        x, y = (left + right) / 2, (top + bottom) / 2
        if left < right and top < bottom and self.left <= x < self.right and self.top <= y < self.bottom:
            covered[np.abs(self.ys - y).argmin(), np.abs(self.xs - x).argmin()] = True


def _centres(start: float, stop: float, number: int) -> NDArray[np.float64]:
    """The middles of so many equal steps."""
    return start + (np.arange(number, dtype=np.float64) + 0.5) * (stop - start) / number


def _view(original: tuple[int, int], size: tuple[int, int], how: Literal["squash", "crop"]) -> _View:
    have, want = (original[1], original[0]), (size[1], size[0])
    return _View(*((0, 0, *have) if how == "squash" else _centred_box(have, want)), size)


def _in_polygon(polygon: Polygon, ys: NDArray[np.float64], xs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the points (ys, xs) lie inside by the even-odd rule, as [ys, xs].

    Pillow's own polygons take in every pixel on the outline: 8 % too large at 30 pixels' width, double at 3.
    """
    points = np.asarray(polygon)
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    edge, row = np.nonzero((y0[:, None] <= ys) != (y1[:, None] <= ys))
    crossing = x0[edge] + (ys[row] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    flips = np.zeros((len(ys), len(xs) + 1), np.intp)
    np.add.at(flips, (row, np.searchsorted(xs, crossing)), 1)
    return np.cumsum(flips[:, :-1], axis=1) % 2 == 1


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", "."))


def _bare(path: str) -> tuple[str, ...]:
    """The path's parts without the suffix of an image: a tar's records have none."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if path.lower().endswith(suffix)), "")
    return _parts(path[: len(path) - len(suffix)])


def _inner(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The path inside its shard."""
    shards = [index for index, part in enumerate(parts) if part.lower().endswith(SHARD_SUFFIXES)]
    return parts[shards[-1] + 1 :] if shards else parts


def _overlap(key: tuple[str, ...], name: tuple[str, ...]) -> int:
    """How many parts agree from the end; 0 where neither path ends in the other."""
    pairs = enumerate(zip(reversed(key), reversed(name), strict=False))
    shared = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(key), len(name)))
    whole = {len(key), len(name)} if _inner(name) != name else {len(key), len(name), len(_inner(key))}
    return shared if shared in whole else 0


def _indexed(named: Iterable[tuple[tuple[str, ...], ImageTruth]]) -> _Index:
    index: dict[tuple[str, ...], list[tuple[tuple[str, ...], ImageTruth]]] = defaultdict(list)
    for path, image in named:
        index[path[-1:]].append((path, image))
    return index


def _canonical(image: ImageTruth) -> str:
    """The content as text, objects sorted."""
    objects = []
    for one in image.objects:
        mask = one.mask and [one.mask.height, one.mask.width, one.mask.counts.hex()]
        objects.append(json.dumps([one.label, one.box, one.polygons, mask, one.difficult, one.crowd]))
    objects.sort()
    return json.dumps([image.name, image.width, image.height, objects])


def _files(store: ObjectStore, name: str) -> list[ObjectInfo]:
    """The annotation files, in order of key; all of one kind, none too large."""
    head = store.head(name) if name else None
    listed = [head] if head is not None else [] if name else list(store.list())
    infos = [info for info in listed if name or not any(part.startswith(("_", ".")) for part in _parts(info.key))]
    kinds: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in sorted(infos, key=lambda info: info.key):
        kinds[PurePosixPath(info.key).suffix.lower()].append(info)
    known = [kinds[kind] for kind in MAX_BYTES if kind in kinds]
    where = f"{store.uri}/{name}" if name else store.uri
    if len(known) != 1 or (JSON in kinds and len(kinds[JSON]) > 1):
        found = ", ".join(f"{len(kind)} like {kind[0].key}" for kind in kinds.values()) or "nothing"
        raise StoreError(
            f"{where} holds {found}; wanted VOC .xml files, one COCO .json or .parquet tables, and one kind alone"
        )
    for info in known[0]:
        most = MAX_BYTES[PurePosixPath(info.key).suffix.lower()]
        if info.size > most:
            raise StoreError(f"{store.uri}/{info.key} has {info.size} bytes, at most {most} are read; split it")
    return known[0]


@contextmanager
def _placed(store: ObjectStore, info: ObjectInfo) -> Iterator[None]:
    """Turns what parsers say about a file into a sentence that names it."""
    try:
        yield
    except (ValueError, LookupError, RecursionError, SyntaxError, pa.ArrowException, OSError) as error:
        raise StoreError(f"{store.uri}/{info.key} cannot be read as ground truth: {error}") from error


def _image(name: str, objects: Iterable[TruthObject], width: int | None, height: int | None) -> ImageTruth:
    """The image with the size that its annotation and its masks agree on. Raises ValueError where they do not."""
    found = tuple(objects)
    if not _parts(name):
        raise ValueError(f"an image has the name {name!r}; wanted a file name or a key")
    sizes = {(one.mask.width, one.mask.height) for one in found if one.mask is not None}
    if width is not None and height is not None:
        sizes.add((width, height))
    if len(sizes) > 1:
        shown = " and ".join(f"{wide} x {high}" for wide, high in sorted(sizes))
        raise ValueError(f"image {name!r} and its masks have different sizes, {shown}; wanted one")
    width, height = next(iter(sizes), (width, height))
    return ImageTruth(as_text(name), found, width, height)


def _once_each(store: ObjectStore, images: Iterable[ImageTruth]) -> tuple[ImageTruth, ...]:
    named: dict[str, ImageTruth] = {}
    for image in images:
        if image.name in named:
            raise StoreError(f"{store.uri} annotates {image.name!r} twice; keep one of the two, or use longer paths")
        named[image.name] = image
    return tuple(named[name] for name in sorted(named))


class _NoDoctype(ElementTree.TreeBuilder):
    """A tree without document types: what an entity expands to has no bound."""

    def doctype(self, name: str, *_: str | None) -> None:
        raise ValueError(f"it declares the document type {name!r}, which is refused; remove the <!DOCTYPE>")


def _voc(store: ObjectStore, info: ObjectInfo) -> ImageTruth:
    with _placed(store, info):
        parser = ElementTree.XMLParser(target=_NoDoctype())
        root = ElementTree.XML(store.read(info.key, etag=info.etag), parser)
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>; wanted VOC's <annotation>")
        name = root.findtext("filename", "").strip() or PurePosixPath(info.key).stem
        sides = [_side(root.findtext(f"size/{side}")) for side in ("width", "height")]
        return _image(name, map(_voc_object, root.findall("object")), *sides)


def _voc_object(one: ElementTree.Element) -> TruthObject:
    """VOC counts pixels from 1 and names the last one inside."""
    label = one.findtext("name", "").strip()
    if not label:
        raise ValueError("an <object> has no <name>")
    left, top, *last = _floats([one.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")])
    return TruthObject(label, _box([left - 1, top - 1, *last]), difficult=one.findtext("difficult", "").strip() == "1")


def _side(value: Any) -> int | None:
    """A width or height in pixels; some programs write 0 for one that they do not know."""
    return int(_floats([value or 0])[0]) or None


def _coco(store: ObjectStore, info: ObjectInfo) -> list[ImageTruth]:
    with _placed(store, info):
        tree = json.loads(store.read(info.key, etag=info.etag))
        categories, images = _by_id(tree, "categories", "name"), _by_id(tree, "images", "file_name")
        objects: dict[Any, list[TruthObject]] = {name: [] for name in images}
        for index, one in enumerate(_entries(tree, "annotations", "image_id", "category_id")):
            if one["image_id"] not in images or one["category_id"] not in categories:
                raise ValueError(f"annotation {index} names an image or a category that the file does not list")
            objects[one["image_id"]].append(_coco_object(one, str(categories[one["category_id"]]["name"])))
        return [
            _image(str(one["file_name"]), objects[name], _side(one.get("width")), _side(one.get("height")))
            for name, one in images.items()
        ]


def _by_id(tree: Any, name: str, field: str) -> dict[int | str, dict[str, Any]]:
    """One of COCO's lists by the entries' ids."""
    entries = _entries(tree, name, "id", field)
    found = {one["id"]: one for one in entries}
    if len(found) < len(entries):
        raise ValueError(f"`{name}` has {len(entries)} entries and {len(found)} ids; wanted one for each")
    return found


def _entries(tree: Any, name: str, *fields: str) -> list[dict[str, Any]]:
    """One of COCO's lists, whose entries have these fields, as numbers or text."""
    entries = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        wanted = "wanted COCO's images, annotations and categories"
        raise ValueError(f"it has no list `{name}`; {wanted}")  # noqa: TRY004 - of the file, not of a caller
    for index, one in enumerate(entries):
        if not isinstance(one, dict) or not all(isinstance(one.get(field), int | str) for field in fields):
            raise ValueError(f"`{name}` entry {index} lacks one of its fields: {', '.join(fields)}")
    return entries


def _coco_object(one: Mapping[str, Any], label: str) -> TruthObject:
    box, shape = one.get("bbox"), one.get("segmentation")
    if not box and not shape:
        raise ValueError(f"an object {label!r} has neither `bbox` nor `segmentation`")
    return TruthObject(
        as_text(label),
        _coco_box(box) if box else None,
        tuple(map(_polygon, shape)) if shape and isinstance(shape, list) else None,
        _rle(shape.get("size"), shape.get("counts")) if isinstance(shape, dict) else None,
        crowd=bool(one.get("iscrowd")),
    )


def _coco_box(values: Any) -> Box:
    left, top, width, height = _floats(values, 4)
    return _box([left, top, left + width, top + height])


def _polygon(values: Any) -> Polygon:
    flat = _floats(values)
    if len(flat) % 2 or not 6 <= len(flat) <= 2 * MAX_POINTS:
        raise ValueError(f"a polygon has {len(flat)} numbers; wanted x and y of 3 to {MAX_POINTS} points")
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _rle(size: Any, counts: Any) -> Mask:
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"a mask has the size {size!r}; wanted [height, width]")
    lengths = _run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(type(length) is int and 0 <= length < 1 << 32 for length in lengths):
        raise ValueError("a mask's `counts` are neither text nor a list of lengths from 0")
    return _mask(size[0], size[1], np.asarray(lengths, np.int64))


def _mask(height: int, width: int, lengths: NDArray[np.int64]) -> Mask:
    if height * width > DEFAULT_LIMITS.num_pixels:
        raise ValueError(f"a mask of {width} x {height} pixels, at most {DEFAULT_LIMITS.num_pixels} are read")
    total = int(lengths.sum())
    if total != height * width:
        raise ValueError(f"a mask's run lengths sum to {total}; its {width} x {height} pixels are {width * height}")
    return Mask(height, width, lengths.astype("<u4").tobytes())


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed lengths: 5 bits a character from `0` on, low bits first, 32 says that more follow.

    The last 5 bits are signed; from the fourth length on, the difference to the last but one is written.
    """
    lengths: list[int] = []
    value = digits = 0
    for code in text.encode():
        code -= 48
        if not 0 <= code < 64 or digits == MAX_DIGITS:
            raise ValueError("a mask's `counts` are no compressed run lengths")
        value |= (code & 31) << 5 * digits
        digits += 1
        if code & 32 == 0:
            value -= (code & 16) << 5 * digits - 4
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = digits = 0
    if digits:
        raise ValueError("a mask's `counts` end within a run length")
    return lengths


def _tables(store: ObjectStore, infos: Sequence[ObjectInfo]) -> list[ImageTruth]:
    objects: dict[str, list[TruthObject]] = defaultdict(list)
    for info in infos:
        with _placed(store, info):
            for key, found in _rows(pq.ParquetFile(pa.PythonFile(WindowedFile(store, info), mode="r"))):
                objects[key] += found
    with _placed(store, infos[0]):
        return [_image(key, found, None, None) for key, found in objects.items()]


def _rows(file: pq.ParquetFile) -> Iterator[tuple[str, list[TruthObject]]]:
    """Key and objects of each row."""
    names = _columns(file.schema_arrow)
    for batch in file.iter_batches(BATCH_ROWS, columns=names):
        cells = [batch.column(name).cast(COLUMNS[name]).to_pylist() for name in names]
        for row in (dict(zip(names, values, strict=True)) for values in zip(*cells, strict=True)):
            if row[KEY] is None:
                raise ValueError(f"the column `{KEY}` is null in a row")
            yield row[KEY], _masked(row) if MASK in row else _boxed(row)


def _columns(schema: pa.Schema) -> list[str]:
    """The columns that are read. Plain types alone: an extension type may bring code that runs on reading."""
    if KEY not in schema.names or (BOXES in schema.names) == (MASK in schema.names):
        raise ValueError(f"its columns are {', '.join(schema.names)}; wanted `{KEY}` and one of `{BOXES}`, `{MASK}`")
    wanted = (KEY, BOXES, LABELS) if BOXES in schema.names else (KEY, MASK, LABEL)
    names = [name for name in wanted if name in schema.names]
    for name in names:
        if "extension" in str(schema.field(name).type):
            raise ValueError(f"column `{name}` is {schema.field(name).type}; wanted {COLUMNS[name]}")
    return names


def _boxed(row: Mapping[str, Any]) -> list[TruthObject]:
    boxes = row[BOXES] or []
    labels = row[LABELS] or [] if LABELS in row else [EVERY_TARGET] * len(boxes)
    if len(labels) != len(boxes) or None in labels:
        raise ValueError(f"key {row[KEY]!r} has {len(boxes)} `{BOXES}` and `{LABELS}` {labels}; wanted one for each")
    return [TruthObject(label, _box(box)) for label, box in zip(labels, boxes, strict=True)]


def _masked(row: Mapping[str, Any]) -> list[TruthObject]:
    label = row.get(LABEL, EVERY_TARGET)
    if label is None:
        raise ValueError(f"key {row[KEY]!r} has no `{LABEL}`")
    return [] if row[MASK] is None else [TruthObject(label, mask=_png(row[MASK]))]


def _png(data: bytes) -> Mask:
    """The non-zero pixels of a PNG, of a palette the non-zero indices."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > DEFAULT_LIMITS.num_pixels:
                raise ValueError(f"{width} x {height} pixels, at most {DEFAULT_LIMITS.num_pixels} are read")
            if "A" in image.mode:
                raise ValueError(f"pixels are {image.mode}; wanted them without alpha")
            pixels = np.asarray(image).reshape(height, width, -1).any(-1)
    except Exception as error:
        raise ValueError(f"a mask cannot be read as PNG: {error}") from error
    changes = np.flatnonzero(np.diff(pixels.ravel("F"), prepend=False))
    return _mask(height, width, np.diff(changes, prepend=0, append=pixels.size))


def _box(values: Any) -> Box:
    left, top, right, bottom = _floats(values, 4)
    if right < left or bottom < top:
        raise ValueError(f"box {(left, top, right, bottom)} ends before it begins; wanted left, top, right, bottom")
    return left, top, right, bottom


def _floats(values: Any, number: int | None = None) -> list[float]:
    """A flat list of so many finite numbers. Raises ValueError."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{str(values)[:80]} are no numbers") from error
    if array.ndim != 1 or (number is not None and len(array) != number):
        raise ValueError(f"{str(values)[:80]} is no list of {number or ''} numbers")
    if not (np.abs(array) <= MAX_COORDINATE).all():
        raise ValueError(f"{str(values)[:80]} has a coordinate that is missing or beyond {MAX_COORDINATE:g}")
    return array.tolist()
