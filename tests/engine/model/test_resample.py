"""The identities that let masks stay at their native grid, in float64 against torch's own interpolation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.engine.model.resample import bilinear_matrix, corner_samples, pooled, pooling_matrix, scaled, upsampling
from tests.engine import oracles

CPU = torch.device("cpu")
GRIDS = [((size, size), (224, 224)) for size in (1, 2, 7, 14, 28, 56, 112, 224)]
ODD = [
    ((13, 13), (224, 224)),
    ((9, 9), (299, 299)),
    ((35, 17), (299, 141)),
    ((7, 5), (200, 333)),
    ((3, 10), (31, 20)),
    ((1, 6), (1, 96)),
]
EVERY = pytest.mark.parametrize(("native", "full"), GRIDS + ODD, ids=str)
VARIED = pytest.mark.parametrize(("native", "full"), GRIDS[1:] + ODD, ids=str)


def maps_of(native, count=3, seed=0):
    return torch.randn(count, *native, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tolerance(native, full):
    """Where the ratio is no binary fraction, torch's own weights are rounded in the fifteenth digit."""
    is_exact = all(size == 224 for size in full)
    return 1e-14 if is_exact else 1e-13


# ---------------------------------------------------------------- hand vectors


def test_hand_vector_v1():
    rows = [[0, 0.25, 0.75, 1], [0.5, 0.75, 1.25, 1.5], [1.5, 1.75, 2.25, 2.5], [2, 2.25, 2.75, 3]]
    small = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]], dtype=torch.float64)
    upsampler = upsampling((2, 2), (4, 4), CPU)
    assert upsampler(small)[0].tolist() == rows
    assert oracles.upsample(small, (4, 4))[0].tolist() == rows
    mask = upsampler(upsampler.normalise(small)[0])[0]
    assert torch.allclose(mask, torch.tensor(rows, dtype=torch.float64) / 3, rtol=0, atol=1e-15)
    assert torch.equal(oracles.minmax(oracles.upsample(small, (4, 4)))[0] * 3, torch.tensor(rows, dtype=torch.float64))


def test_hand_vector_v2_normalises_after_upsampling():
    small = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64)
    upsampler = upsampling((1, 3), (1, 6), CPU)
    assert upsampler(small).flatten().tolist() == [0, 0.25, 0.75, 0.75, 0.25, 0]
    masks, varied = upsampler.normalise(small)
    wanted = pytest.approx([0, 1 / 3, 1, 1, 1 / 3, 0], abs=1e-15)
    assert varied.tolist() == [True]
    assert upsampler(masks).flatten().tolist() == wanted
    assert oracles.minmax(oracles.upsample(small, (1, 6))).flatten().tolist() == wanted


# ---------------------------------------------------------------- the four identities


@EVERY
def test_upsampling_is_torchs_bilinear(native, full):
    maps = maps_of(native)
    ours, torchs = upsampling(native, full, CPU)(maps), oracles.upsample(maps, full)
    assert torch.allclose(ours, torchs, rtol=0, atol=tolerance(native, full))


@VARIED
def test_minmax_commutes_with_upsampling(native, full):
    maps = maps_of(native)
    upsampler = upsampling(native, full, CPU)
    masks, varied = upsampler.normalise(maps)
    assert varied.all()
    for mask, whole in zip(upsampler(masks), oracles.upsample(maps, full), strict=True):
        assert torch.allclose(mask, oracles.minmax(whole), rtol=0, atol=tolerance(native, full))


@pytest.mark.parametrize(("native", "full"), GRIDS[2:], ids=str)
def test_the_corner_samples_hold_the_extremes_exactly(native, full):
    """Values with few digits at a binary ratio: nothing is rounded, and every comparison is exact."""
    maps = (maps_of(native, count=20) * 1024).round() / 1024
    whole = oracles.upsample(maps, full)
    rows, columns = (corner_samples(*axis) for axis in zip(native, full, strict=True))
    corners = whole[:, rows][:, :, columns]
    assert torch.equal(corners.amin((1, 2)), whole.amin((1, 2)))
    assert torch.equal(corners.amax((1, 2)), whole.amax((1, 2)))
    low, high = upsampling(native, full, CPU).extremes(maps)
    assert torch.equal(low.flatten(), whole.amin((1, 2)))
    assert torch.equal(high.flatten(), whole.amax((1, 2)))


@EVERY
def test_the_extremes_are_those_of_the_upsampled_map(native, full):
    maps = maps_of(native, count=20)
    whole = oracles.upsample(maps, full)
    low, high = upsampling(native, full, CPU).extremes(maps)
    assert low.shape == high.shape == (20, 1, 1)
    assert torch.allclose(low.flatten(), whole.amin((1, 2)), rtol=0, atol=tolerance(native, full))
    assert torch.allclose(high.flatten(), whole.amax((1, 2)), rtol=0, atol=tolerance(native, full))
    assert [len(corner_samples(*axis)) <= 2 * axis[0] + 2 for axis in zip(native, full, strict=True)] == [True, True]


@EVERY
def test_the_mass_needs_no_mask(native, full):
    maps = maps_of(native).abs()
    mass = upsampling(native, full, CPU).mass(maps)
    assert torch.allclose(mass, oracles.upsample(maps, full).sum((1, 2)), rtol=1e-13, atol=0)


@EVERY
def test_one_upsampling_serves_a_whole_block(native, full):
    maps, weights = maps_of(native), torch.tensor([0.2, 1.5, 0.01], dtype=torch.float64)
    late = upsampling(native, full, CPU)(torch.einsum("k,khw->hw", weights, maps))
    early = sum(weight * whole for weight, whole in zip(weights, oracles.upsample(maps, full), strict=True))
    assert torch.allclose(late, early, rtol=0, atol=tolerance(native, full))


# ---------------------------------------------------------------- any size

sides = st.integers(1, 20)
fulls = st.integers(1, 60)


@settings(max_examples=100)
@given(sides, sides, fulls, fulls, st.integers(0, 2**31))
def test_the_identities_hold_for_any_sizes(height, width, full_h, full_w, seed):
    native, full = (height, width), (full_h, full_w)
    maps = maps_of(native, seed=seed)
    upsampler, whole = upsampling(native, full, CPU), oracles.upsample(maps, full)
    assert torch.allclose(upsampler(maps), whole, rtol=0, atol=5e-14)
    assert torch.allclose(upsampler.mass(maps), whole.sum((1, 2)), rtol=1e-12, atol=1e-11)
    low, high = upsampler.extremes(maps)
    assert torch.allclose(low.flatten(), whole.amin((1, 2)), rtol=0, atol=5e-14)
    assert torch.allclose(high.flatten(), whole.amax((1, 2)), rtol=0, atol=5e-14)


@settings(max_examples=60)
@given(st.integers(2, 20), sides, st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_masks_of_enlarged_maps_are_the_minmaxed_upsampled_ones(height, width, by_h, by_w, seed):
    native, full = (height, width), (height * by_h, width * by_w)
    maps = maps_of(native, count=1, seed=seed)
    upsampler = upsampling(native, full, CPU)
    mask = upsampler(upsampler.normalise(maps)[0])[0]
    assert torch.allclose(mask, oracles.minmax(oracles.upsample(maps, full)[0]), rtol=0, atol=1e-12)
    assert mask.min() >= -1e-12
    assert mask.max() <= 1 + 1e-12


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 300))
def test_the_matrix_averages(native, full):
    matrix = bilinear_matrix(native, full)
    assert matrix.shape == (full, native)
    assert (matrix >= 0).all()
    assert torch.allclose(matrix.sum(1), torch.ones(full, dtype=torch.float64), rtol=0, atol=1e-15)
    assert ((matrix > 0).sum(1) <= 2).all()
    assert torch.allclose(matrix, matrix.flip(0, 1), rtol=0, atol=1e-13)


# ---------------------------------------------------------------- edges


def test_the_native_extremes_would_be_wrong():
    odd = torch.zeros(1, 3, 3, dtype=torch.float64)
    odd[0, 1, 1] = 1
    assert upsampling((3, 3), (6, 6), CPU).extremes(odd)[1].item() == pytest.approx(0.5625)


def test_the_maps_precision_is_kept_and_statistics_are_double():
    upsampler = upsampling((3, 3), (9, 9), CPU)
    maps = torch.rand(2, 3, 3)
    assert upsampler(maps).dtype == torch.float32
    assert upsampler.extremes(maps)[0].dtype == torch.float64
    assert upsampler.mass(maps).dtype == torch.float64
    assert upsampler.normalise(maps)[0].dtype == torch.float64


def constants(native, dtype):
    values = torch.randn(200, dtype=dtype, generator=torch.Generator().manual_seed(3))
    return values[:, None, None].expand(-1, *native).contiguous()


@EVERY
def test_constant_maps_give_no_mask(native, full):
    masks, varied = upsampling(native, full, CPU).normalise(constants(native, torch.float32))
    assert not varied.any()
    assert not masks.any()


def test_constant_maps_give_no_mask_in_double_either():
    """The weights of a sample need not sum to exactly 1: what varies is decided on the map itself."""
    counts = {
        grids: int(upsampling(*grids, CPU).normalise(constants(grids[0], torch.float64))[1].sum()) for grids in ODD
    }
    assert counts == dict.fromkeys(ODD, 0)


def test_a_map_that_varies_in_one_place_is_a_mask():
    maps = torch.full((1, 7, 7), 0.7)
    maps[0, 3, 3] = torch.nextafter(maps[0, 3, 3], torch.tensor(1.0))
    upsampler = upsampling((7, 7), (224, 224), CPU)
    masks, varied = upsampler.normalise(maps)
    assert varied.tolist() == [True]
    assert upsampler(masks).amax().item() == pytest.approx(1, abs=1e-6)


def test_no_maps_are_no_masks():
    masks, varied = upsampling((3, 3), (9, 9), CPU).normalise(torch.empty(0, 3, 3))
    assert masks.shape == (0, 3, 3)
    assert varied.shape == (0,)


def test_corner_samples_by_hand():
    assert corner_samples(2, 4) == [0, 1, 2, 3]
    assert corner_samples(1, 9) == [0, 4, 8]
    assert corner_samples(2, 16) == [0, 3, 4, 11, 12, 15]
    assert len(corner_samples(7, 224)) == 16


def test_scaled_maps_span_0_to_1_each_for_itself():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[4.0, 4.0], [4.0, 4.0]], [[float("nan"), 1.0], [2.0, 3.0]]])
    found = scaled(maps)
    assert found[0].tolist() == [[0.0, 1.0], [0.5, 0.0]]
    assert not found[1].any()
    assert found[2].isnan().all()


# ---------------------------------------------------------------- means over cells


@pytest.mark.parametrize(("full", "cells"), [(8, 4), (7, 3), (5, 5), (3, 5), (10, 1)])
def test_a_pooling_matrix_is_adaptive_pooling(full, cells):
    matrix = pooling_matrix(full, cells)
    assert matrix.shape == (cells, full)
    assert matrix.dtype == torch.float64
    column = torch.rand(1, 1, full, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = torch.nn.functional.adaptive_avg_pool1d(column, cells)
    torch.testing.assert_close(matrix @ column[0, 0], wanted[0, 0], atol=1e-15, rtol=0)


def test_pooling_an_upsampled_map_makes_no_full_map():
    maps = maps_of((4, 3))
    full = upsampling((4, 3), (11, 9), CPU)(maps)
    wanted = torch.nn.functional.adaptive_avg_pool2d(full, (5, 2))
    torch.testing.assert_close(pooled(maps, (11, 9), (5, 2)), wanted, atol=1e-14, rtol=0)
