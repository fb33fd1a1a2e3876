"""Surveys an input: finds its layout and the objects that hold its records."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from blocksight.storage.inputs.records import as_text
from blocksight.storage.stores.store import ObjectInfo, ObjectStore, StoreError


class Layout(StrEnum):
    """How the records are stored in objects."""

    IMAGES = "images"
    """Loose image files; a folder's name is the label."""
    TAR = "tar"
    """Shards in WebDataset layout."""
    PARQUET = "parquet"
    """Tables with an image column."""


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAYOUT_OF_SUFFIX = {
    **dict.fromkeys(IMAGE_SUFFIXES, Layout.IMAGES),
    ".tar": Layout.TAR,
    ".parquet": Layout.PARQUET,
}
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
EXAMPLES = 3


@dataclass(frozen=True)
class Survey:
    """The result of one listing."""

    layout: Layout
    objects: tuple[ObjectInfo, ...]
    """In order of key."""
    ignored: Mapping[str, int]
    """Counts of what is not input, by suffix or kind. The kind of names that are not UTF-8 includes an example."""


def survey(store: ObjectStore, key: str = "") -> Survey:
    """Lists the store once and finds the layout from the names. `key`: look at this single object instead.

    Skips names with a part that begins with `_` or `.`, as other readers of data folders do. Raises StoreError
    if no records or records of two layouts are found.
    """
    found: dict[Layout, list[ObjectInfo]] = {}
    ignored: Counter[str] = Counter()
    others: list[str] = []
    not_unicode: list[str] = []
    for info in _infos(store, key):
        if as_text(info.key) != info.key:  # such a key can be neither stored nor read back
            not_unicode.append(as_text(info.key))
            continue
        layout = LAYOUT_OF_SUFFIX.get(PurePosixPath(info.key).suffix.lower())
        kind = None if key else _skip_reason(info.key)
        if kind is not None:
            ignored[kind] += 1
        elif layout is None:
            ignored[PurePosixPath(info.key).suffix.lower() or "(no suffix)"] += 1
            others.append(info.key)
        else:
            found.setdefault(layout, []).append(info)
    if not key:
        ignored.update(_skip_reason(other) or kind for other, kind in store.unlisted())
    if not_unicode:
        ignored[f"named in no UTF-8 ({min(not_unicode)})"] = len(not_unicode)
    if len(found) != 1:
        raise StoreError(_no_single_layout(store, key, found, others, ignored))
    ((layout, objects),) = found.items()
    return Survey(layout, tuple(sorted(objects, key=lambda info: info.key)), dict(ignored))


def _infos(store: ObjectStore, key: str) -> Iterable[ObjectInfo]:
    if not key:
        return store.list()
    info = store.head(key)
    return [info] if info is not None else []


def _skip_reason(key: str) -> str | None:
    """Why an object is skipped because of its name; None: it is not skipped."""
    parts = key.split("/")
    if "\0" in key:
        return "names with a zero byte"
    if {"", ".", ".."} & set(parts):
        return "names with an empty part, `.` or `..`"
    return "hidden (_ or .)" if any(part.startswith(("_", ".")) for part in parts) else None


def _no_single_layout(
    store: ObjectStore,
    key: str,
    found: Mapping[Layout, Sequence[ObjectInfo]],
    others: Sequence[str],
    ignored: Mapping[str, int],
) -> str:
    where = f"{store.uri}/{as_text(key)}" if key else store.uri
    if found:
        kinds = ", ".join(f"{len(infos)} of {layout} ({infos[0].key})" for layout, infos in found.items())
        return f"{where} holds more than one layout: {kinds}; point --data at one of them"
    compressed = [key for key in others if key.lower().endswith(COMPRESSED_TARS)]
    if compressed:
        return f"{where} holds compressed tar files ({compressed[0]}), which are not read; unpack them to .tar"
    kinds = (f"{count} {kind}" for kind, count in sorted(ignored.items()) if kind[0] not in ".(")
    seen = [*others[:EXAMPLES], *kinds]
    wanted = ", ".join(LAYOUT_OF_SUFFIX)
    contents = f"it holds {', '.join(seen)}" if seen else "nothing is there"
    return f"{where} holds no images, tar shards or Parquet (by name: {wanted}); {contents}"
