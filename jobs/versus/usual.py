"""What is usual: how much of a map moves from A to B where neither got better or worse, and what lies beyond it."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

BINS = 1000
"""Of the histogram from which the quantile is read: it is exact to a thousandth, in any number of rows."""
USUAL_SHARE = 0.95
"""Of the rows that stayed: their maps move no more than is usual."""
LEAST_STAYED = 20
"""With fewer of them nothing is known to be usual."""
MOST_BY_DEFAULT = 0.5
"""Then a map looks elsewhere where more than half of it moves."""
LEAST_MOVED = 0.1
"""Of a map that looks elsewhere, also where models hardly differ: less is rounding, or a matter of sharpness."""


class Usual:
    """Counts the rows that neither regressed nor improved; needs the same memory for any number."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Of the columns of `MEASURED`."""
        stayed = [row["moved"] for row in rows if not row["regressed"] and not row["improved"]]
        moves = np.array([moved for moved in stayed if moved is not None])
        self.counts += np.histogram(moves, BINS, (0, 1))[0]

    @property
    def num_stayed(self) -> int:
        """Rows that stayed and have two maps that are not flat."""
        return int(self.counts.sum())

    @property
    def threshold(self) -> float:
        """A map looks elsewhere where it moved by more: the 95 % quantile of what moved in the rows that stayed."""
        if self.num_stayed < LEAST_STAYED:
            return MOST_BY_DEFAULT
        place = int(np.searchsorted(self.counts.cumsum(), USUAL_SHARE * self.num_stayed))
        return max(LEAST_MOVED, (place + 1) / BINS)


def judged(row: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The row in the columns of `DIFFERENCE`."""
    elsewhere = None if row["moved"] is None else row["moved"] > threshold
    both = None if elsewhere is None else elsewhere and row["regressed"]
    return {**row, "looks_elsewhere": elsewhere, "regressed_and_looks_elsewhere": both}
