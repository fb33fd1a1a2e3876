"""Delta-encoded pages of a Parquet file: they say how many values they hold, and Arrow allocates as many unasked."""

import pyarrow as pa

from blocksight.storage.parquet.thrift import number_at

BINARY_PACKED, LENGTHS, PREFIXES = 5, 6, 7
"""Encodings: numbers, texts with their lengths, and texts that share a beginning with the last."""
DELTAS = (BINARY_PACKED, LENGTHS, PREFIXES)
MAX_MINIBLOCKS = 4096
"""Of one block; writers have 4."""
CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd", "LZ4": "lz4_raw"}
"""By the name that the footer has."""


def unfolded_page(body: bytes, compression: str, num_bytes: int) -> bytes:
    """A page after decompression, of so many bytes. Raises ValueError."""
    if compression == "UNCOMPRESSED":
        return body
    codec = CODECS.get(compression)
    if codec is None:
        raise ValueError(f"a page is compressed by {compression}; known: {', '.join(CODECS)}")
    try:
        return pa.Codec(codec).decompress(body, decompressed_size=num_bytes, asbytes=True) if num_bytes else b""
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"a page is no {compression}: {error}") from error


def check_deltas(body: bytes, encoding: int, num_levels: int, num_values: int) -> None:
    """Raises ValueError where a page says that it holds more than `num_values`.

    `body` is the page after decompression; `num_levels` lists of levels with a length of their own come first.
    """
    try:
        at = 0
        for _ in range(num_levels):
            at += 4 + int.from_bytes(body[at : at + 4], "little")
        if at >= len(body):
            return  # nulls alone
        if encoding == PREFIXES:
            at = _behind_numbers(body, at, num_values)
        _counts(body, at, num_values)
    except IndexError:
        raise ValueError("a delta-encoded page ends early") from None


def _counts(body: bytes, at: int, num_values: int) -> tuple[int, int, int, int]:
    """Values per block, miniblocks per block, number of values, and where the header of packed numbers ends."""
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


def _behind_numbers(body: bytes, at: int, num_values: int) -> int:
    """Where packed numbers end."""
    per_block, num_minis, total, at = _counts(body, at, num_values)
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
