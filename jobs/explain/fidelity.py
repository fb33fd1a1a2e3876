"""Which records of a job get full SISE, and why: by what is known before a record's map, and by the map itself."""

from collections.abc import Mapping, Sequence

from blocksight.engine.catalog.entries import Fidelity

UNCERTAIN = 0.5
"""A top probability below this is no sure prediction."""
RARE_SHARE = 0.25
"""A label with fewer records than this, of what each would have if all had as many, is rare."""

AS_ASKED, SOUND, POOR_MAP = "as asked", "sound", "poor map"


def rare_labels(counts: Mapping[str, int]) -> frozenset[str]:
    """The rare of a data set's labels, given how many records each has."""
    even = sum(counts.values()) / max(1, len(counts))
    return frozenset(label for label, count in counts.items() if count < RARE_SHARE * even)


def doubts_of(predicted: int, probability: float, label: int | None, *, is_rare: bool) -> tuple[str, ...]:
    """What speaks for full SISE before any map: of wrong, uncertain and rare those that hold.

    `probability` in [0, 1] is that of the predicted class; a `label` of None is not known, and never wrong.
    """
    found = {
        "wrong": label is not None and label != predicted,
        "uncertain": probability < UNCERTAIN,
        "rare": is_rare,
    }
    return tuple(name for name, holds in found.items() if holds)


def fidelity_columns(level: Fidelity | None, doubts: Sequence[str], *, was_completed: bool) -> dict[str, str | None]:
    """What a row says of its fidelity, given the job's level and what came of the record."""
    if level != "auto":
        return {"fidelity": level, "fidelity_reason": None if level is None else AS_ASKED}
    reason = ", ".join(doubts) or (POOR_MAP if was_completed else SOUND)
    return {"fidelity": "balanced" if reason == SOUND else "full", "fidelity_reason": reason}
