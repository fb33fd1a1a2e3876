"""Class activation maps: slow twins in plain loops, closed forms, and invariances."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.cams import WEIGHINGS
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from tests.engine.nets import Depthwise, Plain, Pooled, Residual, from_zoo, seeded, smooth

NETS = [Plain, Residual, Depthwise]


def explained(adapter, inputs, classes, name, **options):
    return EXPLAINERS[name](adapter, None, **options).explain(inputs, ClassProbability(torch.tensor(classes)))


def adapter_of(net, size=32):
    return ModelAdapter(net, input_size=(size, size))


# ---------------------------------------------------------------- slow twins, from the formulas


def slow_map(name: str, maps: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """The map of one image, from its feature maps and gradients [C, h, w], place by place."""
    channels, height, width = maps.shape
    total = np.zeros((height, width))
    for k in range(channels):
        weight = 0.0
        for i in range(height):
            for j in range(width):
                a, g = maps[k, i, j], slopes[k, i, j]
                if name == "gradcam":
                    weight += g / (height * width)
                elif name == "gradcam++" and g > 0:
                    weight += g**2 / (2 * g**2 + maps[k].sum() * g**3) * g
                elif name == "xgradcam" and maps[k].sum() != 0:
                    weight += g * a / maps[k].sum()
                elif name == "layercam":
                    total[i, j] += max(g, 0.0) * a
                elif name == "hirescam":
                    total[i, j] += g * a
        total += weight * maps[k]
    return np.maximum(total, 0.0)


def slowly(net: nn.Module, image: Tensor, target: int, name: str) -> np.ndarray:
    """The saliency map by the network's plain copy, torch's interpolation, and float64 throughout."""
    twin = type(net)().double().eval()
    twin.load_state_dict(net.state_dict())
    logits, blocks = twin.written_out(image[None].double())
    (slopes,) = torch.autograd.grad(logits[0, target], [blocks[-1]])
    native = torch.from_numpy(slow_map(name, blocks[-1][0].detach().numpy(), slopes[0].numpy()))
    full = functional.interpolate(native[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)
    return full[0, 0].numpy()


@pytest.mark.parametrize("name", WEIGHINGS)
@pytest.mark.parametrize("make", NETS)
def test_the_fast_path_equals_the_slow_twin(make, name):
    net, inputs, classes = seeded(make), smooth(3, 32, 32), [[0, 3], [1, 1], [4, 2]]
    found = explained(adapter_of(net), inputs, classes, name)
    for image, own in enumerate(found):
        for index, one in enumerate(own):
            wanted = slowly(net, inputs[image], classes[image][index], name)
            assert np.abs(one.saliency_hw - wanted).max() <= 1e-5 * max(wanted.max(), 1e-3)
            assert one.saliency_hw.min() >= 0
            assert one.num_forwards == 0


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("name", ["gradcam", "xgradcam", "hirescam"])
def test_under_mean_pooling_and_one_layer_it_is_the_original_cam(name):
    net, inputs = seeded(Pooled), smooth(2, 16, 16)
    found = explained(adapter_of(net, 16), inputs, [[1], [3]], name)
    for image, target in enumerate((1, 3)):
        maps = net.features(inputs[image][None])[0].detach().double()
        wanted = torch.einsum("k,khw->hw", net.head.weight[target].detach().double() / 256, maps).relu().numpy()
        assert np.abs(found[image][0].saliency_hw - wanted).max() <= 1e-6


def test_hand_computed_weights():
    maps = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]]).double()
    slopes = torch.tensor([[[[2.0, -1.0]], [[0.0, 4.0]]]]).double()
    # means 0.5 and 2; sum(A) 4 and 2; alpha 4 / (8 + 32) = 0.1 and 16 / (32 + 128) = 0.1; weights 0.2 and 0.4
    wanted = {
        "gradcam": [4.5, 1.5],
        "gradcam++": [0.2 * 1 + 0.4 * 2, 0.2 * 3],
        "xgradcam": [(2 - 3) / 4 * 1, (2 - 3) / 4 * 3],
        "layercam": [2.0, 0.0],
        "hirescam": [2.0, -3.0],
    }
    for name, weigh in WEIGHINGS.items():
        assert weigh(maps, slopes)[0, 0].tolist() == pytest.approx(wanted[name]), name


@pytest.mark.parametrize("name", WEIGHINGS)
def test_maps_and_gradients_of_zero_give_zero_and_no_nan(name):
    nothing, something = torch.zeros(1, 2, 3, 3).double(), torch.ones(1, 2, 3, 3).double()
    for maps, slopes in ((nothing, something), (something, nothing), (nothing, nothing)):
        assert torch.equal(WEIGHINGS[name](maps, slopes), torch.zeros(1, 3, 3).double())


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", WEIGHINGS)
def test_a_map_does_not_depend_on_other_images(name):
    adapter, inputs = adapter_of(seeded(Residual)), smooth(5, 32, 32)
    together = explained(adapter, inputs, [[own] for own in range(5)], name)
    for image in range(5):
        alone = explained(adapter, inputs[image : image + 1], [[image]], name)[0][0]
        assert np.array_equal(alone.saliency_hw, together[image][0].saliency_hw)
        assert alone.score == together[image][0].score
    apart = explained(adapter, inputs, [[own] for own in range(5)], name, images_per_pass=1)
    for one, other in zip(together, apart, strict=True):
        assert np.abs(one[0].saliency_hw - other[0].saliency_hw).max() <= 1e-5 * max(one[0].saliency_hw.max(), 1e-6)


class Mirrored(nn.Module):
    """Sees a picture and its mirror image alike."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.convolution.weight
        kernel = (weight + weight.flip(3)) / 2
        return self.head(functional.conv2d(x, kernel, self.convolution.bias, padding=1).relu().mean((2, 3)))


@pytest.mark.parametrize("name", WEIGHINGS)
def test_a_mirrored_picture_has_the_mirrored_map(name):
    adapter, inputs = adapter_of(seeded(Mirrored)), smooth(1, 32, 32)
    one = explained(adapter, inputs, [[2]], name)[0][0].saliency_hw
    other = explained(adapter, inputs.flip(3), [[2]], name)[0][0].saliency_hw
    assert np.abs(one - other[:, ::-1]).max() <= 1e-5 * max(one.max(), 1e-6)


@pytest.mark.parametrize("name", WEIGHINGS)
def test_another_class_and_other_weights_change_the_map(name):
    inputs = smooth(1, 32, 32)
    maps = [
        explained(adapter_of(seeded(Residual, seed)), inputs, [[target]], name)[0][0].saliency_hw
        for seed, target in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    assert all(not np.allclose(maps[0], other) for other in maps[1:])


@pytest.mark.parametrize("name", WEIGHINGS)
def test_it_explains_the_last_block_or_the_deepest_named_one(name):
    adapter = ModelAdapter(from_zoo("resnet18"), input_size=(64, 64))
    one = explained(adapter, smooth(1, 64, 64), [[1]], name)[0][0]
    assert (one.blocks[0].candidates, len(one.blocks)) == (512, 1)
    named = explained(adapter, smooth(1, 64, 64), [[1]], name, blocks=["layer3", "layer2"])[0][0]
    assert named.blocks[0].candidates == 256


@pytest.mark.parametrize("name", WEIGHINGS)
def test_a_non_finite_gradient_gives_a_map_of_nan(name):
    net = seeded(Pooled)
    with torch.no_grad():
        net.head.weight[1, 0] = float("inf")
    one = explained(adapter_of(net, 16), smooth(1, 16, 16), [[1]], name)[0][0]
    assert np.isnan(one.saliency_hw).all()
