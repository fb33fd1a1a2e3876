"""Tar shards in WebDataset layout: streamed, never extracted, and cut into units by byte range."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from storage.limits import (
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    MAX_MEMBER_NAME_BYTES,
    MAX_SHARD_RECORDS,
    MAX_TAR_HEADER_BYTES,
)
from storage.records import RawRecord, WindowedFile, as_text, too_many_bytes
from storage.rejects import Reject, RejectCode
from storage.store import ObjectInfo, ObjectStore
from storage.survey import IMAGE_SUFFIXES

SAMPLE_BYTES = 4 << 20
END = "(end of archive)"


class _Headers(WindowedFile):
    """What `tarfile` reads headers from: never more than a bounded header at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or size > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, at most {MAX_TAR_HEADER_BYTES} are read")
        return super().read(size)


@dataclass
class _Draft:
    """A record whose members are still being met."""

    key: str
    start: int
    """Offset of its first header."""
    stop: int
    """Offset behind its last member."""
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    """By suffix after the first dot, lower case."""
    reject: Reject | None = None


def read_tar(store: ObjectStore, info: ObjectInfo, start: int, stop: int) -> Iterator[RawRecord]:
    """The records whose first header lies in [start, stop), with their bytes or their reasons.

    Headers are walked from the beginning, so that positions and duplicates do not depend on how the shard
    is cut: over any partition of [0, size) each record comes out once. A shard that ends early gives what
    stands before the break, and one rejected record for the break. Raises MissingError and ChangedError.
    """
    file = _Headers(store, info)
    seen: set[str] = set()
    for index, draft in enumerate(_drafts(file)):
        if draft.start >= stop and stop < info.size:
            return
        if draft.key in seen and draft.reject is None:
            draft.reject = Reject(RejectCode.DUPLICATE_KEY, f"key {draft.key!r} stands earlier in the shard")
        seen.add(draft.key)
        if start <= draft.start:
            yield _record(file, draft, index)


def tar_offset_after(store: ObjectStore, info: ObjectInfo, num_records: int) -> tuple[int, int]:
    """Where a range must stop to hold the first `num_records` records, and how many it then holds."""
    count = 0
    for draft in _drafts(_Headers(store, info)):
        if count == num_records:
            return draft.start, count
        count += 1
    return info.size, count


def sample_tar(store: ObjectStore, info: ObjectInfo) -> float:
    """About how many records the shard holds, from its first 4 MiB."""
    count, reached = 0, 0
    for draft in _drafts(_Headers(store, info)):
        count, reached = count + 1, draft.stop
        if reached >= SAMPLE_BYTES:
            break
    return count * info.size / max(1, reached)


def _record(file: WindowedFile, draft: _Draft, index: int) -> RawRecord:
    shard = file.info.key
    bare = RawRecord(f"{shard}/{draft.key}", shard, index, None)
    if draft.reject is not None:
        return replace(bare, reject=draft.reject)
    labelled = replace(bare, label=_label(file, draft.members.get("cls")))
    image = next((draft.members[suffix] for suffix in draft.members if f".{suffix}" in IMAGE_SUFFIXES), None)
    if image is None:
        found = ", ".join(sorted(draft.members)) or "none"
        return replace(labelled, reject=Reject(RejectCode.MISSING_IMAGE, f"no image member; suffixes: {found}"))
    if image.size > MAX_IMAGE_BYTES:
        return replace(labelled, reject=too_many_bytes(image.size))
    return replace(labelled, data=file.read_at(image.offset_data, image.size))


def _label(file: WindowedFile, member: tarfile.TarInfo | None) -> str | int | None:
    if member is None or member.size > MAX_LABEL_BYTES:
        return None
    text = file.read_at(member.offset_data, member.size).decode("utf-8", "replace").strip()
    return int(text) if text.isdecimal() and text.isascii() else text or None


def _drafts(file: _Headers) -> Iterator[_Draft]:
    """Groups adjacent members of one key; a refused member and a break in the archive stand alone."""
    draft: _Draft | None = None
    for member in _members(file):
        single = member if isinstance(member, _Draft) else _refused(member)
        if single is not None:
            if draft is not None:
                yield draft
            draft = None
            yield single
            continue
        assert isinstance(member, tarfile.TarInfo)
        key, suffix = _split(member.name)
        if draft is None or draft.key != key or suffix in draft.members:
            if draft is not None:
                yield draft
            draft = _Draft(key, member.offset, 0)
        draft.members[suffix] = member
        draft.stop = _end(member)
    if draft is not None:
        yield draft


def _members(file: _Headers) -> Iterator[tarfile.TarInfo | _Draft]:
    """Files and odd members in order; a draft with a reason where the archive breaks off, which ends it."""
    count = 0
    try:
        archive: Any = tarfile.TarFile(fileobj=file, mode="r")  # pyright: ignore[reportArgumentType]
        while (member := archive.next()) is not None:
            archive.members.clear()  # it would keep every header of the shard
            count += 1
            if count > MAX_SHARD_RECORDS:
                yield _break(file, member.offset, RejectCode.MEMBER_REFUSED, f"more than {MAX_SHARD_RECORDS} members")
                return
            if _end(member) > file.info.size:
                text = f"member {as_text(member.name)!r} reaches beyond the shard's {file.info.size} bytes"
                yield _break(file, member.offset, RejectCode.SHARD_TRUNCATED, text, _split(member.name)[0])
                return
            if not member.isdir() and not _is_hidden(member):
                yield member
        offset = archive.offset
    except tarfile.TarError as error:
        code = RejectCode.SHARD_TRUNCATED if count else RejectCode.CORRUPT
        yield _break(file, file.info.size, code, f"the archive cannot be read on: {error}")
        return
    yield from _end_marker(file, offset)


def _end_marker(file: _Headers, offset: int) -> Iterator[_Draft]:
    """`tarfile` takes a missing end for an end; records may have been lost behind it."""
    block = file.read_at(offset, min(tarfile.BLOCKSIZE, max(0, file.info.size - offset)))
    if len(block) < tarfile.BLOCKSIZE:
        yield _break(file, file.info.size, RejectCode.SHARD_TRUNCATED, "the shard ends without an end-of-archive block")
    elif block != bytes(tarfile.BLOCKSIZE):
        yield _break(file, offset, RejectCode.CORRUPT, f"no valid header at byte {offset}; what follows was not read")


def _break(file: _Headers, offset: int, code: RejectCode, message: str, key: str = END) -> _Draft:
    return _Draft(
        key, min(offset, file.info.size - 1) if file.info.size else 0, file.info.size, reject=Reject(code, message)
    )


def _refused(member: tarfile.TarInfo) -> _Draft | None:
    """The member as a rejected record, where it is no plain file or its name is none to keep."""
    reason = _fault_of(member)
    if reason is None:
        return None
    key = as_text(member.name)[:MAX_MEMBER_NAME_BYTES]
    reject = Reject(RejectCode.MEMBER_REFUSED, f"{key!r}: {reason}")
    return _Draft(key, member.offset, _end(member), reject=reject)


def _fault_of(member: tarfile.TarInfo) -> str | None:
    name = member.name
    if not member.isreg() or member.issparse():
        return "links, devices and sparse files are not read"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "the path leaves the archive"
    if not name.isprintable():
        return "the name holds control characters or is no text"
    if len(name.encode("utf-8", "surrogateescape")) > MAX_MEMBER_NAME_BYTES:
        return f"the name is longer than {MAX_MEMBER_NAME_BYTES} bytes"
    return None


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: the base name is cut at its first dot."""
    folder, slash, base = as_text(name).rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _is_hidden(member: tarfile.TarInfo) -> bool:
    return member.name.rpartition("/")[2].startswith(".")


def _end(member: tarfile.TarInfo) -> int:
    return member.offset_data + (member.size if member.isreg() else 0)
