"""Non-finite values: an image that causes them spoils its own map and no other."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.comparing import assert_same_bits, explained
from tests.engine.nets import Plain, seeded, smooth

FAULTY = 1
"""The number of the non-finite image, of three."""


def is_faulty(x: Tensor) -> Tensor:
    """1 for images whose first pixel is above 500, shaped to multiply a picture."""
    return (x[:, :1, :1, :1].detach() > 500).float()


class FaultyGradient(torch.autograd.Function):
    """The identity; its gradient is not finite for these images."""

    @staticmethod
    def forward(ctx, x, faulty):
        ctx.save_for_backward(faulty)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (faulty,) = ctx.saved_tensors
        return gradient / (1 - faulty), None


def faulty_input(net, x, faulty):
    return net(x / (1 - faulty))


def faulty_activation(net, x, faulty):
    """The first block's maps, and everything after them."""
    maps = net.features[1](net.features[0](x)) / (1 - faulty)
    return net.head(net.features[2:](maps).flatten(1))


def faulty_logits(net, x, faulty):
    return net(x) + torch.where(faulty.flatten(1) > 0, float("nan"), 0.0)


def huge_logits(net, x, faulty):
    return net(x) + torch.where(faulty.flatten(1) > 0, float("inf"), 0.0)


def one_huge_logit(net, x, faulty):
    """Infinity for class 0 alone: its score is NaN, its gradient is finite."""
    huge = torch.zeros(5)
    huge[0] = float("inf")
    return net(x) + torch.where(faulty.flatten(1) > 0, huge, 0.0)


def faulty_gradient(net, x, faulty):
    maps = FaultyGradient.apply(net.features[:6](x), faulty)
    return net.head(net.features[6:](maps).flatten(1))


KINDS = {
    "input": faulty_input,
    "activation": faulty_activation,
    "logits": faulty_logits,
    "infinite-logits": huge_logits,
    "infinite-logit-of-the-class": one_huge_logit,
    "gradient": faulty_gradient,
}


class Faulty(nn.Module):
    """The plain network with a fault. It cannot be traced, so that the fault stays in its place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = Plain(), kind

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) == float("inf"):
            return x
        return KINDS[self.kind](self.net, x, is_faulty(x))


def maps_of(kind, inputs):
    adapter = ModelAdapter(seeded(lambda: Faulty(kind)), input_size=(32, 32))
    return explained(adapter, inputs, [[0]] * len(inputs), blocks=("net.features.1", "net.features.4"), batch_size=8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_image_spoils_only_its_own_map(kind):
    inputs = smooth(3, 32, 32)
    sound = maps_of(kind, inputs)
    inputs[FAULTY, 0, 0, 0] = 900
    found = maps_of(kind, inputs)
    assert all(np.isfinite(own[0].saliency_hw).all() for own in sound)
    assert found[FAULTY][0].saliency_hw.shape == (32, 32)
    assert np.isnan(found[FAULTY][0].saliency_hw).all()
    for image in (0, 2):
        assert_same_bits(found[image][0], sound[image][0])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_picture_of_nan_at_any_place(place):
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    inputs = smooth(3, 32, 32)
    sound = explained(adapter, inputs, [[0], [1], [2]])
    inputs[place] = float("nan")
    found = explained(adapter, inputs, [[0], [1], [2]])
    assert np.isnan(found[place][0].saliency_hw).all()
    assert np.isnan(found[place][0].score)
    assert found[place][0].num_forwards == 0
    for image in {0, 1, 2} - {place}:
        assert_same_bits(found[image][0], sound[image][0])


class FailsUnderMasks(nn.Module):
    """NaN for every masked picture; the whole one, whose first pixel is 9, has finite logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x: Tensor) -> Tensor:
        masked = [green > 0 and red < 9 for red, green in x[:, :2, 0, 0].tolist()]  # a tensor would go round all blocks
        return self.net(x) + torch.where(torch.tensor(masked), float("nan"), 0.0)[:, None]


def test_a_non_finite_score_under_a_mask_spoils_the_map():
    adapter = ModelAdapter(seeded(FailsUnderMasks), input_size=(32, 32))
    inputs = smooth(2, 32, 32)
    inputs[:, 1, 0, 0] = -1
    sound = explained(adapter, inputs, [[0], [0]])
    assert all(np.isfinite(own[0].saliency_hw).all() for own in sound)
    inputs[0, 0, 0, 0], inputs[0, 1, 0, 0] = 9, 3
    found = explained(adapter, inputs, [[0], [0]])
    assert np.isfinite(found[0][0].score)
    assert np.isnan(found[0][0].saliency_hw).all()
    assert_same_bits(found[1][0], sound[1][0])
