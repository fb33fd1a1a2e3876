"""Drop and Increase: hand cases, ties, exact counts, and the slow twin."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engine.metrics.faithfulness import KeepTop, KeepTopProtocol, keep_top_values, top_pixels
from engine.models import ModelAdapter
from engine.perturb import BASELINES, perturbation
from engine.scorer import Scorer
from engine.targets import ClassProbability
from tests.engine import oracles
from tests.engine.nets import Plain, seeded, smooth

# ---------------------------------------------------------------- V7

SCORES, KEPT = [0.8, 0.5, 0.9, 0.5], [0.6, 0.75, 0.9, 0.1]


def test_hand_vector_v7():
    values = [keep_top_values(score, kept) for score, kept in zip(SCORES, KEPT, strict=True)]
    assert [value.drop for value in values] == pytest.approx([25, 0, 0, 80])
    assert [value.increase for value in values] == [False, True, False, False]  # the tie does not count
    assert np.mean([value.drop for value in values]) == pytest.approx(26.25)
    assert oracles.drop_and_increase(SCORES, KEPT) == pytest.approx((26.25, 25))


def test_hand_vector_v7_of_the_localisation_metrics():
    saliency = np.array([10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    truth = np.array([0, 1, 1, 1, 0, 0, 0, 0, 0, 1])
    assert oracles.energy(saliency, truth) == pytest.approx(25 / 55)
    assert oracles.overlap(saliency, truth) == pytest.approx(1 / 5)
    assert oracles.box(saliency, truth) == pytest.approx(3 / 4)
    assert truth[top_pixels(saliency, 0.2)].tolist() == [0, 1]
    assert truth[top_pixels(saliency, 0.4)].mean() == 3 / 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-9, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_values_add_up_to_the_slow_twins(pairs):
    values = [keep_top_values(*pair) for pair in pairs]
    drop, increase = oracles.drop_and_increase(*zip(*pairs, strict=True))
    assert np.mean([value.drop for value in values]) == pytest.approx(drop)
    assert 100 * np.mean([value.increase for value in values]) == pytest.approx(increase)


# ---------------------------------------------------------------- edges of the two scores


def test_a_score_of_zero_cannot_drop():
    assert (keep_top_values(0.0, 0.0).drop, keep_top_values(0.0, 0.0).increase) == (0, False)
    assert (keep_top_values(0.0, 0.3).drop, keep_top_values(0.0, 0.3).increase) == (0, True)


def test_a_tiny_score_is_a_score():
    assert keep_top_values(1e-300, 0.0).drop == pytest.approx(100)
    assert keep_top_values(1e-7, 5e-8).drop == pytest.approx(50)


def test_everything_lost_is_a_hundred_percent():
    assert keep_top_values(0.7, 0.0).drop == 100


@pytest.mark.parametrize(("score", "kept"), [(0.5, np.nan), (np.nan, 0.5), (np.nan, np.nan)])
def test_a_score_that_is_no_number_is_no_perfect_drop(score, kept):
    assert np.isnan(keep_top_values(score, kept).drop)


# ---------------------------------------------------------------- which pixels


def test_the_number_of_pixels_is_exact():
    assert top_pixels(np.random.default_rng(0).random((224, 224)), 0.15).sum() == 7526
    assert top_pixels(np.zeros((224, 224)), 0.15).sum() == 7526
    assert top_pixels(np.zeros((224, 224)), 0.2).sum() == 10035
    assert top_pixels(np.ones((3, 3)), 0.1).sum() == 0


def test_ties_by_hand():
    values = np.array([[0.5, 1, 0.5], [0.5, 0, 1]])
    assert top_pixels(values, 0.5).tolist() == [[True, True, False], [False, False, True]]
    assert top_pixels(np.zeros((4, 5)), 0.15).ravel().tolist() == [True] * 3 + [False] * 17


@given(arrays(np.float64, (6, 7), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
def test_ties_go_to_the_earlier_pixel(values):
    assert np.array_equal(top_pixels(values, 0.15), oracles.top_pixels(values, 6))


@settings(max_examples=60)
@given(arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(0, 5)), st.floats(0, 1))
def test_top_pixels_equal_the_slow_twins(values, fraction):
    wanted = oracles.top_pixels(values, int(fraction * values.size))
    assert np.array_equal(top_pixels(values, fraction), wanted)


def test_the_map_is_left_alone():
    values = np.random.default_rng(0).random((5, 5))
    before = values.copy()
    top_pixels(values, 0.3)
    assert np.array_equal(values, before)


# ---------------------------------------------------------------- with a model


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("baseline", ["zero", "black"])
def test_it_equals_one_image_at_a_time(baseline, batch_size):
    adapter, inputs = ModelAdapter(seeded(Plain), input_size=(32, 32)), smooth(3, 32, 32)
    target = ClassProbability(torch.tensor([[0, 1], [2, 3], [4, 0]]))
    maps = np.random.default_rng(0).random((3, 2, 32, 32))
    twin, removed = oracles.double_copy(adapter.module), BASELINES[baseline](adapter).double()

    def probability(picture, own):
        with torch.no_grad():
            return float(oracles.probability(twin(picture)[0], int(own)))

    scores = [
        [probability(one[None].double(), own) for own in row] for one, row in zip(inputs, target.classes, strict=True)
    ]
    metric = KeepTop(Scorer(adapter, perturbation(adapter, baseline), batch_size), KeepTopProtocol(baseline))
    found = metric.evaluate(inputs, target, maps, scores)
    for image in range(3):
        for index in range(2):
            mask = torch.from_numpy(oracles.top_pixels(maps[image, index], 153)).double()
            kept = probability(inputs[image][None].double() * mask + (1 - mask) * removed, target.classes[image, index])
            drop, increase = oracles.drop_and_increase([scores[image][index]], [kept])
            assert found[image][index].drop == pytest.approx(drop, abs=1e-3)
            assert found[image][index].increase == bool(increase)


def test_evaluating_gives_the_model_back():
    adapter = ModelAdapter(seeded(Plain).train(), input_size=(32, 32))
    metric = KeepTop(Scorer(adapter, perturbation(adapter, "zero"), 2), KeepTopProtocol("zero"))
    metric.evaluate(smooth(1, 32, 32), ClassProbability(torch.tensor([[0]])), np.ones((1, 1, 32, 32)), [[0.5]])
    assert adapter.module.training
    assert all(parameter.requires_grad for parameter in adapter.module.parameters())


def test_the_protocol_hash_tells_protocols_apart():
    one = KeepTopProtocol("zero")
    others = [KeepTopProtocol("black"), KeepTopProtocol("zero", fraction=0.2), KeepTopProtocol("zero", score="logit")]
    assert KeepTopProtocol("zero").digest == one.digest
    assert len({one.digest, *(other.digest for other in others)}) == 4
    assert len(one.digest) == 16
    int(one.digest, 16)
