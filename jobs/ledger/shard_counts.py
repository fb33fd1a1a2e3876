"""Compares the records that were found in each shard with the number that its sidecar says."""

from collections import Counter
from collections.abc import Mapping

from blocksight.jobs.ledger.reconcile import JobState

EXAMPLES = 3


def other_counts(job_state: JobState) -> dict[str, tuple[int, int]]:
    """Expected and found records, by key of the shards whose numbers differ. Shards that are not all committed wait."""
    expected = job_state.plan.expected
    incomplete = {unit.objects[0].key for unit in job_state.plan.units if unit.unit_id not in job_state.receipts}
    complete = expected.keys() - incomplete
    found: Counter[str] = Counter()
    for unit in job_state.plan.units:
        if unit.objects[0].key in complete:
            found[unit.objects[0].key] += job_state.receipts[unit.unit_id].num_records
    return {key: (expected[key], count) for key, count in found.items() if count != expected[key]}


def sentence_on(counts: Mapping[str, tuple[int, int]]) -> str:
    """One sentence on shards whose numbers differ."""
    shown = [f"{key} {wanted:,} and {found:,}" for key, (wanted, found) in [*counts.items()][:EXAMPLES]]
    more = f", and {len(counts) - EXAMPLES} more" if len(counts) > EXAMPLES else ""
    return f"shards with other numbers of records than their sidecars say (said and found): {'; '.join(shown)}{more}"
