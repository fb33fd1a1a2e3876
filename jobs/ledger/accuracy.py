"""How often the model is right, from the receipts alone: the same figures in every summary, in any units."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blocksight.jobs.plan.records import LabelCounts, Receipt
from blocksight.jobs.plan.text import counted, percent
from blocksight.storage.outputs.schema import OK

FIRST = 5
"""A label among so many highest scores counts as found."""
LITTLE_SKILL = 0.1
"""A model is near chance if it goes less than this share of the way from chance to always right."""
HALF_SKILL = 0.5
"""It is called so only if the records rule out, at 95 %, that it goes half of that way."""
Z = 1.96
"""The normal distribution's 97.5 % quantile."""
LIKELY_CAUSES = (
    "Its maps say nothing about a model that works. Likely causes: the images are normalised in another way than in "
    "training (mean, standard deviation, 0 to 1 or 0 to 255), they have another size, the classes have another order "
    "than the labels, or the weights are not the trained ones."
)
MAX_COUNTED_CLASSES = 30_000
"""Different labels in one receipt: more of them would not fit it."""

Row = Mapping[str, Any]


def is_right(rows: Iterable[Row]) -> bool | None:
    """Whether the model predicts the label of the record with these rows; None if the rows do not say.

    Rows of older outputs have no `label_rank`: there a row of the prediction or of the label says it.
    """
    for row in rows:
        if row["label"] is None:
            return None
        if row["label_rank"] is not None:
            return row["label_rank"] == 1
        if row["target_rank"] == 1 or row["target_index"] == row["label"]:
            return row["target_rank"] == 1 and row["target_index"] == row["label"]
    return None


def _label_rank(rows: Iterable[Row]) -> int | None:
    """The label's place among the model's classes, from 1; None if the rows do not say."""
    ranks = (row["label_rank"] or (row["target_rank"] if row["target_index"] == row["label"] else None) for row in rows)
    return next((rank for rank in ranks if rank is not None), None)


def label_counts(rows: Iterable[Row]) -> LabelCounts | None:
    """The counts of a fragment, from its rows; None if it has more than `MAX_COUNTED_CLASSES` labels."""
    records: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["status"] == OK:
            records.setdefault((row["shard"], row["shard_index"]), []).append(row)
    known = [own for own in records.values() if is_right(own) is not None]
    classes = Counter(own[0]["label"] for own in known)
    if len(classes) > MAX_COUNTED_CLASSES:
        return None
    ranks = [_label_rank(own) for own in known]
    return LabelCounts(
        right=sum(bool(is_right(own)) for own in known),
        in_first_5=None if None in ranks else sum(rank is not None and rank <= FIRST for rank in ranks),
        no_class=sum(own[0]["label"] is None and own[0]["label_name"] is not None for own in records.values()),
        classes=" ".join(f"{label}:{count}" for label, count in sorted(classes.items())),
    )


@dataclass(frozen=True)
class Accuracy:
    """How often a model is right on the explained records of an output."""

    num_right: int
    num_in_first_5: int | None
    """None if rows of an older output do not say it."""
    by_label: Mapping[int, int]
    """Explained records with a known label, by class."""
    no_class: int
    """Explained records whose label means no class of the model."""
    num_classes: int
    """Of the model."""

    @property
    def num_records(self) -> int:
        """Explained records with a known label."""
        return sum(self.by_label.values())

    @property
    def share(self) -> float:
        """Records right, 0 to 1. There is at least one record."""
        return self.num_right / self.num_records

    @property
    def chance(self) -> float:
        """Records that a guess among all classes gets right, 0 to 1."""
        return 1 / self.num_classes

    @property
    def majority(self) -> float:
        """Records that the one answer gets right that is right most often, 0 to 1."""
        return max(self.by_label.values()) / self.num_records

    @property
    def is_near_chance(self) -> bool:
        """True if the model knows little: by `LITTLE_SKILL`, and by a score test against `HALF_SKILL`."""
        little, half = (self.chance + part * (1 - self.chance) for part in (LITTLE_SKILL, HALF_SKILL))
        return self.share < little and self.share + Z * math.sqrt(half * (1 - half) / self.num_records) < half

    @property
    def facts(self) -> tuple[str, ...]:
        """What the summaries say: records right, and what an answer without looking would reach."""
        if not self.num_records:
            return (f"not known: the labels of {counted(self.no_class, 'record')} mean no class of the model",)
        right = f"{self.num_right:,} of {counted(self.num_records, 'record')} right ({percent(self.share)})"
        if self.num_in_first_5 is not None and self.num_classes > FIRST:
            right += f", {self.num_in_first_5:,} in the top 5 ({percent(self.num_in_first_5 / self.num_records)})"
        if self.no_class:
            verb = "means" if self.no_class == 1 else "mean"
            right += f"; {counted(self.no_class, 'other label')} {verb} no class of the model"
        guess = f"chance is {percent(self.chance)} ({counted(self.num_classes, 'class')})"
        return right, f"{guess}, the most frequent class alone {percent(self.majority)}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Loud sentences about a model that knows little of these images."""
        if not self.num_records:
            return ()
        if self.is_near_chance:
            figures = f"{percent(self.share)} right, and a guess is right in {percent(self.chance)}"
            return (f"THE MODEL IS NEAR CHANCE: {figures}. {LIKELY_CAUSES}",)
        if len(self.by_label) > 1 and self.share <= self.majority:
            figures = f"{percent(self.share)} right, and the most frequent class alone {percent(self.majority)}"
            return (f"THE MODEL IS NO BETTER THAN ONE ANSWER FOR ALL: {figures}.",)
        return ()


def accuracy_of(receipts: Sequence[Receipt], num_classes: int | None) -> Accuracy | None:
    """The model's accuracy over all committed units; None where no label is known or a receipt does not count them."""
    counts = [receipt.labels for receipt in receipts if receipt.labels is not None]
    if num_classes is None or len(counts) < len(receipts):
        return None
    by_label: Counter[int] = Counter()
    for own in counts:
        by_label.update(_classes(own["classes"]))
    in_first_5 = [own["in_first_5"] for own in counts]
    found = Accuracy(
        num_right=sum(own["right"] for own in counts),
        num_in_first_5=None if None in in_first_5 else sum(number or 0 for number in in_first_5),
        by_label=by_label,
        no_class=sum(own["no_class"] for own in counts),
        num_classes=num_classes,
    )
    return found if found.num_records or found.no_class else None


def _classes(text: str) -> dict[int, int]:
    """Records by class, from a receipt."""
    pairs = (pair.split(":") for pair in text.split())
    return {int(label): int(count) for label, count in pairs}
