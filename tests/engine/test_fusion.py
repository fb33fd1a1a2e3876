"""Otsu, gates and the cascade: hand vectors, and the slow twin on random maps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engine.fusion import cascade, hard_gate, minmax, otsu_foreground, soft_gate
from tests.engine import oracles

V5 = np.array([0.0] * 6 + [0.2] * 4 + [0.8] * 3 + [1.0] * 3)
V5B = np.array([0.0] + [0.5] * 12 + [0.7] * 6 + [1.0])
U1, U2, U3 = np.array([[1, 0.5, 0.25, 0]]), np.array([[0, 1, 0.9, 0.1]]), np.array([[0, 0.8, 1, 0.1]])


@pytest.mark.parametrize("foreground", [otsu_foreground, oracles.otsu_foreground])
def test_hand_vector_v5(foreground):
    assert foreground(V5).tolist() == [False] * 10 + [True] * 6
    assert foreground(V5B).sum() == 7
    assert not foreground(np.full(9, 0.4)).any()


@pytest.mark.parametrize("gate", [soft_gate, oracles.soft_gate])
def test_hand_vector_v5_soft(gate):
    assert gate(V5)[-6:].min() > 0.99
    assert gate(V5)[:10].max() < 0.5
    opened = gate(V5B)
    assert opened[-1] > 0.99
    assert opened[:-1].max() < 0.01  # t rises to 0.755859, and 0.7 falls below it
    assert not gate(np.full(9, 0.4)).any()


def test_hand_vector_v6():
    assert cascade([U1, U2, U3], hard_gate).tolist() == [[0, 2.3, 2.15, 0]]
    assert minmax(cascade([U1, U2, U3])).ravel() == pytest.approx([0, 1, 0.934783, 0], abs=1e-6)
    assert cascade([U1, U2, U3], soft_gate).ravel() == pytest.approx([0, 2.3, 2.15, 0.0501], abs=1e-4)


def test_the_deeper_map_gates_and_order_matters():
    assert cascade([U3, U2, U1]).tolist() != cascade([U1, U2, U3]).tolist()
    assert cascade([U1]).tolist() == U1.tolist()
    with pytest.raises(ValueError, match="every block was empty"):
        cascade([])


def test_minmax_of_a_constant_is_zero():
    assert minmax(np.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]


maps = arrays(np.float64, st.integers(2, 60), elements=st.floats(0, 1, allow_subnormal=False))


@settings(max_examples=150, deadline=None)
@given(maps)
def test_otsu_equals_the_slow_twin(values):
    fast, slow = otsu_foreground(values), oracles.otsu_foreground(values)
    if (fast != slow).any():  # two splits may tie within rounding; then their criterion must be the same
        assert criterion(values, fast) == pytest.approx(criterion(values, slow), rel=1e-9)


def criterion(values, foreground):
    share = foreground.mean()
    return share * (1 - share) * (values[foreground].mean() - values[~foreground].mean()) ** 2


@settings(max_examples=60, deadline=None)
@given(maps)
def test_the_cascade_stays_inside_the_last_foreground(values):
    last = minmax(values)
    fused = cascade([np.ones_like(last), last])
    assert not fused[~otsu_foreground(last)].any()
    assert fused.max() <= 2
