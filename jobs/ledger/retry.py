"""Retry: opens dead units again, for the next run."""

from blocksight.jobs.ledger import attempt_markers, dead_letters
from blocksight.jobs.ledger.reconcile import final_manifest
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Cause, DeadLetter
from blocksight.storage.stores.store import ObjectStore


def reopen(output: ObjectStore, plan: Plan, cause: str | None = None) -> list[DeadLetter]:
    """Removes the dead letters (of one cause, if given) and the markers of their attempts; returns the dead letters.

    Raises ConfigError for an unknown cause, and for a finished job, whose manifest is final.
    """
    if cause is not None and cause not in list(Cause):
        raise ConfigError(f"cause {cause!r} is not known; known: {', '.join(Cause)}")
    if final_manifest(output, plan) is not None:
        raise ConfigError(f"{output.uri} is finished: explain the missing inputs into another output")
    letters = [
        letter for letter in dead_letters.read_letters(output, plan.units).values() if cause in (None, letter.cause)
    ]
    for letter in letters:
        for marker in list(output.list(attempt_markers.prefix_of(letter.unit_id))):
            output.delete(marker.key)
        output.delete(dead_letters.letter_key(letter.unit_id))
    if final_manifest(output, plan) is not None:  # written meanwhile, with these units as dead
        for letter in letters:
            dead_letters.write_letter(output, letter)
        raise ConfigError(f"{output.uri} was finished meanwhile, without these units: nothing was opened")
    return letters
