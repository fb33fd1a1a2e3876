"""SISE against hand numbers, against the slow twin, and against its own invariants."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from engine.catalog import SiseParameters
from engine.explainers.sise import Sise, select
from engine.models import ModelAdapter
from engine.taps import frozen
from engine.targets import ClassProbability
from tests.engine import oracles
from tests.engine.nets import Plain, Residual, Untraceable, seeded

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FLIPPED_SHARE = 0.001


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- hand vectors


@pytest.mark.parametrize(
    ("alphas", "mu", "kept"),
    [
        ([-1, 0, 0.25, 0.5, 1], 0.0, [2, 3, 4]),
        ([-1, 0, 0.25, 0.5, 1], 0.25, [3, 4]),
        ([-1, 0, 0.25, 0.5, 1], 0.5, [4]),
        ([-1, 0, 0.25, 0.5, 1], 0.75, [4]),
        ([-1e-9, 0, 2.5e-10, 5e-10, 1e-9], 0.25, [3, 4]),
        ([-3, -1], 0.0, []),
        ([0, 0], 0.0, []),
    ],
)
def test_hand_vector_v3(alphas, mu, kept):
    alphas = torch.tensor(alphas, dtype=torch.float64)
    assert select(alphas, SiseParameters(mu=mu)).tolist() == kept
    assert oracles.keep(alphas, mu, "mu") == kept


def test_ada_keeps_a_subset_with_the_largest():
    alphas = torch.tensor([-1.0, 0.01, 0.02, 0.03, 0.9, 1.0], dtype=torch.float64)
    assert select(alphas, SiseParameters(selection="ada")).tolist() == [4, 5]
    assert select(torch.tensor([-1.0, 0.5]), SiseParameters(selection="ada")).tolist() == [1]
    assert select(torch.tensor([0.5, 0.5]), SiseParameters(selection="ada")).tolist() == [0]


class HandNet(nn.Module):
    """V8: two channels, a picture and its mirror image; pooled; a linear stand-in for the confidence."""

    def __init__(self, weight_b: float = -0.25) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.register_buffer("of_a", torch.tensor([[1.0, 0], [0, 0.5]]))
        self.register_buffer("of_b", torch.tensor([[0, weight_b], [weight_b, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(torch.cat([x[:, :1], x[:, :1].flip(2)], 1))
        pooled = self.pool(first)
        value = (pooled[:, 0] * self.of_a).sum((1, 2)) + (pooled[:, 1] * self.of_b).sum((1, 2))
        return value[:, None]


class Raw:
    """A target that is the output itself."""

    num_targets = 1

    def of(self, images):
        return self

    def score(self, logits, images):
        return logits.double()

    def direction(self, logits, index):
        return torch.ones_like(logits)


PICTURE = torch.tensor([[4.0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])


def hand_case(weight_b: float = -0.25):
    inputs = torch.zeros(1, 3, 4, 4)
    inputs[0, 0] = PICTURE
    adapter = ModelAdapter(HandNet(weight_b), input_size=(4, 4))
    explainer = Sise(adapter, SiseParameters(), blocks=("act", "pool"), batch_size=2, images_per_pass=1)
    return explainer.explain(inputs, Raw())[0][0]


def test_hand_vector_v8_end_to_end():
    found = hand_case()
    assert found.score == 1.75
    assert [block.kept for block in found.blocks] == [(0,), (0,)]
    assert found.num_forwards == 2
    first, second = (block.saliency_hw for block in found.blocks)
    assert first == pytest.approx(PICTURE.numpy() / 4, abs=1e-6)
    wanted = [
        [1, 0.75, 0.25, 0],
        [0.75, 0.59375, 0.28125, 0.125],
        [0.25, 0.28125, 0.34375, 0.375],
        [0, 0.125, 0.375, 0.5],
    ]
    assert second == pytest.approx(np.array(wanted), abs=1e-6)
    fused = [[2, 1.25, 0, 0], [1.25, 0.59375, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.75]]
    assert found.saliency_hw == pytest.approx(np.array(fused), abs=1e-6)
    assert found.saliency_hw[:2, :2].sum() / found.saliency_hw.sum() == pytest.approx(0.871658, abs=1e-6)


def test_a_negative_score_turns_the_map_over():
    upright, turned = hand_case(), hand_case(weight_b=-1.0)
    assert upright.blocks[1].saliency_hw[0, 0] == 1
    assert turned.blocks[1].saliency_hw[0, 0] == 0


# ---------------------------------------------------------------- the slow twin


def by_modules(names):
    """A capture of the oracle's own: forward hooks, no shared code."""

    def capture(model, image):
        kept = {}
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
            for name in names
        ]
        logits = model(image)
        for handle in handles:
            handle.remove()
        return logits, [kept[name] for name in names]

    return capture


def residual_capture(model, image):
    first = model.stem(image).relu()
    second = (model.inner(first) + first).relu()
    last = model.down(second).relu()
    return model.head(last.mean((2, 3))), [second, last]


def batch(count, size, seed=1):
    smooth = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(smooth, size=(size, size), mode="bicubic") * 4 - 2


CASES = {
    "plain": (Plain, by_modules(["features.1", "features.4", "features.7"]), 32),
    "residual": (Residual, residual_capture, 24),
    "untraceable": (Untraceable, by_modules(["first", "second"]), 24),
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=7),
        by_modules(["relu", "layer1", "layer2", "layer3", "layer4"]),
        64,
    ),
}


def assert_same(fast, slow):
    assert [list(block.kept) for block in fast.blocks] == slow.kept
    assert fast.score == pytest.approx(slow.score, rel=1e-5)
    for block, wanted in zip(fast.blocks, slow.block_maps, strict=True):
        if wanted is None:
            assert block.saliency_hw is None
        else:
            assert np.abs(block.saliency_hw - wanted).max() <= 1e-4
    flipped = np.abs(fast.saliency_hw - slow.fused) > 1e-3
    assert flipped.mean() <= FLIPPED_SHARE


PARAMETERS = {
    "paper": SiseParameters(),
    "mu": SiseParameters(mu=0.3),
    "ada": SiseParameters(selection="ada"),
    "soft-black": SiseParameters(mu=0.2, gate="soft", baseline="black"),
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        pytest.param(name, parameters, id=f"{name}-{kind}")
        for name in CASES
        for kind, parameters in PARAMETERS.items()
        if name != "resnet18" or kind in ("mu", "ada")
    ],
)
def test_equals_the_slow_twin(name, parameters):
    make, capture, size = CASES[name]
    net = seeded(make)
    inputs = batch(3, size)
    classes = [0, 3, 4]
    adapter = ModelAdapter(net, input_size=(size, size))
    fast = Sise(adapter, parameters, images_per_pass=2).explain(
        inputs, ClassProbability(torch.tensor(classes)[:, None])
    )
    black = adapter.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    for image, target, found in zip(inputs, classes, fast, strict=True):
        with frozen(net):
            slow = oracles.sise(
                net,
                capture,
                image[None],
                target,
                mu=parameters.mu,
                selection=parameters.selection,
                gate=parameters.gate,
                baseline=black if parameters.baseline == "black" else 0.0,
            )
        assert_same(found[0], slow)


class Scaled(nn.Module):
    """A network whose logits are so far apart that the softmax rounds to 0 and 1 in float32."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.factor = Plain(), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor


@pytest.mark.parametrize("place", [0, -1], ids=["saturated", "hopeless"])
def test_a_saturated_softmax_selects_as_float64_does(place):
    net = seeded(lambda: Scaled(400.0))
    inputs = batch(1, 32)
    logits = net(inputs).detach()
    target = int(logits[0].argsort(descending=True)[place])
    single = float(logits.softmax(1)[0, target])
    assert single == 1.0 or single < 1e-38  # float32 holds nothing of the gradient
    capture = by_modules(["net.features.1", "net.features.4", "net.features.7"])
    found = Sise(ModelAdapter(net, input_size=(32, 32)), SiseParameters()).explain(
        inputs, ClassProbability(torch.tensor([[target]]))
    )[0][0]
    double = seeded(lambda: Scaled(400.0)).double()
    with frozen(double):
        slow = oracles.sise(double, capture, inputs.double(), target)
    assert [list(block.kept) for block in found.blocks] == slow.kept
    assert any(block.kept for block in found.blocks)


# ---------------------------------------------------------------- invariants (V9 and beyond)


@pytest.fixture(scope="module")
def resnet():
    return ModelAdapter(seeded(lambda: torchvision.models.resnet18(num_classes=7)), input_size=(64, 64))


SOME = SiseParameters(mu=0.5)


def explained(adapter, inputs, classes, parameters=SOME, **options):
    target = ClassProbability(torch.tensor(classes))
    return Sise(adapter, parameters, **options).explain(inputs, target)


def assert_close(one, other):
    assert [block.kept for block in one.blocks] == [block.kept for block in other.blocks]
    assert one.score == pytest.approx(other.score, rel=1e-5)
    for left, right in zip(one.blocks, other.blocks, strict=True):
        assert np.abs(left.saliency_hw - right.saliency_hw).max() <= 1e-4


@pytest.mark.parametrize(("batch_size", "images_per_pass"), [(1, 1), (3, 2), (8, 4), (64, 3)])
def test_results_do_not_depend_on_the_batches(resnet, batch_size, images_per_pass):
    inputs = batch(3, 64)
    wanted = explained(resnet, inputs, [[0], [1], [2]])
    found = explained(resnet, inputs, [[0], [1], [2]], batch_size=batch_size, images_per_pass=images_per_pass)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one[0], other[0])


def test_an_image_has_the_same_bits_in_any_company(resnet):
    inputs = batch(5, 64)
    alone = explained(resnet, inputs[2:3], [[1]])[0][0]
    for order in ([2, 0, 1], [0, 1, 3, 4, 2], [4, 2]):
        among = explained(resnet, inputs[order], [[1]] * len(order))[order.index(2)][0]
        assert np.array_equal(among.saliency_hw, alone.saliency_hw)
        assert among.score == alone.score
        assert among.num_forwards == alone.num_forwards


def test_several_targets_share_forwards_and_equal_one_at_a_time(resnet):
    inputs = batch(2, 64)
    together = explained(resnet, inputs, [[0, 3], [5, 1]])
    for image, classes in enumerate([[0, 3], [5, 1]]):
        singles = [explained(resnet, inputs[image : image + 1], [[own]])[0][0] for own in classes]
        for one, other in zip(together[image], singles, strict=True):
            assert_close(one, other)
        assert together[image][0].num_forwards < sum(single.num_forwards for single in singles)
        assert together[image][0].num_forwards >= max(single.num_forwards for single in singles)


def test_a_larger_mu_keeps_less(resnet):
    inputs = batch(1, 64)
    sets = [
        [set(block.kept) for block in explained(resnet, inputs, [[2]], SiseParameters(mu=mu))[0][0].blocks]
        for mu in (0.0, 0.2, 0.6)
    ]
    for wide, middle, narrow in zip(*sets, strict=True):
        assert narrow <= middle <= wide
        assert narrow
    ada = explained(resnet, inputs, [[2]], SiseParameters(selection="ada"))[0][0]
    assert all(set(block.kept) <= wide for block, wide in zip(ada.blocks, sets[0], strict=True))


def test_another_class_and_other_weights_change_the_map(resnet):
    inputs = batch(1, 64)
    maps = explained(resnet, inputs, [[0, 1]])[0]
    assert np.abs(maps[0].saliency_hw - maps[1].saliency_hw).max() > 0.1
    other = ModelAdapter(seeded(lambda: torchvision.models.resnet18(num_classes=7), seed=9), input_size=(64, 64))
    assert np.abs(explained(other, inputs, [[0]])[0][0].saliency_hw - maps[0].saliency_hw).max() > 0.1


def test_pooling_keeps_the_sums_of_gradients():
    net = seeded(Plain)
    adapter = ModelAdapter(net, input_size=(32, 32))
    inputs = batch(2, 32)
    before = explained(adapter, inputs, [[0], [1]], blocks=("features.1", "features.4"))
    after = explained(adapter, inputs, [[0], [1]], blocks=("features.2", "features.5"))
    for one, other in zip(before, after, strict=True):
        assert [block.kept for block in one[0].blocks] == [block.kept for block in other[0].blocks]


def test_the_order_of_channels_does_not_matter():
    net = seeded(Plain)
    adapter = ModelAdapter(net, input_size=(32, 32))
    wanted = explained(adapter, batch(1, 32), [[2]])[0][0]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    twin = seeded(Plain)
    with torch.no_grad():
        twin.features[0].weight.copy_(net.features[0].weight[order])
        twin.features[0].bias.copy_(net.features[0].bias[order])
        twin.features[3].weight.copy_(net.features[3].weight[:, order])
    found = explained(ModelAdapter(twin, input_size=(32, 32)), batch(1, 32), [[2]])[0][0]
    assert {int(order[k]) for k in found.blocks[0].kept} == set(wanted.blocks[0].kept)
    assert np.abs(found.blocks[0].saliency_hw - wanted.blocks[0].saliency_hw).max() <= 1e-4


class Sick(nn.Module):
    """Says NaN for images whose first pixel is above 5."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x: Tensor) -> Tensor:
        sick = (x[:, :1, :1, :1] > 5).float()
        return self.net(x / (1 - sick))


def test_a_sick_image_leaves_its_neighbours_alone():
    adapter = ModelAdapter(seeded(Sick), input_size=(32, 32))
    inputs = batch(3, 32)
    healthy = explained(adapter, inputs, [[0], [0], [0]])
    inputs[1, 0, 0, 0] = 9
    found = explained(adapter, inputs, [[0], [0], [0]])
    assert np.isnan(found[1][0].saliency_hw).all()
    for image in (0, 2):
        assert np.array_equal(found[image][0].saliency_hw, healthy[image][0].saliency_hw)


def test_empty_blocks_are_left_out_and_all_empty_is_flat():
    net = seeded(Plain)
    with torch.no_grad():
        net.head.weight.zero_()
    found = explained(ModelAdapter(net, input_size=(32, 32)), batch(1, 32), [[0]])[0][0]
    assert all(block.saliency_hw is None and not block.kept for block in found.blocks)
    assert not found.saliency_hw.any()
    assert found.num_forwards == 0


def test_parameters_are_checked():
    with pytest.raises(ValueError, match=r"mu must lie in \[0, 1\)"):
        replace(SiseParameters(), mu=1.0)


# ---------------------------------------------------------------- real weights, real photographs


def test_real_weights_equal_the_slow_twin(monkeypatch):
    if not SHARED.exists():
        pytest.skip("the shared test data (real CIFAR weights and images) are not beside this checkout")
    monkeypatch.syspath_prepend(str(SHARED))
    import load_models
    from PIL import Image

    net = load_models.cifar_resnet(20)
    sys.modules.pop("load_models")
    adapter = ModelAdapter(net, input_size=(32, 32))
    files = [SHARED / f"images/cifar10_test_1000/{name}/0003.jpg" for name in ("cat", "ship")]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2)
    inputs = adapter.normalise(pixels)
    found = explained(adapter, inputs, [[3], [8]], SiseParameters())
    assert [len(block.kept) > 0 for block in found[0][0].blocks] == [True] * 3
    for image, own, target in zip(inputs, found, (3, 8), strict=True):
        with frozen(net):
            slow = oracles.sise(net, by_modules(["layer1", "layer2", "layer3"]), image[None], target)
        assert_same(own[0], slow)
