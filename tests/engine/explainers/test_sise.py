"""SISE against numbers computed by hand: selection, one layer's map, and a whole small explanation."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.explainers.sise import Sise, select
from blocksight.engine.model import proofs
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from tests.engine import oracles
from tests.engine.nets import Plain, seeded, smooth

# ---------------------------------------------------------------- V3: selection


@pytest.mark.parametrize(
    ("alphas", "mu", "kept"),
    [
        ([-1, 0, 0.25, 0.5, 1], 0.0, [2, 3, 4]),
        ([-1, 0, 0.25, 0.5, 1], 0.25, [3, 4]),
        ([-1, 0, 0.25, 0.5, 1], 0.5, [4]),
        ([-1, 0, 0.25, 0.5, 1], 0.75, [4]),
        ([-3, -1], 0.0, []),
        ([0, 0], 0.0, []),
        ([2, 2], 0.9, [0, 1]),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 2.0**-900])
def test_hand_vector_v3(alphas, mu, kept, scale):
    alphas = torch.tensor(alphas, dtype=torch.float64) * scale
    assert select(alphas, SiseParameters(mu=mu)).tolist() == kept
    assert oracles.keep(alphas, mu, "mu") == kept


@pytest.mark.parametrize(
    ("alphas", "kept"),
    [
        ([-1.0, 0.01, 0.02, 0.03, 0.9, 1.0], [4, 5]),
        ([-1.0, 0.5], [1]),
        ([0.5, 0.5], [0]),
        ([-1.0, 0.0], []),
        ([0.2, 0.0, -0.5, 0.2, 0.8, 0.8, 1.0, 1.0], [4, 5, 6, 7]),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_ada_puts_otsus_threshold_on_the_positive_gradients(alphas, kept, scale):
    alphas = torch.tensor(alphas, dtype=torch.float64) * scale
    assert select(alphas, SiseParameters(selection="ada")).tolist() == kept
    assert oracles.keep(alphas, 0.0, "ada") == kept


def test_ada_does_not_read_mu():
    alphas = torch.tensor([0.1, 0.2, 0.8, 1.0], dtype=torch.float64)
    assert select(alphas, SiseParameters(selection="ada", mu=0.9)).tolist() == [2, 3]


@pytest.mark.parametrize("mu", [1.0, 1.5, -0.1, float("nan")])
def test_mu_lies_in_its_range(mu):
    with pytest.raises(ValueError, match=r"mu must lie in \[0, 1\)"):
        replace(SiseParameters(), mu=mu)


# ---------------------------------------------------------------- V4: one layer's map, written out


def test_hand_vector_v4_by_the_slow_twin():
    masks = [np.array([[1.0, 0], [0, 0]]), np.ones((2, 2)), np.array([[0.5, 1], [0, 0.5]])]
    scores = [0.8, 0.9, 0.6]
    right = oracles.layer_map(masks, scores)
    assert right.ravel() == pytest.approx([0.391667, 0.175, 0.075, 0.125], abs=1e-6)
    assert oracles.minmax(right).ravel() == pytest.approx([1, 0.315789, 0, 0.157895], abs=1e-6)
    wrong = oracles.layer_map(masks, scores, by_mass=False)
    assert wrong.ravel() == pytest.approx([0.666667, 0.5, 0.3, 0.4], abs=1e-6)
    assert oracles.minmax(wrong).ravel() == pytest.approx([1, 0.545455, 0, 0.272727], abs=1e-6)


# ---------------------------------------------------------------- V8: end to end


PICTURE = torch.tensor([[4.0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
SECOND = [
    [1, 0.75, 0.25, 0],
    [0.75, 0.59375, 0.28125, 0.125],
    [0.25, 0.28125, 0.34375, 0.375],
    [0, 0.125, 0.375, 0.5],
]
FUSED = np.array([[2, 1.25, 0, 0], [1.25, 0.59375, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.75]])
TRUTH = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


class HandNet(nn.Module):
    """Two channels, a picture and its mirror image; pooled; a linear layer in place of the confidence."""

    def __init__(self, weight_b: float = -0.25) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.register_buffer("of_a", torch.tensor([[1.0, 0], [0, 0.5]]))
        self.register_buffer("of_b", torch.tensor([[0, weight_b], [weight_b, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.written_out(x)[0]

    def written_out(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.act(torch.cat([x[:, :1], x[:, :1].flip(2)], 1))
        pooled = self.pool(first)
        value = (pooled[:, 0] * self.of_a).sum((1, 2)) + (pooled[:, 1] * self.of_b).sum((1, 2))
        return value[:, None], [first, pooled]


class Raw:
    """A target that is the output itself, and any positive multiple of it."""

    num_targets = 1

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def of(self, images):
        return self

    def score(self, logits, images):
        return self.factor * logits.double()

    def direction(self, logits, index):
        return torch.full_like(logits, self.factor)


def hand_inputs() -> Tensor:
    inputs = torch.zeros(1, 3, 4, 4)
    inputs[0, 0] = PICTURE
    return inputs


def hand_case(weight_b: float = -0.25, factor: float = 1.0):
    adapter = ModelAdapter(HandNet(weight_b), input_size=(4, 4))
    with patch.object(
        proofs, "LEAST_ODDS", 0.9
    ):  # half of its channels are mirrored: no cell follows the picture alone
        explainer = Sise(adapter, SiseParameters(), blocks=("act", "pool"), batch_size=2, images_per_pass=1)
    return explainer.explain(hand_inputs(), Raw(factor))[0][0]


def slow_hand_case(weight_b: float = -0.25):
    return oracles.sise(HandNet(weight_b), HandNet.written_out, hand_inputs(), 0, psi=oracles.raw)


def test_hand_vector_v8_end_to_end():
    found = hand_case()
    assert found.score == 1.75
    assert [block.kept for block in found.blocks] == [(0,), (0,)]
    assert [block.candidates for block in found.blocks] == [2, 2]
    assert found.num_forwards == 2
    first, second = (block.saliency_hw for block in found.blocks)
    assert first == pytest.approx(PICTURE.numpy() / 4, abs=1e-6)
    assert second == pytest.approx(np.array(SECOND), abs=1e-6)
    assert found.saliency_hw == pytest.approx(FUSED, abs=1e-6)
    assert oracles.energy(found.saliency_hw, TRUTH) == pytest.approx(0.871658, abs=1e-6)


def test_hand_vector_v8_by_the_slow_twin():
    slow = slow_hand_case()
    assert slow.score == 1.75
    assert [alpha.tolist() for alpha in slow.alphas] == [[1.5, -0.5], [1.5, -0.5]]
    assert slow.kept == [[0], [0]]
    assert slow.block_maps[0] == pytest.approx(PICTURE.numpy() / 4, abs=1e-15)
    assert slow.block_maps[1] == pytest.approx(np.array(SECOND), abs=1e-15)
    assert oracles.otsu_foreground(slow.block_maps[1]).tolist() == (FUSED > 0).tolist()
    assert slow.fused == pytest.approx(FUSED, abs=1e-15)
    assert oracles.energy(slow.fused, TRUTH) == pytest.approx(0.871658, abs=1e-6)


def test_hand_vector_v8_masks_and_scores():
    """m1 sums to 3 and scores 1.1875; m2 sums to 6 and scores 1.412109375."""
    net, image = oracles.double_copy(HandNet()), hand_inputs().double()
    _, maps = net.written_out(image)
    for own, mass, score in zip(maps, (3, 6), (1.1875, 1.412109375), strict=True):
        mask = oracles.minmax(oracles.upsample(own[0, :1], (4, 4))[0])
        assert mask.sum().item() == mass
        assert net(image * mask).item() == score


def test_a_negative_score_inverts_the_map():
    upright, turned = hand_case(), hand_case(weight_b=-1.0)
    assert upright.blocks[1].saliency_hw[0, 0] == 1
    assert turned.blocks[1].saliency_hw[0, 0] == 0
    assert slow_hand_case(weight_b=-1.0).block_maps[1] == pytest.approx(turned.blocks[1].saliency_hw, abs=1e-6)


@pytest.mark.parametrize("factor", [1e-20, 3.0, 1e20])
def test_a_positive_scale_of_the_confidence_changes_nothing(factor):
    assert hand_case(factor=factor).saliency_hw == pytest.approx(FUSED, abs=1e-6)


# ---------------------------------------------------------------- edges


def one_class(adapter, inputs, target, parameters=None, **options):
    target = ClassProbability(torch.tensor([[target]] * len(inputs)))
    return Sise(adapter, parameters or SiseParameters(), **options).explain(inputs, target)


def test_no_images_are_no_explanations():
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    assert (
        Sise(adapter, SiseParameters()).explain(
            torch.empty(0, 3, 32, 32), ClassProbability(torch.empty(0, 1, dtype=torch.int64))
        )
        == []
    )


def test_if_every_block_is_empty_the_map_is_flat():
    net = seeded(Plain)
    with torch.no_grad():
        net.head.weight.zero_()
    found = one_class(ModelAdapter(net, input_size=(32, 32)), smooth(1, 32, 32), 0)[0][0]
    assert all(block.saliency_hw is None and not block.kept for block in found.blocks)
    assert found.saliency_hw.shape == (32, 32)
    assert not found.saliency_hw.any()
    assert found.num_forwards == 0


class SecondBlind(nn.Module):
    """Its deeper block only lowers class 0: every gradient there is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def test_an_empty_block_is_left_out_of_the_fusion():
    net = seeded(SecondBlind)
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
    found = one_class(ModelAdapter(net, input_size=(16, 16)), smooth(1, 16, 16), 0)[0][0]
    first, second = found.blocks
    assert second.saliency_hw is None
    assert second.kept == ()
    assert first.kept
    assert np.array_equal(found.saliency_hw, first.saliency_hw)


class Constant(nn.Module):
    """A block of four maps of which the second is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))

    def written_out(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = self.conv(x).relu()
        return self.head(maps.mean((2, 3))), [maps]


def test_a_constant_map_is_kept_and_costs_no_forward():
    net = seeded(Constant)
    with torch.no_grad():
        net.conv.weight[1] = 0
        net.conv.bias.copy_(torch.tensor([0.1, 0.7, 0.1, 0.1]))
        net.head.weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    inputs = smooth(1, 9, 9)
    found = one_class(ModelAdapter(net, input_size=(9, 9)), inputs, 0, blocks=("relu",))[0][0]
    slow = oracles.sise(net, Constant.written_out, inputs, 0)
    assert found.blocks[0].kept == (0, 1, 2, 3)
    assert found.num_forwards == slow.num_masks[0] == 3
    assert found.blocks[0].saliency_hw == pytest.approx(slow.block_maps[0], abs=1e-5)


def test_a_network_of_constant_maps_has_an_empty_block():
    net = seeded(Constant)
    with torch.no_grad():
        net.conv.weight.zero_()
        net.conv.bias.fill_(0.7)
        net.head.weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    found = one_class(ModelAdapter(net, input_size=(9, 9)), smooth(1, 9, 9), 0, blocks=("relu",))[0][0]
    assert found.blocks[0].kept == (0, 1, 2, 3)
    assert found.blocks[0].saliency_hw is None
    assert not found.saliency_hw.any()
    assert found.num_forwards == 0


def test_explaining_leaves_weights_modes_and_hooks_alone():
    net = seeded(Plain).train()
    adapter = ModelAdapter(net, input_size=(32, 32))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    one_class(adapter, smooth(1, 32, 32), 1, SiseParameters(mu=0.5))
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(module.inplace for module in net.modules() if hasattr(module, "inplace"))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
