"""Every kind of picture in the six formats: its pixels are known by hand or from another decoder, or it is rejected."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from blocksight.storage.images.decode import decode
from blocksight.storage.images.formats import as_markdown
from blocksight.storage.images.jpeg import _segments
from blocksight.storage.images.png import MAX_RAW_PROFILE_BYTES
from blocksight.storage.rejects import Reject, RejectCode
from tests.storage.by_hand import bmp, chunk, png, png_of, tiff

RANDOM = np.random.default_rng(3)
HEIGHT, WIDTH = 11, 13
SMOOTH = np.linspace(0, 255, 40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)


def noise(depth: int, num_samples: int) -> np.ndarray:
    return RANDOM.integers(0, 2**depth, (HEIGHT, WIDTH, num_samples))


def eight(values: np.ndarray, depth: int) -> np.ndarray:
    """Samples of `depth` bits, scaled to 8 bits."""
    return np.rint(values * (255 / (2**depth - 1)))


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.reshape(*values.shape[:2], 1), 3, axis=-1)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours from 0 to 255 on white, with alpha from 0 to 1; exact."""
    return colours * alpha + 255 * (1 - alpha)


def inked(cmyk: np.ndarray) -> np.ndarray:
    return (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255


def found(data: bytes) -> np.ndarray:
    return decode(data).pixels.astype(float)


def code(data: bytes, reason: str = "") -> RejectCode:
    with pytest.raises(Reject, match=reason) as caught:
        decode(data)
    return caught.value.code


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def written(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- PNG


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_grey(depth, interlaced):
    values = noise(depth, 1)
    assert np.array_equal(found(png(values, depth, 0, interlaced=interlaced)), grey(eight(values, depth)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_grey_with_a_transparent_level(depth):
    values = noise(depth, 1)
    key = int(values[3, 3, 0])
    wanted = np.where(grey(values) == key, 255, grey(eight(values, depth)))
    beyond = key | (0 if depth == 16 else 1 << depth)  # bits above the depth do not count
    assert np.array_equal(found(png(values, depth, 0, chunk(b"tRNS", struct.pack(">H", beyond)))), wanted)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [2, 4, 6])
def test_png_colours_and_alpha(depth, colour, interlaced):
    num_samples = {2: 3, 4: 2, 6: 4}[colour]
    values = noise(depth, num_samples)
    colours, alpha = (values, np.array(1.0)) if colour == 2 else (values[..., :-1], values[..., -1:] / (2**depth - 1))
    wanted = on_white(colours * (255 / (2**depth - 1)), alpha)
    error = np.abs(found(png(values, depth, colour, interlaced=interlaced)) - wanted).max()
    assert error <= (0.501 if depth == 16 or colour == 2 else 1)


@pytest.mark.parametrize("depth", [8, 16])
def test_png_with_a_transparent_colour(depth):
    values = noise(depth, 3)
    key = values[3, 3]
    values[5, 5] = key ^ 1  # differs in the lowest bit of each sample
    wanted = eight(values, depth)
    wanted[3, 3] = 255
    assert np.array_equal(found(png(values, depth, 2, chunk(b"tRNS", struct.pack(">3H", *key)))), wanted)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("num_alphas", [0, 1, 2])
def test_png_palette(depth, num_alphas):
    values, palette = noise(depth, 1), RANDOM.integers(0, 256, (2**depth, 3))
    alphas = RANDOM.integers(0, 256, num_alphas)
    alpha = np.append(alphas, np.full(2**depth - num_alphas, 255))[:, None] / 255
    before = [chunk(b"PLTE", bytes(palette.ravel().tolist()))]
    before += [chunk(b"tRNS", bytes(alphas.tolist()))] if num_alphas else []
    error = np.abs(found(png(values, depth, 3, *before)) - on_white(palette, alpha)[values[..., 0]]).max()
    assert error <= (1 if num_alphas else 0)


def test_png_a_palette_is_used_as_far_as_it_goes():
    short = chunk(b"PLTE", bytes(range(9)))
    assert found(png(np.array([[[0], [2]]]), 8, 3, short))[0].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert code(png(np.array([[[0], [3]]]), 8, 3, short), "colour 3, the palette 3 colours") == RejectCode.CORRUPT


BLACK = np.zeros((1, 1, 1), int)
PIXELS = chunk(b"IDAT", zlib.compress(bytes(2)))
HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_of(HEADER, HEADER, PIXELS), "IHDR comes first and once"),
        (png(BLACK, 8, 3), "no palette"),
        (png(BLACK, 8, 3, chunk(b"PLTE", bytes(4))), "palette has 4 bytes"),
        (png(BLACK, 8, 3, *[chunk(b"PLTE", bytes(3))] * 2), "comes twice"),
        (png(BLACK, 8, 3, chunk(b"PLTE", bytes(3)), chunk(b"tRNS", bytes(2))), "2 entries, its palette 1"),
        (png(BLACK, 8, 0, chunk(b"tRNS", bytes(1))), "1 bytes; wanted 2"),
        (png(BLACK, 8, 0, *[chunk(b"tRNS", bytes(2))] * 2), "comes twice"),
        (png_of(HEADER, PIXELS, chunk(b"tRNS", bytes(2))), "after the pixels"),
        (png_of(HEADER, PIXELS, chunk(b"tIME", bytes(7)), PIXELS), "between its IDAT chunks"),
        (png(BLACK, 8, 0, chunk(b"ABCD", b"")), "critical chunk b'ABCD' is unknown"),
        (png_of(HEADER), "no pixels"),
        (png_of(HEADER, chunk(b"IDAT", zlib.compress(bytes(2))[:-4] + bytes(4))), "data check"),
        (png(BLACK, 8, 0)[:-1] + b"\0", "checksum"),
        (png(BLACK, 8, 0, chunk(b"tEXt", b"k\0text")[:-1] + b"\0"), "checksum"),
    ],
)
def test_png_broken(data, reason):
    assert code(data, reason) == RejectCode.CORRUPT


@pytest.mark.parametrize("interlaced", [False, True])
def test_png_pixels_that_end_early(interlaced):
    values = noise(8, 3)
    whole = png(values, 8, 2, interlaced=interlaced)
    start = whole.index(b"IDAT")
    (length,) = struct.unpack_from(">I", whole, start - 4)
    lines = zlib.decompress(whole[start + 4 : start + 4 + length])
    for short in (zlib.compress(lines[:-1]), zlib.compress(lines)[:-40], b""):
        cut = png_of(whole[8:33], chunk(b"IDAT", short))
        assert code(cut, "pixels are truncated") == RejectCode.TRUNCATED
    parts = [chunk(b"IDAT", short) for short in (b"", zlib.compress(lines + bytes(99)))]
    assert np.array_equal(found(png_of(whole[8:33], *parts)), values)


def test_png_text_and_profiles_of_any_size_are_left_aside():
    values = noise(8, 3)
    bomb = zlib.compress(bytes(20_000_000), 9)
    before = [
        chunk(b"zTXt", b"workflow\0\0" + bomb),
        chunk(b"iCCP", b"profile\0\0" + bomb),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
        chunk(b"tEXt", b"prompt\0" + b"node " * 400_000),
        *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000)))] * 80,
    ]
    assert np.array_equal(found(png(values, 8, 2, *before)), values)


def test_png_the_first_picture_of_an_animation_is_the_one_that_all_readers_see():
    values = noise(8, 3)
    control = chunk(b"acTL", struct.pack(">II", 1, 0))
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 4, 4, 0, 0, 1, 1, 0, 0))
    more = chunk(b"fdAT", struct.pack(">I", 1) + zlib.compress(bytes(4 * 13)))
    animated = png(values, 8, 2, control)
    animated = animated[:-12] + frame + more + animated[-12:]
    assert np.array_equal(found(animated), values)


# ---------------------------------------------------------------- TIFF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_tiff_grey(depth, photometric, order):
    values = noise(depth, 1)
    wanted = grey(eight(values if photometric else 2**depth - 1 - values, depth))
    assert np.array_equal(found(tiff(values, depth, photometric, order)), wanted)


def test_tiff_twelve_bits():
    values = noise(12, 1)
    assert np.array_equal(found(tiff(values, 12, 1)), grey(eight(values, 12)))
    for other in (tiff(values, 12, 1, ">"), tiff(values, 12, 0)):
        assert code(other, "12 bits") == RejectCode.MODE_REFUSED


def test_tiff_a_greatest_value_is_a_statistic_and_scales_nothing():
    values = noise(16, 1)
    assert np.array_equal(found(tiff(values, 16, 1, tags={281: [4095]})), grey(eight(values, 16)))


def narrow(bits: int, num_samples: int) -> np.ndarray:
    """Samples of which the greatest needs all of these bits."""
    values = noise(bits, num_samples)
    values[0, 0] = 2**bits - 1
    return values


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_samples_of_sixteen_are_stretched(bits):
    values, colours, both = narrow(bits, 1), narrow(bits, 3), narrow(bits, 2)
    wanted = grey(eight(values, bits))
    for data in (png(values, 16, 0), tiff(values, 16, 1), tiff(values, 16, 1, ">")):
        assert np.array_equal(found(data), wanted)
        assert decode(data).kind.endswith(f", {bits} of 16 bits")
    assert np.array_equal(found(tiff(values, 16, 0)), 255 - wanted)
    for data in (png(colours, 16, 2), tiff(colours, 16, 2)):
        assert np.array_equal(found(data), eight(colours, bits))
    scaled = both / (2**bits - 1)
    assert np.abs(found(png(both, 16, 4)) - grey(on_white(255 * scaled[..., :1], scaled[..., 1:]))).max() <= 0.501
    opaque = np.concatenate([colours, np.full((HEIGHT, WIDTH, 1), 65535)], -1)
    assert np.array_equal(found(png(opaque, 16, 6)), eight(colours, bits))


def test_the_transparent_level_of_a_stretched_image_is_the_one_in_the_file():
    values = narrow(12, 1)
    key = chunk(b"tRNS", struct.pack(">H", int(values[3, 3, 0])))
    wanted = np.where(grey(values) == values[3, 3, 0], 255, grey(eight(values, 12)))
    assert np.array_equal(found(png(values, 16, 0, key)), wanted)


@pytest.mark.parametrize("greatest", [0, 1 << 14, 1 << 15, 65535])
def test_the_full_range_of_sixteen_bits_is_kept(greatest):
    values = np.minimum(noise(16, 1), greatest)
    values[0, 0] = greatest
    for data in (png(values, 16, 0), tiff(values, 16, 1)):
        assert np.array_equal(found(data), grey(eight(values, 16)))
        assert "bits" not in decode(data).kind
    inks = np.minimum(noise(12, 4), 4095)  # little ink is a bright picture, of any depth
    assert np.abs(found(tiff(inks, 16, 5)) - inked(eight(inks, 16))).max() <= 1


@pytest.mark.parametrize(("greatest", "kind"), [(31, "PNG, nearly black"), (32, "PNG")])
def test_a_nearly_black_image_is_named(greatest, kind):
    assert decode(png(np.minimum(noise(8, 3), greatest), 8, 2)).kind == kind


def test_a_deep_image_that_stays_nearly_black_after_it_was_stretched_is_named():
    values = np.minimum(noise(8, 1), 31)
    values[0, 0] = 31
    assert decode(png(values, 16, 0)).kind == "PNG, nearly black"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
def test_tiff_colours(depth, order, extra):
    values = noise(depth, 3 + len(extra))
    if extra == (1,):
        values[..., :3] = np.minimum(values[..., :3], values[..., 3:])
    scaled, alpha = values * (255 / (2**depth - 1)), values[..., 3:] / (2**depth - 1)
    wanted = {
        (): scaled,
        (0,): scaled[..., :3],
        (1,): scaled[..., :3] + 255 * (1 - alpha) if extra else scaled,
        (2,): on_white(scaled[..., :3], alpha) if extra else scaled,
    }[extra]
    error = np.abs(found(tiff(values, depth, 2, order, {338: extra} if extra else {})) - wanted).max()
    assert error <= (1 if extra == (2,) and depth == 8 else 0.501)


@pytest.mark.parametrize("extra", [(0,), (1,), (2,)])
def test_tiff_grey_with_a_second_sample(extra):
    values = noise(8, 2)
    values[..., :1] = np.minimum(values[..., :1], values[..., 1:])
    colours, alpha = values[..., :1], values[..., 1:] / 255
    wanted = {0: colours, 1: colours + 255 * (1 - alpha), 2: on_white(colours, alpha)}[extra[0]]
    assert np.abs(found(tiff(values, 8, 1, tags={338: extra})) - grey(wanted)).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_tiff_palette(depth):
    values, palette = noise(depth, 1), RANDOM.integers(0, 256, (3, 2**depth))
    data = tiff(values, depth, 3, tags={320: (palette * 257).ravel().tolist()})
    assert np.array_equal(found(data), palette.T[values[..., 0]])


@pytest.mark.parametrize("depth", [8, 16])
def test_tiff_cmyk(depth):
    values = noise(depth, 4)
    assert np.abs(found(tiff(values, depth, 5)) - inked(eight(values, depth))).max() <= 1


@pytest.mark.parametrize("photometric", [2, 5])
def test_tiff_planes(photometric):
    values = noise(8, 3 if photometric == 2 else 4)
    wanted = values if photometric == 2 else inked(values)
    assert np.abs(found(tiff(values, 8, photometric, planar=True)) - wanted).max() <= photometric // 5


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "lzma", "zstd"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_tiff_compressions(order, compression, tile):
    for dtype in (np.uint8, np.uint16):
        depth = 8 * np.dtype(dtype).itemsize
        values = noise(depth, 3).astype(dtype)
        predictor = 2 if compression in ("lzw", "zlib") else None
        options = {"photometric": "rgb", "byteorder": order, "compression": compression, "tile": tile}
        data = written(values, predictor=predictor, rowsperstrip=None if tile else 4, **options)
        assert np.array_equal(found(data), eight(tifffile.imread(io.BytesIO(data)).astype(int), depth))
        inverted = written(values[..., 0], **{**options, "photometric": "miniswhite"})
        assert np.array_equal(found(inverted), grey(eight(2**depth - 1 - values[..., 0].astype(int), depth)))


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", "packbits"])
def test_tiff_fax(compression):
    values = noise(1, 1)[..., 0].astype(bool)
    data = encoded(Image.fromarray(values), "TIFF", compression=compression)
    assert np.array_equal(found(data), grey(values * 255.0))


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2)])
def test_tiff_jpeg(subsampling):
    ramp = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
    data = written(ramp, photometric="ycbcr", compression="jpeg", subsampling=subsampling)
    assert np.abs(found(data) - tifffile.imread(io.BytesIO(data))).max() <= 2


def test_tiff_bigtiff_and_further_frames():
    values = noise(8, 3).astype(np.uint8)
    assert np.array_equal(found(written(values, photometric="rgb", bigtiff=True)), values)
    assert np.array_equal(found(written(np.stack([values, 255 - values]), photometric="rgb")), values)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(noise(16, 3), 16, 2, planar=True), "16 bits .* in separate planes"),
        (tiff(noise(8, 4), 8, 2), "4 samples, of which 0 are named"),
        (tiff(noise(8, 4), 8, 2, tags={338: [2]}, planar=True), "separate planes"),
        (tiff(noise(8, 5), 8, 2, tags={338: [0, 2]}), "extra samples"),
        (tiff(noise(8, 1), 8, 1, tags={277: [65535]}), "65535 samples is not read; wanted at most 8"),
        (tiff(noise(16, 2), 16, 1, tags={338: [2]}), "16 bits and extra samples"),
        (tiff(noise(8, 2), 8, 3, tags={320: [0] * 768, 338: [2]}), "palette with 8 bits and extra"),
        (tiff(noise(4, 1), 4, 3, tags={320: [200] * 48}), "values below 256"),
        (tiff(noise(8, 1), 8, 1, tags={339: [2]}), "samples of format 2"),
        (tiff(noise(16, 1), 16, 1, tags={339: [2]}), "samples of format 2"),
        (tiff(noise(8, 3), 8, 2, tags={339: [1, 1, 2]}), "samples of format 1, 2"),
        (tiff(noise(8, 3), 8, 6), "compression 1"),
        (tiff(noise(8, 3), 8, 8), "photometric 8"),
        (tiff(noise(8, 3), 8, 9), "photometric 9"),
        (tiff(noise(8, 1), 8, 4), "photometric 4"),
        (tiff(noise(8, 1), 8, 32803), "photometric 32803"),
        (tiff(noise(8, 3), 8, 2, tags={258: [5, 6, 5]}), "samples of 5, 6, 5 bits"),
        (tiff(noise(8, 1), 8, 1, tags={266: [2]}), "fill order 2"),
        (tiff(noise(1, 1), 1, 1, tags={259: [8], 266: [2]}), "fill order 2"),
        (tiff(noise(8, 3), 8, 2, tags={317: [2]}), "predictor 2"),
        (tiff(noise(8, 4), 8, 5, tags={332: [2]}), "inks of set 2"),
        (tiff(noise(8, 4), 8, 5, tags={259: [7]}), "compression 7"),
        (tiff(noise(8, 3), 8, 2, tags={259: [6]}), "compression 6"),
        (tiff(noise(8, 3), 8, 2, tags={259: [34677]}), "compression 34677"),
        (tiff(noise(8, 3), 8, 2, tags={259: [8], 317: [3]}), "predictor 3"),
        (written(np.zeros((4, 4), np.float32), photometric="minisblack"), "samples of format 3"),
        (written(np.zeros((4, 4), np.uint32), photometric="minisblack"), "grey with 32 bits"),
        (written(np.zeros((4, 4, 3), np.uint8), photometric="rgb", bigtiff=True, byteorder=">"), "big-endian BigTIFF"),
    ],
)
def test_tiff_refused(data, reason):
    assert code(data, reason) == RejectCode.MODE_REFUSED


@pytest.mark.parametrize(
    ("data", "reason", "wanted"),
    [
        (tiff(noise(8, 3), 8, 2, tags={273: [8, 8]}), "tag 273 has 2 values", RejectCode.CORRUPT),
        (tiff(noise(8, 3), 8, 2, tags={258: [8] * 9}), "tag 258 has 9 values", RejectCode.CORRUPT),
        (tiff(noise(8, 3), 8, 2, tags={278: [5]}), "1 strips or tiles", RejectCode.CORRUPT),
        (tiff(noise(8, 3), 8, 2, tags={279: [9]}), "is truncated: 9 bytes", RejectCode.TRUNCATED),
        (tiff(noise(8, 3), 8, 2, tags={279: [99_999]}), "truncated: they end at", RejectCode.TRUNCATED),
        (tiff(noise(8, 1), 8, 3, tags={320: [0] * 3}), "3 values; wanted 768", RejectCode.CORRUPT),
        (
            tiff(noise(8, 1), 8, 1, tags={322: [60_000], 323: [60_000], 324: [8], 325: [143]}),
            "tiles are 60000",
            RejectCode.CORRUPT,
        ),
    ],
)
def test_tiff_pieces_that_do_not_fit(data, reason, wanted):
    assert code(data, reason) == wanted


def test_tiff_jpeg_without_its_end():
    data = written(SMOOTH, photometric="rgb", compression="jpeg")
    page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    end = page.dataoffsets[0] + page.databytecounts[0]
    assert data[end - 2 : end] == b"\xff\xd9"
    assert code(data[: end - 2] + bytes(2) + data[end:], "its JPEG has no end") == RejectCode.TRUNCATED


def test_tiff_in_too_many_pieces():
    pieces = tiff(np.zeros((1, 1, 1), int), 8, 1, tags={256: [300], 257: [300], 322: [1], 323: [1], 324: [8], 325: [1]})
    assert code(pieces, "90000 strips or tiles") == RejectCode.MODE_REFUSED


def test_tiff_what_libtiff_says_is_the_reason_and_not_on_stderr(capfd):
    data = bytearray(written(noise(8, 3).astype(np.uint8), photometric="rgb", compression="zlib"))
    start = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0].dataoffsets[0]
    data[start + 20 : start + 60] = bytes(40)
    assert code(bytes(data), "libtiff says, in 1 messages: ZIPDecode") == RejectCode.CORRUPT
    assert capfd.readouterr().err == ""


def test_tiff_what_libtiff_fills_in_is_no_picture():
    values = RANDOM.integers(0, 2, (40, 50)).astype(bool)
    data = bytearray(encoded(Image.fromarray(values), "TIFF", compression="group4"))
    page = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0]
    start, size = page.dataoffsets[0], page.databytecounts[0]
    data[start + size // 2 : start + size] = b"\xa5" * (size - size // 2)
    assert code(bytes(data), "^libtiff says, in 1 messages: Fax4Decode: Bad code word") == RejectCode.CORRUPT


# ---------------------------------------------------------------- GIF


def gif(values: np.ndarray, palette: np.ndarray, **options) -> bytes:
    image = Image.fromarray(values.astype(np.uint8)[..., 0])
    image.putpalette(palette.ravel().tolist())
    return encoded(image, "GIF", optimize=False, **options)


COLOURS = RANDOM.integers(0, 256, (256, 3))
GREYS = np.repeat(np.arange(256)[:, None], 3, axis=1)


@pytest.mark.parametrize("palette", [COLOURS, GREYS], ids=["colours", "greys"])
@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("transparent", [None, 0, 5, 200])
def test_gif(palette, interlace, transparent):
    values = np.arange(256).reshape(16, 16, 1)
    options = {} if transparent is None else {"transparency": transparent}
    wanted = palette[values[..., 0]].astype(float)
    if transparent is not None:
        wanted[values[..., 0] == transparent] = 255
    assert np.array_equal(found(gif(values, palette, interlace=interlace, **options)), wanted)


def on_canvas(data: bytes, width: int, height: int, left: int, top: int) -> bytes:
    """The GIF with a larger canvas, its only frame at `left` and `top`."""
    frame = data.index(b"\x2c\0\0\0\0", 13 + 768)
    moved = data[: frame + 1] + struct.pack("<HH", left, top) + data[frame + 5 :]
    return moved[:6] + struct.pack("<HH", width, height) + moved[10:]


def test_gif_a_frame_that_covers_a_part():
    values = np.arange(16).reshape(4, 4, 1)
    clear, plain = gif(values, COLOURS, transparency=255), gif(values, COLOURS)
    wanted = np.full((7, 6, 3), 255.0)
    wanted[2:6, 1:5] = COLOURS[values[..., 0]]
    assert np.array_equal(found(on_canvas(clear, 6, 7, 1, 2)), wanted)
    assert code(on_canvas(plain, 6, 7, 1, 2), "covers 4 x 4 of 6 x 7") == RejectCode.MODE_REFUSED
    assert np.array_equal(found(on_canvas(plain, 0, 0, 0, 0)), COLOURS[values[..., 0]])
    assert code(on_canvas(plain, 4, 4, 1, 0), "ends at") == RejectCode.CORRUPT


def test_gif_a_block_that_ends_twice():
    plain = gif(np.arange(16).reshape(4, 4, 1), COLOURS)
    frame = plain.index(b"\x2c\0\0\0\0", 13 + 768)
    assert np.array_equal(found(plain[:frame] + b"\0" + plain[frame:]), found(plain))
    assert code(plain[:frame] + b"\7" + plain[frame:], "block begins with 7") == RejectCode.CORRUPT


def test_gif_a_colour_that_no_table_has():
    short = gif(np.full((4, 4, 1), 3), COLOURS[:4])
    assert np.array_equal(found(short)[0, 0], COLOURS[3])
    cut = short[:10] + bytes([short[10] & 0xF8]) + short[11:13] + short[13:19] + short[25:]
    assert code(cut, "colour 3, the palette 2 colours") == RejectCode.CORRUPT
    bare = short[:10] + b"\0" + short[11:13] + short[25:]
    assert code(bare, "no colour table") == RejectCode.CORRUPT


# ---------------------------------------------------------------- BMP


def lines(values: np.ndarray, depth: int) -> bytes:
    """Rows from the bottom up, each padded to words of 4 bytes."""
    rows = [np.packbits((row.ravel()[:, None] >> np.arange(depth - 1, -1, -1) & 1).ravel()).tobytes() for row in values]
    return b"".join(row + bytes(-len(row) % 4) for row in rows[::-1])


@pytest.mark.parametrize("depth", [1, 4, 8])
def test_bmp_palette(depth):
    values, palette = noise(depth, 1), RANDOM.integers(0, 256, (2**depth, 4))
    data = bmp(lines(values, depth), WIDTH, HEIGHT, depth, palette=bytes(palette.ravel().tolist()))
    assert np.array_equal(found(data), palette[values[..., 0], 2::-1])
    data = bmp(lines(values[::-1], depth), WIDTH, -HEIGHT, depth, palette=bytes(palette.ravel().tolist()))
    assert np.array_equal(found(data), palette[values[..., 0], 2::-1])


@pytest.mark.parametrize(
    ("bits", "masks"),
    [(24, ()), (32, ()), (32, (0xFF0000, 0xFF00, 0xFF)), (32, (0xFF000000, 0xFF0000, 0xFF00)), (32, "alpha")],
)
def test_bmp_colours(bits, masks):
    values = noise(8, 4)
    stored = values[..., 2::-1] if bits == 24 else values[..., [2, 1, 0, 3]]
    if masks == (0xFF000000, 0xFF0000, 0xFF00):
        stored = values[..., [3, 2, 1, 0]]
    if masks == "alpha":
        masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    data = bmp(lines(stored, 8), WIDTH, HEIGHT, bits, compression=3 if masks else 0, masks=masks)
    is_clear = len(masks) == 4
    wanted = on_white(values[..., :3], values[..., 3:] / 255) if is_clear else values[..., :3]
    assert np.abs(found(data) - wanted).max() <= int(is_clear)


@pytest.mark.parametrize(("masks", "greens"), [((), 31), ((0xF800, 0x7E0, 0x1F), 63)])
def test_bmp_sixteen_bits(masks, greens):
    red, green, blue = (RANDOM.integers(0, most + 1, (HEIGHT, WIDTH)) for most in (31, greens, 31))
    words = red << (11 if masks else 10) | green << 5 | blue
    rows = b"".join(row.astype("<u2").tobytes() + bytes(2) for row in words[::-1])
    data = bmp(rows, WIDTH, HEIGHT, 16, compression=3 if masks else 0, masks=masks)
    wanted = np.stack([red * 255 / 31, green * 255 / greens, blue * 255 / 31], -1)
    assert np.abs(found(data) - wanted).max() < 1


def test_bmp_of_the_first_kind():
    """A header of 12 bytes: sides of two bytes, and a palette of three bytes for each colour."""
    values, palette = noise(4, 1), RANDOM.integers(0, 256, (16, 3))
    header = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, 4) + bytes(palette.ravel().tolist())
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(header)) + header + lines(values, 4)
    assert np.array_equal(found(data), palette[values[..., 0], ::-1])


def test_bmp_runs():
    palette = bytes(RANDOM.integers(0, 256, 1024).tolist())
    runs = b"\x03\x05\x00\x03\x07\x08\x09\x00\x00\x00" + b"\x06\x02\x00\x00" + b"\x00\x01"
    colours = np.frombuffer(palette, np.uint8).reshape(-1, 4)[:, 2::-1]
    data = bmp(runs, 6, 2, 8, compression=1, palette=palette)
    assert np.array_equal(found(data), colours[np.array([[2] * 6, [5, 5, 5, 7, 8, 9]])])
    halves = b"\x03\x56\x00\x03\x78\x90\x00\x00" + b"\x05\x12\x01\x20\x00\x00" + b"\x00\x01"
    data = bmp(halves, 6, 2, 4, compression=2, palette=palette[:64])
    assert np.array_equal(found(data), colours[np.array([[1, 2, 1, 2, 1, 2], [5, 6, 5, 7, 8, 9]])])


RAMP = bytes(np.repeat(np.arange(256, dtype=np.uint8), 4).tolist())


@pytest.mark.parametrize(
    ("runs", "bits"),
    [
        (b"\x02\x05\x00\x04\x01\x02\x03\x04\x00\x00\x04\x01\x00\x01", 8),  # two pixels and four in a row of four
        (b"\x03\x55\x00\x03\x12\x30\x00\x00\x04\x11\x00\x01", 4),
        (b"\x05\x01\x00\x00\x04\x01\x00\x01", 8),
        (b"\x00\x02\x03\x00\x02\x01\x00\x01", 8),
        (b"\x00\x02\x00\x02\x01\x01\x00\x01", 8),
    ],
)
def test_bmp_runs_that_leave_the_picture(runs, bits):
    palette = bytes(RANDOM.integers(0, 256, 4 << bits).tolist())
    assert code(bmp(runs, 4, 2, bits, compression=1 if bits == 8 else 2, palette=palette), "runs reach") == "corrupt"


@pytest.mark.parametrize(
    ("data", "wanted", "reason"),
    [
        (bmp(bytes(8), 8, 1, 8, palette=bytes(4) + b"\xff" * 4), RejectCode.MODE_REFUSED, "8 bits with a palette"),
        (bmp(bytes(4), 8, 1, 4, palette=RAMP[:64]), RejectCode.MODE_REFUSED, "4 bits with a palette"),
        (bmp(bytes(4), 8, 1, 2, palette=RAMP[:16]), RejectCode.MODE_REFUSED, "2 bits"),
        (bmp(bytes(4), 1, 1, 24, compression=4), RejectCode.MODE_REFUSED, "compression 4"),
        (bmp(bytes(4), 1, 1, 32, compression=3, masks=(0, 0, 0)), RejectCode.MODE_REFUSED, "masks 0, 0, 0, 0"),
        (
            bmp(bytes(4), 1, 1, 16, compression=3, masks=(31 << 10, 31 << 5, 31, 1 << 15)),
            RejectCode.MODE_REFUSED,
            "8000",
        ),
        (bmp(bytes(4), 1, 1, 32, compression=3, masks=(1, 2, 4)), RejectCode.MODE_REFUSED, "masks 1, 2, 4, 0"),
        (bmp(b"\x09" * 4, 4, 1, 8, palette=bytes(16)), RejectCode.CORRUPT, "colour 9, the palette 4 colours"),
        (bmp(b"\x09" * 4, 4, 1, 8, palette=RAMP[:32]), RejectCode.CORRUPT, "colour 9, the palette 8 colours"),
        (bmp(b"\x04\x01\x00\x01", 4, -1, 8, compression=1, palette=RAMP), RejectCode.CORRUPT, "4 x -1"),
    ],
)
def test_bmp_refused(data, wanted, reason):
    assert code(data, reason) == wanted


# ---------------------------------------------------------------- JPEG


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
def test_jpeg_agrees_with_another_decoder(options):
    for mode in ("L", "RGB"):
        data = encoded(Image.fromarray(SMOOTH).convert(mode), "JPEG", **options)
        other = imagecodecs.jpeg8_decode(data)
        assert np.abs(found(data) - (grey(other) if mode == "L" else other)).max() <= 1


def test_jpeg_cmyk_is_inverted_where_adobe_says_so():
    ink = Image.fromarray(SMOOTH).convert("CMYK")
    data = encoded(ink, "JPEG", quality=100)
    assert np.abs(found(data) - inked(np.asarray(ink).astype(int))).max() <= 8
    marker = data.index(b"\xff\xee")
    bare = data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big") :]
    assert code(bare, "without Adobe's marker") == RejectCode.MODE_REFUSED


def test_jpeg_kinds_that_are_not_read():
    data = encoded(Image.fromarray(SMOOTH), "JPEG")
    frame = data.index(b"\xff\xc0")
    for marker, reason in ((0xC3, "lossless"), (0xC6, "hierarchical"), (0xC9, "arithmetic")):
        assert code(data[: frame + 1] + bytes([marker]) + data[frame + 2 :], reason) == RejectCode.MODE_REFUSED
    assert code(data[: frame + 4] + b"\x0c" + data[frame + 5 :], "3 layers of 12 bits") == RejectCode.MODE_REFUSED
    assert code(data[: frame + 9] + b"\x02" + data[frame + 10 :], "2 layers of 8 bits") == RejectCode.MODE_REFUSED
    assert code(data[:2] + b"\xff\xfe\0\2" * 16_385 + data[2:], "more than 16384 segments") == RejectCode.CORRUPT
    assert decode(data[:2] + b"\xff\xfe\0\2" * 16_000 + data[2:]).width == 56
    assert code(data[:frame], "truncated") == RejectCode.TRUNCATED


# ---------------------------------------------------------------- WebP


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("num_samples", [3, 4])
def test_webp_agrees_with_another_decoder(lossless, num_samples):
    values = np.concatenate([SMOOTH, SMOOTH[..., :1]], -1)[..., :num_samples].copy()
    data = encoded(Image.fromarray(values), "WEBP", lossless=lossless, exact=True)
    other = imagecodecs.webp_decode(data).astype(float)
    wanted = other if num_samples == 3 else on_white(other[..., :3], other[..., 3:] / 255)
    assert np.abs(found(data) - wanted).max() <= num_samples - 3


def test_webp_that_is_too_large_is_refused_before_its_canvas_is_made():
    huge = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xfe\x3f\0" * 2 + bytes(8)
    assert code(huge, "16383 x 16383") == RejectCode.TOO_MANY_PIXELS
    assert code(huge[:12] + b"ABCD" + huge[16:], "first chunk") == RejectCode.CORRUPT


# ---------------------------------------------------------------- orientation


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """The upright pixels. EXIF 2.3 defines an orientation by the sides that stored row 0 and column 0 are."""
    sides = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]
    upright = values.swapaxes(0, 1) if sides[0] in "lr" else values
    if "b" in sides:
        upright = upright[::-1]
    return upright[:, ::-1] if "r" in sides else upright


def exif_of(orientation: int, kind: str = "H", order: str = ">") -> bytes:
    body = struct.pack(order + kind, orientation).ljust(4, b"\0")
    start = b"MM\0*" if order == ">" else b"II*\0"
    number = {"B": 1, "H": 3, "I": 4}[kind]
    return start + struct.pack(order + "IHHHI", 8, 1, 274, number, 1) + body + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    values = noise(8, 3).astype(np.uint8)
    wanted, image = turned(values, orientation), Image.fromarray(values)
    raw = "\nexif\n  26\n" + (b"Exif\0\0" + exif_of(orientation)).hex() + "\n"
    files = [
        png(values, 8, 2, chunk(b"eXIf", exif_of(orientation))),
        png(values, 8, 2, chunk(b"eXIf", exif_of(orientation, "I", "<"))),
        png(values, 8, 2, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw.encode()))),
        png(values, 8, 2, chunk(b"tEXt", b"Raw profile type exif\0" + raw.encode())),
        tiff(values, 8, 2, tags={274: [orientation]}),
        written(values, photometric="rgb", compression="zlib", extratags=[(274, 3, 1, orientation, True)]),
        encoded(image, "WEBP", lossless=True, exif=exif_of(orientation)),
    ]
    for data in files:
        assert np.array_equal(found(data), wanted)
    flat = encoded(image, "JPEG")
    photograph = encoded(image, "JPEG", exif=b"Exif\0\0" + exif_of(orientation))
    assert np.array_equal(found(photograph), turned(found(flat), orientation))


def test_a_jpeg_segment_may_follow_a_marker_without_a_length():
    segment = b"\xff\xe1" + struct.pack(">H", 6) + b"Exif"
    found = [(marker, bytes(body)) for marker, body in _segments(b"\xff\xd8\xff\x01" + segment + b"\xff\xda")]
    assert found == [(0xE1, b"Exif")]


def test_a_colour_type_that_no_png_has_is_damage():
    header = struct.pack(">IIBBBBB", 4, 4, 8, 5, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(20))) + chunk(b"IEND", b"")
    with pytest.raises(Reject, match="values that PNG does not allow") as raised:
        decode(b"\x89PNG\r\n\x1a\n" + chunks)
    assert raised.value.code is RejectCode.CORRUPT


def test_a_raw_profile_counts_where_there_is_no_other_and_is_of_a_sound_length():
    values = noise(8, 3).astype(np.uint8)
    raw = ("\nexif\n  26\n" + (b"Exif\0\0" + exif_of(6)).hex() + "\n").encode()
    named = b"Raw profile type exif\0"
    both = png(values, 8, 2, chunk(b"eXIf", exif_of(3)) + chunk(b"tEXt", named + raw))
    assert np.array_equal(found(both), turned(values, 3))
    long = png(values, 8, 2, chunk(b"tEXt", named + raw + b"\n" * MAX_RAW_PROFILE_BYTES))
    assert np.array_equal(found(long), values)


@pytest.mark.parametrize("body", [b"", b"MM\0*", exif_of(9), exif_of(0), exif_of(6)[:20], b"Exif\0\0" * 3, bytes(99)])
def test_broken_exif_costs_the_orientation_alone(body):
    values = noise(8, 3)
    assert np.array_equal(found(png(values, 8, 2, chunk(b"eXIf", body))), values)


def test_xmp_turns_nothing():
    values = noise(8, 3)
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    assert np.array_equal(found(png(values, 8, 2, chunk(b"iTXt", xmp))), values)


# ---------------------------------------------------------------- the table of decisions


def test_the_readme_has_the_table_of_decisions():
    assert as_markdown() in (Path(__file__).resolve().parents[3] / "storage" / "README.md").read_text()
