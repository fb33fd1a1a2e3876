"""Attempt markers: their folder, and removing those of a run that was stopped."""

from blocksight.storage.stores.store import ObjectStore

FOLDER = "_job/attempts/"


def is_under_way(output: ObjectStore, step: str) -> bool:
    """True if a process is at a step, or died in it."""
    return any(True for _ in output.list(f"{FOLDER}{step}-"))


def forget_interrupted(output: ObjectStore, run_id: str) -> None:
    """Removes the markers of a run that was asked to stop: no record killed its attempts."""
    for info in output.list(FOLDER):
        if f"-{run_id}-" in info.key:
            output.delete(info.key)
