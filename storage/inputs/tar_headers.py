"""Walks the headers of a tar shard: its members in order, or the fault after which nothing can be read."""

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from blocksight.storage.inputs.records import as_text
from blocksight.storage.limits import MAX_MEMBER_NAME_BYTES, MAX_TAR_HEADER_BYTES
from blocksight.storage.rejects import Reject, RejectCode
from blocksight.storage.stores.windowed_file import WindowedFile

BLOCK = tarfile.BLOCKSIZE
PADDING_BYTES = 1 << 20
"""Of the zeros behind an end marker that are looked at in one go."""

REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
WITHOUT_BODY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSIONS = (*PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
"""Headers that say something of the member behind them (`g`: of all members behind it)."""

SPARSE_PREFIX = b"GNU.sparse."
PATH, SIZE, SPARSE_NAME, SPARSE = "path", "size", "GNU.sparse.name", "GNU.sparse"
USED_FIELDS = {PATH.encode(), SIZE.encode(), SPARSE_NAME.encode()}
"""Of PAX headers; all others that make a member sparse count as `SPARSE`, the rest is dropped."""
SHOWN_BYTES = 40
"""Of what is no PAX header, in a message."""
LONGEST_NUMBER = 20
"""Digits of a length in a PAX header."""
MORE_IN_HEADER, MORE_IN_BLOCK = 482, 504
"""Where an old GNU sparse header, and a block behind it, say that another such block follows."""


@dataclass(frozen=True)
class Member:
    """One member, where it lies in its shard."""

    name: str
    start: int
    """Offset of its first header, extension headers included."""
    data_start: int
    size: int
    """Bytes of its body."""
    is_plain: bool
    """A regular file; no link, device or sparse file."""
    is_folder: bool = False

    @property
    def stop(self) -> int:
        """Offset behind its body."""
        return self.data_start + self.size


class ShardFault(Exception):
    """The shard cannot be read on from here."""

    def __init__(self, offset: int, reject: Reject, name: str | None = None) -> None:
        super().__init__(reject.message)
        self.offset = offset
        """Of the header that is at fault."""
        self.reject = reject
        self.name = name
        """Of the member that is cut."""


@dataclass
class _Said:
    """What extension headers said of the members behind them."""

    start: int | None = None
    """Offset of the first one of the next member; None: it has none."""
    name: str | None = None
    """From a GNU long name."""
    fields: dict[str, str] = field(default_factory=dict)
    """From PAX headers of the next member."""
    of_all: dict[str, str] = field(default_factory=dict)
    """From global PAX headers."""


def walk_members(file: WindowedFile) -> Iterator[Member]:
    """The shard's members in order, as `tar --ignore-zeros` finds them. Raises ShardFault where they break off.

    Each step moves forward by a block at least, so that the work is bounded by the shard's bytes. Zero blocks end
    an archive; another one may follow. What follows and is none raises ShardFault, as does a missing end.
    """
    said, offset, is_ended = _Said(), 0, False
    while offset < file.info.size:
        block = file.read_at(offset, BLOCK)
        if not block.strip(b"\0"):
            _refuse_lone_extension(said)
            said, is_ended = _Said(), is_ended or len(block) == BLOCK
            offset = _behind_zeros(file, offset)
            continue
        header = _header(file, block, offset, is_ended=is_ended)
        is_ended = False
        if header.type in EXTENSIONS:
            said = _heard(file, header, offset, said)
            offset += BLOCK + _whole_blocks(header.size)
            continue
        member = _member(file, header, offset, said)
        yield member
        said = _Said(of_all=said.of_all)
        offset = member.data_start + _whole_blocks(member.size)
    _refuse_lone_extension(said)
    if not is_ended:
        said_so = "is empty" if not file.info.size else "ends without an end-of-archive block"
        code = RejectCode.SHARD_TRUNCATED if file.info.size else RejectCode.CORRUPT
        raise ShardFault(file.info.size, Reject(code, f"the shard {said_so}"))


def _header(file: WindowedFile, block: bytes, offset: int, *, is_ended: bool) -> tarfile.TarInfo:
    """The block as a header. Raises ShardFault where it is none, or names a length that cannot be."""
    if len(block) < BLOCK and not is_ended:
        raise _fault(file, offset, "the header is cut", RejectCode.SHARD_TRUNCATED)
    where = "behind the end of the archive stands something that is no header" if is_ended else "no valid header"
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _fault(file, offset, f"{where} ({error})") from error
    if header.size < 0:
        raise _fault(file, offset, f"a header names {header.size} bytes")
    return header


def _heard(file: WindowedFile, header: tarfile.TarInfo, offset: int, said: _Said) -> _Said:
    """What is said once this extension header has been read too. Raises ShardFault."""
    if header.size > MAX_TAR_HEADER_BYTES:
        text = f"an extension header of {header.size} bytes, at most {MAX_TAR_HEADER_BYTES} are read"
        raise _fault(file, offset, text)
    body = file.read_at(offset + BLOCK, header.size)
    if len(body) < header.size:
        raise _fault(file, offset, "an extension header is cut", RejectCode.SHARD_TRUNCATED)
    start = offset if said.start is None else said.start
    if header.type in PAX or header.type == tarfile.XGLTYPE:
        try:
            fields = _pax_fields(body)
        except ValueError as error:
            raise _fault(file, offset, f"a PAX header cannot be read: {error}") from error
        if header.type == tarfile.XGLTYPE:
            return _Said(start, said.name, said.fields, {**said.of_all, **fields})
        return _Said(start, said.name, {**said.fields, **fields}, said.of_all)
    name = said.name
    if header.type == tarfile.GNUTYPE_LONGNAME:
        name = _kept(body.partition(b"\0")[0])
    return _Said(start, name, said.fields, said.of_all)


def _pax_fields(body: bytes) -> dict[str, str]:
    """What the records of a PAX header, each `LENGTH KEY=VALUE` and a new line, say that is used. Raises ValueError."""
    fields: dict[str, str] = {}
    start, end = 0, len(body.rstrip(b"\0"))
    while start < end:
        length, space, _ = body[start : start + LONGEST_NUMBER + 1].partition(b" ")
        stop = start + _number(length.decode("ascii", "replace"))
        key, equals, value = body[start + len(length) + 1 : stop].partition(b"=")
        if not space or not equals or not value.endswith(b"\n") or stop > end:
            raise ValueError(f"{body[start : start + SHOWN_BYTES]!r} is no record of it")
        if key in USED_FIELDS or key.startswith(SPARSE_PREFIX):
            text = value[:-1].rstrip(b"/") if key == PATH.encode() else value[:-1]
            fields[key.decode() if key in USED_FIELDS else SPARSE] = _kept(text)
        start = stop
    return fields


def _kept(value: bytes) -> str:
    """A value as text, cut where it is too long for a name all the same: a global one is every member's."""
    return value.decode("utf-8", "surrogateescape")[: MAX_MEMBER_NAME_BYTES + 1]


def _number(text: str) -> int:
    """The plain decimal number. Raises ValueError."""
    if not (text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER):
        raise ValueError(f"{text[:LONGEST_NUMBER]!r} is no length")
    return int(text)


def _member(file: WindowedFile, header: tarfile.TarInfo, offset: int, said: _Said) -> Member:
    """The member with this header. Raises ShardFault where its body reaches beyond the shard."""
    fields: Mapping[str, str] = {**said.of_all, **said.fields}
    is_sparse = header.type == tarfile.GNUTYPE_SPARSE or SPARSE in fields or SPARSE_NAME in fields
    name = fields.get(SPARSE_NAME) or fields.get(PATH) or said.name or header.name
    start = offset if said.start is None else said.start
    size = _size(file, header, offset, fields)
    data_start = _behind_sparse_map(file, offset) if header.type == tarfile.GNUTYPE_SPARSE else offset + BLOCK
    if data_start + size > file.info.size:
        left = file.info.size - start
        text = f"member {as_text(name)!r} reaches beyond the shard; its last {left} bytes were not read"
        raise ShardFault(start, Reject(RejectCode.SHARD_TRUNCATED, text), name)
    is_folder = header.type == tarfile.DIRTYPE
    return Member(name, start, data_start, size, header.type in REGULAR and not is_sparse, is_folder)


def _size(file: WindowedFile, header: tarfile.TarInfo, offset: int, fields: Mapping[str, str]) -> int:
    if header.type in WITHOUT_BODY:
        return 0
    if SIZE not in fields:
        return header.size
    try:
        return _number(fields[SIZE])
    except ValueError as error:
        raise _fault(file, offset, f"the size in a PAX header: {error}") from error


def _behind_sparse_map(file: WindowedFile, offset: int) -> int:
    """Where the body of an old GNU sparse member begins."""
    block, flag = file.read_at(offset, BLOCK), MORE_IN_HEADER
    while len(block) == BLOCK and block[flag]:
        offset, flag = offset + BLOCK, MORE_IN_BLOCK
        block = file.read_at(offset, BLOCK)
    return offset + BLOCK


def _refuse_lone_extension(said: _Said) -> None:
    """Raises ShardFault where the last extension header has no member."""
    if said.start is not None and (said.name is not None or said.fields):
        raise ShardFault(said.start, Reject(RejectCode.CORRUPT, f"no member follows the header at byte {said.start}"))


def _behind_zeros(file: WindowedFile, offset: int) -> int:
    """The first block from here that is not all zeros, or the shard's end."""
    while offset < file.info.size:
        piece = file.read_at(offset, PADDING_BYTES)
        if not piece:
            break
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if zeros < len(piece):
            return offset + zeros // BLOCK * BLOCK
        offset += len(piece)
    return file.info.size


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _fault(file: WindowedFile, offset: int, text: str, code: RejectCode = RejectCode.CORRUPT) -> ShardFault:
    left = file.info.size - offset
    return ShardFault(offset, Reject(code, f"{text} at byte {offset}; the last {left} bytes were not read"))
