"""Surveys an input: finds its layout and the objects that hold its records."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath

from blocksight.storage.inputs.records import as_text
from blocksight.storage.inputs.sidecars import expected_counts
from blocksight.storage.inputs.table_formats import TableLogs
from blocksight.storage.inputs.tables import IMAGE, has_image_column
from blocksight.storage.stores.locations import matches
from blocksight.storage.stores.object_columns import ObjectCollector, ObjectColumns
from blocksight.storage.stores.store import FOLLOWED_LINKS, ObjectInfo, ObjectStore, StoreError, is_hidden


class Layout(StrEnum):
    """How the records are stored in objects."""

    IMAGES = "images"
    """Loose image files; a folder's name is the label."""
    TAR = "tar"
    """Shards in WebDataset layout."""
    PARQUET = "parquet"
    """Tables with an image column."""


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAYOUT_OF_SUFFIX = {
    **dict.fromkeys(IMAGE_SUFFIXES, Layout.IMAGES),
    ".tar": Layout.TAR,
    ".parquet": Layout.PARQUET,
}
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
FOREIGN_IMAGE_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".svg", ".exr"}
    | {".dcm", ".dicom", ".svs", ".ndpi", ".czi", ".fits", ".hdr", ".bpg", ".jls", ".xcf", ".jpf", ".jpm"}
)
"""Suffixes of images that Pillow does not know."""
CONTAINER_SUFFIXES = frozenset(
    {".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip", ".7z", ".rar", ".h5", ".hdf5", ".mdb", ".tfrecord", ".arrow"}
    | {".feather", ".orc", ".avro", ".mds", ".rec", ".npy", ".npz", ".lance", ".beton"}
)
"""Suffixes of archives and of data formats that may hold images."""
EXAMPLES = 3
LOOKED_AT = 8
"""Tables whose columns are read to tell whether they hold images."""


@dataclass(frozen=True)
class Survey:
    """The result of one listing."""

    layout: Layout
    objects: Sequence[ObjectInfo]
    """In order of key."""
    ignored: Mapping[str, int]
    """Counts of what is not input, by suffix or kind. The kind of names that are not UTF-8 includes an example."""
    expected: Mapping[str, int] = field(default_factory=dict)
    """Records by key of a tar shard, as a sidecar says."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing that was followed, joined or left out, and that a user may not expect."""


@dataclass
class _Findings:
    """What a listing holds."""

    by_layout: dict[Layout, ObjectColumns]
    others: ObjectColumns
    """Objects whose suffix is of no layout."""
    ignored: Counter[str]
    followed: list[str] = field(default_factory=list)
    """Links to folders whose files are read."""
    left_out: list[str] = field(default_factory=list)
    """Broken links, and links to folders whose files are not read under the link's name."""
    notes: list[str] = field(default_factory=list)


def survey(store: ObjectStore, key: str = "", listing: ObjectColumns | None = None) -> Survey:
    """Lists the store once and finds the layout from the names. `listing`: its objects, in place of that.

    `key`: look at this single object instead or, if it has a wildcard and is no object, at those that match it.
    Skips names with a part that begins with `_` or `.`, as other readers of data folders do. Tables without an image
    column beside records of another layout are left out. Raises StoreError if no records or records of two layouts
    are found, and for a Delta, Iceberg or Hudi table; a single object is not listed, and may be of such a table.
    """
    single = store.head(key) if key and listing is None else None
    pattern = key if single is None else ""
    logs = TableLogs(store.uri)
    listed = [single] if single is not None else logs.noticed(store.list() if listing is None else listing.drained())
    found = _sorted_out((info for info in listed if not pattern or matches(info.key, pattern)), is_named=bool(single))
    if single is None:
        _add_unlisted(store, found)
    if Layout.PARQUET in found.by_layout:
        logs.refuse()
    _leave_out_tables_without_images(store, found)
    _add_notes(found)
    if len(found.by_layout) != 1:
        raise StoreError(_no_single_layout(store, key, found))
    ((layout, objects),) = found.by_layout.items()
    in_order = objects.in_order()
    expected = {}
    if layout is Layout.TAR:
        expected = expected_counts(store, _keys(in_order), _keys(found.others))
    if expected:
        found.notes.append(f"sidecars say {sum(expected.values()):,} records in {len(expected):,} shards")
    return Survey(layout, in_order, dict(found.ignored), expected, tuple(found.notes))


def _sorted_out(infos: Iterable[ObjectInfo], *, is_named: bool) -> _Findings:
    """The objects by layout, and counts of those that are no input. `is_named`: a user named the object itself."""
    by_layout: defaultdict[Layout, ObjectCollector] = defaultdict(ObjectCollector)
    others, ignored = ObjectCollector(), Counter[str]()
    not_unicode: list[str] = []
    for info in infos:
        if as_text(info.key) != info.key:  # such a key can be neither stored nor read back
            not_unicode.append(as_text(info.key))
            continue
        suffix = _suffix(info.key)
        layout = LAYOUT_OF_SUFFIX.get(suffix)
        kind = None if is_named else _skip_reason(info.key)
        if kind is not None:
            ignored[kind] += 1
            continue
        if layout is None:
            ignored[suffix or "(no suffix)"] += 1
        (others if layout is None else by_layout[layout]).add(info.key, info.size, info.etag)
    if not_unicode:
        ignored[f"named in no UTF-8 ({min(not_unicode)})"] = len(not_unicode)
    return _Findings({layout: own.objects() for layout, own in by_layout.items()}, others.objects(), ignored)


def _add_unlisted(store: ObjectStore, found: _Findings) -> None:
    """Adds what the listing does not hold: pipes, broken links, and links to folders."""
    for key, kind in store.unlisted():
        if kind == FOLLOWED_LINKS:
            found.followed.append(as_text(key))
            continue
        skipped = _skip_reason(key)
        found.ignored[skipped or kind] += 1
        if skipped is None and "links" in kind:
            found.left_out.append(as_text(key))


def _leave_out_tables_without_images(store: ObjectStore, found: _Findings) -> None:
    """Leaves tables without images out if there are records of another layout: img2dataset writes such tables."""
    tables = found.by_layout.get(Layout.PARQUET)
    if tables is None or len(found.by_layout) < 2:
        return
    chosen = tables[:: max(1, len(tables) // LOOKED_AT)][:LOOKED_AT]
    answers = {has_image_column(store, info) for info in chosen}
    if True in answers or False not in answers:
        return
    del found.by_layout[Layout.PARQUET]
    found.ignored[f".parquet without a column `{IMAGE}`"] = len(tables)
    seen = f", as {len(chosen)} that were looked at" if len(chosen) < len(tables) else ""
    keys = _examples([*_keys(tables)])
    found.notes.append(f"tables without a column `{IMAGE}`{seen}, left out ({len(tables)}): {keys}")


def _add_notes(found: _Findings) -> None:
    """Adds a sentence on the links that were followed or not, and on images in formats that are not read."""
    if found.followed:
        found.notes.append(f"links to folders, followed ({len(found.followed)}): {_examples(found.followed)}")
    if found.left_out:
        found.notes.append(f"links, broken or not followed ({len(found.left_out)}): {_examples(found.left_out)}")
    containers = [key for key in _keys(found.others) if _suffix(key) in CONTAINER_SUFFIXES]
    if containers:
        found.notes.append(
            f"archives and containers that are not read, left out ({len(containers)}): {_examples(containers)}; unpack "
            "them"
        )
    images = _unread_images(found.others)
    if images:
        found.notes.append(
            f"images in formats that are not read, left out ({len(images)}): {_examples(images)}; convert them to PNG"
        )


def _suffix(key: str) -> str:
    """As of a path, in lower case, for each of millions of keys."""
    name = key.rpartition("/")[2]
    place = name.rfind(".")
    return name[place:].lower() if 0 < place < len(name) - 1 else ""


def _keys(objects: Iterable[ObjectInfo]) -> Iterator[str]:
    return (info.key for info in objects)


def _unread_images(others: ObjectColumns) -> list[str]:
    """The keys that name an image in a format that is not read."""
    if not others:
        return []
    from PIL import Image  # slow to import, and few data sets hold other files

    kinds = Image.registered_extensions().items()
    known = {suffix for suffix, kind in kinds if Image.MIME.get(kind, "").startswith("image/")}
    unread = known | FOREIGN_IMAGE_SUFFIXES
    return [key for key in _keys(others) if _suffix(key) in unread]


def _examples(names: Sequence[str]) -> str:
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(sorted(names)[:EXAMPLES]) + more


def _skip_reason(key: str) -> str | None:
    """Why an object is skipped because of its name; None: it is not skipped."""
    if "\0" in key:
        return "names with a zero byte"
    if {"", ".", ".."} & set(key.split("/")):
        return "names with an empty part, `.` or `..`"
    return "hidden (_ or .)" if is_hidden(key) else None


def _no_single_layout(store: ObjectStore, key: str, found: _Findings) -> str:
    where = f"{store.uri}/{as_text(key)}" if key else store.uri
    if found.by_layout:
        kinds = ", ".join(f"{len(infos)} of {kind} ({infos[0].key})" for kind, infos in found.by_layout.items())
        return (
            f"{where} holds more than one layout: {kinds}; name one of them by a pattern in quotes, such as "
            f"--data '{store.uri}/{_pattern_of(found.by_layout)}'"
        )
    compressed = next((key for key in _keys(found.others) if key.lower().endswith(COMPRESSED_TARS)), None)
    if compressed is not None:
        return f"{where} holds compressed tar files ({compressed}), which are not read; unpack them to .tar"
    kinds = (f"{count} {kind}" for kind, count in sorted(found.ignored.items()) if kind[0] not in ".(")
    seen = [*_keys(found.others[:EXAMPLES]), *kinds]
    wanted = ", ".join(LAYOUT_OF_SUFFIX)
    contents = f"it holds {', '.join(seen)}" if seen else "nothing is there"
    return "; ".join([f"{where} holds no images, tar shards or Parquet (by name: {wanted})", contents, *found.notes])


def _pattern_of(by_layout: Mapping[Layout, Sequence[ObjectInfo]]) -> str:
    """A pattern for the shards of one layout, else for one kind of image."""
    layout = next(one for one in (Layout.TAR, Layout.PARQUET, Layout.IMAGES) if one in by_layout)
    infos = by_layout[layout]
    folders = "**/" if any("/" in key for key in _keys(infos)) else ""
    return f"{folders}*{PurePosixPath(infos[0].key).suffix}"
