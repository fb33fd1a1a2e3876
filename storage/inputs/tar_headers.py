"""Walks the headers of a tar shard: yields its members in order, or raises the fault that ends it."""

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from blocksight.storage.inputs.records import as_text
from blocksight.storage.limits import MAX_MEMBER_NAME_BYTES, MAX_TAR_HEADER_BYTES
from blocksight.storage.rejects import Reject, RejectCode
from blocksight.storage.stores.windowed_file import WindowedFile

BLOCK = tarfile.BLOCKSIZE
PADDING_BYTES = 1 << 20
"""Zeros after an end marker that are read in one step."""

REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
TYPES_WITHOUT_BODY = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSION_TYPES = (*PAX_TYPES, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
"""Headers with facts about the next member (`g`: about all members that follow)."""

SPARSE_PREFIX = b"GNU.sparse."
PATH, SIZE, SPARSE_NAME, SPARSE = "path", "size", "GNU.sparse.name", "GNU.sparse"
USED_FIELDS = {PATH.encode(), SIZE.encode(), SPARSE_NAME.encode()}
"""PAX fields that are used. Other fields of sparse members count as `SPARSE`; the rest is dropped."""
SHOWN_BYTES = 40
"""Bytes of a malformed PAX record in a message."""
MAX_NUMBER_DIGITS = 20
"""Digits of a number in a PAX header."""
MORE_IN_HEADER, MORE_IN_BLOCK = 482, 504
"""Offsets of the flag `another block follows`: in an old GNU sparse header, and in a block after it."""


@dataclass(frozen=True)
class Member:
    """One member and its position in the shard."""

    name: str
    start: int
    """Offset of its first header, extension headers included."""
    data_start: int
    size: int
    """Bytes of its body."""
    is_plain: bool
    """A regular file: not a link, device or sparse file."""
    is_folder: bool = False

    @property
    def stop(self) -> int:
        """Offset of the end of its body."""
        return self.data_start + self.size


class ShardFault(Exception):
    """The shard cannot be read further."""

    def __init__(self, offset: int, reject: Reject, name: str | None = None) -> None:
        super().__init__(reject.message)
        self.offset = offset
        """Of the malformed header."""
        self.reject = reject
        self.name = name
        """Of the member that is cut, if one is."""


@dataclass
class _Extensions:
    """The facts from extension headers about the next members."""

    start: int | None = None
    """Offset of the next member's first extension header; None: it has none."""
    name: str | None = None
    """From a GNU long name."""
    fields: dict[str, str] = field(default_factory=dict)
    """From PAX headers of the next member."""
    global_fields: dict[str, str] = field(default_factory=dict)
    """From global PAX headers."""


def walk_members(file: WindowedFile) -> Iterator[Member]:
    """The shard's members in order, as `tar --ignore-zeros` finds them. Raises ShardFault if the shard is damaged.

    Each step moves forward by at least one block, so the shard's size bounds the work. Zero blocks end an archive,
    and another archive may follow. Anything else after the end raises ShardFault, as does a missing end.
    """
    extensions, offset, is_ended = _Extensions(), 0, False
    while offset < file.info.size:
        block = file.read_at(offset, BLOCK)
        if not block.strip(b"\0"):
            _refuse_lone_extension(extensions)
            extensions, is_ended = _Extensions(), is_ended or len(block) == BLOCK
            offset = _end_of_zeros(file, offset)
            continue
        header = _header(file, block, offset, is_ended=is_ended)
        is_ended = False
        if header.type in EXTENSION_TYPES:
            extensions = _with_header(file, header, offset, extensions)
            offset += BLOCK + _padded_size(header.size)
            continue
        member = _member(file, header, offset, extensions)
        yield member
        extensions = _Extensions(global_fields=extensions.global_fields)
        offset = member.data_start + _padded_size(member.size)
    _refuse_lone_extension(extensions)
    if not is_ended:
        problem = "is empty" if not file.info.size else "ends without an end-of-archive block"
        code = RejectCode.SHARD_TRUNCATED if file.info.size else RejectCode.CORRUPT
        raise ShardFault(file.info.size, Reject(code, f"the shard {problem}"))


def _header(file: WindowedFile, block: bytes, offset: int, *, is_ended: bool) -> tarfile.TarInfo:
    """The block as a header. Raises ShardFault if it is not one or has a negative length."""
    if len(block) < BLOCK and not is_ended:
        raise _fault(file, offset, "the header is cut", RejectCode.SHARD_TRUNCATED)
    where = "the bytes after the end of the archive are no header" if is_ended else "no valid header"
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _fault(file, offset, f"{where} ({error})") from error
    if header.size < 0:
        raise _fault(file, offset, f"a header says {header.size} bytes")
    return header


def _with_header(file: WindowedFile, header: tarfile.TarInfo, offset: int, extensions: _Extensions) -> _Extensions:
    """The extensions with the facts of this header added. Raises ShardFault."""
    if header.size > MAX_TAR_HEADER_BYTES:
        text = f"an extension header of {header.size} bytes, at most {MAX_TAR_HEADER_BYTES} are read"
        raise _fault(file, offset, text)
    body = file.read_at(offset + BLOCK, header.size)
    if len(body) < header.size:
        raise _fault(file, offset, "an extension header is cut", RejectCode.SHARD_TRUNCATED)
    start = offset if extensions.start is None else extensions.start
    if header.type in PAX_TYPES or header.type == tarfile.XGLTYPE:
        try:
            fields = _pax_fields(body)
        except ValueError as error:
            raise _fault(file, offset, f"a PAX header cannot be read: {error}") from error
        if header.type == tarfile.XGLTYPE:
            return _Extensions(start, extensions.name, extensions.fields, {**extensions.global_fields, **fields})
        return _Extensions(start, extensions.name, {**extensions.fields, **fields}, extensions.global_fields)
    name = extensions.name
    if header.type == tarfile.GNUTYPE_LONGNAME:
        name = _shortened_text(body.partition(b"\0")[0])
    return _Extensions(start, name, extensions.fields, extensions.global_fields)


def _pax_fields(body: bytes) -> dict[str, str]:
    """The used fields of a PAX header. Its records are `LENGTH KEY=VALUE` and a new line. Raises ValueError."""
    fields: dict[str, str] = {}
    start, end = 0, len(body.rstrip(b"\0"))
    while start < end:
        length, space, _ = body[start : start + MAX_NUMBER_DIGITS + 1].partition(b" ")
        stop = start + _number(length.decode("ascii", "replace"))
        key, equals, value = body[start + len(length) + 1 : stop].partition(b"=")
        if not space or not equals or not value.endswith(b"\n") or stop > end:
            raise ValueError(f"{body[start : start + SHOWN_BYTES]!r} is no PAX record")
        if key in USED_FIELDS or key.startswith(SPARSE_PREFIX):
            text = value[:-1].rstrip(b"/") if key == PATH.encode() else value[:-1]
            fields[key.decode() if key in USED_FIELDS else SPARSE] = _shortened_text(text)
        start = stop
    return fields


def _shortened_text(value: bytes) -> str:
    """A value as text, cut once it is too long for a name: every member keeps the global values."""
    return value.decode("utf-8", "surrogateescape")[: MAX_MEMBER_NAME_BYTES + 1]


def _number(text: str) -> int:
    """The plain decimal number. Raises ValueError."""
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_NUMBER_DIGITS):
        raise ValueError(f"{text[:MAX_NUMBER_DIGITS]!r} is no length")
    return int(text)


def _member(file: WindowedFile, header: tarfile.TarInfo, offset: int, extensions: _Extensions) -> Member:
    """The member with this header. Raises ShardFault if its body ends beyond the shard."""
    fields: Mapping[str, str] = {**extensions.global_fields, **extensions.fields}
    is_sparse = header.type == tarfile.GNUTYPE_SPARSE or SPARSE in fields or SPARSE_NAME in fields
    name = fields.get(SPARSE_NAME) or fields.get(PATH) or extensions.name or header.name
    start = offset if extensions.start is None else extensions.start
    size = _size(file, header, offset, fields)
    data_start = _end_of_sparse_map(file, offset) if header.type == tarfile.GNUTYPE_SPARSE else offset + BLOCK
    if data_start + size > file.info.size:
        left = file.info.size - start
        text = f"member {as_text(name)!r} reaches beyond the shard; its last {left} bytes were not read"
        raise ShardFault(start, Reject(RejectCode.SHARD_TRUNCATED, text), name)
    is_folder = header.type == tarfile.DIRTYPE
    return Member(name, start, data_start, size, header.type in REGULAR_TYPES and not is_sparse, is_folder)


def _size(file: WindowedFile, header: tarfile.TarInfo, offset: int, fields: Mapping[str, str]) -> int:
    if header.type in TYPES_WITHOUT_BODY:
        return 0
    if SIZE not in fields:
        return header.size
    try:
        return _number(fields[SIZE])
    except ValueError as error:
        raise _fault(file, offset, f"the size in a PAX header: {error}") from error


def _end_of_sparse_map(file: WindowedFile, offset: int) -> int:
    """Offset of the body of an old GNU sparse member."""
    block, flag = file.read_at(offset, BLOCK), MORE_IN_HEADER
    while len(block) == BLOCK and block[flag]:
        offset, flag = offset + BLOCK, MORE_IN_BLOCK
        block = file.read_at(offset, BLOCK)
    return offset + BLOCK


def _refuse_lone_extension(extensions: _Extensions) -> None:
    """Raises ShardFault if the last extension header has no member."""
    if extensions.start is not None and (extensions.name is not None or extensions.fields):
        raise ShardFault(
            extensions.start, Reject(RejectCode.CORRUPT, f"no member follows the header at byte {extensions.start}")
        )


def _end_of_zeros(file: WindowedFile, offset: int) -> int:
    """Offset of the next block that is not all zeros, or the shard's end."""
    while offset < file.info.size:
        piece = file.read_at(offset, PADDING_BYTES)
        if not piece:
            break
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if zeros < len(piece):
            return offset + zeros // BLOCK * BLOCK
        offset += len(piece)
    return file.info.size


def _padded_size(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _fault(file: WindowedFile, offset: int, text: str, code: RejectCode = RejectCode.CORRUPT) -> ShardFault:
    left = file.info.size - offset
    return ShardFault(offset, Reject(code, f"{text} at byte {offset}; the last {left} bytes were not read"))
