"""Decoding keeps to its memory bound: bytes for each pixel, row and byte of the file."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import tifffile
from PIL import Image

from blocksight.storage.images.decode import (
    DECODE_BYTES_FIXED,
    DECODE_BYTES_PER_BYTE,
    DECODE_BYTES_PER_PIXEL,
    DECODE_BYTES_PER_ROW,
)
from tests.storage.bounded import printed
from tests.storage.by_hand import chunk, png_of

WIDTH, HEIGHT = 3000, 2500


def encoded(mode: str, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, *before: bytes) -> bytes:
    row_bytes = 1 + width * depth // 8 * {2: 3, 6: 4}[colour]
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(bytes(row_bytes)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png_of(chunk(b"IHDR", header), *before, chunk(b"IDAT", pixels))


def tiff(**options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    tifffile.imwrite(buffer, pixels, photometric="rgb", extrasamples=["unassalpha"], compression="zlib", **options)
    return buffer.getvalue()


def text_bomb() -> bytes:
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    return png(64, 64, 8, 2, chunk(b"zTXt", b"k\0\0" + body), chunk(b"iCCP", b"k\0\0" + body))


FILES: dict[str, tuple[Callable[[], bytes], int, int]] = {
    "JPEG": (lambda: encoded("RGB", "JPEG"), WIDTH, HEIGHT),
    "progressive CMYK": (lambda: encoded("CMYK", "JPEG", progressive=True), WIDTH, HEIGHT),
    "PNG with alpha": (lambda: png(WIDTH, HEIGHT, 8, 6), WIDTH, HEIGHT),
    "PNG of 16 bits": (lambda: png(WIDTH, HEIGHT, 16, 6), WIDTH, HEIGHT),
    "PNG, one column": (lambda: png(1, 400_000, 16, 2), 1, 400_000),
    "PNG with bombs": (text_bomb, 64, 64),
    "WebP": (lambda: encoded("RGBA", "WEBP", lossless=True, method=0, quality=0), WIDTH, HEIGHT),
    "TIFF, one tile": (lambda: tiff(tile=(2512, 3008)), WIDTH, HEIGHT),
    "TIFF, one strip": (lambda: tiff(rowsperstrip=HEIGHT), WIDTH, HEIGHT),
    "GIF": (lambda: encoded("L", "GIF"), WIDTH, HEIGHT),
    "BMP": (lambda: encoded("RGB", "BMP"), WIDTH, HEIGHT),
}


@pytest.mark.parametrize(("made", "width", "height"), FILES.values(), ids=FILES)
def test_an_image_is_decoded_and_fitted_within_the_bound(tmp_path, made, width, height):
    (tmp_path / "image").write_bytes(made())
    num_bytes = (tmp_path / "image").stat().st_size
    allowed = DECODE_BYTES_PER_PIXEL * width * height + DECODE_BYTES_PER_ROW * height
    allowed += DECODE_BYTES_PER_BYTE * num_bytes + DECODE_BYTES_FIXED
    code = """
found = blocksight.storage.images.decode.decode(body)
blocksight.storage.images.decode.fit(found.pixels, (224, 224), "squash")
print(found.width, found.height)
"""
    assert printed(code, tmp_path / "image", allowed) == f"{width} {height}"
