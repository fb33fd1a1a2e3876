"""The ground truth that pictures show: the one that is given, or the last that `evaluate` or `audit` was given."""

import json
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from blocksight.jobs.plan.documents import read_document
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.stores.store import MissingError, ObjectStore, StoreError

TRUTH_KEY = "_job/truth.json"


class TruthDocument(TypedDict):
    """The content of `TRUTH_KEY`."""

    place: str
    """Path or URI."""
    digest: str
    """Of the content that was read there."""


@dataclass(frozen=True)
class KnownTruth:
    """Ground truth, or a sentence that says why there is none although a place is known."""

    truth: Truth | None = None
    note: str | None = None


def remember_truth(store: ObjectStore, place: str, truth: Truth) -> None:
    """Stores where an output's ground truth is, over an earlier place. Raises StoreError."""
    where = place if "://" in place else str(Path(place).expanduser().absolute())
    store.put(TRUTH_KEY, (json.dumps({"place": where, "digest": truth.digest}) + "\n").encode())


def known_truth(store: ObjectStore, given: str | None, endpoint_url: str | None) -> KnownTruth:
    """The ground truth at the given place, or else at the remembered one, if its content is still the same.

    Raises StoreError if the given one cannot be read, and UnreconciledError if the stored document is damaged.
    """
    if given is not None:
        return KnownTruth(open_truth(given, endpoint_url))
    try:
        remembered = read_document(store, TRUTH_KEY, TruthDocument)
    except MissingError:
        return KnownTruth()
    place = remembered["place"]
    try:
        truth = open_truth(place, endpoint_url)
    except StoreError as error:
        return KnownTruth(note=f"no boxes are drawn, the ground truth cannot be read any more: {error}")
    if truth.digest != remembered["digest"]:
        return KnownTruth(note=f"no boxes are drawn, the ground truth at {place} has changed: name it with --truth")
    return KnownTruth(truth)
