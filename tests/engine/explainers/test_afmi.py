"""A-FMI: its slow twin, the closed form against passes, and the importance of duplicate maps."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.parameters import AFmiParameters
from blocksight.engine.errors import ImageError
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.head import pooled_weights
from blocksight.engine.model.targets import ClassProbability
from tests.engine import oracles
from tests.engine import slow_explainers as slow
from tests.engine.explainers.test_explainers import BLACK, CLASS_2, TAILS, adapter_of, assert_near, small_vit
from tests.engine.nets import Depthwise, InPlace, Plain, Pooled, Residual, Untraceable, seeded, smooth

REMOVALS = ["reference", "zero", "insert", "two_sided"]
CLASSES = [[0, 3], [1, 2]]
PASSES = {"tail": "passes"}


def afmi(net: nn.Module, inputs: Tensor, **options):
    return EXPLAINERS["a-fmi"](adapter_of(net, tuple(inputs.shape[2:])), AFmiParameters(**options), batch_size=5)


def explained(net, inputs, classes, seeds=None, **options):
    return afmi(net, inputs, **options).explain(inputs, ClassProbability(torch.tensor(classes)), seeds)


def signed(net, inputs, classes, **options):
    """The signed maps at the block's grid."""
    target = ClassProbability(torch.tensor(classes))
    found = afmi(net, inputs, **options).attribute(inputs, target, [0] * len(inputs))
    return [[one.values for one in own] for own in found]


def importance(one) -> np.ndarray:
    return one.products.channel_importance


def black(size: tuple[int, int]) -> Tensor:
    """The black picture [3, H, W], float64."""
    return BLACK.expand(3, *size).clone()


# ---------------------------------------------------------------- the slow twin

VARIANTS = [
    *({"removal": removal, "score": score} for removal, score in product(REMOVALS, ("logit", "probability"))),
    {"keep": "all"},
    {"threshold": 0.02},
    {"conserve": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("make", [Plain, Residual, Depthwise, InPlace, Untraceable])
def test_afmi_equals_its_twin(make, options):
    net, inputs = seeded(make), smooth(2, 32, 32)
    found, double = explained(net, inputs, CLASSES, **options), oracles.double_copy(net)
    for image, own in enumerate(found):
        for target, one in zip(CLASSES[image], own, strict=True):
            wanted, native = slow.afmi_signed(
                double,
                lambda net, _, maps: TAILS[make](net, maps),
                lambda picture: slow.last_maps(double, picture),
                inputs[image].double(),
                target,
                black((32, 32)),
                **options,
            )
            assert np.abs(importance(one) - wanted).max() <= 1e-5 * np.abs(wanted).max()
            whole = slow.upsample(native.clamp(min=0)[None], (32, 32))[0].numpy()
            assert np.abs(one.saliency_hw - whole).max() <= 1e-4 * native.abs().max()


def through_the_tokens(net: nn.Module, image: Tensor, maps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits [1, K] with `maps` as the picture's tokens behind the second layer; and these tokens [C, 4, 4]."""
    kept = {}

    def put(_module, _given, out):
        kept["maps"] = out[0, 1:].T.reshape(-1, 4, 4)
        if maps is None:
            return out
        return torch.cat([out[:, :1], maps.flatten(2).transpose(1, 2)], 1)

    handle = net.encoder.layers[1].register_forward_hook(put)
    with torch.no_grad():
        logits = net(image[None])
    handle.remove()
    return logits, kept["maps"]


@pytest.mark.parametrize("removal", REMOVALS)
def test_tokens_are_replaced_in_the_whole_network(removal):
    """The class token of the picture is kept; its other tokens are replaced."""
    net, inputs = seeded(small_vit), smooth(1, 32, 32)
    ((one,),) = explained(net, inputs, [[1]], removal=removal, rectify=False)
    double = oracles.double_copy(net)
    wanted, native = slow.afmi_signed(
        double,
        lambda net, image, maps: through_the_tokens(net, image, maps)[0],
        lambda picture: through_the_tokens(double, picture)[1],
        inputs[0].double(),
        1,
        black((32, 32)),
        removal=removal,
    )
    assert np.abs(importance(one) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert_near(one.saliency_hw, slow.upsample(native.abs()[None], (32, 32))[0])
    assert one.num_forwards == 1 + 12 * (2 if removal == "two_sided" else 1)


# ---------------------------------------------------------------- closed form and passes


@pytest.mark.parametrize("score", ["logit", "probability"])
@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("make", [Residual, Depthwise, Untraceable])
def test_the_closed_form_equals_passes(make, removal, score):
    net, inputs = seeded(make), smooth(2, 24, 24)
    closed, passes = (
        explained(net, inputs, CLASSES, removal=removal, score=score, **options) for options in ({}, PASSES)
    )
    num_maps = len(importance(closed[0][0]))
    for own, others in zip(closed, passes, strict=True):
        for one, other in zip(own, others, strict=True):
            assert np.abs(importance(one) - importance(other)).max() <= 1e-5 * np.abs(importance(other)).max()
            assert_near(one.saliency_hw, other.saliency_hw, 1e-5)
            assert one.num_forwards == 1
            assert other.num_forwards == 1 + num_maps * (2 if removal == "two_sided" else 1)


def test_the_stated_number_of_passes_behind_the_block_is_made():
    """In batches of 5: one with nothing replaced, one per map of 12. The whole network runs only for the score."""
    net, inputs = seeded(Residual), smooth(1, 24, 24)
    counts = {"head": 0, "network": 0}
    own = afmi(net, inputs, **PASSES)
    net.head.register_forward_hook(lambda _m, given, _o: counts.update(head=counts["head"] + len(given[0])))
    net.register_forward_hook(lambda *_: counts.update(network=counts["network"] + 1))
    own.explain(inputs, ClassProbability(torch.tensor([[0]])))
    assert counts == {"head": 15 + 3 * own.images_per_pass, "network": 1}  # the image, the reference and the score


class Behind(nn.Module):
    """One stage, followed by the given layers."""

    def __init__(self, head: Callable[["Behind", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.features, self.linear, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4), nn.Linear(4, 4)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self, x, self.features(x))


NOT_POOLED = {
    "greatest": lambda net, _, maps: net.linear(maps.amax((2, 3))),
    "a ReLU before": lambda net, _, maps: net.linear(maps.relu().mean((2, 3))),
    "a ReLU behind": lambda net, _, maps: net.last(net.linear(maps.mean((2, 3))).relu()),
    "a bound": lambda net, _, maps: net.linear(maps.mean((2, 3)).clamp(-5, 5)),
    "weights by place": lambda net, _, maps: net.linear(maps[:, :, :4].mean((2, 3))),
    "no gradients": lambda net, _, maps: net.linear(maps.detach().mean((2, 3))),
}


@pytest.mark.parametrize("head", NOT_POOLED)
def test_a_head_with_more_than_pooling_and_a_linear_layer_is_detected(head):
    adapter = adapter_of(seeded(lambda: Behind(NOT_POOLED[head])), 16)
    assert pooled_weights(adapter, adapter.network.blocks(["features"])[-1]) is None


@pytest.mark.parametrize("make", [Plain, small_vit])
def test_heads_without_pooling_have_no_pooled_weights(make):
    adapter = adapter_of(seeded(make), 32)
    assert pooled_weights(adapter, adapter.network.blocks()[-1]) is None


@pytest.mark.parametrize("make", [Pooled, Residual, Depthwise, InPlace, Untraceable])
def test_a_pooled_heads_weights_are_read(make):
    net = seeded(make).train()
    adapter = adapter_of(net, 32)
    found = pooled_weights(adapter, adapter.network.blocks()[-1])
    assert found.dtype == torch.float64
    assert torch.allclose(found, net.head.weight.detach().double(), rtol=1e-5, atol=1e-6)
    assert net.training


# ---------------------------------------------------------------- properties of an importance


def test_a_head_that_is_no_pooling_on_an_image_is_told():
    """The head was tried on random maps; the channels' steps must also sum to the difference of the logits."""
    inputs = smooth(1, 32, 32)
    one = afmi(seeded(Pooled), inputs)
    one.weights = 1.01 * one.weights
    with pytest.raises(ImageError, match=r"its channels sum to .* where the logit differs by .*: take -p tail=passes"):
        one.explain(inputs, CLASS_2)


@pytest.mark.parametrize("tail", ["auto", "passes"])
def test_all_importances_sum_to_the_gain_of_the_logit(tail):
    net, inputs = seeded(Residual), smooth(1, 24, 24)
    ((one,),) = explained(net, inputs, [[2]], keep="all", tail=tail)
    with torch.no_grad():
        gained = net(inputs)[0, 2] - net(black((24, 24)).float()[None])[0, 2]
    assert float(importance(one).astype(np.float64).sum()) == pytest.approx(float(gained), rel=1e-5)


def test_conserved_importance_is_the_difference_of_two_class_activation_maps():
    """`(CAM(x) - CAM(x')) / (h w)`, place by place; its sum is the gain of the logit."""
    net, inputs = seeded(Pooled), smooth(1, 16, 16)
    ((found,),) = signed(net, inputs, [[2]], keep="all", conserve=True)
    double = oracles.double_copy(net)
    with torch.no_grad():
        maps = double.features(inputs.double())[0] - double.features(black((16, 16))[None])[0]
    cam = torch.einsum("k,khw->hw", double.head.weight[2].detach(), maps)
    assert torch.allclose(found, cam / 256, rtol=1e-4, atol=1e-6 * float(cam.abs().max()))


@pytest.mark.parametrize("conserve", [False, True])
@pytest.mark.parametrize("tail", ["auto", "passes"])
@pytest.mark.parametrize("removal", ["reference", "insert", "two_sided"])
def test_a_picture_against_itself_has_no_importance_and_an_empty_map(removal, tail, conserve):
    inputs = black((24, 24)).float()[None]
    ((one,),) = explained(seeded(Residual), inputs, [[0]], removal=removal, tail=tail, conserve=conserve)
    assert not importance(one).any()
    assert not one.saliency_hw.any()


class Copies(nn.Module):
    """Every map twice; the linear layer reads half of their sum, or the greater of the two."""

    def __init__(self, net: Pooled, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.joined = net, joined

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.cat([self.net.features(x)] * 2, 1).mean((2, 3)).chunk(2, 1)
        return self.net.head(self.joined(one, other))


def test_two_copies_that_share_a_weight_have_half_the_importance_each():
    net, inputs = seeded(Pooled), smooth(1, 16, 16)
    copies = Copies(net, lambda one, other: (one + other) / 2)
    ((single,),), ((both,),) = (explained(own, inputs, [[2]], keep="all") for own in (net, copies))
    assert len(importance(both)) == 12
    assert importance(both) == pytest.approx(np.tile(importance(single) / 2, 2), rel=1e-4, abs=1e-7)


def test_two_copies_under_a_maximum_have_no_importance():
    """Redundant feature maps are not relevant: removing one alone changes nothing."""
    net, inputs = seeded(Pooled), smooth(1, 16, 16)
    with torch.no_grad():
        net.features[0].bias.fill_(2)  # by its kernel, each map of the picture is above or below that of the black one
        net.features[0].weight.copy_(net.features[0].weight.abs())
    ((single,),), ((both,),) = (explained(own, inputs, [[2]], keep="all") for own in (net, Copies(net, torch.maximum)))
    assert np.abs(importance(single)).max() > 0.01
    assert not importance(both).any()
    assert not both.saliency_hw.any()


# ---------------------------------------------------------------- references and the other choices


def test_several_references_have_the_mean_of_their_signed_maps():
    net, inputs, names = seeded(Residual), smooth(2, 24, 24), ("black", "mean", "blur", "noise")
    both = signed(net, inputs, CLASSES, references=names)
    each = [signed(net, inputs, CLASSES, references=(name,)) for name in names]
    for image, index in product(range(2), range(2)):
        mean = sum(one[image][index] for one in each) / 4
        assert torch.allclose(both[image][index], mean, atol=1e-9)
    products = [explained(net, inputs, CLASSES, references=of) for of in (names, *((name,) for name in names))]
    together, *single = (importance(own[0][0]) for own in products)
    assert together == pytest.approx(np.mean(single, 0), rel=1e-5, abs=1e-7)
    assert products[0][0][0].num_forwards == 4
    assert len({own.tobytes() for own in single}) == 4


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mean", lambda image: torch.zeros_like(image)),
        ("blur", lambda image: torch.stack([torch.from_numpy(slow.blurred(one.numpy(), 10 / 7)) for one in image])),
    ],
)
def test_references_match_their_names(name, reference):
    net, inputs = seeded(Residual), smooth(1, 32, 32)
    ((one,),) = explained(net, inputs, [[0]], references=(name,))
    double = oracles.double_copy(net)
    wanted, _ = slow.afmi_signed(
        double,
        lambda net, _, maps: TAILS[Residual](net, maps),
        lambda picture: slow.last_maps(double, picture),
        inputs[0].double(),
        0,
        reference(inputs[0].double()),
    )
    assert np.abs(importance(one) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_noise_depends_on_the_seed_alone():
    net, inputs = seeded(Residual), smooth(2, 24, 24)
    one, same, other = (
        explained(net, inputs, [[0], [0]], seeds, references=("noise",)) for seeds in ([3, 4], [3, 4], [3, 5])
    )
    assert [own[0].saliency_hw.tobytes() for own in one] == [own[0].saliency_hw.tobytes() for own in same]
    assert np.array_equal(one[0][0].saliency_hw, other[0][0].saliency_hw)
    assert not np.array_equal(one[1][0].saliency_hw, other[1][0].saliency_hw)


def test_without_rectify_the_map_is_the_absolute_value():
    net, inputs = seeded(Residual), smooth(1, 24, 24)
    ((native,),) = signed(net, inputs, [[0]], keep="all")
    assert native.min() < 0 < native.max()
    for rectify, part in ((True, native.clamp(min=0)), (False, native.abs())):
        ((one,),) = explained(net, inputs, [[0]], keep="all", rectify=rectify)
        assert_near(one.saliency_hw, slow.upsample(part[None], (24, 24))[0], 1e-6)


@pytest.mark.parametrize("removal", ["reference", "two_sided"])
def test_a_limit_keeps_the_channels_that_differ_most(removal):
    net, inputs = seeded(Plain), smooth(1, 32, 32)
    ((whole,),), ((some,),), ((more,),) = (
        explained(net, inputs, [[0]], removal=removal, channels=number) for number in (None, 4, 99)
    )
    double = oracles.double_copy(net)
    maps = slow.last_maps(double, inputs[0].double()) - slow.last_maps(double, black((32, 32)))
    tried = np.sort(maps.abs().sum((1, 2)).argsort(descending=True)[:4].numpy())
    assert np.array_equal(importance(some)[tried], importance(whole)[tried])
    assert np.count_nonzero(importance(some)) <= 4 < np.count_nonzero(importance(whole))
    ways = 2 if removal == "two_sided" else 1
    assert (some.num_forwards, whole.num_forwards, more.num_forwards) == (1 + 4 * ways, 1 + 10 * ways, 1 + 10 * ways)
    assert np.array_equal(more.saliency_hw, whole.saliency_hw)


def test_the_closed_form_ignores_the_limit_of_channels():
    net, inputs = seeded(Residual), smooth(1, 24, 24)
    (one,), (other,) = (explained(net, inputs, [[0]], channels=number)[0] for number in (None, 2))
    assert np.array_equal(one.saliency_hw, other.saliency_hw)
    assert np.array_equal(importance(one), importance(other))


def test_an_adapter_may_take_pictures_of_another_size():
    """As for wrappers that enlarge crops."""
    net = seeded(Residual)
    small = adapter_of(net, 24)
    large = ModelAdapter(
        net, input_size=(40, 40), mean=small._mean.flatten().tolist(), std=small._std.flatten().tolist()
    )
    parameters = replace(AFmiParameters(), references=("black", "noise"))
    ((own,),) = EXPLAINERS["a-fmi"](large, parameters).explain(smooth(1, 40, 40), ClassProbability(torch.tensor([[0]])))
    assert own.saliency_hw.shape == (40, 40)
    assert functional.relu(torch.from_numpy(own.saliency_hw)).sum() > 0
