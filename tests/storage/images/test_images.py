"""Images: sound ones have the right pixels, and every bad one has a reject code of the closed list."""

import io
import signal
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from blocksight.storage.images.decode import DecodeLimits, decode, fit
from blocksight.storage.rejects import Reject, RejectCode
from tests.storage.by_hand import chunk, png_of


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rejected(data: bytes, limits: DecodeLimits | None = None) -> RejectCode:
    with pytest.raises(Reject) as caught:
        decode(data, limits or DecodeLimits())
    assert caught.value.message
    return caught.value.code


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
JPEG = encoded(Image.fromarray(NOISE), "JPEG")
PNG = encoded(Image.fromarray(NOISE), "PNG")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_pixels_back(kind):
    found = decode(encoded(Image.fromarray(NOISE), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(found.pixels, NOISE)
    assert (found.width, found.height, found.format) == (60, 40, kind)


def test_sixteen_bits_keep_their_ramp():
    found = decode(encoded(Image.fromarray(grey_ramp()), "PNG")).pixels
    assert np.array_equal(found[..., 0], np.rint(grey_ramp() / 257).astype(np.uint8))
    assert len(np.unique(found)) == 64


def test_big_endian_sixteen_bits():
    header = b"MM\0*" + struct.pack(">I", 8)
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 110), (277, 3, 1), (279, 4, 4)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    body = header + struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    body = body.ljust(110, b"\0") + struct.pack(">HH", 0xFFFF, 0x0101)
    assert decode(body).pixels[0, :, 0].tolist() == [255, 1]


def test_alpha_is_composited_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 128, 255)
    assert decode(encoded(Image.fromarray(rgba), "PNG")).pixels[0, :, 0].tolist() == [255, 127, 0]
    both = np.stack([np.full((1, 2), 10, np.uint8), np.array([[0, 255]], np.uint8)], -1)
    assert decode(encoded(Image.fromarray(both, "LA"), "PNG")).pixels[0, :, 0].tolist() == [255, 10]


def test_a_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    found = decode(encoded(image, "PNG", transparency=0)).pixels[0].tolist()
    assert found == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_not_inverted(kind):
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # cyan none, magenta and yellow full: red
    red, green, blue = decode(encoded(ink, kind)).pixels[8, 8].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:10, :20] = 255
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that `orientation` asks a viewer to undo
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, "PNG", exif=exif))
    assert (found.width, found.height) == (40, 20)
    assert np.array_equal(found.pixels, upright)


def test_only_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        found = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert found.pixels[2, 2, 0] > 200
        assert found.pixels[2, 2, 1] < 60


def bomb() -> bytes:
    size = struct.pack(">IIBBBBB", 25_000, 25_000, 8, 2, 0, 0, 0)
    return png_of(chunk(b"IHDR", size), chunk(b"IDAT", zlib.compress(bytes(1000))))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", RejectCode.EMPTY_FILE),
        (b"this is a text file, whatever its name says\n", RejectCode.NOT_AN_IMAGE),
        (JPEG[: len(JPEG) // 2], RejectCode.TRUNCATED),
        (PNG[: len(PNG) // 2], RejectCode.TRUNCATED),
        (PNG[:-60] + bytes(60), RejectCode.CORRUPT),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), RejectCode.CORRUPT),
        (bomb(), RejectCode.TOO_MANY_PIXELS),
        (encoded(Image.fromarray(NOISE), "ICO", sizes=[(16, 16)]), RejectCode.FORMAT_REFUSED),
        (encoded(Image.fromarray(NOISE), "PPM"), RejectCode.FORMAT_REFUSED),
        (encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"), RejectCode.MODE_REFUSED),
        (encoded(Image.fromarray(NOISE[..., 0].astype(np.int32)), "TIFF"), RejectCode.MODE_REFUSED),
    ],
    ids=lambda value: str(value) if isinstance(value, RejectCode) else "",
)
def test_every_bad_image_has_its_reason(data, code):
    assert rejected(data) == code


def test_caps_are_checked_before_decoding():
    assert rejected(bytes((256 << 20) + 1)) == RejectCode.TOO_MANY_BYTES
    wide = struct.pack(">IIBBBBB", 89_478_486, 1, 8, 0, 0, 0, 0)
    with pytest.raises(Reject, match="89478486 x 1 pixels, at most 89478485"):
        decode(png_of(chunk(b"IHDR", wide), chunk(b"IDAT", b"")))
    assert rejected(PNG, DecodeLimits(num_bytes=100)) == RejectCode.TOO_MANY_BYTES
    assert rejected(PNG, DecodeLimits(num_pixels=60 * 40 - 1)) == RejectCode.TOO_MANY_PIXELS
    assert decode(PNG, DecodeLimits(num_pixels=60 * 40)).width == 60


def busy(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_slow_decoder_is_stopped(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda _self: busy(30))
    assert rejected(JPEG, DecodeLimits(seconds=0.05)) == RejectCode.DECODE_TIMEOUT


def test_time_that_a_decoder_does_not_run_is_not_its_own(monkeypatch):
    """For example on a busy machine, or while the process is stopped."""
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: [time.sleep(0.3), load(self)][1])
    assert decode(JPEG, DecodeLimits(seconds=0.1)).width == 60


def test_time_of_other_threads_is_not_its_own(monkeypatch):
    load = JpegImageFile.load
    other = threading.Thread(target=busy, args=[0.4])

    def loaded_beside(self):
        if other.ident is None:
            other.start()
            other.join()
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", loaded_beside)
    assert decode(JPEG, DecodeLimits(seconds=0.2)).width == 60


def test_the_timer_is_put_back():
    before = signal.getsignal(signal.SIGPROF)
    decode(JPEG)
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0
    assert signal.getsignal(signal.SIGPROF) == before


def test_decoding_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(decode(PNG)))
    thread.start()
    thread.join()
    assert np.array_equal(found[0].pixels, NOISE)


def test_a_program_that_is_stopped_is_not_a_bad_image(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode(JPEG)


def test_random_damage_never_escapes():
    random = np.random.default_rng(1)
    bodies = [JPEG, PNG, *(encoded(Image.fromarray(NOISE), kind) for kind in ("GIF", "BMP", "TIFF", "WEBP"))]
    outcomes = set()
    for _ in range(300):
        body = bytearray(bodies[random.integers(len(bodies))])
        for place in random.integers(0, len(body), 8):
            body[place] = random.integers(256)
        try:
            assert decode(bytes(body)).pixels.dtype == np.uint8
            outcomes.add("decoded")
        except Reject as reject:
            outcomes.add(str(reject.code))
    assert len(outcomes) > 2


def test_fit():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert fit(wide, (8, 8), "squash")[4].mean() == pytest.approx(200 / 3, abs=8)
    assert fit(wide, (8, 8), "crop")[:, :, 0].min() > 150
    assert np.array_equal(fit(wide, (10, 30), "squash"), wide)


def test_pngsuite(shared_data):
    decoded = {}
    for path in sorted((shared_data / "images" / "pngsuite").glob("*.png")):
        if path.name.startswith("x"):
            assert rejected(path.read_bytes()) in (RejectCode.CORRUPT, RejectCode.NOT_AN_IMAGE, RejectCode.TRUNCATED)
        else:
            decoded[path.stem] = decode(path.read_bytes()).pixels
    assert len(decoded) == 161
    for name, pixels in decoded.items():
        if name.startswith("basi"):
            assert np.array_equal(pixels, decoded[name.replace("basi", "basn")]), name
    assert np.abs(decoded["basn0g16"].astype(int) - decoded["basn0g16"][::-1, ::-1].astype(int)).max() > 50
    for name in ("tbbn0g04", "tbwn0g16", "tbbn2c16", "tbrn2c08", "tbbn3p08"):
        assert decoded[name][0, 0].tolist() == [255, 255, 255], name


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_the_exif_set_looks_alike(shared_data, kind):
    folder = shared_data / "images" / "exif_orientation"
    pictures = [decode((folder / f"{kind}_{number}.jpg").read_bytes()) for number in range(9)]
    for picture in pictures:
        assert np.abs(picture.pixels.astype(float) - pictures[1].pixels).mean() < 5
