"""Budgets: how many rejects and dead units a job may have, and when a run stops early."""

from collections import Counter
from dataclasses import dataclass, field

from blocksight.jobs.ledger.reconcile import JobState
from blocksight.jobs.plan.records import Outcome, Receipt
from blocksight.jobs.plan.text import counted

NUM_FIRST_UNITS = 5
"""If so many units are done and no record is explained, the run stops."""


@dataclass(frozen=True)
class Budget:
    """What a user allows."""

    max_reject_fraction: float
    """Of all records, including those of dead units."""
    max_dead_units: int


def exceeded_budgets(job_state: JobState, budget: Budget) -> list[str]:
    """One sentence per exceeded budget, with the count and the limit."""
    sentences = []
    if len(job_state.dead) > budget.max_dead_units:
        dead = counted(len(job_state.dead), "dead unit")
        sentences.append(f"{dead}, and --max-dead-units allows {budget.max_dead_units}")
    lost = sum(letter.num_records for letter in job_state.dead.values())
    rejected, records = job_state.total("num_rejected") + lost, job_state.total("num_records") + lost
    if records and rejected / records > budget.max_reject_fraction:
        allowed = f"--max-reject-fraction allows {budget.max_reject_fraction:g}"
        sentences.append(f"{rejected:,} of {counted(records, 'record')} rejected or in dead units, and {allowed}")
    return sentences


@dataclass
class FirstUnits:
    """Counts the first units of a job until a record is explained."""

    is_over: bool
    """True once a record is explained, in this run or an earlier one."""
    reasons: list[Counter[str]] = field(default_factory=list)
    """Records by reject code, one Counter per unit."""

    @classmethod
    def of(cls, job_state: JobState, budget: Budget) -> "FirstUnits":
        """At the start of a run; already over if the user allows all records to be rejected."""
        return cls(job_state.total("num_ok") > 0 or budget.max_reject_fraction == 1)

    def add(self, outcome: Outcome) -> None:
        """Counts a committed unit. Dead units do not count: they cost nothing, and one lost shard may be many."""
        if isinstance(outcome, Receipt):
            self.is_over |= outcome.num_ok > 0
            self.reasons.append(Counter(outcome.rejects))

    @property
    def is_hopeless(self) -> bool:
        """True if the run should stop."""
        return not self.is_over and len(self.reasons) >= NUM_FIRST_UNITS

    def verdict(self) -> str:
        """The result of the first units, in a sentence."""
        reasons = ", ".join(f"{count} {code}" for code, count in sum(self.reasons, Counter()).most_common(3))
        return f"no record of the first {counted(len(self.reasons), 'unit')} was explained ({reasons})"
