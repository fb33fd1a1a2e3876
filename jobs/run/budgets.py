"""Budgets: how much may go wrong before a job is no success, and when it is not worth going on."""

from collections import Counter
from dataclasses import dataclass, field

from blocksight.jobs.ledger.reconcile import JobState
from blocksight.jobs.plan.records import Outcome, Receipt

FIRST_UNITS = 5
"""If so many units come to their end before a single record is explained, the rest would go the same way."""


@dataclass(frozen=True)
class Budget:
    """What a user puts up with."""

    max_reject_fraction: float
    """Of all records, those of dead units included."""
    max_dead_units: int


def excess(job_state: JobState, budget: Budget) -> list[str]:
    """One sentence per budget that is exceeded, with both sides."""
    said = []
    if len(job_state.dead) > budget.max_dead_units:
        said.append(f"{len(job_state.dead)} dead units, and --max-dead-units allows {budget.max_dead_units}")
    lost = sum(letter.num_records for letter in job_state.dead.values())
    rejected, records = job_state.total("num_rejected") + lost, job_state.total("num_records") + lost
    if records and rejected / records > budget.max_reject_fraction:
        allowed = f"--max-reject-fraction allows {budget.max_reject_fraction:g}"
        said.append(f"{rejected:,} of {records:,} records were rejected or are in dead units, and {allowed}")
    return said


@dataclass
class Opening:
    """The beginning of a job: while nothing was ever explained, it counts the units that brought nothing."""

    is_over: bool
    """A record was explained, in this run or an earlier one."""
    reasons: list[Counter[str]] = field(default_factory=list)
    """Per unit, records by reject code."""

    @classmethod
    def of(cls, job_state: JobState, budget: Budget) -> "Opening":
        """At the start of a run; over from the start for a user who puts up with any share of rejects."""
        return cls(job_state.total("num_ok") > 0 or budget.max_reject_fraction == 1)

    def add(self, outcome: Outcome) -> None:
        """Counts one more unit that was committed; dead ones cost nothing, and one lost shard may be many."""
        if isinstance(outcome, Receipt):
            self.is_over |= outcome.num_ok > 0
            self.reasons.append(Counter(outcome.rejects))

    @property
    def is_hopeless(self) -> bool:
        """Whether the run should end here."""
        return not self.is_over and len(self.reasons) >= FIRST_UNITS

    def verdict(self) -> str:
        """What came of the units so far, in a sentence."""
        reasons = ", ".join(f"{count} {code}" for code, count in sum(self.reasons, Counter()).most_common(3))
        return f"no record of the first {len(self.reasons)} units was explained ({reasons})"
