"""The scorer: packing in numbers, scores one at a time, and the layer map done by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.models import ModelAdapter
from engine.perturb import BASELINES, Perturbation, perturbation
from engine.resample import upsampling
from engine.scorer import MaskSet, Scorer, pack
from engine.targets import ClassProbability
from tests.engine.nets import Plain, seeded


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 16))
def test_packing_loses_nothing_and_fills_every_batch_but_the_last(counts, size):
    batches = pack(counts, size)
    flat = [(piece.which, mask) for batch in batches for piece in batch for mask in range(piece.start, piece.stop)]
    assert flat == [(which, mask) for which, count in enumerate(counts) for mask in range(count)]
    fill = [sum(piece.stop - piece.start for piece in batch) for batch in batches]
    assert all(own == size for own in fill[:-1])
    assert all(0 < own <= size for own in fill[-1:])


def test_packing_by_hand():
    shown = [[(piece.which, piece.start, piece.stop) for piece in batch] for batch in pack([3, 0, 4], 5)]
    assert shown == [[(0, 0, 3), (2, 0, 2)], [(2, 2, 4)]]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_are_those_of_one_mask_at_a_time(batch_size):
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    inputs = torch.randn(2, 3, 32, 32)
    target = ClassProbability(torch.tensor([[0, 4], [2, 1]]))
    sets = [MaskSet(1, torch.rand(3, 4, 4)), MaskSet(0, torch.rand(5, 8, 8)), MaskSet(0, torch.rand(1, 32, 32))]
    with adapter.borrowed():
        found = Scorer(adapter, perturbation(adapter, "zero"), batch_size).scores(inputs, target, sets)
        for own, masks in zip(found, sets, strict=True):
            for score, mask in zip(own, masks.values_khw, strict=True):
                full = upsampling(tuple(mask.shape), (32, 32), mask.device)(mask[None])[0]
                logits = adapter.module(inputs[masks.image][None] * full)
                wanted = logits.double().softmax(1)[0, target.classes[masks.image]]
                assert torch.allclose(score, wanted, rtol=1e-5, atol=0)


def test_hand_vector_v4():
    """2 x 2 masks at full size: the weights q / mass, and what leaving the mass out would give."""
    masks = torch.tensor([[[1.0, 0], [0, 0]], [[1, 1], [1, 1]], [[0.5, 1], [0, 0.5]]], dtype=torch.float64)
    scores = torch.tensor([0.8, 0.9, 0.6], dtype=torch.float64)
    mass = upsampling((2, 2), (2, 2), masks.device).mass(masks)
    assert mass.tolist() == [1, 4, 2]
    mean = torch.einsum("k,khw->hw", scores / mass, masks) / 3
    assert mean.flatten().tolist() == pytest.approx([0.391667, 0.175, 0.075, 0.125], abs=1e-6)
    wrong = torch.einsum("k,khw->hw", scores, masks) / 3
    assert wrong.flatten().tolist() == pytest.approx([0.666667, 0.5, 0.3, 0.4], abs=1e-6)


def test_baselines():
    adapter = ModelAdapter(seeded(Plain), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert BASELINES["zero"](adapter).unique().tolist() == [0]
    assert BASELINES["black"](adapter).unique().tolist() == [-1]
    inputs, masks = torch.full((1, 3, 1, 2), 3.0), torch.tensor([[[[1.0, 0.25]]]])
    assert Perturbation(torch.tensor(-1.0))(inputs, masks)[0, 0].tolist() == [[3.0, 0.0]]


def test_the_direction_is_the_gradient_up_to_a_positive_factor():
    logits = torch.tensor([[1.0, -2.0, 0.5], [30.0, 0.0, -5.0]], dtype=torch.float64, requires_grad=True)
    target = ClassProbability(torch.tensor([[2], [0]]))
    score = target.score(logits, torch.arange(2))
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    factor = gradient / target.direction(logits.detach(), 0)
    assert (factor > 0).all()
    assert torch.allclose(factor, factor[:, :1].expand(-1, 3), rtol=1e-6)
