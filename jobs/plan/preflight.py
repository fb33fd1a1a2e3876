"""What was found out about a job's model before its first unit, stored beside the plan; read without torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blocksight.engine.catalog.readouts import READOUTS, ReadoutName
from blocksight.jobs.plan.documents import read_document
from blocksight.jobs.plan.labels import is_class_number
from blocksight.jobs.plan.plan import MODEL_KEY, PLAN_FOLDER
from blocksight.jobs.plan.text import percent
from blocksight.storage.stores.store import AlreadyExistsError, MissingError, ObjectStore

PREFLIGHT_KEY = f"{PLAN_FOLDER}preflight.json"


@dataclass(frozen=True)
class Preflight:
    """How the model's scores are read in all units of a job, and what is odd about the model."""

    readout: ReadoutName
    images: str
    """What it was tried on, for people; empty: it was not examined."""
    findings: tuple[str, ...]
    """A sentence for each oddity."""
    outputs: tuple[tuple[float, ...], ...] = ()
    """Of random pictures; every later command compares its model's outputs with them. Empty: of an earlier version."""
    blocks: tuple[str, ...] = ()
    """Each block of the explainer, with how it was proved; empty: it uses none, or of an earlier version."""

    def __str__(self) -> str:
        examined = f"examined on {self.images}" if self.images else "not examined"
        odd = "" if self.findings or not self.images else ", nothing odd"
        return f"{examined}{odd}; a score is the {READOUTS[self.readout].removeprefix('the ')}"


UNEXAMINED = Preflight("softmax", "", ())
"""Of outputs of earlier versions."""


def readout_of(output: ObjectStore) -> ReadoutName:
    """How the scores of an output were read. Raises as `stored_preflight`."""
    return (stored_preflight(output) or UNEXAMINED).readout


def score_name(readout: ReadoutName) -> str:
    """What a score is called: a model's output itself is no probability."""
    return "score" if readout == "identity" else "probability"


def score_text(score: float, readout: ReadoutName) -> str:
    """`79.1 %` for a probability, and the figure for a model's output itself."""
    return f"{score:.4g}" if readout == "identity" else percent(score)


def target_score_text(row: Mapping[str, Any], readout: ReadoutName) -> str:
    """The score of a row: `79.1 %` where it is a class's probability, else the figure itself."""
    return score_text(row["score"], readout if is_class_score(row) else "identity")


def is_class_score(row: Mapping[str, Any]) -> bool:
    """True if the row's score is that of a class, and no logit or sum."""
    return is_class_number(row["target_formula"])


def readout_difference(outputs: Mapping[str, ObjectStore]) -> str | None:
    """A sentence if the scores of outputs, by name, were read in different ways; None if all are alike.

    Raises as `stored_preflight`.
    """
    readouts: Mapping[str, ReadoutName] = {name: readout_of(output) for name, output in outputs.items()}
    if len(set(readouts.values())) < 2:
        return None
    ways = ", ".join(f"{name}: {READOUTS[readout]}" for name, readout in readouts.items())
    return f"scores are read in different ways ({ways}): their values cannot be compared, nor what is judged by them"


def stored_preflight(output: ObjectStore) -> Preflight | None:
    """An output's preflight; None before the first. For an output of an earlier version scores are softmaxes.

    Raises StoreError, and UnreconciledError if it is damaged.
    """
    try:
        return read_document(output, PREFLIGHT_KEY, Preflight)
    except MissingError:
        return UNEXAMINED if output.head(MODEL_KEY) is not None else None


def ensure_preflight(output: ObjectStore, preflight: Preflight) -> Preflight:
    """Writes it once; returns the stored one, which may be another driver's."""
    if stored_preflight(output) is None:
        try:
            output.create(PREFLIGHT_KEY, json.dumps(asdict(preflight), indent=1).encode())
        except AlreadyExistsError:
            pass
        else:
            return preflight
    return stored_preflight(output) or preflight
