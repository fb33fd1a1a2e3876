"""How a library feeds a model is measured on plain pictures: mean, std, the order of colours; or refused."""

import pytest
import torch

from blocksight.engine.errors import ModelError
from blocksight.engine.model.preprocessing import Preprocessing
from blocksight.engine.model.sources.feeding import measured

MEAN, STD = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.4, 0.2]).view(3, 1, 1)


def own(change):
    """A preprocessing that makes the input of RGB [3, H, W] in 0..1."""
    return Preprocessing(lambda pixels: change(torch.tensor(pixels).permute(2, 0, 1) / 255)[..., :7, :9], ())


def test_mean_and_std_are_those_that_are_subtracted_and_divided_by():
    found = measured(own(lambda rgb: (rgb - MEAN) / STD))
    assert (found.size, found.is_bgr) == ((7, 9), False)
    assert found.mean == pytest.approx((0.1, 0.2, 0.3), abs=1e-6)
    assert found.std == pytest.approx((0.5, 0.4, 0.2), abs=1e-6)
    assert measured(own(lambda rgb: (rgb - MEAN) / STD), (0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)


def test_blue_first_is_seen_and_its_numbers_are_of_rgb():
    found = measured(own(lambda rgb: ((rgb - MEAN) / STD).flip(0)))
    assert found.is_bgr
    assert found.mean == pytest.approx((0.1, 0.2, 0.3), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rgb: rgb**2, "does more to colours"),
        (lambda rgb: 1 - rgb, "does more to colours"),
        (lambda rgb: rgb.mean(0, keepdim=True).expand(3, -1, -1), "does more to colours"),
        (lambda rgb: rgb.roll(1, 0), "does more to colours"),
        (lambda rgb: rgb[:1], r"gives \(1, 7, 9\) for a picture; wanted \[3, H, W\]"),
        (lambda rgb: rgb[None], r"gives \(1, 3, 7, 9\)"),
        (lambda rgb: rgb[0], "cuts each picture into patches"),
    ],
    ids=["a curve", "inverted", "grey", "green first", "one channel", "a batch", "patches"],
)
def test_what_a_mean_and_a_std_do_not_say_is_refused(change, told):
    with pytest.raises(ModelError, match=told):
        measured(own(change))
