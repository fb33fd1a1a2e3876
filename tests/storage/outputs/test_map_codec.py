"""The map codec: it reads what it writes, and refuses any other bytes in bounded memory."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from blocksight.storage.limits import MAX_MAP_SIDE
from blocksight.storage.outputs.map_codec import (
    DECODING_BYTES_PER_PIXEL,
    MAX_ERROR,
    MapError,
    decode_levels,
    decode_map,
    encode_map,
)
from tests.storage.bounded import printed

maps = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.floats(-5, 5, width=32))


@settings(max_examples=100)
@given(maps)
def test_a_decoded_map_is_within_the_stated_error(saliency):
    stored = encode_map(saliency)
    assert (stored.height, stored.width) == saliency.shape
    assert (stored.low, stored.high) == (saliency.min(), saliency.max())
    span = np.float64(stored.high) - stored.low
    wanted = (saliency.astype(np.float64) - stored.low) / span if span > 0 else np.zeros(saliency.shape)
    assert np.abs(decode_map(stored.data, saliency.shape) - wanted).max() <= MAX_ERROR + 1e-6


def test_the_same_map_gives_the_same_bytes():
    saliency = np.random.default_rng(0).random((50, 50)).astype(np.float32)
    assert encode_map(saliency).data == encode_map(saliency.copy()).data


def test_a_map_that_is_not_finite_cannot_be_stored():
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode_map(np.array([[0.0, np.nan]]))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(height: int, width: int, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def pixels(num_rows: int, row_bytes: int, kind: bytes = b"IDAT") -> bytes:
    """Zeros, compressed in pieces: gigabytes become a few KB."""
    packer = zlib.compressobj(9)
    return chunk(kind, b"".join(packer.compress(bytes(row_bytes)) for _ in range(num_rows)) + packer.flush())


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def written(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


SMALL = pixels(4, 5)
SOUND = png(header(4, 4), SMALL)


def test_a_sound_map_may_lie_in_several_chunks():
    levels = np.arange(256, dtype=np.uint8).reshape(4, 64)
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in levels))
    parts = [chunk(b"IDAT", stream[at : at + 9]) for at in range(0, len(stream), 9)]
    assert np.array_equal(decode_levels(png(header(4, 64), *parts), (4, 64)), levels)


def test_a_map_of_noise_is_read():
    levels = np.random.default_rng(0).integers(0, 256, (80, 90), dtype=np.uint8)
    assert np.array_equal(decode_levels(encode_map(levels / np.float32(255)).data, levels.shape), levels)


REFUSED = {
    "nothing": (b"", "begins with"),
    "text": (b"x" * 40, "begins with"),
    "RGB": (written("RGB"), "8-bit grey"),
    "16 bits": (written("I;16"), "8-bit grey"),
    "interlaced": (png(header(4, 4, interlace=1), SMALL), "8-bit grey"),
    "cut": (SOUND[:40], "truncated"),
    "no end": (SOUND[:-12], "truncated"),
    "no pixels": (png(header(4, 4)), "decompress to 0 bytes"),
    "another size": (png(header(4, 5), pixels(4, 6)), "4 x 5 pixels, and its row says 4 x 4"),
    "second header": (png(header(4, 4), header(12_000, 12_000), SMALL), "IHDR comes first and once"),
    "header of 14 bytes": (png(chunk(b"IHDR", bytes(14)), SMALL), "14 bytes, not 13"),
    "pixels first": (png(SMALL, header(4, 4)), "IHDR comes first"),
    "palette": (png(header(4, 4), chunk(b"PLTE", bytes(3)), SMALL), "this one has b'PLTE'"),
    "text bomb": (png(header(4, 4), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))), SMALL), "b'zTXt'"),
    "profile": (png(header(4, 4), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(99))), SMALL), "b'iCCP'"),
    "too few rows": (png(header(4, 4), pixels(3, 5)), "decompress to 15 bytes"),
    "too many rows": (png(header(4, 4), pixels(5, 5)), "decompress to more than 20 bytes"),
    "bytes after the pixels": (png(header(4, 4), chunk(b"IDAT", zlib.compress(bytes(20)) + b"x")), "do not end there"),
    "no such filter": (png(header(4, 4), chunk(b"IDAT", zlib.compress(b"\x09" + bytes(19)))), "damaged"),
    "wrong checksum": (SOUND[:-16] + bytes(4) + SOUND[-12:], "checksum"),
    "padding": (png(header(4, 4), SMALL, chunk(b"IDAT", bytes(9_000))), "at most"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_bytes_that_are_no_map_are_refused(data, reason):
    with pytest.raises(MapError, match=reason):
        decode_map(data, (4, 4))


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4097, 4), (4, 4097), (None, 4), (4.0, 4)])
def test_a_row_that_names_no_size_is_refused(size):
    with pytest.raises(MapError, match="sides of 1 to 4096"):
        decode_levels(SOUND, size)


def test_the_longest_side_is_read():
    levels = np.tile(np.arange(MAX_MAP_SIDE, dtype=np.float32), (2, 1))
    assert decode_levels(encode_map(levels).data, levels.shape).shape == (2, MAX_MAP_SIDE)


def test_random_damage_is_a_damaged_map():
    random = np.random.default_rng(1)
    sound = encode_map(random.random((24, 24), np.float32)).data
    for _ in range(500):
        body = bytearray(sound)
        for place in random.integers(0, len(body), random.integers(1, 9)):
            body[place] = (body[place] + 1 + random.integers(255)) % 256
        with pytest.raises(MapError, match=r"\w"):
            decode_levels(bytes(body), (24, 24))


SIDE = 3000

BOMBS = {
    "as large as its row says": (lambda: png(header(SIDE, SIDE), pixels(SIDE, SIDE + 1)), (SIDE, SIDE), "decoded"),
    "second header": (
        lambda: png(header(8, 8), header(12_000, 12_000), pixels(12_000, 12_001)),
        (SIDE, SIDE),
        "MapError",
    ),
    "larger than its row says": (lambda: png(header(9_000, 9_000), pixels(9_000, 9_001)), (8, 8), "MapError"),
    "more pixels than its header says": (
        lambda: png(header(SIDE, SIDE), pixels(9_000, 9_001)),
        (SIDE, SIDE),
        "MapError",
    ),
    "text": (lambda: png(header(8, 8), pixels(200, 1 << 20, b"zTXt"), pixels(8, 9)), (SIDE, SIDE), "MapError"),
}


@pytest.mark.parametrize(("made", "size", "outcome"), BOMBS.values(), ids=BOMBS)
def test_memory_is_bounded_by_the_pixels_that_the_row_names(tmp_path, made, size, outcome):
    (tmp_path / "map.png").write_bytes(made())
    code = f"""
try:
    found = "decoded" if blocksight.storage.outputs.map_codec.decode_map(body, {size}).shape == {size} else "odd"
except blocksight.storage.outputs.map_codec.MapError:
    found = "MapError"
print(found)
"""
    allowed = DECODING_BYTES_PER_PIXEL * size[0] * size[1]
    assert printed(code, tmp_path / "map.png", allowed) == outcome
