"""Otsu, gates and the cascade: hand vectors, and the slow twin on random maps."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from blocksight.engine.explainers.fusion import GATES, cascade, hard_gate, otsu_foreground, soft_gate
from blocksight.engine.saliency import minmax
from tests.engine import oracles

V5 = np.array([0.0] * 6 + [0.2] * 4 + [0.8] * 3 + [1.0] * 3)
V5B = np.array([0.0] + [0.5] * 12 + [0.7] * 6 + [1.0])
U1, U2, U3 = np.array([[1, 0.5, 0.25, 0]]), np.array([[0, 1, 0.9, 0.1]]), np.array([[0, 0.8, 1, 0.1]])

BOTH_OTSU = pytest.mark.parametrize("foreground", [otsu_foreground, oracles.otsu_foreground])
BOTH_SOFT = pytest.mark.parametrize("gate", [soft_gate, oracles.soft_gate])
BOTH_CASCADES = pytest.mark.parametrize(
    "fuse", [lambda maps, gate="hard": cascade(maps, GATES[gate]), oracles.fuse], ids=["engine", "slow"]
)


# ---------------------------------------------------------------- Otsu


@BOTH_OTSU
def test_hand_vector_v5(foreground):
    assert foreground(V5).tolist() == [False] * 10 + [True] * 6
    assert foreground(V5.reshape(4, 4)).shape == (4, 4)
    assert foreground(V5B).tolist() == [False] * 13 + [True] * 7


def test_hand_vector_v5_variances():
    splits = [oracles.between_class_variance(V5, value < V5) for value in (0, 0.2, 0.8)]
    assert splits == pytest.approx([0.090094, 0.157594, 0.086575], abs=1e-6)
    splits = [oracles.between_class_variance(V5B, value < V5B) for value in (0, 0.5, 0.7)]
    assert splits == pytest.approx([0.016505, 0.018004, 0.010189], abs=1e-6)
    assert oracles.otsu_threshold(V5, np.minimum((V5 * 256).astype(int), 255)) == 51
    assert oracles.otsu_threshold(V5B, np.minimum((V5B * 256).astype(int), 255)) == 128


@BOTH_OTSU
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_hand_vector_v5c_a_constant_map_has_no_foreground(foreground, value):
    assert not foreground(np.full((3, 3), value)).any()


@BOTH_OTSU
def test_otsu_in_edge_cases(foreground):
    assert foreground(np.array([0.0, 1.0])).tolist() == [False, True]
    assert foreground(np.array([0.0, 0.5, 1.0])).tolist() == [False, True, True]  # a tie: the first split wins
    assert foreground(np.array([0.5, 0.5 + 1 / 512])).tolist() == [False, False]  # one bin
    assert foreground(np.array([127.9 / 256, 128 / 256])).tolist() == [False, True]  # an edge is in the bin above
    assert foreground(np.array([255 / 256, 1.0])).tolist() == [False, False]  # 1 shares the last bin


# ---------------------------------------------------------------- gates


@BOTH_SOFT
def test_hand_vector_v5_soft(gate):
    opened = gate(V5)
    assert opened == pytest.approx(1 / (1 + np.exp(-100 * (V5 - 52 / 256))), abs=1e-12)
    assert opened[-6:].min() > 0.99
    assert opened[:10].max() < 0.5


@BOTH_SOFT
def test_hand_vector_v5b_raises_the_threshold(gate):
    opened = gate(V5B)
    assert opened == pytest.approx(1 / (1 + np.exp(-100 * (V5B - 193.5 / 256))), abs=1e-12)
    assert opened[-1] > 0.99
    assert opened[:-1].max() < 0.01  # t rises to 0.755859, and 0.7 falls below it
    assert not gate(np.full(9, 0.4)).any()


def test_a_hard_gate_is_the_foreground():
    assert hard_gate(V5).tolist() == [0.0] * 10 + [1.0] * 6


# ---------------------------------------------------------------- the cascade


@BOTH_CASCADES
def test_hand_vector_v6(fuse):
    assert fuse([U1, U2]).tolist() == [[0, 1.5, 1.15, 0]]
    assert fuse([U1, U2, U3]).tolist() == [[0, 2.3, 2.15, 0]]
    assert fuse([U1, U2, U3], "soft").ravel() == pytest.approx([0, 2.3, 2.15, 0.0501], abs=1e-4)


def test_hand_vector_v6_for_display():
    assert minmax(cascade([U1, U2, U3])).ravel() == pytest.approx([0, 1, 0.934783, 0], abs=1e-6)


@BOTH_CASCADES
def test_the_deeper_map_gates_and_order_matters(fuse):
    assert minmax(fuse([U3, U2, U1])).tolist() == [[1, 0, 0, 0]]
    assert fuse([U1]).tolist() == U1.tolist()


def test_nothing_to_fuse_is_an_error():
    with pytest.raises(ValueError, match="every block was empty"):
        cascade([])


def test_the_cascade_leaves_its_inputs_alone():
    maps = [U1.copy(), U2.copy(), U3.copy()]
    cascade(maps)
    assert [one.tolist() for one in maps] == [U1.tolist(), U2.tolist(), U3.tolist()]


def test_minmax_is_exact_and_zero_for_a_constant():
    assert minmax(np.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]
    assert minmax(np.array([-3.0, 1.0, 5.0])).tolist() == [0, 0.5, 1]
    assert minmax(np.array([1e-9, 2e-9])).tolist() == [0, 1]  # no epsilon in the denominator


# ---------------------------------------------------------------- random maps

maps = arrays(np.float64, st.integers(2, 60), elements=st.floats(0, 1, allow_subnormal=False))
coarse = arrays(np.float64, st.integers(2, 40), elements=st.sampled_from([k / 16 for k in range(17)]))


def assert_same_split(values, fast, slow):
    """Two splits may tie within rounding error; then their criteria must be equal."""
    if (fast != slow).any():
        wanted = oracles.between_class_variance(values, slow)
        assert oracles.between_class_variance(values, fast) == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=200)
@given(st.one_of(maps, coarse))
def test_otsu_equals_the_slow_twin(values):
    assert_same_split(values, otsu_foreground(values), oracles.otsu_foreground(values))


@settings(max_examples=100)
@given(st.one_of(maps, coarse))
def test_the_soft_gate_equals_the_slow_twin(values):
    slow, fast = oracles.soft_gate(values), soft_gate(values)
    grey = np.rint(256 * values)
    threshold = oracles.otsu_threshold(grey, np.minimum(grey, 255))
    assume(threshold is None or not is_tied(grey, threshold))
    assert fast == pytest.approx(slow, abs=1e-9)


def is_tied(grey, threshold):
    """Another split is as good within rounding error."""
    best = oracles.between_class_variance(grey, grey > threshold)
    others = {value for value in grey if (grey > value).any() and ((grey > value) != (grey > threshold)).any()}
    return any(oracles.between_class_variance(grey, grey > value) >= best * (1 - 1e-9) for value in others)


@settings(max_examples=60)
@given(maps)
def test_the_cascade_stays_inside_the_last_foreground(values):
    last = minmax(values)
    fused = cascade([np.ones_like(last), last])
    assert not fused[~otsu_foreground(last)].any()
    assert fused.min() >= 0
    assert fused.max() <= 2
