"""What is usual: how alike A's and B's maps are where neither got better or worse, and what is less alike than that.

Spearman's correlation judges, for it asks where a map is strong, and not how sharp: a map that has only drawn together
moves much of its mass and looks where it looked before.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

BINS = 2000
"""Of the histogram from which the quantile is read: it is exact to a thousandth, in any number of rows."""
UNUSUAL_SHARE = 0.05
"""Of the rows that stayed: their maps are the least alike."""
LEAST_STAYED = 20
"""With fewer of them nothing is known to be usual."""
BY_DEFAULT = 0.2
"""Then maps with a lower correlation, which have next to nothing in common, look elsewhere."""
MOST = 0.5
"""Maps with a higher correlation never do, also where two models hardly differ."""


class Usual:
    """Counts the rows that neither regressed nor improved; needs the same memory for any number."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Of the columns of `MEASURED`."""
        stayed = [row["spearman"] for row in rows if not row["regressed"] and not row["improved"]]
        alike = np.array([one for one in stayed if one is not None])
        self.counts += np.histogram(alike.clip(-1, 1), BINS, (-1, 1))[0]

    @property
    def num_stayed(self) -> int:
        """Rows that stayed and have two maps that are not flat."""
        return int(self.counts.sum())

    @property
    def threshold(self) -> float:
        """A map looks elsewhere where the correlation is below: the 5 % quantile of the rows that stayed."""
        if self.num_stayed < LEAST_STAYED:
            return BY_DEFAULT
        place = np.searchsorted(self.counts.cumsum(), UNUSUAL_SHARE * self.num_stayed, side="right")
        return min(MOST, float(np.linspace(-1, 1, BINS + 1)[place]))

    @property
    def rule(self) -> str:
        """In words."""
        if self.num_stayed < LEAST_STAYED:
            return f"spearman below {BY_DEFAULT:g}, for fewer than {LEAST_STAYED} rows neither regressed nor improved"
        quantile = f"the {UNUSUAL_SHARE:.0%} quantile of the {self.num_stayed:,} rows that stayed"
        return f"spearman below {quantile} (neither regressed nor improved), and below {MOST:g}"


def judged(row: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The row in the columns of `DIFFERENCE`."""
    elsewhere = None if row["spearman"] is None else row["spearman"] < threshold
    both = None if elsewhere is None else elsewhere and row["regressed"]
    return {**row, "looks_elsewhere": elsewhere, "regressed_and_looks_elsewhere": both}
