"""The identities that let masks stay at their native grid, against torch's own interpolation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.resample import bilinear_matrix, corner_samples, upsampling
from tests.engine.oracles import upsample

CPU = torch.device("cpu")


@pytest.mark.parametrize("native", [1, 2, 7, 13, 14, 28, 56, 112, 224])
def test_upsampling_is_torchs_bilinear(native):
    maps = torch.rand(3, native, native, dtype=torch.float64)
    ours = upsampling((native, native), (224, 224), CPU)(maps)
    assert torch.allclose(ours, upsample(maps, (224, 224)), rtol=0, atol=1e-14)


def test_hand_vector_v1():
    ours = upsampling((2, 2), (4, 4), CPU)(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]], dtype=torch.float64))
    rows = [[0, 0.25, 0.75, 1], [0.5, 0.75, 1.25, 1.5], [1.5, 1.75, 2.25, 2.5], [2, 2.25, 2.75, 3]]
    assert ours[0].tolist() == rows


def test_hand_vector_v2_normalises_after_upsampling():
    upsampler = upsampling((1, 3), (1, 6), CPU)
    masks, varied = upsampler.normalise(torch.tensor([[[0.0, 1.0, 0.0]]]))
    assert varied.tolist() == [True]
    assert upsampler(masks)[0, 0].tolist() == pytest.approx([0, 1 / 3, 1, 1, 1 / 3, 0], abs=1e-15)


sides = st.integers(1, 20)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**31))
def test_extremes_mass_and_normalisation_are_those_of_the_full_map(height, width, full_h, full_w, seed):
    maps = torch.rand(2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    upsampler = upsampling((height, width), (full_h, full_w), CPU)
    whole = upsampler(maps)
    low, high = upsampler.extremes(maps)
    assert torch.equal(low.flatten(), whole.amin((1, 2))) or torch.allclose(
        low.flatten(), whole.amin((1, 2)), atol=1e-15
    )
    assert torch.allclose(high.flatten(), whole.amax((1, 2)), rtol=0, atol=1e-15)
    assert torch.allclose(upsampler.mass(maps), whole.sum((1, 2)), rtol=1e-13)
    masks, varied = upsampler.normalise(maps)
    for mask, full, is_varied in zip(upsampler(masks), whole, varied, strict=True):
        wanted = (full - full.min()) / (full.max() - full.min()) if is_varied else torch.zeros_like(full)
        assert torch.allclose(mask, wanted, rtol=0, atol=1e-9)


def test_the_native_extremes_would_be_wrong():
    maps = torch.zeros(1, 2, 2, dtype=torch.float64)
    maps[0, 0, 0] = 1
    assert upsampling((2, 2), (5, 5), CPU).extremes(maps)[1].item() == 1
    odd = torch.zeros(1, 3, 3, dtype=torch.float64)
    odd[0, 1, 1] = 1
    assert upsampling((3, 3), (6, 6), CPU).extremes(odd)[1].item() == pytest.approx(0.5625)


def test_constant_maps_give_no_mask():
    masks, varied = upsampling((3, 3), (9, 9), CPU).normalise(torch.full((2, 3, 3), 0.7))
    assert varied.tolist() == [False, False]
    assert masks.abs().max() == 0


def test_corner_samples_are_few():
    assert len(corner_samples(7, 224)) <= 16
    assert corner_samples(4, 4) == [0, 1, 2, 3]


def test_rows_sum_to_one():
    assert torch.allclose(bilinear_matrix(7, 224).sum(1), torch.ones(224, dtype=torch.float64))
