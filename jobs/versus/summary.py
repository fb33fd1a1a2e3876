"""Sums up a difference: means with intervals, right and wrong predictions, and how often regressions look elsewhere."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from blocksight.jobs.evaluate.bootstrap import MethodEstimate, MetricSums, estimate, key_hashes
from blocksight.jobs.evaluate.shares import GAP_BY, SHARES_BY, newcombe, wilson
from blocksight.jobs.versus.joining import Tally
from blocksight.jobs.versus.rows import JUDGEMENTS, MEASURES
from blocksight.jobs.versus.typical_range import TypicalRange

AMONG = ("elsewhere_of_regressed", "elsewhere_of_others")
MEANS_BY = "95 % by bootstrap over images"
COLUMNS = (*MEASURES, *JUDGEMENTS, *AMONG)
RIGHT = {True: "right", False: "wrong", None: "unknown"}


class Sums:
    """Sums over the rows of a difference. Their memory does not grow with the rows."""

    def __init__(self) -> None:
        self.sums: MetricSums | None = None
        self.confusion: Counter[tuple[bool | None, bool | None]] = Counter()
        self.num_rows = 0
        self.num_flat = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows with the columns of `DIFFERENCE`; all rows of a record come together, in order."""
        self.num_rows += len(rows)
        self.num_flat += sum(row["spearman"] is None for row in rows)
        for _, own in groupby(rows, key=itemgetter("key")):
            first = next(own)
            self.confusion[first["is_right_a"], first["is_right_b"]] += 1
        values = np.array([list(_values(row)) for row in rows], np.float64)
        sums = MetricSums.of(key_hashes([row["key"] for row in rows]), values)
        self.sums = sums if self.sums is None else self.sums + sums

    def estimates(self) -> dict[str, MethodEstimate]:
        """Means and shares with their intervals, by column; at least one row was added."""
        assert self.sums is not None
        found = dict(zip(COLUMNS, estimate(self.sums), strict=True))
        images = dict(zip(COLUMNS, self.sums.images.tolist(), strict=False))  # differences follow the columns
        return {
            name: own if name in MEASURES else wilson(own.mean, images[name], own.count) for name, own in found.items()
        }


def _values(row: Mapping[str, Any]) -> Iterator[float]:
    """The row's values in the order of `COLUMNS`, NaN for null."""
    for name in (*MEASURES, *JUDGEMENTS):
        yield np.nan if row[name] is None else float(row[name])
    elsewhere = np.nan if row["looks_elsewhere"] is None else float(row["looks_elsewhere"])
    yield elsewhere if row["regressed"] else np.nan
    yield np.nan if row["regressed"] else elsewhere


def summary(tally: Tally, typical: TypicalRange, sums: Sums) -> dict[str, Any]:
    """The content of `summary.json`, as plain JSON values."""
    found = sums.estimates()
    confusion = {f"{RIGHT[a]} to {RIGHT[b]}": count for (a, b), count in sums.confusion.items()}
    return {
        "counts": _counts(tally, sums),
        "confusion": {
            name: confusion.get(name, 0)
            for name in (*_known_outcomes(), *sorted(confusion.keys() - {*_known_outcomes()}))
        },
        "means": {name: asdict(found[name]) for name in MEASURES},
        "shares": {name: asdict(found[name]) for name in (*JUDGEMENTS, *AMONG)},
        "elsewhere_gap": asdict(newcombe(*(found[name] for name in AMONG))),
        "intervals": {"means": MEANS_BY, "shares": SHARES_BY, "elsewhere_gap": GAP_BY},
        "looks_elsewhere": {
            "threshold": typical.threshold,
            "rows_that_stayed": typical.num_stayed,
            "rule": typical.rule,
        },
        "meanings": {**MEASURES, **JUDGEMENTS},
    }


def _known_outcomes() -> Iterator[str]:
    return (f"{a} to {b}" for a in ("right", "wrong") for b in ("right", "wrong"))


def _counts(tally: Tally, sums: Sums) -> dict[str, Any]:
    return {
        "rows": sums.num_rows,
        "rows_with_a_flat_map": sums.num_flat,
        "rows_with_other_target_name": tally.other_names,
        "records_compared": sum(sums.confusion.values()),
        "records_with_other_targets": tally.other_targets,
        "records_with_other_image": tally.other_image,
        "records_only_in_a": tally.a.explained - tally.explained_in_both,
        "records_only_in_b": tally.b.explained - tally.explained_in_both,
        "explained_in_a": tally.a.explained,
        "explained_in_b": tally.b.explained,
        "rejected_in_a": tally.a.rejected,
        "rejected_in_b": tally.b.rejected,
        "open_units_of_a": tally.a.open_units,
        "open_units_of_b": tally.b.open_units,
    }
