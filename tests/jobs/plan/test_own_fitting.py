"""Pictures are fitted as timm fits them for the size that a model is fed at; an unknown shape is refused."""

import numpy as np
import pytest

from blocksight.engine.model.preprocessing import Resizing, scaled_to
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.own_fitting import own_fitting
from tests.jobs.jobs_of import config_of

timm_data = pytest.importorskip("timm.data", reason="the extra timm is not installed")


def fitted(size, pixels):
    config = config_of("in", "out", model="timm:regnety_002.pycls_in1k", weights="random", input_size=size)
    return own_fitting(config).apply(pixels, size or (224, 224))


def by_timm(size, pixels):
    from PIL import Image
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg("regnety_002.pycls_in1k").to_dict()
    config = timm_data.resolve_data_config({"input_size": (3, *size)}, pretrained_cfg=known)
    transform = timm_data.create_transform(**config, is_training=False)
    mean, std = (np.array(config[name])[:, None, None] for name in ("mean", "std"))
    return (255 * (transform(Image.fromarray(pixels)).numpy() * std + mean)).transpose(1, 2, 0)


@pytest.mark.parametrize("side", [96, 224, 320])
@pytest.mark.parametrize("shape", [(301, 377), (377, 301)])
def test_another_square_is_fitted_to_the_pixel(side, shape):
    """timm rounds the side before the crop down, at each size anew: 109 for 96, and 365 for 320."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert np.abs(fitted((side, side), pixels) - by_timm((side, side), pixels)).max() <= 3


@pytest.mark.parametrize("size", [(128, 192), (192, 128)])
def test_a_shape_that_is_not_known_is_refused_and_not_padded(size):
    with pytest.raises(ConfigError, match=rf"prepares a picture for {size[0]} x {size[1]} pixels is none"):
        fitted(size, np.zeros((9, 9, 3), np.uint8))


def test_a_short_side_says_nothing_of_another_shape():
    short, whole = (Resizing(kind, 256, 256, "bilinear", rounds_down=False) for kind in ("short", "whole"))
    assert scaled_to(short, (224, 224), (128, 192)) is None
    assert scaled_to(short, (224, 224), (112, 112)) == Resizing("short", 128, 128, "bilinear", rounds_down=False)
    assert scaled_to(whole, (256, 256), (128, 192)) == Resizing("whole", 128, 192, "bilinear", rounds_down=False)
