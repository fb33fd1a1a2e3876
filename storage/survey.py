"""The survey of an input: which layout it has, and which objects hold its records."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from storage.store import ObjectInfo, ObjectStore, StoreError


class Layout(StrEnum):
    """How the records lie in their objects."""

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
    """What one listing found."""

    layout: Layout
    objects: tuple[ObjectInfo, ...]
    """In order of key."""
    ignored: Mapping[str, int]
    """How many objects are no input, by suffix, or hidden."""


def survey(store: ObjectStore, prefix: str = "") -> Survey:
    """Lists the store once and settles the layout by the names; `prefix` may be a single file.

    Names with a part that begins with `_` or `.` are skipped, as all readers of data folders do. Raises
    StoreError where nothing is found, or records of two layouts.
    """
    found: dict[Layout, list[ObjectInfo]] = {}
    ignored: Counter[str] = Counter()
    others: list[str] = []
    for info in store.list(prefix):
        _refuse_no_text(store, info.key)
        path = PurePosixPath(info.key)
        if prefix and info.key != prefix:
            continue
        if any(part.startswith(("_", ".")) for part in path.parts):
            ignored["hidden (_ or .)"] += 1
            continue
        layout = LAYOUT_OF_SUFFIX.get(path.suffix.lower())
        if layout is None:
            ignored[path.suffix.lower() or "(no suffix)"] += 1
            others.append(info.key)
        else:
            found.setdefault(layout, []).append(info)
    if len(found) != 1:
        raise StoreError(_no_single_layout(store, prefix, found, others))
    ((layout, objects),) = found.items()
    return Survey(layout, tuple(sorted(objects, key=lambda info: info.key)), dict(ignored))


def _refuse_no_text(store: ObjectStore, key: str) -> None:
    """A key is stored as text: a file name of other bytes could neither be written down nor found again."""
    try:
        key.encode()
    except UnicodeEncodeError as error:
        shown = key.encode("utf-8", "backslashreplace").decode()
        raise StoreError(f"{store.uri} holds a file whose name is no UTF-8: {shown}; rename it") from error


def _no_single_layout(
    store: ObjectStore, prefix: str, found: Mapping[Layout, Sequence[ObjectInfo]], others: Sequence[str]
) -> str:
    where = f"{store.uri}/{prefix}" if prefix else store.uri
    if found:
        kinds = ", ".join(f"{len(infos)} of {layout} ({infos[0].key})" for layout, infos in found.items())
        return f"{where} holds more than one layout: {kinds}; point --data at one of them"
    compressed = [key for key in others if key.lower().endswith(COMPRESSED_TARS)]
    if compressed:
        return f"{where} holds compressed tar files ({compressed[0]}), which are not read; unpack them to .tar"
    seen = f"; it holds {', '.join(others[:EXAMPLES])}" if others else "; nothing is there"
    wanted = ", ".join(LAYOUT_OF_SUFFIX)
    return f"{where} holds no images, tar shards or Parquet (by name: {wanted}){seen}"
