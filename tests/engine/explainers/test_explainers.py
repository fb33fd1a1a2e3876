"""Explainers other than SISE and the CAMs: slow twins and closed forms; and properties of every explainer."""

import random
import re
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog import entries
from blocksight.engine.catalog.composition import num_learning_images, parameters_of, parse_method
from blocksight.engine.catalog.parameters import (
    AdaSiseParameters,
    AFmiParameters,
    BeeParameters,
    DaamParameters,
    ExtremalParameters,
    FeatureCamParameters,
    FovExParameters,
    IntegratedGradientsParameters,
    LeGradParameters,
    LibraParameters,
    NoParameters,
    OcclusionParameters,
    ReciproCamParameters,
    RiseParameters,
    ScoreCamParameters,
    SiseParameters,
    SmoothGradParameters,
    UcagParameters,
)
from blocksight.engine.errors import ImageError, ModelError
from blocksight.engine.explainers import EXPLAINERS, extremal, make_explainer
from blocksight.engine.explainers.fullgrad import bias_of
from blocksight.engine.judging.preflight import check_balance
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassLogit, ClassProbability
from blocksight.engine.scoring.perturb import blurred
from tests.engine import comparing, oracles
from tests.engine import slow_explainers as slow
from tests.engine.nets import (
    TRANSFORMERS_ONLY,
    Curved,
    Depthwise,
    InPlace,
    Plain,
    Pooled,
    Residual,
    Transformer,
    Untraceable,
    seeded,
    smooth,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
BLACK = -(torch.tensor(MEAN) / torch.tensor(STD)).double().view(3, 1, 1)
BASELINES = {"zero": torch.zeros(3, 1, 1).double(), "black": BLACK}


CLASS_2 = ClassProbability(torch.tensor([[2]]))


def adapter_of(net, size=32):
    side = (size, size) if isinstance(size, int) else size
    return ModelAdapter(net, input_size=side, mean=MEAN, std=STD)


def explainer(name, adapter, parameters=None, **options):
    """The explainer, after its first pass where it has one."""
    make = partial(make_explainer, name, adapter, parameters, **options)
    method = parse_method(name)
    count = num_learning_images(method, parameters or parameters_of(method, {}))
    if count == 0:
        return make()
    learner, classes = make().learner(), ClassProbability(torch.zeros(count, 1, dtype=torch.int64))
    learner.see(smooth(count, *adapter.input_size, seed=9), classes, range(100, 100 + count))
    return make(state=learner.state())


def maps(name, net, inputs, classes, parameters=None, *, seeds=None, target=ClassProbability, **options):
    """The map [H, W] of each image, for one class each."""
    adapter = adapter_of(net, tuple(inputs.shape[2:]))
    found = explainer(name, adapter, parameters, **options).explain(
        inputs, target(torch.tensor(classes)[:, None]), seeds
    )
    return [own[0].saliency_hw for own in found]


def assert_near(found, wanted, tolerance=1e-4):
    """Relative to the greatest value, which must not be 0."""
    wanted = np.asarray(wanted)
    assert wanted.max() > 1e-6
    assert np.abs(found - wanted).max() <= tolerance * wanted.max()


# ---------------------------------------------------------------- slow twins

TAILS = {
    Plain: lambda net, maps: net.head(functional.max_pool2d(maps, 2).flatten(1)),
    Residual: lambda net, maps: net.head(maps.mean((2, 3))),
    Depthwise: lambda net, maps: net.head(maps.mean((2, 3))),
    InPlace: lambda net, maps: net.head(maps.mean((2, 3))),
    Untraceable: lambda net, maps: net.head(maps.mean((2, 3))),
}
CLASSES = [0, 3]


def against_twin(name, net, inputs, twin, parameters=None, tolerance=1e-4, **options):
    """The engine's maps of two images equal those of `twin(net in float64, image, class, which)`."""
    found = maps(name, net, inputs, CLASSES, parameters, **options)
    double = oracles.double_copy(net)
    for image, (own, target) in enumerate(zip(found, CLASSES, strict=True)):
        assert_near(own, twin(double, inputs[image].double(), target, image), tolerance)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("weights", ["softmax", "probability"])
@pytest.mark.parametrize("make", [Plain, Depthwise])
def test_scorecam_equals_its_twin(make, weights, baseline):
    against_twin(
        "scorecam",
        seeded(make),
        smooth(2, 32, 32),
        lambda net, image, target, _: slow.scorecam(net, image, target, weights=weights, baseline=BASELINES[baseline]),
        ScoreCamParameters(weights=weights, baseline=baseline),
    )


@pytest.mark.parametrize("make", [Plain, Residual, Depthwise, Untraceable])
def test_ablationcam_equals_its_twin(make):
    """With the network cut behind the block, and with the whole network if it cannot be traced."""
    against_twin(
        "ablationcam",
        seeded(make),
        smooth(2, 32, 32),
        lambda net, image, target, _: slow.ablationcam(net, TAILS[make], image, target),
    )


@pytest.mark.parametrize(("size", "grid", "keep"), [((32, 32), 7, 0.5), ((24, 40), 4, 0.3)])
def test_rise_equals_its_twin(size, grid, keep):
    options = {"num_masks": 70, "grid": grid, "keep": keep}  # more masks than are summed at once
    against_twin(
        "rise",
        seeded(Residual),
        smooth(2, *size),
        lambda net, image, target, which: slow.rise(net, image, target, 5 + which, **options),
        RiseParameters(**options),
        seeds=[5, 6],
    )


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (10, 7), (6, 6), (23, 3)])
def test_occlusion_equals_its_twin(window, stride, baseline):
    """Also where the windows do not fill the side."""
    options = {"window": window, "stride": stride}
    net, inputs = seeded(Residual), smooth(2, 24, 30)
    found = maps("occlusion", net, inputs, CLASSES, OcclusionParameters(**options, baseline=baseline))
    double = oracles.double_copy(net)
    hidden = BASELINES[baseline]
    for image, (one, target) in enumerate(zip(found, CLASSES, strict=True)):
        wanted = slow.occlusion(double, inputs[image].double(), target, **options, baseline=hidden)
        assert np.abs(one - wanted.numpy()).max() <= 1e-6


@pytest.mark.parametrize("window", [24, 99])
def test_a_window_that_hides_all_is_refused(window):
    with pytest.raises(ModelError, match=f"a window of {window} pixels hides all of an input of 24 x 30"):
        maps("occlusion", seeded(Residual), smooth(1, 24, 30), CLASSES[:1], OcclusionParameters(window=window))


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("make", [Residual, Depthwise])
def test_integrated_gradients_equal_their_twin(make, baseline):
    against_twin(
        "integrated_gradients",
        seeded(make),
        smooth(2, 32, 32),
        lambda net, image, target, _: slow.integrated(net, image, target, 9, BASELINES[baseline]).sum(0).clamp(min=0),
        IntegratedGradientsParameters(steps=9, baseline=baseline),
        tolerance=1e-3,  # in float32 a kink may move to the other side of a point
    )


@pytest.mark.parametrize("base", ["gradient", "integrated_gradients"])
def test_smoothgrad_equals_its_twin(base):
    options = {"samples": 3, "noise": 0.2}
    against_twin(
        f"smoothgrad({base})",
        seeded(Residual),
        smooth(2, 24, 24),
        lambda net, image, target, which: slow.smoothgrad(net, image, target, 5 + which, base=base, **options),
        SmoothGradParameters(**options),
        tolerance=1e-3,
        seeds=[5, 6],
    )


@pytest.mark.parametrize("make", [Plain, Residual, Curved])
def test_fullgrad_equals_its_twin(make):
    against_twin(
        "fullgrad",
        seeded(make),
        smooth(2, 32, 32),
        lambda net, image, target, _: slow.fullgrad(net, image, target),
    )


def test_ada_sise_equals_the_slow_twin():
    net, inputs = seeded(Residual), smooth(2, 24, 24)
    adapter = ModelAdapter(net, input_size=(24, 24))
    found = explainer("ada-sise", adapter).explain(inputs, ClassProbability(torch.tensor([[0], [3]])))
    for image, target in enumerate(CLASSES):
        wanted = comparing.slowly(net, comparing.written_out, inputs[image], target, SiseParameters(selection="ada"))
        comparing.assert_equals_slow(found[image][0], wanted)


# ---------------------------------------------------------------- closed forms


class Linear(nn.Module):
    """Every logit is a weighted sum of the pixels and a bias."""

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        self.head = nn.Linear(3 * side * side, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))

    def weights(self, target: int, side: int = 16) -> Tensor:
        return self.head.weight[target].detach().double().view(3, side, side)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_linear_models_integrated_gradients_are_weight_times_difference(baseline):
    net, inputs = seeded(Linear), smooth(2, 16, 16)
    found = maps("integrated_gradients", net, inputs, [1, 2], IntegratedGradientsParameters(3, baseline))
    for image, target in enumerate((1, 2)):
        product = net.weights(target) * (inputs[image].double() - BASELINES[baseline])
        assert_near(found[image], product.sum(0).clamp(min=0), 1e-5)


class Quadratic(nn.Module):
    """`z_c = sum w_c x^2`, whose integrated gradients are `w_c x^2` and whose gradient is `2 w_c x`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * x)


def test_two_points_integrate_a_quadratic_model_exactly():
    net, inputs = seeded(Quadratic), smooth(1, 16, 16)
    (found,) = maps("integrated_gradients", net, inputs, [1], IntegratedGradientsParameters(steps=2))
    assert_near(found, (net.linear.weights(1) * inputs[0].double() ** 2).sum(0).clamp(min=0), 1e-5)


def test_integrated_gradients_sum_to_the_logits_difference():
    """Completeness, on a network whose logit is smooth: the positive part of one class less that of its negative."""
    net, inputs = seeded(Quadratic), smooth(1, 16, 16)
    with torch.no_grad():
        net.linear.head.weight[2] = -net.linear.head.weight[1]
        logits = net(inputs)[0] - net(torch.zeros_like(inputs))[0]
    up, down = (maps("integrated_gradients", net, inputs, [target])[0].sum() for target in (1, 2))
    assert up - down == pytest.approx(float(logits[1]), rel=1e-4)


def test_smoothgrad_of_a_linear_model_is_its_weights():
    net, inputs = seeded(Linear), smooth(1, 16, 16)
    (found,) = maps("smoothgrad", net, inputs, [1], SmoothGradParameters(samples=3))
    assert_near(found, net.weights(1).abs().amax(0), 1e-5)


def test_a_linear_models_occlusion_is_the_mean_of_the_windows_sums():
    net, inputs = seeded(Linear), smooth(1, 16, 16)
    (found,) = maps("occlusion", net, inputs, [1], OcclusionParameters(window=4, stride=4), target=ClassLogit)
    inside = functional.avg_pool2d((net.weights(1) * inputs[0].double()).sum(0)[None, None], 4) * 16
    assert_near(found, functional.interpolate(inside, scale_factor=4)[0, 0].clamp(min=0), 1e-5)
    (each,) = maps("occlusion", net, inputs, [1], OcclusionParameters(window=1, stride=1), target=ClassLogit)
    assert_near(each, (net.weights(1) * inputs[0].double()).sum(0).clamp(min=0), 1e-4)


def test_rise_on_a_linear_model_has_its_expected_value():
    """`E[s(M) M_p] / P = P sum_q v_q + (1 - P) sum_q v_q K_pq`, v = w x + b, K the masks' mean overlap."""
    net, inputs, side, grid, keep = seeded(Linear), smooth(1, 16, 16), 16, 4, 0.4
    with torch.no_grad():
        net.head.weight.mul_(net.head.weight > 0)
        net.head.bias.fill_(1.0)
    inputs = inputs.abs()
    (found,) = maps("rise", net, inputs, [1], RiseParameters(6000, grid, keep), target=ClassLogit, batch_size=64)
    values = (net.weights(1) * inputs[0].double()).sum(0)
    large = oracles.upsample(torch.eye(grid).double()[:, None, :], (1, (grid + 1) * 4))[:, 0].T
    overlap = sum(large[shift : shift + side] @ large[shift : shift + side].T for shift in range(4)) / 4
    wanted = 1 + keep * values.sum() + (1 - keep) * overlap @ values @ overlap
    assert np.abs(found / wanted.numpy() - 1).max() <= 0.06  # about five deviations of the mean of 6000


def test_under_mean_pooling_ablationcam_weighs_by_weight_times_mean():
    net, inputs = seeded(Pooled), smooth(1, 16, 16)
    (found,) = maps("ablationcam", net, inputs, [1])
    own = net.features(inputs)[0].detach().double()
    weights = net.head.weight[1].detach().double() * own.mean((1, 2))
    assert_near(found, torch.einsum("k,khw->hw", weights, own).relu(), 1e-5)


def small_vit():
    """Three layers over 16 patches, with a head that is not of zeros."""
    net = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=5
    )
    nn.init.normal_(net.heads.head.weight)
    return net


def test_ablation_of_tokens_is_ablation_in_the_whole_network():
    """A channel of the picture's tokens is set to 0; the class token keeps it."""
    net, inputs = seeded(small_vit), smooth(1, 32, 32)
    (found,) = maps("ablationcam", net, inputs, [1])
    double, image = oracles.double_copy(net), inputs.double()
    layer, kept = double.encoder.layers[1], {}

    def logit_without(channel):
        def zero(_module, _given, out):
            kept["tokens"], out = out, out.clone()
            if channel is not None:
                out[:, 1:, channel] = 0
            return out

        handle = layer.register_forward_hook(zero)
        with torch.no_grad():
            logit = double(image)[0, 1]
        handle.remove()
        return float(logit)

    whole = logit_without(None)
    tokens = kept["tokens"][0, 1:].reshape(4, 4, 12)
    native = sum((whole - logit_without(channel)) * tokens[..., channel] for channel in range(12))
    assert_near(found, oracles.upsample(native.clamp(min=0)[None], (32, 32))[0])


@pytest.mark.parametrize("make", [Plain, Residual, Depthwise, InPlace])
def test_the_cut_networks_ablation_is_the_whole_networks(make):
    adapter, inputs = adapter_of(seeded(make)), smooth(1, 32, 32)
    taps = adapter.network.taps(adapter.network.blocks()[-1:])
    with adapter.borrowed():
        logits, (own,) = taps(inputs)
        own = own.detach().clone()
        own[:, 1] = 0
        replaced = taps.tail()(torch.zeros_like(inputs), own.clone())
        assert torch.allclose(replaced, TAILS[make](adapter.module, own), atol=1e-6)
        assert not torch.allclose(replaced, logits)


# ---------------------------------------------------------------- FullGrad


@pytest.mark.parametrize("make", [Plain, Residual])
def test_the_input_term_and_all_bias_terms_sum_to_the_logit(make):
    """Completeness, exact for ReLU networks; the linear layers' biases belong to it."""
    net = oracles.double_copy(seeded(make))
    every = slow.bias_terms(net, smooth(1, 32, 32)[0].double(), 2, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    logit, terms = every
    assert float(sum(term.sum() for term in terms)) == pytest.approx(float(logit), rel=1e-10)
    _, without = slow.bias_terms(net, smooth(1, 32, 32)[0].double(), 2, (nn.Conv2d, nn.BatchNorm2d))
    assert abs(float(sum(term.sum() for term in without) - logit)) > 1e-3


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 6, 1, groups=3),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, affine=False),
    ],
)
def test_a_bias_is_what_a_layer_makes_of_zeros(layer):
    layer.eval()
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean.copy_(torch.tensor([0.3, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.5, 1.0, 4.0]))
    if isinstance(layer, nn.BatchNorm2d) and layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias)
    with torch.no_grad():
        wanted = layer(torch.zeros(1, 3, 5, 5))
        assert torch.allclose(bias_of(layer).view(1, -1, 1, 1).expand_as(wanted), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Linear(3, 4, bias=False),
        nn.ReLU(),
    ],
)
def test_a_layer_without_a_bias(layer):
    assert bias_of(layer) is None


class NormThenActivation(nn.BatchNorm2d):
    """A batch norm whose output has already passed its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) - 0.3).relu()


class Twice(nn.Module):
    """One convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.first(x).relu()).relu()).relu().mean((2, 3)))


class Functional(Twice):
    """Its second convolution is a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.first(x).relu(), self.again.weight, self.again.bias).relu()
        return self.head(x.mean((2, 3)))


class Fused(Twice):
    """A batch norm with an activation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = NormThenActivation(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("make", [Functional, Fused, Depthwise, Transformer])
def test_fullgrad_refuses_a_network_whose_terms_do_not_sum_to_the_logit(make):
    sentence = r"terms sum to -?[\d.e-]+, and the logit is -?[\d.e-]+\. .* take smoothgrad or integrated_gradients"
    with pytest.raises(ModelError, match=sentence):
        explainer("fullgrad", adapter_of(seeded(make), 32))


@pytest.mark.parametrize("make", [Plain, Residual, Curved, Twice])
def test_the_terms_that_fullgrad_sees_sum_to_the_logit(make):
    one = explainer("fullgrad", adapter_of(seeded(make), 32))
    inputs = smooth(1, 32, 32)
    with one.adapter.borrowed():
        logits, terms_of = one._terms(inputs)
        terms = terms_of(functional.one_hot(torch.tensor([2]), 5).float())
        total = sum(term.sum() for term in terms.values)
        assert float(total) == pytest.approx(float(logits[0, 2]), abs=1e-4)
        assert terms.gap() is None


class OneOddClass(Twice):
    """Class 2 alone has a bias that no layer owns: neither the greatest nor the least logit."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + functional.one_hot(torch.tensor(2), 5) * (logits[:, [0]] - logits[:, [1]]).detach() / 9


class Clipped(Twice):
    """A function that clips large values, which smooth pictures reach and noise does not."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(self.first(x).relu(), 8)
        return self.head(functional.pad(x, (3, 3, 3, 3)).clamp(max=1.0).mean((2, 3)))


def test_fullgrad_refuses_a_class_or_an_image_whose_terms_do_not_sum():
    """The check before the job sees one picture and two classes; each map is checked as well."""
    one = explainer("fullgrad", adapter_of(seeded(OneOddClass), 32))
    assert one.explain(smooth(1, 32, 32), ClassProbability(torch.tensor([[0]])))
    with pytest.raises(ImageError, match="terms sum to"):
        one.explain(smooth(1, 32, 32), ClassProbability(torch.tensor([[0, 2]])))
    clipped = explainer("fullgrad", adapter_of(seeded(Clipped), 32))
    inputs = 5 * smooth(3, 32, 32)
    inputs[0] = inputs[2] = 0.1
    assert clipped.explain(inputs[:1], ClassProbability(torch.tensor([[0]])))
    with pytest.raises(ImageError, match="terms sum to"):
        clipped.explain(inputs, ClassProbability(torch.tensor([[0], [0], [0]])))


class ByName(Twice):
    """Its layers take their inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(input=self.again(input=self.first(input=x))).mean((2, 3)))


class ChannelsLast(nn.Module):
    """Linear layers and an activation between two permutations; 4 x 4 places of 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.act = nn.Conv2d(3, 6, 8, stride=8), nn.Linear(6, 24), nn.GELU()
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.wide(self.first(x).permute(0, 2, 3, 1))).mean((1, 2)))


def test_fullgrad_takes_layers_that_are_called_by_name():
    assert explainer("fullgrad", adapter_of(seeded(ByName), 32)).explain(smooth(1, 32, 32), CLASS_2)


def test_fullgrad_tells_channels_last():
    """A 1 x 1 convolution gives the same map as the linear layer that it equals."""
    last, first = seeded(ChannelsLast), seeded(ChannelsLast)
    wide = nn.Conv2d(6, 24, 1)
    wide.load_state_dict({"weight": first.wide.weight[:, :, None, None], "bias": first.wide.bias})
    twin = nn.Sequential(first.first, wide, first.act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), first.head)
    maps = [
        explainer("fullgrad", adapter_of(net, 32)).explain(smooth(1, 32, 32), CLASS_2)[0][0].saliency_hw
        for net in (last, twin)
    ]
    np.testing.assert_allclose(*maps, rtol=1e-4, atol=1e-4)


class Frozen(Twice):
    """Its forward records no gradient."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("name", ["fullgrad", "gradient", "integrated_gradients"])
def test_a_forward_without_gradients_is_told(name):
    with pytest.raises(ModelError, match="no gradient reaches the output"):
        explainer(name, adapter_of(seeded(Frozen), 32)).explain(smooth(1, 32, 32), CLASS_2)


def test_a_network_without_biases_is_refused():
    with pytest.raises(ModelError, match=r"fullgrad reads .* model has none: take smoothgrad"):
        explainer("fullgrad", adapter_of(seeded(Linear), 16))


# ---------------------------------------------------------------- completeness of integrated gradients


class Rounded(Twice):
    """Most of its logits comes through a function without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits / 20 + logits.detach()


class Steep(Twice):
    """It grows within a small part of the path from the baseline, where few steps see nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((20 * x).tanh())


def balanced(make, steps):
    """The findings on two pictures, each by the class whose logit changes most."""
    adapter, inputs = adapter_of(seeded(make), 16), smooth(2, 16, 16)
    with torch.no_grad(), adapter.borrowed():
        changes = adapter.logits(inputs) - adapter.logits(torch.zeros_like(inputs))
    one = explainer("integrated_gradients", adapter, IntegratedGradientsParameters(steps=steps))
    return check_balance(one, inputs, one.adapter.target(changes.abs().argmax(1, keepdim=True)))


def test_integrated_gradients_sum_to_the_change_of_the_logit():
    one = explainer("integrated_gradients", adapter_of(seeded(Curved), 16), IntegratedGradientsParameters(steps=100))
    inputs = smooth(1, 16, 16)
    own = one.balance(inputs, CLASS_2)
    with torch.no_grad(), one.adapter.borrowed():
        after, before = one.adapter.logits(inputs), one.adapter.logits(torch.zeros_like(inputs))
    assert own.wanted == pytest.approx(float((after - before)[0, 2]), rel=1e-5)
    assert own.largest == pytest.approx(float((after - before).abs().max()), rel=1e-5)
    assert own.gap < 0.01
    assert balanced(Curved, 100) == ()


@pytest.mark.parametrize("readout", ["softmax", "sigmoid", "identity", "probabilities"])
def test_the_sum_is_of_the_output_whatever_the_readout(readout):
    adapter = adapter_of(nn.Sequential(seeded(Twice), nn.Softmax(1)), 16)
    adapter.readout = readout
    one = explainer("integrated_gradients", adapter, IntegratedGradientsParameters(steps=100))
    own = one.balance(smooth(1, 16, 16), adapter.target(torch.tensor([[2]])))
    assert own.wanted == pytest.approx(own.found, rel=0.1)


def test_a_rough_sum_is_said_and_a_gross_one_refused():
    (sentence,) = balanced(Steep, 6)
    assert re.match(
        r"integrated_gradients sums to \S+ in 6 steps, and the logit changes by \S+ .* -p steps=24", sentence
    )
    with pytest.raises(ModelError, match=r"sums to .* are missing or too much\): take more steps, .* has no gradient"):
        balanced(Rounded, 50)


# ---------------------------------------------------------------- extremal perturbation


def test_the_smooth_maximum_over_bells_equals_its_twin():
    heights = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    found = extremal.max_convolved(heights)
    for own, wanted in zip(found, heights, strict=True):
        twin = slow.max_convolution(wanted.numpy(), 3.0, 20.0, 4)
        assert np.abs(own.numpy() - twin).max() <= 1e-12


def test_one_height_spreads_as_a_bell_with_a_flat_top():
    heights = torch.zeros(1, 15, 15).double()
    heights[0, 7, 7] = 1
    (row,) = extremal.max_convolved(heights)[:, 7]
    assert torch.allclose(row, row.flip(0))
    assert row[7] == pytest.approx(float(row[6]), rel=0.05)  # 1/3 of a deviation lies under the flat top
    assert row[7] > 0.9
    assert (row[7:].diff() <= 0).all()
    assert row[-1] < 0.01
    assert extremal.max_convolved(torch.zeros(1, 4, 4)).abs().max() == 0


def test_the_pyramid_and_its_lookup_equal_their_twins():
    image = smooth(1, 6, 5)[0].double()
    levels = extremal.pyramid(image)
    assert levels.shape == (8, 3, 6, 5)
    assert torch.equal(levels[-1], image)
    for level, sigma in ((0, 20.0), (6, 20.0 / 7)):
        assert np.abs(levels[level, 0].numpy() - slow.blurred(image[0].numpy(), sigma)).max() <= 1e-9
    mask = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    mask[0, 0, :3] = torch.tensor([0.0, 1.0, 3 / 7])
    found = extremal.between_levels(levels[None], mask)[0]
    assert np.abs(found.numpy() - slow.looked_up(levels.numpy(), mask[0].numpy())).max() <= 1e-12
    assert torch.equal(found[:, 0, 0], levels[0, :, 0, 0])
    assert torch.equal(found[:, 0, 1], image[:, 0, 1])


def test_the_lookups_slope_is_the_difference_of_two_levels():
    levels = extremal.pyramid(smooth(1, 8, 8)[0].double())[None]
    mask = torch.full((1, 8, 8), 0.5).double().requires_grad_(True)
    (slopes,) = torch.autograd.grad(extremal.between_levels(levels, mask).sum(), mask)
    assert torch.allclose(slopes[0], 7 * (levels[0, 4] - levels[0, 3]).sum(0))


class Spots(nn.Module):
    """The logit of a class grows with the contrast in its corner."""

    def __init__(self) -> None:
        super().__init__()
        places = torch.zeros(4, 1, 112, 112)
        for index, (top, left) in enumerate(((8, 8), (8, 64), (64, 8), (64, 64))):
            places[index, 0, top : top + 40, left : left + 40] = 1 / 400
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x.square().mean(1, keepdim=True), self.places).flatten(1)


AREA = 0.2
"""A bell on its own covers about 0.13 of 112 pixels by 112."""


@pytest.fixture(scope="module")
def extremal_mask():
    """A picture of broad stripes, and the mask of a fifth of it that 150 steps find for class 1."""
    inputs = (torch.arange(112) // 14 % 2 * 2.0 - 1).expand(1, 3, 112, 112).contiguous()
    adapter = adapter_of(Spots(), 112)
    one = explainer("extremal_perturbation", adapter, ExtremalParameters((AREA,), 150), batch_size=1)
    target = ClassProbability(torch.tensor([[1]]))
    with adapter.borrowed():
        (mask,) = one._optimised(inputs, target, [(0, 0, AREA)])
    return inputs, mask


def test_the_extremal_mask_has_the_area_that_was_asked(extremal_mask):
    _, mask = extremal_mask
    assert mask.shape == (112, 112)
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert float(mask.mean()) == pytest.approx(AREA, abs=0.08)


def test_the_extremal_mask_beats_the_same_mask_elsewhere(extremal_mask):
    inputs, mask = extremal_mask
    levels = extremal.pyramid(inputs[0])[None]

    def score(one):
        return float(Spots()(extremal.between_levels(levels, one[None].float()))[0, 1])

    others = [mask.roll(shifts, (0, 1)) for shifts in ((0, 56), (56, 0), (56, 56))]
    assert score(mask) > 2 * max(score(other) for other in others)
    shuffled = mask.flatten()[torch.randperm(112 * 112, generator=torch.Generator().manual_seed(0))].view(112, 112)
    assert score(mask) > 1.5 * score(shuffled)
    assert mask[8:48, 64:104].sum() > 0.4 * mask.sum()


def test_the_extremal_map_is_the_mask_blurred():
    adapter, inputs = adapter_of(seeded(Residual)), smooth(1, 32, 32)
    one, target = explainer("extremal_perturbation", adapter, ExtremalParameters((0.3,), 5)), [[1]]
    with adapter.borrowed():
        (mask,) = one._optimised(inputs, ClassProbability(torch.tensor(target)), [(0, 0, 0.3)])
    saliency = one.explain(inputs, ClassProbability(torch.tensor(target)))[0][0].saliency_hw
    assert np.abs(saliency - blurred(mask[None], 0.09 * 32)[0].numpy()).max() <= 1e-9


def test_the_areas_masks_are_summed():
    net, inputs = seeded(Residual), smooth(1, 32, 32)
    both, one, other = (
        maps("extremal_perturbation", net, inputs, [1], ExtremalParameters(areas, 5))[0]
        for areas in ((0.1, 0.3), (0.1,), (0.3,))
    )
    assert_near(both, one + other)


# ---------------------------------------------------------------- controls


def test_the_random_map_is_uniform_and_depends_on_the_seed():
    one, other = maps("random", seeded(Pooled), smooth(2, 64, 64), [0, 1], seeds=[1, 2])
    for own in (one, other):
        assert own.min() >= 0
        assert own.max() < 1
        assert np.histogram(own, 4, (0, 1))[0] / own.size == pytest.approx([0.25] * 4, abs=0.03)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.08


def test_the_gaussian_is_centred():
    (found,) = maps("gaussian", seeded(Pooled), smooth(1, 20, 30), [0])
    wanted = [[np.exp(-0.5 * (((i - 9.5) / 5) ** 2 + ((j - 14.5) / 7.5) ** 2)) for j in range(30)] for i in range(20)]
    assert np.abs(found - wanted).max() <= 1e-12


def test_edges_equal_their_twin_and_a_constant_picture_has_none():
    inputs = smooth(1, 20, 14)
    (found,) = maps("edges", seeded(Pooled), inputs, [0])
    assert_near(found, slow.gradient_magnitude(inputs[0].double().numpy(), 1, 2), 1e-9)
    (even,) = maps("edges", seeded(Pooled), torch.ones(1, 3, 16, 16), [0])
    assert not even.any()


# ---------------------------------------------------------------- what holds for every explainer

CHEAP = {
    "rise": RiseParameters(num_masks=64, grid=4),
    "occlusion": OcclusionParameters(window=8, stride=4),
    "integrated_gradients": IntegratedGradientsParameters(steps=6),
    "smoothgrad": SmoothGradParameters(samples=4),
    "extremal_perturbation": ExtremalParameters((0.2,), iterations=10),
    "a-fmi": AFmiParameters(),
    "fovex": FovExParameters(fixations=3, steps=12),
    "sise": SiseParameters(),
    "ada-sise": AdaSiseParameters(),
    "scorecam": ScoreCamParameters(),
    "ucag": UcagParameters(crops=2, enlarge=2.5),  # crops of 13 pixels become 32
    "feature-cam": FeatureCamParameters(edges="scharr", interior=0.2),
    "bee": BeeParameters(draws=3, images=3, pool=2),
    "daam": DaamParameters(),
    "legrad": LeGradParameters(),
    "libra": LibraParameters(),
    "reciprocam": ReciproCamParameters(),
}
CONTROLS = {"random", "gaussian", "edges"}
STOCHASTIC = {"bee", "fovex", "random", "rise", "smoothgrad"}
SEEING = [name for name in EXPLAINERS if name not in CONTROLS]
SIDE = 24


def net_for(name, make=Residual, seed=0):
    """The network, or a transformer if the explainer needs one."""
    return seeded(Transformer if name in TRANSFORMERS_ONLY else make, seed)


def cheap(name, net, **options):
    return explainer(name, adapter_of(net, SIDE), CHEAP.get(name, NoParameters()), **options)


def explained(name, net, inputs, classes, seeds=None, **options):
    return cheap(name, net, **options).explain(inputs, ClassProbability(torch.tensor(classes)), seeds)


def assert_same_map(one, other, tolerance=1e-4):
    """Except for the few pixels that rounding may move over SISE's hard thresholds."""
    scale = max(np.abs(one).max(), 1e-9)
    assert (np.abs(one - other) > tolerance * scale).mean() <= 0.002


def test_every_explainer_of_the_catalogue_is_made():
    assert EXPLAINERS.keys() == entries.EXPLAINERS.keys()


@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_map_is_finite_not_negative_and_has_the_inputs_size(name):
    """Also for a picture that is not square; the score is the class's probability."""
    net, inputs = net_for(name), smooth(2, 24, 36)
    adapter = adapter_of(net, (24, 36))
    found = explainer(name, adapter, CHEAP.get(name, NoParameters())).explain(
        inputs, ClassProbability(torch.tensor([[0, 3], [1, 2]]))
    )
    with torch.no_grad():
        scores = net(inputs).double().softmax(1)
    for image, (own, classes) in enumerate(zip(found, [[0, 3], [1, 2]], strict=True)):
        for one, target in zip(own, classes, strict=True):
            assert one.saliency_hw.shape == (24, 36)
            assert one.saliency_hw.dtype == np.float64
            assert np.isfinite(one.saliency_hw).all()
            assert one.saliency_hw.min() >= 0
            assert one.score == pytest.approx(float(scores[image, target]), rel=1e-5)
        assert any(one.saliency_hw.max() > 0 for one in own)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_map_does_not_depend_on_other_images(name):
    net, inputs, seeds = net_for(name), smooth(5, SIDE, SIDE), [7, 8, 9, 10, 11]
    together = explained(name, net, inputs, [[own] for own in range(5)], seeds)
    for image in (0, 4):
        (alone,) = explained(name, net, inputs[image : image + 1], [[image]], seeds[image : image + 1])
        assert alone[0].score == together[image][0].score
        assert alone[0].num_forwards == together[image][0].num_forwards
        assert_same_map(alone[0].saliency_hw, together[image][0].saliency_hw, 1e-6)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_batches_do_not_change_a_map(name):
    net, inputs = net_for(name), smooth(2, SIDE, SIDE)
    found = [
        explained(name, net, inputs, [[0, 3], [1, 2]], [3, 4], batch_size=size, images_per_pass=images)
        for size, images in ((8, 4), (3, 4), (1, 1))
    ]
    for other in found[1:]:
        for own, wanted in zip(other, found[0], strict=True):
            for one, same in zip(own, wanted, strict=True):
                assert_same_map(one.saliency_hw, same.saliency_hw)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_several_targets_at_once_equal_each_target_alone(name):
    net, inputs = net_for(name), smooth(2, SIDE, SIDE)
    together = explained(name, net, inputs, [[0, 3], [1, 2]], [3, 4])
    for index, classes in enumerate(([[0], [1]], [[3], [2]])):
        alone = explained(name, net, inputs, classes, [3, 4])
        for own, wanted in zip(together, alone, strict=True):
            assert own[index].score == wanted[0].score
            assert_same_map(own[index].saliency_hw, wanted[0].saliency_hw, 1e-5)


@pytest.mark.parametrize("name", SEEING)
def test_another_class_and_other_weights_change_the_map(name):
    inputs = smooth(1, SIDE, SIDE)
    first, second = explained(name, net_for(name), inputs, [[0, 1]])[0]
    other = explained(name, net_for(name, seed=1), inputs, [[0]])[0][0]
    for one in (second, other):
        parted = np.abs(one.saliency_hw - first.saliency_hw).max()
        assert parted > 1e-3 * first.saliency_hw.max()


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_a_control_depends_on_no_class_and_no_weights(name):
    inputs = smooth(1, SIDE, SIDE)
    first, second = explained(name, net_for(name), inputs, [[0, 1]])[0]
    other = explained(name, net_for(name, seed=1), inputs, [[0]])[0][0]
    assert np.array_equal(first.saliency_hw, second.saliency_hw)
    assert np.array_equal(first.saliency_hw, other.saliency_hw)
    assert first.score != second.score


class Mirrored(nn.Module):
    """Sees a picture and its mirror image alike, at two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            kernel = (layer.weight + layer.weight.flip(3)) / 2
            x = functional.avg_pool2d(functional.conv2d(x, kernel, layer.bias, padding=1).relu(), 2)
        return self.head(x.mean((2, 3)))


# FullGrad needs layers that are modules; here they are called as functions
@pytest.mark.parametrize("name", [name for name in EXPLAINERS if name not in STOCHASTIC and name != "fullgrad"])
def test_a_mirrored_picture_has_the_mirrored_map(name):
    net, inputs = net_for(name, Mirrored), smooth(1, SIDE, SIDE)
    if name == "extremal_perturbation":  # it ranks values that are close together: rounding errors grow with each step
        net, inputs = net.double(), inputs.double()
    net.mirrored = True
    one = explained(name, net, inputs, [[2]])[0][0].saliency_hw
    other = explained(name, net, inputs.flip(3), [[2]])[0][0].saliency_hw
    assert one.max() > 0
    assert_same_map(one, other[:, ::-1])


class Faulty(nn.Module):
    """Pictures whose first pixel is above 5 have an infinite logit for class 0, and no gradient tells of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("huge", torch.tensor([float("inf"), 0, 0, 0, 0]))
        self.register_buffer("none", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        is_bad = [pixel > 5 for pixel in x[:, 0, 0, 0].tolist()]  # a tensor of it would be a way round all blocks
        return self.net(x) + torch.where(torch.tensor(is_bad)[:, None], self.huge, self.none)


@pytest.mark.parametrize("fault", ["logit", "picture"])
@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_non_finite_image_spoils_only_its_own_map(name, fault):
    net, inputs = Faulty(net_for(name)).eval(), smooth(3, SIDE, SIDE)
    healthy = explained(name, net, inputs, [[0], [0], [0]], [1, 2, 3])
    if fault == "logit":
        inputs[1, 0, 0, 0] = 9
    else:
        inputs[1] = float("nan")
    found = explained(name, net, inputs, [[0], [0], [0]], [1, 2, 3])
    assert found[1][0].saliency_hw.shape == (SIDE, SIDE)
    assert np.isnan(found[1][0].saliency_hw).all()
    assert np.isnan(found[1][0].score)
    for image in (0, 2):
        assert np.isfinite(healthy[image][0].saliency_hw).all()
        assert_same_map(found[image][0].saliency_hw, healthy[image][0].saliency_hw, 1e-6)


def global_states():
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what must not move
    return torch.get_rng_state().tolist(), str(legacy), random.getstate()


@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_map_depends_on_its_seed_and_not_on_global_random_numbers(name):
    net, inputs = net_for(name), smooth(2, SIDE, SIDE)
    before = global_states()
    one = explained(name, net, inputs, [[0], [1]], [3, 4])
    assert global_states() == before
    torch.rand(3)
    again, others = (explained(name, net, inputs, [[0], [1]], seeds) for seeds in ([3, 4], [3, 5]))
    for own, same in zip(one, again, strict=True):
        assert np.array_equal(own[0].saliency_hw, same[0].saliency_hw)
    assert np.array_equal(one[0][0].saliency_hw, others[0][0].saliency_hw)
    assert np.array_equal(one[1][0].saliency_hw, others[1][0].saliency_hw) == (name not in STOCHASTIC)


def state_of(net):
    return {
        "modes": [child.training for child in net.modules()],
        "in place": [getattr(child, "inplace", None) for child in net.modules()],
        "needs": [parameter.requires_grad for parameter in net.parameters()],
        "gradients": [parameter.grad for parameter in net.parameters()],
        "hooks": [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in net.modules()],
        "weights": [tensor.tolist() for tensor in net.state_dict().values()],
    }


@pytest.mark.parametrize("name", EXPLAINERS)
def test_the_model_is_given_back_unchanged(name):
    """In training mode, with one frozen parameter; also when the network fails half way."""
    make = Residual if name == "fullgrad" else Depthwise  # it refuses networks with squeeze-and-excitation
    net, inputs = net_for(name, make).train(), smooth(1, SIDE, SIDE)
    net.project.weight.requires_grad_(False)
    before = state_of(net)
    own = cheap(name, net)
    inputs_before = inputs.clone()
    own.explain(inputs, ClassProbability(torch.tensor([[0, 1]])))
    assert state_of(net) == before
    assert torch.equal(inputs, inputs_before)
    with pytest.raises((RuntimeError, IndexError)):
        own.explain(inputs, ClassProbability(torch.tensor([[0, 99]])))
    assert state_of(net) == before
