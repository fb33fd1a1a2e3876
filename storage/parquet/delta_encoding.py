"""Checks delta-encoded Parquet pages: they state a number of values, and Arrow allocates memory for it unchecked."""

import pyarrow as pa

from blocksight.storage.parquet.thrift import number_at

BINARY_PACKED, LENGTHS, SHARED_PREFIXES = 5, 6, 7
"""Encodings: numbers, texts with their lengths, and texts that share a prefix with the one before."""
DELTAS = (BINARY_PACKED, LENGTHS, SHARED_PREFIXES)
MAX_MINIBLOCKS = 4096
"""Miniblocks of one block; writers use 4."""
CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd", "LZ4": "lz4_raw"}
"""Arrow's codec by the footer's name."""


def decompressed_page(body: bytes, compression: str, num_bytes: int) -> bytes:
    """A page's `num_bytes` bytes after decompression. Raises ValueError."""
    if compression == "UNCOMPRESSED":
        return body
    codec = CODECS.get(compression)
    if codec is None:
        raise ValueError(f"a page is compressed by {compression}; known: {', '.join(CODECS)}")
    try:
        return pa.Codec(codec).decompress(body, decompressed_size=num_bytes, asbytes=True) if num_bytes else b""
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"a page is not valid {compression}: {error}") from error


def check_deltas(body: bytes, encoding: int, num_levels: int, num_values: int) -> None:
    """Raises ValueError if a page states more than `num_values` values.

    `body`: the page after decompression. It begins with `num_levels` lists of levels, each with its length.
    """
    try:
        at = 0
        for _ in range(num_levels):
            at += 4 + int.from_bytes(body[at : at + 4], "little")
        if at >= len(body):
            return  # only nulls
        if encoding == SHARED_PREFIXES:
            at = _end_of_numbers(body, at, num_values)
        _numbers_header(body, at, num_values)
    except IndexError:
        raise ValueError("a delta-encoded page ends early") from None


def _numbers_header(body: bytes, at: int, num_values: int) -> tuple[int, int, int, int]:
    """Values per block, miniblocks per block, number of values, and the offset after the header of packed numbers."""
    per_block, at = number_at(body, at)
    num_minis, at = number_at(body, at)
    total, at = number_at(body, at)
    _, at = number_at(body, at)
    if total > num_values or not 0 < num_minis <= min(per_block, MAX_MINIBLOCKS):
        raise ValueError(
            f"a delta-encoded page says that it holds {total} values in blocks of {num_minis} parts; its header says "
            f"{num_values}, and a block may have {MAX_MINIBLOCKS}"
        )
    return per_block, num_minis, total, at


def _end_of_numbers(body: bytes, at: int, num_values: int) -> int:
    """Offset after the packed numbers."""
    per_block, num_minis, total, at = _numbers_header(body, at, num_values)
    per_mini = per_block // num_minis
    left = total - 1
    while left > 0:
        _, at = number_at(body, at)
        widths = body[at : at + num_minis]
        at += num_minis
        for width in widths[: -(-min(left, per_block) // per_mini)]:
            at += width * per_mini // 8
        left -= per_block
    return at
