"""Decides which records of a job get full SISE, from the prediction, the label and the map, and says why."""

from collections.abc import Mapping, Sequence

from blocksight.engine.catalog.entries import Fidelity

UNCERTAIN_BELOW = 0.5
"""A prediction is uncertain if its probability is below this."""
RARE_SHARE = 0.25
"""A label is rare if it has fewer records than this fraction of the mean per label."""

AS_ASKED, SOUND, POOR_MAP = "as asked", "sound", "poor map"


def rare_labels(counts: Mapping[str, int]) -> frozenset[str]:
    """The rare labels of a data set; `counts` is the number of records of each label."""
    mean = sum(counts.values()) / max(1, len(counts))
    return frozenset(label for label, count in counts.items() if count < RARE_SHARE * mean)


def doubts_of(predicted: int, probability: float, label: int | None, *, is_rare: bool) -> tuple[str, ...]:
    """The reasons for full SISE that are known before the map: of wrong, uncertain and rare those that hold.

    `probability` in [0, 1] is that of the predicted class. A `label` of None is unknown, and the record is not wrong.
    """
    found = {
        "wrong": label is not None and label != predicted,
        "uncertain": probability < UNCERTAIN_BELOW,
        "rare": is_rare,
    }
    return tuple(name for name, holds in found.items() if holds)


def fidelity_columns(level: Fidelity | None, doubts: Sequence[str], *, was_completed: bool) -> dict[str, str | None]:
    """A row's two fidelity columns, from the job's level and the record's doubts."""
    if level != "auto":
        return {"fidelity": level, "fidelity_reason": None if level is None else AS_ASKED}
    reason = ", ".join(doubts) or (POOR_MAP if was_completed else SOUND)
    return {"fidelity": "balanced" if reason == SOUND else "full", "fidelity_reason": reason}
