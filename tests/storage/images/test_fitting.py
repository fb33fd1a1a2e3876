"""How pictures are fitted: the text of a plan, what is seen, and the same pixels at the model's size."""

import numpy as np
import pytest
from PIL import Image

from blocksight.storage.images.fitting import Fitting

TEXTS = (
    *("squash", "crop", "squash, bicubic", "crop, nearest", "short side 256, centre 224x224"),
    *("short side 256, centre 224x192 rounded down, bicubic", "whole 256x248, centre 224x224, lanczos"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_back(text):
    assert str(Fitting.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "own", "squash, bilinear", "squash, cubic", "short side 256", "short side 0, centre 8x8"),
        *("whole 5000x8, centre 8x8", "short side 8x9, centre 8x8, ", "whole 8, centre 8", "crop, bicubic, bicubic"),
    ],
)
def test_another_text_is_refused(text):
    if text == "whole 8, centre 8":
        with pytest.raises(ValueError, match="known: squash, crop"):
            Fitting.parse(text)
        return
    with pytest.raises(ValueError, match=r"no way to fit|wanted sides up to"):
        Fitting.parse(text)


@pytest.mark.parametrize("shape", [(60, 91), (91, 60), (40, 40)])
def test_the_centre_is_that_of_the_resized_picture(shape):
    """Against resizing all of it first, as libraries do."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    how = Fitting.parse("short side 33, centre 28x28, bicubic")
    width, height = (33, int(33 * shape[0] / shape[1])) if shape[1] <= shape[0] else (int(33 * shape[1] / shape[0]), 33)
    whole = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 28) / 2), round((width - 28) / 2)
    found = how.apply(pixels, (28, 28))
    assert np.abs(found.astype(int) - whole[top : top + 28, left : left + 28]).max() <= 1


def test_what_lies_outside_is_black():
    pixels = np.full((20, 40, 3), 255, np.uint8)
    how = Fitting.parse("short side 8, centre 12x12")
    found = how.apply(pixels, (12, 12))
    assert found[:2].max() == found[10:].max() == 0
    assert found[2:10].min() == 255
    assert how.box((40, 20), (12, 12)) == (5.0, -5.0, 35.0, 25.0)


def test_a_long_picture_takes_no_memory():
    pixels = np.zeros((1, 60_000, 3), np.uint8)
    pixels[:, 29_000:31_000] = 200
    assert Fitting.parse("short side 256, centre 224x224").apply(pixels, (224, 224)).min() == 200


def test_half_a_pixel():
    have = (9, 8)
    even, down = (Fitting.parse(f"whole 8x9, centre 8x4{text}") for text in ("", " rounded down"))
    assert even.box(have, (4, 8))[0] == down.box(have, (4, 8))[0] == 2
    even, down = (Fitting.parse(f"whole 8x11, centre 8x4{text}") for text in ("", " rounded down"))
    assert (even.box((11, 8), (4, 8))[0], down.box((11, 8), (4, 8))[0]) == (4, 3)
