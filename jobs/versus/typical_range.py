"""The typical range: how alike A's and B's maps are in rows that neither regressed nor improved, and which are less so.

Likeness is Spearman's correlation. It compares where maps are strong, not how sharp they are: a map that has only
become sharper moves much of its mass and still points at the same place.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BINS = 2000
"""Of the histogram that the quantile is read from: it is exact to 0.001 for any number of rows."""
UNUSUAL_SHARE = 0.05
"""Share of the rows that stayed whose maps are unusual: the least alike."""
MIN_STAYED = 20
"""With fewer rows that stayed, the typical range is unknown and `DEFAULT_THRESHOLD` holds."""
DEFAULT_THRESHOLD = 0.2
"""Maps with a lower correlation have hardly anything in common."""
MAX_THRESHOLD = 0.5
"""Maps with a higher correlation never look elsewhere, also where two models hardly differ."""


class TypicalRange:
    """Counts the rows that stayed: neither regressed nor improved. Its memory does not grow with the rows."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, table: pa.Table) -> None:
        """Adds rows with the columns of `MEASURED`."""
        stayed = table.filter(~pc.field("regressed") & ~pc.field("improved"))["spearman"].drop_null()
        self.counts += np.histogram(stayed.to_numpy().clip(-1, 1), BINS, (-1, 1))[0]

    @property
    def num_stayed(self) -> int:
        """Rows that stayed and whose two maps are not flat."""
        return int(self.counts.sum())

    @property
    def threshold(self) -> float:
        """Maps with a lower correlation look elsewhere: the 5 % quantile of the rows that stayed, -1 to 0.5."""
        if self.num_stayed < MIN_STAYED:
            return DEFAULT_THRESHOLD
        bin_index = np.searchsorted(self.counts.cumsum(), UNUSUAL_SHARE * self.num_stayed, side="right")
        return min(MAX_THRESHOLD, float(np.linspace(-1, 1, BINS + 1)[bin_index]))

    @property
    def rule(self) -> str:
        """The threshold's rule, in words."""
        if self.num_stayed < MIN_STAYED:
            return (
                f"spearman below {DEFAULT_THRESHOLD:g}, for fewer than {MIN_STAYED} rows neither regressed nor improved"
            )
        quantile = f"the {UNUSUAL_SHARE:.0%} quantile of the rows that stayed ({self.num_stayed:,})"
        return f"spearman below {quantile} (neither regressed nor improved), and below {MAX_THRESHOLD:g}"


def judged(row: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The row with the columns of `DIFFERENCE`: a map pair with a correlation below `threshold` looks elsewhere."""
    elsewhere = None if row["spearman"] is None else row["spearman"] < threshold
    both = None if elsewhere is None else elsewhere and row["regressed"]
    return {**row, "looks_elsewhere": elsewhere, "regressed_and_looks_elsewhere": both}
