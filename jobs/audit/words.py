"""Puts a trial's figures into words: a sentence always agrees with sign, interval and p-value."""

from typing import Literal

from blocksight.jobs.audit.result import MIN_EFFECT, Effect, Shortcut
from blocksight.jobs.plan.text import counted

Verb = Literal["fall", "rise"]
"""What the log-odds do if the region is a shortcut: they fall where it is removed, and rise where it is pasted."""

LEAST_P = 1e-4
"""Smaller p-values are printed as smaller than this."""
MAX_CLASSES = 5
"""Classes that a sentence names."""


def comparison(effect: Effect, verb: Verb) -> str:
    """Compares an effect with that of random regions: `its log-odds fall by 3.00 [2.50, 3.50] more than with ...`.

    An effect below 0 is printed as its amount with "less"; one that is not significant is never called more or less.
    """
    if effect.direction == "unclear":
        return (
            f"its {effect.scale} {verb} no differently than with a random region, as far as can be told: "
            f"a difference of {_signed(effect.mean)} [{_signed(effect.low)}, {_signed(effect.high)}], {p_text(effect)}"
        )
    sign = 1 if effect.direction == "more" else -1
    low, high = sorted((sign * effect.low, sign * effect.high))
    size = f"{_amount(sign * effect.mean)} [{_amount(low)}, {_amount(high)}]"
    text = f"its {effect.scale} {verb} by {size} {effect.direction} than with a random region"
    if effect.direction == "more" and not effect.is_real:
        return f"{text}, less than the {_amount(MIN_EFFECT)} of a finding"
    return text


def p_text(effect: Effect) -> str:
    """`p = 0.03`, `p < 0.0001`."""
    return f"p < {LEAST_P:.4f}" if effect.p_value < LEAST_P else f"p = {effect.p_value:.2g}"


def scope(shortcut: Shortcut) -> str | None:
    """Says on how many records of which classes a region was tried, and that no others were; None if it was not."""
    if shortcut.blanked is None or shortcut.pasted is None:
        return None
    name = shortcut.target_name or f"class {shortcut.target_index}"
    others = shortcut.other_classes
    more = f" and {len(others) - MAX_CLASSES:,} more" if len(others) > MAX_CLASSES else ""
    of = f" explained for {', '.join(others[:MAX_CLASSES])}{more}" if others else " explained for other classes"
    return (
        f"Tried: this one region, inpainted in {counted(shortcut.blanked.count, 'record')} of {name} whose maps point "
        f"there, and pasted from them into {counted(shortcut.pasted.count, 'record')}{of}. "
        "Nothing is claimed of other records, classes or regions."
    )


def _amount(value: float) -> str:
    """Two decimals; a value that they would show as 0 has one significant digit."""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.005 else f"{value:.1g}"


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{_amount(abs(value))}"
