"""The class probability: its value, and the direction in which it grows, also where the softmax is saturated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.engine.model.targets import ClassProbability
from tests.engine import oracles

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [30.0, 0.0, -5.0]], dtype=torch.float64)


def exact_gradient(logits, target):
    """By autograd of 1 / (1 + odds against), which loses nothing near 0 and 1."""
    own = logits.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(oracles.probability(own, target), own)
    return gradient


def test_scores_are_softmax_probabilities_in_double():
    target = ClassProbability(torch.tensor([[2, 0], [0, 1]]))
    found = target.score(LOGITS.float(), torch.tensor([0, 1]))
    assert found.dtype == torch.float64
    assert found.tolist() == [
        pytest.approx([float(oracles.probability(LOGITS[0], own)) for own in (2, 0)], rel=1e-12),
        pytest.approx([float(oracles.probability(LOGITS[1], own)) for own in (0, 1)], rel=1e-12),
    ]


def test_each_row_belongs_to_its_image():
    target = ClassProbability(torch.tensor([[2], [0]]))
    images = torch.tensor([1, 1, 0, 1])
    found = target.score(LOGITS[[0, 1, 0, 1]], images)
    assert found.shape == (4, 1)
    wanted = [oracles.probability(LOGITS[row], own) for row, own in ((0, 0), (1, 0), (0, 2), (1, 0))]
    assert found.flatten().tolist() == pytest.approx([float(own) for own in wanted], rel=1e-12)


def test_of_takes_some_images():
    target = ClassProbability(torch.tensor([[2], [0], [1]]))
    assert target.of(slice(1, 3)).classes.tolist() == [[0], [1]]
    assert target.num_targets == target.of(slice(0, 1)).num_targets == 1
    assert ClassProbability(torch.tensor([[2, 1]])).num_targets == 2


@settings(max_examples=200)
@given(st.lists(st.floats(-40, 40), min_size=2, max_size=6), st.data())
def test_the_direction_is_the_gradient_up_to_a_positive_factor(values, data):
    logits = torch.tensor(values, dtype=torch.float64)
    own = data.draw(st.integers(0, len(values) - 1))
    found = ClassProbability(torch.tensor([[own]])).direction(logits[None], 0)[0]
    wanted = exact_gradient(logits, own)
    assert found[own] == 1
    assert found.sum().item() == pytest.approx(0, abs=1e-12)
    assert torch.allclose(found, wanted / wanted[own], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("logits", [[100.0, 3.0, 1.0], [-100.0, 3.0, 1.0], [1e4, 0.0, -1.0], [0.0, 1e4, 9e3]], ids=str)
def test_the_direction_is_exact_where_float32_is_saturated(logits):
    logits = torch.tensor([logits])
    direction = ClassProbability(torch.tensor([[0]])).direction(logits, 0)[0].double()
    others = logits[0, 1:].double().softmax(0)
    assert direction.tolist() == pytest.approx([1, *(-others).tolist()], rel=1e-12)


def test_the_target_number_chooses_the_class():
    target = ClassProbability(torch.tensor([[0, 2]]))
    assert target.direction(LOGITS[:1], 0)[0].argmax() == 0
    assert target.direction(LOGITS[:1], 1)[0].argmax() == 2
