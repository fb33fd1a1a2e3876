"""Reads records from tar shards in WebDataset layout, by byte range, without extracting files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import PurePosixPath

from blocksight.storage.inputs.compression import compression_of
from blocksight.storage.inputs.labels import label_of, partition_label
from blocksight.storage.inputs.paused import PausedReader
from blocksight.storage.inputs.records import RawRecord, as_text, read_failed, too_many_bytes
from blocksight.storage.inputs.survey import IMAGE_SUFFIXES
from blocksight.storage.inputs.tar_headers import BLOCK, Member, ShardFault, walk_members
from blocksight.storage.limits import MAX_IMAGE_BYTES, MAX_LABEL_BYTES, MAX_MEMBER_NAME_BYTES, MAX_SHARD_RECORDS
from blocksight.storage.rejects import Reject, RejectCode
from blocksight.storage.stores.error_classes import is_of_record
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore
from blocksight.storage.stores.streamed_file import StreamedFile
from blocksight.storage.stores.windowed_file import WindowedFile

SAMPLE_BYTES = 4 << 20
END = "(end of archive)"
CLASS = "cls"
"""The suffix of the member that holds a record's label."""


@dataclass
class _Draft:
    """A record whose members are still being read."""

    key: str
    start: int
    """Offset of its first header."""
    stop: int
    """Offset of the end of its last member."""
    members: dict[str, Member] = field(default_factory=dict)
    """By suffix: the name after its first dot, in lower case."""
    reject: Reject | None = None
    is_split: bool = False
    """It is one of several images with one name up to the first dot."""

    @property
    def images(self) -> list[str]:
        """The suffixes of its images, the explained one first."""
        found = [suffix for suffix in self.members if _is_image(suffix)]
        return sorted(found, key=lambda suffix: "." in suffix)


def read_tar(store: ObjectStore, info: ObjectInfo, start: int, stop: int) -> Iterator[RawRecord]:
    """The records whose first header lies in [start, stop), with their bytes or their rejects.

    Headers are read from the shard's beginning, so positions and duplicates do not depend on the ranges: over
    any partition of [0, size) each record occurs once. A range that follows the last one goes on from there. A
    damaged shard yields the records before the damage, and one rejected record for the damage. Raises DamagedError if
    there is no member before it, MissingError and ChangedError.
    """
    walk = PAUSED.take(store, info, start) or _Walk(store, info)
    is_last = stop >= info.size
    for index, draft in walk.until(None if is_last else stop):
        if start <= draft.start:
            yield _record(walk.file, draft, index)
    if not is_last:
        PAUSED.keep(store, info, stop, walk)


class _Walk:
    """A walk through the records of a shard, which may rest between two ranges."""

    def __init__(self, store: ObjectStore, info: ObjectInfo) -> None:
        self.file = StreamedFile(store, info)
        self._coming = enumerate(_drafts(self.file))
        self._ahead: tuple[int, _Draft] | None = None
        """The first record behind the range."""
        self._seen: dict[str, bool] = {}
        """Keys of earlier records, and whether they have an image."""

    def until(self, stop: int | None) -> Iterator[tuple[int, _Draft]]:
        """The next records whose first header lies before `stop`, each with its position in the shard. None: all."""
        first = [] if self._ahead is None else [self._ahead]
        for index, draft in chain(first, self._coming):
            self._ahead = (index, draft)
            if stop is not None and draft.start >= stop:
                return
            if draft.key in self._seen and draft.reject is None:
                draft.reject = Reject(RejectCode.DUPLICATE_KEY, _why_twice(draft, self._seen[draft.key]))
            self._seen.setdefault(draft.key, bool(draft.images))
            yield index, draft
        self._ahead = None


PAUSED = PausedReader[_Walk]()


def tar_offset_after(store: ObjectStore, info: ObjectInfo, num_records: int) -> tuple[int, int]:
    """The offset after the first `num_records` records, and how many records lie before it."""
    count = 0
    for draft in _drafts(WindowedFile(store, info)):
        if count == num_records:
            return draft.start, count
        count += 1
    return info.size, count


@dataclass(frozen=True)
class TarSample:
    """What the beginning of a shard tells."""

    num_records: float
    """Estimate for the whole shard; 0.0 if no record of the sample can be read."""
    notes: Mapping[str, str]
    """Sentences on what was joined, split or left out, by kind."""


def sample_tar(store: ObjectStore, info: ObjectInfo) -> TarSample:
    """Estimates the records from the shard's first 4 MiB. Raises as `read_tar`."""
    count, reached, num_readable = 0, 0, 0
    notes: dict[str, str] = {}
    seen: dict[str, bool] = {}
    for draft in _drafts(WindowedFile(store, info)):
        count, reached = count + 1, max(reached, draft.stop)
        num_readable += draft.reject is None
        if draft.reject is None:
            notes = {**_notes_on(draft, info.key, seen.get(draft.key)), **notes}
        seen.setdefault(draft.key, bool(draft.images))
        if reached >= SAMPLE_BYTES:
            break
    return TarSample(count * info.size / max(1, reached) if num_readable else 0.0, notes)


def _notes_on(draft: _Draft, shard: str, had_image: bool | None) -> dict[str, str]:
    """What a user may not expect of a record, by kind. `had_image`: of an earlier record with this key, if any."""
    images, members = draft.images, ", ".join(draft.members)
    unread = [suffix for suffix in draft.members if suffix != CLASS and suffix not in images]
    notes = {}
    if draft.is_split:
        notes["dots"] = (
            f"{shard}: images whose names agree up to the first dot only are records of their own ({draft.key})"
        )
    if len(images) > 1:
        left = ", ".join(images[1:])
        notes["images"] = f"{shard}: records hold several images; {images[0]} is explained, {left} is not ({draft.key})"
    if had_image is not None and not (images and had_image):
        notes["order"] = f"{shard}: {_why_twice(draft, had_image)}"
    elif not images:
        notes["no image"] = (
            f"{shard}: a record without an image that is read: {draft.key} holds {members} alone; the members of a "
            "record have one name, folders included"
        )
    elif unread:
        notes["unread"] = f"{shard}: members that are not read: {', '.join(unread)} ({draft.key})"
    if images and CLASS not in draft.members and _own_label(draft, shard) is None and "/" in draft.key:
        notes["folders"] = (
            f"{shard}: folders in a shard are no labels ({draft.key}): those are members .cls, or --labels"
        )
    return notes


def _why_twice(draft: _Draft, had_image: bool) -> str:
    """Why a draft is rejected whose key occurs earlier in the shard, there with an image or without."""
    if draft.images and had_image:
        return f"key {draft.key!r} occurs earlier in the shard"
    return (
        f"the members of key {draft.key!r} are not adjacent: {', '.join(draft.members)} comes apart from those earlier "
        "in the shard and is not read; write the shard in order of names (tar --sort=name)"
    )


def tar_labels(store: ObjectStore, info: ObjectInfo, stop: int) -> Iterator[tuple[str, str | int | None]]:
    """Key and label of the records that begin before byte `stop`, in the shard's first 4 MiB. Raises StoreError."""
    file = WindowedFile(store, info)
    for draft in _drafts(file):
        if draft.start >= stop:
            return
        if draft.reject is None:
            yield f"{info.key}/{draft.key}", _label(file, draft)
        if draft.stop >= SAMPLE_BYTES:
            return


def _record(file: WindowedFile, draft: _Draft, index: int) -> RawRecord:
    """The draft as a record, rejected if it cannot be read. Errors of the shard or the store are raised."""
    shard = file.info.key
    bare = RawRecord(f"{shard}/{draft.key}", shard, index, None)
    if draft.reject is not None:
        return replace(bare, reject=draft.reject)
    try:
        return _with_members(file, draft, bare)
    except Exception as error:
        if not is_of_record(error):
            raise
        return replace(bare, reject=read_failed(error))


def _with_members(file: WindowedFile, draft: _Draft, bare: RawRecord) -> RawRecord:
    labelled = replace(bare, label=_label(file, draft))
    images = draft.images
    if not images:
        found = ", ".join(sorted(draft.members)) or "none"
        return replace(labelled, reject=Reject(RejectCode.MISSING_IMAGE, f"no image member; suffixes: {found}"))
    image = draft.members[images[0]]
    if image.size > MAX_IMAGE_BYTES:
        return replace(labelled, reject=too_many_bytes(image.size))
    return replace(labelled, data=file.read_at(image.data_start, image.size))


def _label(file: WindowedFile, draft: _Draft) -> str | int | None:
    """The label of the record's own member, else that of a folder `label=VALUE`."""
    member = draft.members.get(CLASS)
    if member is None:
        return _own_label(draft, file.info.key)
    body = file.read_at(
        member.data_start, min(member.size, MAX_LABEL_BYTES + 1)
    )  # one byte more shows that it is too long
    return label_of(body.strip())


def _own_label(draft: _Draft, shard: str) -> str | int | None:
    """The label in a folder `label=VALUE`, in the shard or around it."""
    return partition_label(f"{shard}/{draft.key}")


def _drafts(file: WindowedFile) -> Iterator[_Draft]:
    """The shard's records. Images that share a name up to its first dot only are records of their own.

    `22.00.png` and `22.01.png` are two records, as are `x.left.jpg` and `x.right.jpg`. Beside `x.jpg`, `x.1.jpg` is a
    record and `x.mask.png` a part of `x`.
    """
    for draft in _joined(file):
        yield from _split(draft)


def _split(draft: _Draft) -> Iterator[_Draft]:
    """The draft, or a draft for each image that is a record of its own, with the members of its longer name."""
    images = draft.images
    is_plain = bool(images) and "." not in images[0]
    stems = {suffix: suffix.rpartition(".")[0] for suffix in images if "." in suffix}
    own = {suffix: stem for suffix, stem in stems.items() if not is_plain or stem.replace(".", "").isdecimal()}
    if not own:
        yield draft
        return
    parts = [_renamed(draft, suffix, stem) for suffix, stem in own.items()]
    if is_plain:
        rest = {name: one for name, one in draft.members.items() if not _is_of(name, own.values())}
        parts.append(replace(draft, start=rest[images[0]].start, members=rest))
    yield from sorted(parts, key=lambda part: part.start)


def _renamed(draft: _Draft, image: str, stem: str) -> _Draft:
    """The draft with one image, its own members and the common label, under the image's name up to its last dot."""
    members = {name.removeprefix(f"{stem}."): one for name, one in draft.members.items() if _is_of(name, [stem])}
    if CLASS in draft.members:
        members.setdefault(CLASS, draft.members[CLASS])
    key = as_text(draft.members[image].name).rpartition(".")[0]
    is_split = len(draft.images) > 1
    return replace(draft, key=key, start=draft.members[image].start, members=members, is_split=is_split)


def _is_of(suffix: str, stems: Iterable[str]) -> bool:
    return suffix.rpartition(".")[0] in stems


def _is_image(suffix: str) -> bool:
    return PurePosixPath(f"x.{suffix}").suffix in IMAGE_SUFFIXES


def _joined(file: WindowedFile) -> Iterator[_Draft]:
    """Groups adjacent members of one key. A refused member, and the fault that ends a shard, get their own draft."""
    draft: _Draft | None = None
    for member in _members(file):
        single = member if isinstance(member, _Draft) else _refused_draft(member)
        if single is not None:
            if draft is not None:
                yield draft
            draft = None
            yield single
            continue
        assert isinstance(member, Member)
        key, suffix = _key_and_suffix(member.name)
        if draft is None or draft.key != key or suffix in draft.members:
            if draft is not None:
                yield draft
            draft = _Draft(key, member.start, 0)
        draft.members[suffix] = member
        draft.stop = member.stop
    if draft is not None:
        yield draft


def _members(file: WindowedFile) -> Iterator[Member | _Draft]:
    """Members in order, without folders and hidden files. If the shard is damaged, a rejected draft comes last.

    Raises DamagedError if the damage comes before the first member.
    """
    count = -1
    try:
        for count, member in enumerate(walk_members(file)):
            if count == MAX_SHARD_RECORDS:
                text = f"more than {MAX_SHARD_RECORDS} members; the last {file.info.size - member.start} bytes"
                raise ShardFault(member.start, Reject(RejectCode.MEMBER_REFUSED, f"{text} were not read"))
            if not member.is_folder and not _is_hidden(member):
                yield member
    except ShardFault as fault:
        if count < 0:
            raise DamagedError(_why_damaged(file, fault)) from fault
        key = END if fault.name is None else _key_and_suffix(fault.name)[0]
        start = max(0, min(fault.offset, file.info.size - 1))
        yield _Draft(key, start, file.info.size, reject=fault.reject)


def _why_damaged(file: WindowedFile, fault: ShardFault) -> str:
    where = f"{file.store.uri}/{file.info.key}"
    kind = compression_of(file.read_at(0, BLOCK))
    if kind is None:
        return f"{where} holds no readable tar member: {fault.reject.message}"
    return f"{where} is {kind} inside, which is not read: unpack it to a plain .tar"


def _refused_draft(member: Member) -> _Draft | None:
    """The member as a rejected draft, if it is not a regular file or its name is refused; else None."""
    reason = _refusal_reason(member)
    if reason is None:
        return None
    key = as_text(member.name)[:MAX_MEMBER_NAME_BYTES]
    reject = Reject(RejectCode.MEMBER_REFUSED, f"{key!r}: {reason}")
    return _Draft(key, member.start, member.stop, reject=reject)


def _refusal_reason(member: Member) -> str | None:
    name = member.name
    if not member.is_plain:
        return "links, devices and sparse files are not read"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "the path leaves the archive"
    if not name.isprintable():
        return "the name holds control characters or is no text"
    if len(name.encode("utf-8", "surrogateescape")) > MAX_MEMBER_NAME_BYTES:
        return f"the name is longer than {MAX_MEMBER_NAME_BYTES} bytes"
    return None


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Key and suffix: the base name is cut at its first dot."""
    folder, slash, base = as_text(name).rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _is_hidden(member: Member) -> bool:
    return member.name.rpartition("/")[2].startswith(".")
