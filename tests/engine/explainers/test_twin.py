"""The fast path against the slow twin: small networks with unusual traits, and torchvision's."""

import pytest
import torch

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.comparing import assert_equals_slow, by_modules, explained, slowly, written_out
from tests.engine.nets import Depthwise, InPlace, Plain, Residual, Scaled, Untraceable, from_zoo, seeded, smooth

PARAMETERS = {
    "paper": SiseParameters(),
    "mu": SiseParameters(mu=0.3),
    "ada": SiseParameters(selection="ada"),
    "soft": SiseParameters(gate="soft"),
    "black": SiseParameters(baseline="black"),
    "all": SiseParameters(mu=0.3, gate="soft", baseline="black"),
}
SMALL = {
    "plain": (Plain, (32, 32)),
    "residual": (Residual, (24, 40)),
    "depthwise": (Depthwise, (33, 31)),
    "in-place": (InPlace, (28, 20)),
    "untraceable": (Untraceable, (24, 24)),
}
CLASSES = [0, 3, 4]


@pytest.mark.parametrize("name", SMALL)
def test_the_plain_copy_is_the_same_network(name):
    make, size = SMALL[name]
    net, inputs = seeded(make), smooth(2, *size)
    logits, maps = net.written_out(inputs)
    with torch.no_grad():
        assert torch.allclose(net(inputs), logits, atol=1e-6)
    blocks = ModelAdapter(net, input_size=size).network.blocks()
    assert [(block.channels, block.grid) for block in blocks] == [(own.shape[1], tuple(own.shape[2:])) for own in maps]


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_equal_the_slow_twin(name, kind):
    make, size = SMALL[name]
    net, inputs, parameters = seeded(make), smooth(3, *size), PARAMETERS[kind]
    found = explained(ModelAdapter(net, input_size=size), inputs, [[own] for own in CLASSES], parameters)
    for image, target, fast in zip(inputs, CLASSES, found, strict=True):
        assert_equals_slow(fast[0], slowly(net, written_out, image, target, parameters))


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("name", SMALL)
def test_in_float64_only_the_last_digits_differ(name, kind):
    """Both give the same numbers but for rounding; a difference in float64 would mean another method."""
    make, size = SMALL[name]
    net, inputs, parameters = seeded(make, seed=2), smooth(1, *size, seed=2).double(), PARAMETERS[kind]
    adapter = ModelAdapter(net, input_size=size)
    assert adapter.network.places
    adapter.module.double()
    found = explained(adapter, inputs, [[1]], parameters)
    tolerance = 1e-6 if parameters.baseline == "black" else 1e-9  # the black pixel is normalised in float32
    assert_equals_slow(found[0][0], slowly(net, written_out, inputs[0], 1, parameters), tolerance=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_more_weights_and_images_equal_the_slow_twin(seed):
    size = (20, 36)
    net, inputs = seeded(Residual, seed=10 + seed), smooth(2, *size, seed=20 + seed)
    found = explained(ModelAdapter(net, input_size=size), inputs, [[seed], [4]])
    for image, target, fast in zip(inputs, (seed, 4), found, strict=True):
        assert_equals_slow(fast[0], slowly(net, written_out, image, target, SiseParameters()))


# ---------------------------------------------------------------- torchvision

ZOO = {
    "resnet18": (64, ["relu", "layer1", "layer2", "layer3", "layer4"]),
    "mobilenet_v3_small": (
        96,
        ["features.0.2", "features.2.block.0.2", "features.4.block.0.2", "features.9.block.0.2", "features.12.2"],
    ),
}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        pytest.param("resnet18", "paper", marks=pytest.mark.sweep),
        ("resnet18", "ada"),
        pytest.param("mobilenet_v3_small", "mu", marks=pytest.mark.sweep),
        ("mobilenet_v3_small", "all"),
    ],
)
def test_torchvisions_networks_equal_the_slow_twin(architecture, kind):
    size, names = ZOO[architecture]
    net = from_zoo(architecture)
    inputs, parameters = smooth(1, size, size), PARAMETERS[kind]
    found = explained(ModelAdapter(net, input_size=(size, size)), inputs, [[5]], parameters)
    assert all(block.kept for block in found[0][0].blocks)
    assert_equals_slow(found[0][0], slowly(net, by_modules(names), inputs[0], 5, parameters))


# ---------------------------------------------------------------- saturated softmax


def scaled_case(factor, place):
    """A network, an image and the class at this place in the order of logits."""
    net, inputs = seeded(lambda: Scaled(factor)), smooth(1, 32, 32)
    logits = net(inputs).detach()[0]
    target = int(logits.argsort(descending=True)[place])
    return net, inputs, target, float(logits.softmax(0)[target])


@pytest.mark.parametrize("factor", [100.0, 600.0])
def test_selection_is_exact_if_the_probability_rounds_to_one(factor):
    net, inputs, target, single = scaled_case(factor, 0)
    assert single == 1.0
    found = explained(ModelAdapter(net, input_size=(32, 32)), inputs, [[target]])[0][0]
    slow = slowly(net, written_out, inputs[0], target, SiseParameters())
    assert all(slow.kept)
    assert_equals_slow(found, slow)


@pytest.mark.parametrize(("factor", "below"), [(100.0, 1e-8), (600.0, 1e-48)])
@pytest.mark.parametrize("place", [1, -1], ids=["second", "last"])
def test_a_class_of_almost_no_probability_is_explained(factor, below, place):
    net, inputs, target, single = scaled_case(factor, place)
    found = explained(ModelAdapter(net, input_size=(32, 32)), inputs, [[target]])[0][0]
    slow = slowly(net, written_out, inputs[0], target, SiseParameters())
    assert single <= below
    assert any(slow.kept)
    assert_equals_slow(found, slow, score_tolerance=1e-4)  # the logits' rounding, times 600


@pytest.mark.parametrize("place", [0, 1, -1], ids=["first", "second", "last"])
def test_in_float64_a_saturated_softmax_equals_the_slow_twin(place):
    net, inputs, target, _ = scaled_case(600.0, place)
    adapter = ModelAdapter(net, input_size=(32, 32))
    assert adapter.network.places
    adapter.module.double()
    found = explained(adapter, inputs.double(), [[target]])[0][0]
    slow = slowly(net, written_out, inputs[0], target, SiseParameters())
    assert_equals_slow(found, slow, tolerance=1e-9)
