"""A trial's sentence agrees with its figures, for every combination of sign, interval and p-value."""

from dataclasses import replace
from itertools import product

import pytest

from blocksight.jobs.audit.result import CERTAIN, Effect
from blocksight.jobs.audit.words import comparison, p_text, scope
from tests.jobs.audit.test_trial import REAL, SHORTCUT

INTERVALS = {
    "above 0": (0.5, 60.0),
    "touches 0 from above": (0.0, 60.0),
    "around 0": (-60.0, 60.0),
    "touches 0 from below": (-60.0, 0.0),
    "below 0": (-60.0, -0.5),
}
MEANS = (-55.13, -1.0, -0.004, 0.0, 0.004, 0.99, 1.0, 55.13)
P_VALUES = (3e-5, CERTAIN - 1e-9, CERTAIN, 0.2, 1.0, float("nan"))


def expected(mean: float, low: float, high: float, p_value: float) -> str:
    """The direction by the plain rule: all three figures are on one side of 0."""
    if not p_value < 0.05 or low <= 0 <= high:
        return "unclear"
    if low > 0 and mean > 0:
        return "more"
    return "less" if high < 0 and mean < 0 else "unclear"


@pytest.mark.parametrize("verb", ["fall", "rise"])
@pytest.mark.parametrize(("mean", "interval", "p_value"), list(product(MEANS, INTERVALS, P_VALUES)))
def test_sign_interval_p_value_and_sentence_agree(mean, interval, p_value, verb):
    effect = Effect(mean, *INTERVALS[interval], p_value, 32, 0.0)
    text = comparison(effect, verb)
    direction = expected(mean, *INTERVALS[interval], p_value)
    assert effect.direction == direction
    assert ("no differently" in text) == (direction == "unclear")
    assert (" more than with a random region" in text) == (direction == "more")
    assert (" less than with a random region" in text) == (direction == "less")
    assert effect.is_real == (direction == "more" and mean >= 1)
    assert ("of a finding" in text) == (direction == "more" and mean < 1)
    if direction != "unclear":
        assert "-" not in text.replace("log-odds", "")  # a negative amount "more" is a contradiction
        assert "by 0.00 [" not in text


@pytest.mark.parametrize(
    ("effect", "text"),
    [
        (
            Effect(-55.13, -60.0, -50.0, 3e-5, 32, 0.0),
            "its log-odds rise by 55.13 [50.00, 60.00] less than with a random region",
        ),
        (
            Effect(3, 2.5, 3.5, 1e-6, 32, None, "outputs"),
            "its outputs rise by 3.00 [2.50, 3.50] more than with a random region",
        ),
        (Effect(3, 2.5, 3.5, 1e-6, 32, 0.4), "its log-odds rise by 3.00 [2.50, 3.50] more than with a random region"),
        (
            Effect(0.5, 0.4, 0.6, 0.01, 32, 0.4),
            "its log-odds rise by 0.50 [0.40, 0.60] more than with a random region, less than the 1.00 of a finding",
        ),
        (
            Effect(-0.5, -1.5, 0.25, 0.3, 32, 0.4),
            "its log-odds rise no differently than with a random region, as far as can be told: a difference of -0.50 "
            "[-1.50, +0.25], p = 0.3",
        ),
    ],
)
def test_the_sentences(effect, text):
    assert comparison(effect, "rise") == text


@pytest.mark.parametrize(("p_value", "text"), [(3e-5, "p < 0.0001"), (0, "p < 0.0001"), (0.0123, "p = 0.012")])
def test_p_values_in_words(p_value, text):
    assert p_text(replace(REAL, p_value=p_value)) == text


def test_a_finding_bounds_its_claims():
    tried = replace(SHORTCUT, pasted=replace(REAL, count=30), other_classes=tuple("abcdefg"))
    assert scope(tried) == (
        "Tried: this one region, inpainted in 32 records of yes whose maps point there, and pasted from them into 30 "
        "records explained for a, b, c, d, e and 2 more. Nothing is claimed of other records, classes or regions."
    )
    assert "30 records explained for other classes" in str(scope(replace(tried, other_classes=())))
    assert scope(replace(SHORTCUT, blanked=None, pasted=None)) is None


@pytest.mark.parametrize(
    ("change", "standing"),
    [
        ({"is_confirmed": True}, "finding"),
        ({}, "suspicion"),
        ({"blanked": None, "pasted": None}, "suspicion"),
        ({"blanked": replace(REAL, p_value=0.5)}, "not confirmed"),
        ({"pasted": replace(REAL, mean=-3.0, low=-4.0, high=-2.0)}, "not confirmed"),
        ({"blanked": replace(REAL, mean=0.5, low=0.1)}, "not confirmed"),
    ],
)
def test_what_was_tried_without_effect_is_no_suspicion(change, standing):
    assert replace(SHORTCUT, **change).standing == standing
