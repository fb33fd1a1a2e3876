"""The markers of attempts: where they lie, and which of them are removed when a run stops."""

from blocksight.storage.stores.store import ObjectStore

FOLDER = "_job/attempts/"


def forget_interrupted(output: ObjectStore, run_id: str) -> None:
    """Removes the markers of a run that was asked to stop: its attempts were broken off, and died of no record."""
    for info in output.list(FOLDER):
        if f"-{run_id}-" in info.key:
            output.delete(info.key)
