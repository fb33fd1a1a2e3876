"""The attention head: its size, and its masks against a slow twin in the authors' order of operations."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.training.attention_head import AttentionHead, HeadShape, TapShape, doubling_matrix, in_order

PUBLISHED = {
    "VGG-16": (((256, 28), (512, 14), (512, 7)), True, 1_874_664),
    "ResNet-50": (((512, 28), (1024, 14), (2048, 7)), True, 9_100_776),
    "ViT-B/16": (((768, 14), (768, 14), (768, 14)), True, 4_081_384),
    "P-TAME with ResNet-18": (((64, 56), (128, 28), (256, 14), (512, 7)), False, 1_311_040),
}
"""Taps (channels, side), whether the fusion has a bias, and the number of trained numbers, for 1000 classes."""


def shape_of(
    taps: Sequence[tuple[int, int]], num_classes: int = 6, *, has_bias: bool = True, doubles: bool = False
) -> HeadShape:
    """A head's shape from (channels, side) of its taps."""
    places = tuple(TapShape(f"tap{index}", *own, (side, side)) for index, (*own, side) in enumerate(taps))
    return HeadShape(places, num_classes, has_bias, doubles)


def random_maps(shape: HeadShape, num: int = 2, seed: int = 3) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(num, tap.channels, *tap.grid, generator=drawn) for tap in shape.taps]


def slow_masks(head: AttentionHead, features: Sequence[Tensor]) -> Tensor:
    """All classes' masks [N, K, h, w] in the authors' order: upsample, stack, convolve."""
    size = head.shape.grid
    large = []
    for own in features:
        grown = own
        while head.shape.doubles and 2 * grown.shape[-1] <= size[1]:
            grown = functional.interpolate(grown, scale_factor=2, mode="bilinear", align_corners=False)
        large.append(functional.interpolate(grown, size, mode="bilinear", align_corners=False))
    return functional.conv2d(torch.cat(large, 1), head.weight[:, :, None, None], head.bias)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_head_has_the_published_size(name):
    taps, has_bias, number = PUBLISHED[name]
    shape = shape_of(taps, 1000, has_bias=has_bias)
    head = AttentionHead(shape, 0)
    assert shape.num_parameters == sum(own.numel() for own in head.parameters()) == number


@pytest.mark.parametrize(("has_bias", "doubles"), [(True, False), (False, True)])
def test_the_masks_of_any_classes_are_those_of_the_authors_order(has_bias, doubles):
    shape = shape_of([(5, 28), (7, 14), (9, 7)], has_bias=has_bias, doubles=doubles)
    head = AttentionHead(shape, 1)
    features = head.features(random_maps(shape))
    classes = torch.tensor([[0, 5, 2], [4, 4, 1]])
    wanted = slow_masks(head, features)
    found = head.masks(features, classes)
    assert found.shape == (2, 3, 28, 28)
    for image in range(2):
        torch.testing.assert_close(found[image], wanted[image, classes[image]], rtol=1e-5, atol=1e-5)


def test_masks_have_the_first_taps_size_and_at_most_56_a_side():
    assert shape_of([(4, 112), (4, 56)]).grid == (56, 56)
    assert shape_of([(4, 14), (4, 7)]).grid == (14, 14)
    shape = shape_of([(4, 112), (6, 28)])
    head = AttentionHead(shape, 0)
    features = head.features(random_maps(shape, 1))
    found = head.masks(features, torch.tensor([[3]]))[0, 0]
    torch.testing.assert_close(found, slow_masks(head, features)[0, 3], rtol=1e-5, atol=1e-5)


def test_doubling_is_not_one_interpolation():
    assert not torch.allclose(doubling_matrix(7, 28), torch.nn.functional.interpolate(
        torch.eye(7, dtype=torch.float64)[None], 28, mode="linear", align_corners=False
    )[0].T, atol=1e-3)  # fmt: skip
    torch.testing.assert_close(doubling_matrix(7, 28).sum(1), torch.ones(28, dtype=torch.float64))


def test_without_weights_a_branch_is_the_rectified_map():
    shape = shape_of([(4, 6)])
    head = AttentionHead(shape, 0)
    torch.nn.init.zeros_(head.branches[0].conv.weight)
    torch.nn.init.zeros_(head.branches[0].conv.bias)
    (maps,) = random_maps(shape)
    torch.testing.assert_close(head.features([maps])[0], maps.relu())


def test_the_first_weights_follow_from_the_seed_alone():
    shape = shape_of([(4, 6), (5, 3)])
    before = torch.get_rng_state()
    one, same, other = AttentionHead(shape, 7), AttentionHead(shape, 7), AttentionHead(shape, 8)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.weight, other.weight)


def test_stored_statistics_move_to_the_mean_of_those_of_the_shards():
    shape = shape_of([(4, 6)])
    head = AttentionHead(shape, 0)
    parts = [random_maps(shape, 3, seed) for seed in (1, 2)]
    statistics = [head.trained_features(own)[1] for own in parts]
    head.move_statistics(statistics)
    raw = [head.branches[0].conv(own[0]).transpose(0, 1).flatten(1) for own in parts]
    mean = (raw[0].mean(1) + raw[1].mean(1)) / 2
    variance = (raw[0].var(1) + raw[1].var(1)) / 2
    torch.testing.assert_close(head.branches[0].norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(head.branches[0].norm.running_var, 0.9 + 0.1 * variance)


def test_a_branch_in_training_is_torchs_own_batch_norm():
    shape = shape_of([(4, 6)])
    head = AttentionHead(shape, 0)
    (maps,) = random_maps(shape)
    (found,), _ = head.trained_features([maps])
    head.train()
    torch.testing.assert_close(found, head.features([maps])[0])


def test_parts_are_added_one_after_the_other():
    drawn = torch.Generator().manual_seed(0)
    parts = [torch.randn(1000, generator=drawn) * 10.0**power for power in (4, -3, 2, -1)]
    assert torch.equal(in_order(parts), (((parts[0] + parts[1]) + parts[2]) + parts[3]) / 4)
    assert not torch.equal(in_order(parts), in_order(parts[::-1]))
