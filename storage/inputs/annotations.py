"""Reads ground truth from Pascal VOC XML, COCO JSON or columns of a Parquet table."""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from blocksight.storage.images.png import samples_of
from blocksight.storage.inputs.ground_truth import (
    EVERY_TARGET,
    Box,
    ImageTruth,
    Mask,
    Polygon,
    Truth,
    TruthObject,
    parts_of,
)
from blocksight.storage.inputs.records import as_text
from blocksight.storage.limits import MAX_IMAGE_PIXELS
from blocksight.storage.parquet.reader import ParquetTable, parquet_object
from blocksight.storage.stores.locations import matches
from blocksight.storage.stores.opening import open_named
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore, StoreError

XML, JSON, TABLE = ".xml", ".json", ".parquet"
MAX_BYTES = {XML: 1 << 20, JSON: 2 << 30, TABLE: 64 << 30}
"""Largest file of each kind; a larger one is refused unread. A table is read a few rows at a time."""
MAX_COORDINATE = 1e9
MAX_POINTS = 100_000
"""Points of one polygon."""
MAX_DIGITS = 7
"""Characters of one compressed run length: 35 bits; 27 bits hold any length that fits an image."""
NUM_READERS = 16
"""XML files that are fetched in parallel: they are many and small."""
BATCH_ROWS = 64

BOXES, LABELS, MASK, LABEL, KEY = "boxes", "labels", "mask", "label", "key"
COLUMNS = {
    KEY: pa.string(),
    BOXES: pa.list_(pa.list_(pa.float64())),
    LABELS: pa.list_(pa.string()),
    MASK: pa.binary(),
    LABEL: pa.string(),
}
"""The type that each column of a table is cast to."""


def open_truth(uri: str, endpoint_url: str | None = None) -> Truth:
    """The ground truth at a path or URI: one file, or all files below a folder or a prefix. Raises StoreError."""
    return read_truth(*open_named(uri, endpoint_url))


def read_truth(store: ObjectStore, name: str = "") -> Truth:
    """The ground truth in one file of a store, or in all of its files if no name is given.

    .xml is Pascal VOC, one file per image; .json is COCO, one file; .parquet is a table with `key` and either
    `boxes` (lists of left, top, right, bottom; with `labels` if there are classes) or `mask` (PNG, not zero on
    the object; with `label`). Rows of one key belong together. Raises StoreError for no file, for more than one
    kind of file, and for a malformed file.
    """
    infos = _files(store, name)
    kind = PurePosixPath(infos[0].key).suffix.lower()
    if kind == XML:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            images = list(pool.map(lambda info: _read_voc(store, info), infos))
    else:
        images = _read_coco(store, infos[0]) if kind == JSON else _read_tables(store, infos)
    return Truth(_without_duplicates(store, images))


def _files(store: ObjectStore, name: str) -> list[ObjectInfo]:
    """The annotation files, in order of key. Raises StoreError for more than one kind and for a large file."""
    head = store.head(name) if name else None
    listed = [head] if head is not None else [info for info in store.list() if not name or matches(info.key, name)]
    infos = [info for info in listed if name or not any(part.startswith(("_", ".")) for part in parts_of(info.key))]
    kinds: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in sorted(infos, key=lambda info: info.key):
        kinds[PurePosixPath(info.key).suffix.lower()].append(info)
    known = [kinds[kind] for kind in MAX_BYTES if kind in kinds]
    where = f"{store.uri}/{name}" if name else store.uri
    if len(known) != 1 or (JSON in kinds and len(kinds[JSON]) > 1):
        found = ", ".join(f"{len(kind)} like {kind[0].key}" for kind in kinds.values())
        holds = f"holds {found}" if found else "is not there, or holds nothing"
        raise StoreError(
            f"{where} {holds}; wanted VOC .xml files, one COCO .json or .parquet tables, and one kind alone"
        )
    for info in known[0]:
        most = MAX_BYTES[PurePosixPath(info.key).suffix.lower()]
        if info.size > most:
            raise StoreError(f"{store.uri}/{info.key} has {info.size} bytes, at most {most} are read; split it")
    return known[0]


@contextmanager
def _errors_naming(store: ObjectStore, info: ObjectInfo) -> Iterator[None]:
    """Turns a parser's error into a StoreError that names the file."""
    try:
        yield
    except (ValueError, LookupError, RecursionError, SyntaxError, pa.ArrowException, OSError, DamagedError) as error:
        raise StoreError(f"{store.uri}/{info.key} cannot be read as ground truth: {error}") from error


def _image_truth(name: str, objects: Iterable[TruthObject], width: int | None, height: int | None) -> ImageTruth:
    """The image with the size from its annotation and its masks. Raises ValueError if they differ."""
    found = tuple(objects)
    if not parts_of(name):
        raise ValueError(f"an image is named {name!r}; wanted a file name or a key")
    sizes = {(one.mask.width, one.mask.height) for one in found if one.mask is not None}
    if width is not None and height is not None:
        sizes.add((width, height))
    if len(sizes) > 1:
        shown = " and ".join(f"{wide} x {high}" for wide, high in sorted(sizes))
        raise ValueError(f"image {name!r} and its masks have different sizes, {shown}; wanted one")
    width, height = next(iter(sizes), (width, height))
    return ImageTruth(as_text(name), found, width, height)


def _without_duplicates(store: ObjectStore, images: Iterable[ImageTruth]) -> tuple[ImageTruth, ...]:
    named: dict[str, ImageTruth] = {}
    for image in images:
        if image.name in named:
            raise StoreError(f"{store.uri} annotates {image.name!r} twice; keep one of the two, or use longer paths")
        named[image.name] = image
    return tuple(named[name] for name in sorted(named))


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses document types: an entity may expand without bound."""

    def doctype(self, name: str, *_: str | None) -> None:
        raise ValueError(f"it declares the document type {name!r}, which is refused; remove the <!DOCTYPE>")


def _read_voc(store: ObjectStore, info: ObjectInfo) -> ImageTruth:
    with _errors_naming(store, info):
        parser = ElementTree.XMLParser(target=_NoDoctype())
        root = ElementTree.XML(store.read(info.key, etag=info.etag), parser)
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>; wanted VOC's <annotation>")
        name = root.findtext("filename", "").strip() or PurePosixPath(info.key).stem
        sides = [_side(root.findtext(f"size/{side}")) for side in ("width", "height")]
        return _image_truth(name, map(_voc_object, root.findall("object")), *sides)


def _voc_object(one: ElementTree.Element) -> TruthObject:
    """One object. VOC counts pixels from 1, and its last pixel is inside the box."""
    label = one.findtext("name", "").strip()
    if not label:
        raise ValueError("an <object> has no <name>")
    left, top, *last = _floats([one.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")])
    return TruthObject(label, _box([left - 1, top - 1, *last]), difficult=one.findtext("difficult", "").strip() == "1")


def _side(value: Any) -> int | None:
    """A width or height in pixels, or None: some programs write 0 for an unknown one."""
    return int(_floats([value or 0])[0]) or None


def _read_coco(store: ObjectStore, info: ObjectInfo) -> list[ImageTruth]:
    with _errors_naming(store, info):
        tree = json.loads(store.read(info.key, etag=info.etag))
        categories, images = _by_id(tree, "categories", "name"), _by_id(tree, "images", "file_name")
        objects: dict[Any, list[TruthObject]] = {name: [] for name in images}
        for index, one in enumerate(_entries(tree, "annotations", "image_id", "category_id")):
            if one["image_id"] not in images or one["category_id"] not in categories:
                raise ValueError(f"annotation {index} has an image or a category that the file does not list")
            objects[one["image_id"]].append(_coco_object(one, str(categories[one["category_id"]]["name"])))
        return [
            _image_truth(str(one["file_name"]), objects[name], _side(one.get("width")), _side(one.get("height")))
            for name, one in images.items()
        ]


def _by_id(tree: Any, name: str, field: str) -> dict[int | str, dict[str, Any]]:
    """One of COCO's lists, as a mapping by id. Raises ValueError if an id is repeated."""
    entries = _entries(tree, name, "id", field)
    found = {one["id"]: one for one in entries}
    if len(found) < len(entries):
        raise ValueError(f"`{name}` has {len(entries)} entries and {len(found)} ids; wanted one for each")
    return found


def _entries(tree: Any, name: str, *fields: str) -> list[dict[str, Any]]:
    """One of COCO's lists. Raises ValueError if an entry lacks one of these fields (number or text)."""
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
        _mask_from_rle(shape.get("size"), shape.get("counts")) if isinstance(shape, dict) else None,
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


def _mask_from_rle(size: Any, counts: Any) -> Mask:
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"a mask has the size {size!r}; wanted [height, width]")
    lengths = _run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(type(length) is int and 0 <= length < 1 << 32 for length in lengths):
        raise ValueError("a mask's `counts` are neither text nor a list of lengths from 0")
    return _mask(size[0], size[1], np.asarray(lengths, np.int64))


def _mask(height: int, width: int, lengths: NDArray[np.int64]) -> Mask:
    if height * width > MAX_IMAGE_PIXELS:
        raise ValueError(f"a mask of {width} x {height} pixels, at most {MAX_IMAGE_PIXELS} are read")
    total = int(lengths.sum())
    if total != height * width:
        raise ValueError(f"a mask's run lengths sum to {total}; its {width} x {height} pixels are {width * height}")
    return Mask(height, width, lengths.astype("<u4").tobytes())


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits per character from `0` on, low bits first; bit 32: more follow.

    The last 5 bits are signed. From the fourth length on, the text holds the difference to the last but one.
    """
    lengths: list[int] = []
    value = digits = 0
    for code in text.encode():
        code -= 48
        if not 0 <= code < 64 or digits == MAX_DIGITS:
            raise ValueError("a mask's `counts` are not compressed run lengths")
        value |= (code & 31) << 5 * digits
        digits += 1
        if code & 32 == 0:
            value -= (code & 16) << 5 * digits - 4
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = digits = 0
    if digits:
        raise ValueError("a mask's `counts` end within a run length")
    return lengths


def _read_tables(store: ObjectStore, infos: Sequence[ObjectInfo]) -> list[ImageTruth]:
    objects: dict[str, list[TruthObject]] = defaultdict(list)
    for info in infos:
        with _errors_naming(store, info):
            for key, found in _table_rows(parquet_object(store, info)):
                objects[key] += found
    with _errors_naming(store, infos[0]):
        return [_image_truth(key, found, None, None) for key, found in objects.items()]


def _table_rows(table: ParquetTable) -> Iterator[tuple[str, list[TruthObject]]]:
    """Key and objects of each row."""
    names = _read_columns(table)
    for _, batch in table.rows(names, BATCH_ROWS):
        cells = [batch.column(name).cast(COLUMNS[name]).to_pylist() for name in names]
        for row in (dict(zip(names, values, strict=True)) for values in zip(*cells, strict=True)):
            if row[KEY] is None:
                raise ValueError(f"the column `{KEY}` is null in a row")
            yield row[KEY], _mask_objects(row) if MASK in row else _box_objects(row)


def _read_columns(table: ParquetTable) -> list[str]:
    """The columns to read. Raises ValueError if `key`, or both `boxes` and `mask`, are missing."""
    names = table.names
    if KEY not in names or (BOXES in names) == (MASK in names):
        raise ValueError(f"its columns are {', '.join(names)}; wanted `{KEY}` and one of `{BOXES}`, `{MASK}`")
    wanted = (KEY, BOXES, LABELS) if BOXES in names else (KEY, MASK, LABEL)
    return [name for name in wanted if name in names]


def _box_objects(row: Mapping[str, Any]) -> list[TruthObject]:
    boxes = row[BOXES] or []
    labels = row[LABELS] or [] if LABELS in row else [EVERY_TARGET] * len(boxes)
    if len(labels) != len(boxes) or None in labels:
        raise ValueError(f"key {row[KEY]!r} has {len(boxes)} `{BOXES}` and `{LABELS}` {labels}; wanted one for each")
    return [TruthObject(label, _box(box)) for label, box in zip(labels, boxes, strict=True)]


def _mask_objects(row: Mapping[str, Any]) -> list[TruthObject]:
    label = row.get(LABEL, EVERY_TARGET)
    if label is None:
        raise ValueError(f"key {row[KEY]!r} has no `{LABEL}`")
    return [] if row[MASK] is None else [TruthObject(label, mask=_mask_from_png(row[MASK]))]


def _mask_from_png(data: bytes) -> Mask:
    """The non-zero pixels of a PNG; for a palette, the non-zero indices."""
    try:
        found = samples_of(data, MAX_IMAGE_PIXELS)
        width, height = found.width, found.height
        with Image.open(io.BytesIO(found.data), formats=["PNG"]) as image:
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
    """A flat list of `number` finite numbers (None: of any length). Raises ValueError."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{str(values)[:80]} are no numbers") from error
    if array.ndim != 1 or (number is not None and len(array) != number):
        raise ValueError(f"{str(values)[:80]} is not a list of {number or ''} numbers")
    if not (np.abs(array) <= MAX_COORDINATE).all():
        raise ValueError(f"{str(values)[:80]} has a coordinate that is missing or beyond {MAX_COORDINATE:g}")
    return array.tolist()
