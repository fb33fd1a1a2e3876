"""Drop and Increase: hand cases, ties, exact counts, and the slow twin."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engine.metrics.faithfulness import KeepTop, KeepTopProtocol, keep_top_values, top_pixels
from engine.models import ModelAdapter
from engine.perturb import perturbation
from engine.scorer import Scorer
from engine.targets import ClassProbability
from tests.engine import oracles
from tests.engine.nets import Plain, seeded


def test_hand_vector_v7():
    pairs = zip([0.8, 0.5, 0.9, 0.5], [0.6, 0.75, 0.9, 0.1], strict=True)
    values = [keep_top_values(score, kept) for score, kept in pairs]
    assert np.mean([value.drop for value in values]) == pytest.approx(26.25)
    assert 100 * np.mean([value.increase for value in values]) == 25


def test_a_score_of_zero_cannot_drop():
    assert keep_top_values(0.0, 0.0).drop == 0
    assert not keep_top_values(0.0, 0.0).increase


def test_the_number_of_pixels_is_exact():
    assert top_pixels(np.random.default_rng(0).random((224, 224)), 0.15).sum() == 7526
    assert top_pixels(np.zeros((224, 224)), 0.2).sum() == 10035
    assert top_pixels(np.zeros((4, 5)), 0.15).ravel()[:3].all()


@given(arrays(np.float64, (6, 7), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
def test_ties_go_to_the_earlier_pixel(values):
    assert np.array_equal(top_pixels(values, 0.15), oracles.top_pixels(values, 6))


def test_it_equals_one_image_at_a_time():
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    inputs = torch.randn(3, 3, 32, 32)
    target = ClassProbability(torch.tensor([[0, 1], [2, 3], [4, 0]]))
    maps = np.random.default_rng(0).random((3, 2, 32, 32))
    scores = target.score(adapter.module(inputs).detach(), torch.arange(3)).tolist()
    metric = KeepTop(Scorer(adapter, perturbation(adapter, "zero"), 4), KeepTopProtocol("zero"))
    found = metric.evaluate(inputs, target, maps, scores)
    for image in range(3):
        for index in range(2):
            mask = torch.from_numpy(oracles.top_pixels(maps[image, index], 153)).float()
            kept = adapter.module(inputs[image : image + 1] * mask).double().softmax(1)
            own = float(kept[0, target.classes[image, index]].detach())
            wanted = keep_top_values(scores[image][index], own)
            assert found[image][index].drop == pytest.approx(wanted.drop, abs=1e-3)
            assert found[image][index].increase == wanted.increase


def test_the_protocol_hash_tells_baselines_apart():
    assert KeepTopProtocol("zero").digest != KeepTopProtocol("black").digest
    assert KeepTopProtocol("zero").digest == KeepTopProtocol("zero").digest
