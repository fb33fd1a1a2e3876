"""What must not change an explanation, and what must."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.explainers.sise import Sise
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from tests.engine import oracles
from tests.engine.comparing import (
    assert_close,
    assert_few_flipped,
    assert_same_bits,
    by_modules,
    explained,
)
from tests.engine.nets import Depthwise, Plain, Residual, from_zoo, seeded, smooth

SOME = SiseParameters(mu=0.5)
FEW = SiseParameters(mu=0.8)
"""The parameters for larger networks: the same code, fewer forwards."""


def zoo(architecture, seed=0):
    return ModelAdapter(from_zoo(architecture, seed), input_size=(64, 64))


@pytest.fixture(scope="module")
def resnet():
    return zoo("resnet18")


@pytest.fixture(scope="module")
def mobilenet():
    return zoo("mobilenet_v3_small")


# ---------------------------------------------------------------- (c) packing


def small_adapter():
    return ModelAdapter(seeded(Depthwise), input_size=(32, 32))


@pytest.fixture(scope="module")
def unpacked():
    """One mask per forward, one image per pass."""
    options = {"batch_size": 1, "images_per_pass": 1}
    return explained(small_adapter(), smooth(5, 32, 32), [[own] for own in (0, 1, 2, 3, 4)], **options)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
@pytest.mark.parametrize("images_per_pass", [1, 2, 4])
def test_a_map_does_not_depend_on_the_packing(unpacked, batch_size, images_per_pass):
    options = {"batch_size": batch_size, "images_per_pass": images_per_pass}
    found = explained(small_adapter(), smooth(5, 32, 32), [[own] for own in (0, 1, 2, 3, 4)], **options)
    for one, other in zip(found, unpacked, strict=True):
        assert_close(one[0], other[0])
        assert one[0].num_forwards == other[0].num_forwards


@pytest.mark.parametrize(("batch_size", "images_per_pass"), [(3, 1), (64, 4)])
def test_a_map_of_a_resnet_does_not_depend_on_the_packing(resnet, batch_size, images_per_pass):
    inputs, classes = smooth(3, 64, 64), [[0], [1], [2]]
    wanted = explained(resnet, inputs, classes, FEW)
    found = explained(resnet, inputs, classes, FEW, batch_size=batch_size, images_per_pass=images_per_pass)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one[0], other[0])


COMPANY = ([2, 0, 1], [0, 1, 3, 4, 2], [4, 2, 0], [2, 2])


def assert_same_beside_any_others(adapter, inputs, parameters=SOME, **options):
    alone = explained(adapter, inputs[2:3], [[1]], parameters, **options)[0][0]
    assert all(block.kept for block in alone.blocks)
    for order in COMPANY:
        among = explained(adapter, inputs[order], [[1]] * len(order), parameters, **options)
        assert_same_bits(among[order.index(2)][0], alone)


@pytest.mark.parametrize("make", [Plain, Residual, Depthwise])
@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "images_per_pass": 2}], ids=["default", "small"])
def test_an_image_has_the_same_bits_beside_any_others(make, options):
    assert_same_beside_any_others(ModelAdapter(seeded(make), input_size=(32, 32)), smooth(5, 32, 32), **options)


def test_an_image_has_the_same_bits_beside_any_others_in_a_resnet(resnet):
    assert_same_beside_any_others(resnet, smooth(5, 64, 64), FEW)


def test_an_image_has_the_same_bits_beside_any_others_in_a_mobilenet(mobilenet):
    assert_same_beside_any_others(mobilenet, smooth(5, 64, 64), FEW)


def test_a_map_does_not_depend_on_another_images_class():
    adapter, inputs = small_adapter(), smooth(3, 32, 32)
    one = explained(adapter, inputs, [[0], [1], [2]])[1][0]
    assert_same_bits(explained(adapter, inputs, [[4], [1], [3]])[1][0], one)


def test_a_second_run_has_the_same_bits(mobilenet):
    inputs = smooth(2, 64, 64)
    for one, other in zip(*(explained(mobilenet, inputs, [[0], [6]], SOME) for _ in range(2)), strict=True):
        assert_same_bits(one[0], other[0])


def test_a_map_does_not_depend_on_global_random_numbers():
    torch.manual_seed(1)
    one = explained(small_adapter(), smooth(1, 32, 32), [[0]])[0][0]
    torch.manual_seed(2)
    assert_same_bits(explained(small_adapter(), smooth(1, 32, 32), [[0]])[0][0], one)


def test_a_map_does_not_depend_on_the_memory_layout():
    adapter, inputs = small_adapter(), smooth(2, 32, 32)
    one, other = (
        explained(adapter, inputs.contiguous(memory_format=layout), [[0], [3]])
        for layout in (torch.channels_last, torch.contiguous_format)
    )
    for left, right in zip(one, other, strict=True):
        assert_close(left[0], right[0])


# ---------------------------------------------------------------- several targets


@pytest.mark.parametrize("parameters", [SiseParameters(), SiseParameters(selection="ada")], ids=["paper", "ada"])
@pytest.mark.parametrize("make", [Plain, Residual, Depthwise])
def test_targets_together_equal_targets_alone(make, parameters):
    adapter, inputs = ModelAdapter(seeded(make), input_size=(32, 32)), smooth(3, 32, 32)
    classes = [[0, 3, 1], [4, 1, 2], [2, 2, 0]]
    together = explained(adapter, inputs, classes, parameters)
    for image, own in enumerate(classes):
        for index, target in enumerate(own):
            alone = explained(adapter, inputs[image : image + 1], [[target]], parameters)[0][0]
            assert_close(together[image][index], alone)


def test_targets_share_the_forwards_of_the_masks_they_both_keep():
    net, inputs = seeded(Plain), smooth(1, 32, 32)
    adapter = ModelAdapter(net, input_size=(32, 32))
    alone = [explained(adapter, inputs, [[target]])[0][0] for target in (0, 1, 2)]
    union = 0
    for index, maps in enumerate(net.written_out(inputs)[1]):
        kept = {channel for own in alone for channel in own.blocks[index].kept}
        union += sum(bool(maps[0, channel].min() < maps[0, channel].max()) for channel in kept)
    together = explained(adapter, inputs, [[0, 1, 2]])[0]
    assert [own.num_forwards for own in together] == [union] * 3
    assert union < sum(own.num_forwards for own in alone)


# ---------------------------------------------------------------- (a), (b), (d)


def test_pooling_keeps_the_sums_of_gradients():
    """(a) at a non-overlapping max-pool's input and output."""
    net, inputs = seeded(Plain), smooth(2, 32, 32)
    before, after = ("features.1", "features.4", "features.7"), ("features.2", "features.5", "features.8")
    for image in inputs:
        slow = [oracles.sise(net, by_modules(names), image[None], 3, mu=0.9) for names in (before, after)]
        for one, other in zip(slow[0].alphas, slow[1].alphas, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=0)
    adapter = ModelAdapter(net, input_size=(32, 32))
    pair = [explained(adapter, inputs, [[3], [1]], blocks=names) for names in (before, after)]
    for one, other in zip(*pair, strict=True):
        assert [block.kept for block in one[0].blocks] == [block.kept for block in other[0].blocks]


def kept_sets(adapter, inputs, target, parameters):
    return [set(block.kept) for block in explained(adapter, inputs, [[target]], parameters)[0][0].blocks]


@pytest.mark.parametrize("make", [Plain, Residual, Depthwise])
def test_a_larger_mu_keeps_less(make):
    """(b), and for Ada-SISE: a subset of the channels of mu 0, with the largest gradient in it."""
    adapter, inputs = ModelAdapter(seeded(make), input_size=(32, 32)), smooth(1, 32, 32)
    sets = [kept_sets(adapter, inputs, 2, SiseParameters(mu=mu)) for mu in (0.0, 0.2, 0.6, 0.999)]
    for wider, narrower in pairwise(sets):
        assert all(inner <= outer and inner for inner, outer in zip(narrower, wider, strict=True))
    ada = kept_sets(adapter, inputs, 2, SiseParameters(selection="ada"))
    assert all(largest <= own <= every for largest, own, every in zip(sets[-1], ada, sets[0], strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_the_support_lies_in_the_last_blocks_foreground(seed):
    """(d)."""
    adapter = ModelAdapter(seeded(Depthwise, seed), input_size=(32, 32))
    for found in explained(adapter, smooth(2, 32, 32, seed), [[0], [1]]):
        foreground = oracles.otsu_foreground(found[0].blocks[-1].saliency_hw)
        assert found[0].saliency_hw.any()
        assert not found[0].saliency_hw[~foreground].any()
        assert found[0].saliency_hw.min() >= 0
        assert found[0].saliency_hw.max() <= len(found[0].blocks)


def test_the_fused_map_is_the_cascade_of_the_block_maps(mobilenet):
    for gate in ("hard", "soft"):
        found = explained(mobilenet, smooth(1, 64, 64), [[1]], SiseParameters(mu=0.5, gate=gate))[0][0]
        wanted = oracles.fuse([block.saliency_hw for block in found.blocks], gate)
        assert found.saliency_hw == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("architecture", ["resnet", "mobilenet"])
def test_block_maps_span_zero_to_one_at_the_inputs_size(architecture, request):
    found = explained(request.getfixturevalue(architecture), smooth(1, 64, 64), [[1]], SOME)[0][0]
    for block in found.blocks:
        assert block.saliency_hw.shape == (64, 64)
        assert block.saliency_hw.dtype == np.float64
        assert (block.saliency_hw.min(), block.saliency_hw.max()) == (0, 1)


# ---------------------------------------------------------------- (c) channels and scale


def permuted_plain(net, order):
    """The same network with the channels of its first convolution in another order."""
    twin = seeded(Plain)
    with torch.no_grad():
        twin.features[0].weight.copy_(net.features[0].weight[order])
        twin.features[0].bias.copy_(net.features[0].bias[order])
        twin.features[3].weight.copy_(net.features[3].weight[:, order])
    return twin


@pytest.mark.parametrize("parameters", [SiseParameters(), SiseParameters(selection="ada")], ids=["paper", "ada"])
def test_the_order_of_channels_does_not_matter(parameters):
    net, order = seeded(Plain), torch.tensor([3, 0, 5, 1, 4, 2])
    nets, inputs = (net, permuted_plain(net, order)), smooth(1, 32, 32)
    wanted, found = (explained(ModelAdapter(own, input_size=(32, 32)), inputs, [[2]], parameters)[0][0] for own in nets)
    assert sorted(int(order[k]) for k in found.blocks[0].kept) == list(wanted.blocks[0].kept)
    for one, other in zip(found.blocks, wanted.blocks, strict=True):
        assert np.abs(one.saliency_hw - other.saliency_hw).max() <= 1e-5
    assert_few_flipped(found.saliency_hw, wanted.saliency_hw)


class ManyTimes(ClassProbability):
    """The probability times 1000."""

    def of(self, images):
        return ManyTimes(self.classes[images])

    def score(self, logits, images):
        return 1000 * super().score(logits, images)

    def direction(self, logits, index):
        return 1000 * super().direction(logits, index)


def test_a_positive_factor_of_the_confidence_does_not_matter():
    adapter, inputs = small_adapter(), smooth(2, 32, 32)
    classes = torch.tensor([[1], [4]])
    wanted, found = (
        Sise(adapter, SiseParameters()).explain(inputs, kind(classes)) for kind in (ClassProbability, ManyTimes)
    )
    for one, other in zip(found, wanted, strict=True):
        assert one[0].score == pytest.approx(1000 * other[0].score)
        for left, right in zip(one[0].blocks, other[0].blocks, strict=True):
            assert left.kept == right.kept
            assert np.abs(left.saliency_hw - right.saliency_hw).max() <= 1e-9
        assert_few_flipped(one[0].saliency_hw, other[0].saliency_hw)


# ---------------------------------------------------------------- (e), (f), (g)


def test_about_half_of_the_maps_are_kept(resnet):
    """(e): each block has its count of candidates; random weights give gradients of both signs."""
    found = explained(resnet, smooth(1, 64, 64), [[0]])[0][0]
    candidates = sum(block.candidates for block in found.blocks)
    kept = sum(len(block.kept) for block in found.blocks)
    assert candidates == 64 + 64 + 128 + 256 + 512
    assert 0.35 <= kept / candidates <= 0.65
    assert 0.9 * kept <= found.num_forwards <= kept  # constant maps are kept and not scored


def two_things():
    """A picture with two different textures on two sides."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    left = ((rows // 4) % 2).float() * (columns < 32)
    right = ((columns // 4) % 2).float() * (columns >= 32)
    return (torch.stack([left, right, left * 0.5 + right * 0.2]) * 4 - 2)[None]


def test_another_class_changes_the_map(resnet):
    """(f)."""
    maps = explained(resnet, two_things(), [[0, 1]], SOME)[0]
    assert np.abs(maps[0].saliency_hw - maps[1].saliency_hw).max() > 0.1
    assert maps[0].blocks[-1].kept != maps[1].blocks[-1].kept


def test_other_weights_change_the_map(resnet):
    """(g)."""
    one, other = (explained(adapter, two_things(), [[0]], SOME)[0][0] for adapter in (resnet, zoo("resnet18", seed=9)))
    assert np.abs(one.saliency_hw - other.saliency_hw).max() > 0.1
    assert np.corrcoef(one.saliency_hw.ravel(), other.saliency_hw.ravel())[0, 1] < 0.9
