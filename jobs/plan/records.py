"""The plain records that pass between the steps of a job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from blocksight.storage.inputs.records import as_text
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.limits import MAX_CLASSES, MAX_MAP_SIDE
from blocksight.storage.outputs.schema import MAX_ERROR_LENGTH
from blocksight.storage.rejects import Reject
from blocksight.storage.stores.store import ObjectInfo

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""Checks a count that is read back from JSON."""
Side = Annotated[int, Field(ge=1, le=MAX_MAP_SIDE)]


@dataclass(frozen=True)
class Unit:
    """One piece of work: some loose images, or a part of one shard. It becomes one fragment."""

    ordinal: int
    """Place in the plan, from 0."""
    unit_id: str
    """20 hex digits of the sha256 of configuration, inputs with their versions, and range."""
    layout: Layout
    objects: Sequence[ObjectInfo]
    """The loose images, or the one shard, pinned by ETag."""
    start: int
    """First byte (tar) or row (Parquet) of the shard; 0 for loose images."""
    stop: int
    """One past the last byte or row; the number of loose images."""
    num_records: int
    """Exact for images and Parquet; for tar an estimate from the shard's size; 0 where planning could not read it."""
    is_spread: bool = True
    """Its fragment lies in one of 256 folders, because stores limit the requests to one; False before schema 5."""

    @property
    def is_counted(self) -> bool:
        """False if the plan could not read the shard: the unit then takes all its records."""
        return self.num_records > 0

    @property
    def fragment_key(self) -> str:
        """The fragment's key below the output's root."""
        folder = f"data/{self.unit_id[:2]}/" if self.is_spread else "data/"
        return f"{folder}{self.ordinal:06d}-{self.unit_id}.parquet"


@dataclass(frozen=True)
class RecordFacts:
    """The facts of a record before it is explained."""

    key: str
    shard: str
    """URI of the input object."""
    shard_index: int
    label: str | int | None
    """As in the data set."""
    sha256: str | None = None
    num_bytes: int | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    reject_code: str | None = None
    reject_stage: str | None = None
    error: str | None = None


def with_reject(facts: RecordFacts, reject: Reject, stage: str) -> RecordFacts:
    """The record with the reason why it has no map, and the stage (read, decode, explain, encode) that found it."""
    message = as_text(reject.message)[:MAX_ERROR_LENGTH]
    return replace(facts, reject_code=str(reject.code), reject_stage=stage, error=message)


@dataclass(frozen=True)
class UnitInput:
    """A unit, read and decoded."""

    unit: Unit
    records: tuple[RecordFacts, ...]
    """All of them, rejected ones included, in the shard's order."""
    pixels: NDArray[np.uint8]
    """[M, H, W, 3] RGB of the records that were decoded, in their order."""


@dataclass(frozen=True)
class UnitResult:
    """A unit, explained: the fragment's rows before encoding."""

    unit: Unit
    rows: tuple[Mapping[str, Any], ...]
    """In `blocksight.storage.outputs.schema.SCHEMA`'s columns; `map` holds float32 [H, W] or None."""
    num_records: int
    explain_seconds: float
    forward: str | None = None
    """How masks were scored: backend, precision and batch size."""


class MetricSum(TypedDict):
    """One metric under one protocol, over a fragment's rows."""

    sum: float
    count: Count


class MetricMean(TypedDict):
    """One metric under one protocol, over a job's rows."""

    mean: float
    count: Count


class LabelCounts(TypedDict):
    """How often the model is right, over a fragment's explained records."""

    right: Count
    """Records whose label is the prediction."""
    in_first_5: Count | None
    """Records whose label is among the five highest scores; None for an older fragment that does not say it."""
    no_class: Count
    """Records whose label means no class of the model."""
    classes: Annotated[str, Field(pattern=r"^(\d{1,7}:\d{1,18}( \d{1,7}:\d{1,18})*)?$")]
    """Records with a known label, as `class:records` joined by spaces: a dictionary would need 20 times the memory."""


@dataclass(frozen=True)
class Receipt:
    """What a committed unit holds. All but the last four fields can be rebuilt from the fragment."""

    unit_id: str
    ordinal: Count
    fragment: str
    """Key of the fragment below the output's root."""
    num_bytes: Count
    sha256: str
    """Of the fragment's bytes."""
    num_rows: Count
    num_records: Count
    num_ok: Count
    num_rejected: Count
    rejects: Mapping[str, Count]
    """Records by reject code."""
    num_forwards: Count
    metrics: Mapping[str, MetricSum]
    """By name and protocol: sum and count over the fragment's rows, to be added by `math.fsum`."""
    odd_formats: Mapping[str, Count] | None = None
    """Records by an odd `DecodedImage.kind`: stretched, or nearly black. None in a receipt of an older version."""
    num_flat: Count | None = None
    """Maps that are flat; None in a receipt of an older version."""
    labels: LabelCounts | None = None
    """None in a receipt of an older version, and where there are too many classes."""
    attempt: str | None = None
    """Id of the attempt whose bytes were committed."""
    explain_seconds: float | None = None
    forward: str | None = None
    """How the attempt scored masks: backend, precision and batch size."""
    worker: str | None = None
    """Host and process of the attempt."""


@dataclass(frozen=True)
class UnitFailure:
    """A unit that failed and stays open; the next run tries it again."""

    unit_id: str
    ordinal: int
    inputs: str
    """The first input object, for the user."""
    stage: str
    error: str
    store_is_away: bool = False
    """The store did not answer for as long as the job waits."""


class Cause(StrEnum):
    """Why a whole unit cannot be done. Stored in the output: never rename one, only add."""

    INPUT_MISSING = "input_missing"
    INPUT_CHANGED = "input_changed"
    INPUT_UNREADABLE = "input_unreadable"
    """The store refuses only this object, or fails at it each time."""
    CONTAINER_CORRUPT = "container_corrupt"
    OUTPUT_UNWRITABLE = "output_unwritable"
    """The store refuses the fragment of this unit, and accepts others."""
    FAILED = "failed"
    """A step failed at it each time, and no single record could be blamed."""
    POISON = "poison"
    """It killed the process that worked on it again and again, and no single record could be blamed."""


@dataclass(frozen=True)
class DeadLetter:
    """A unit that is given up until it is retried."""

    unit_id: str
    ordinal: Count
    inputs: str
    """The first input object, for the user."""
    cause: str
    """One of `Cause`."""
    stage: str
    error: str
    num_records: Count
    """As planned."""


@dataclass(frozen=True)
class UnitSkipped:
    """A unit that was not begun, because a stop was requested."""

    unit_id: str


@dataclass(frozen=True)
class UnitReturned:
    """A unit that a worker gave back because of its device; it stays open, and another worker may take it."""

    unit_id: str
    worker: str
    """Its name, for people; the same for all units of the worker."""
    reason: str
    is_unfit: bool
    """The worker can do no unit; False: its process lost the device, and ends."""

    def __str__(self) -> str:
        return f"worker {self.worker} gave its unit back: {self.reason}"


Outcome = Receipt | UnitFailure | DeadLetter | UnitSkipped | UnitReturned
"""The outcome of a unit in one run."""


class UnreconciledError(Exception):
    """The bucket differs from the plan, or cannot be read; the message has a line per fault."""


class UnfinishedError(Exception):
    """The run broke off and the job state is unknown; the message says how to go on."""


class BlockFacts(TypedDict):
    """A block of the model that the explainer uses."""

    name: str
    channels: Count
    height: Count
    width: Count


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the loaded model; a resume with other facts is refused."""

    weights_sha256: str
    """Over all weights and buffers, by name."""
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    input_size: tuple[Side, Side]
    """Height and width in pixels."""
    blocks: tuple[BlockFacts, ...] = ()
    """Shallow to deep."""
    mean: tuple[float, ...] | None = None
    """Subtracted from RGB in [0, 1]; None in outputs of earlier versions."""
    std: tuple[float, ...] | None = None
    """What the difference is divided by; None in outputs of earlier versions."""
    notes: tuple[str, ...] = ()
    """What was assumed when the weights were loaded, one sentence each; may differ in a resume."""
    embeddings: tuple[tuple[float, ...], ...] | None = None
    """Of the targets' prompts, in order, so that all workers use the same; None without prompts."""
    features: tuple[tuple[float, ...], ...] | None = None
    """The vectors of targets of features, in order, as `embeddings`; None without them."""

    @property
    def vectors(self) -> "StoredVectors":
        """What was computed once for the targets."""
        return StoredVectors(self.embeddings, self.features)


@dataclass(frozen=True)
class StoredVectors:
    """What a model was given for its targets, so that all workers and later commands use the same."""

    embeddings: tuple[tuple[float, ...], ...] | None = None
    """Of prompts."""
    features: tuple[tuple[float, ...], ...] | None = None
    """Of targets of features."""


NO_VECTORS = StoredVectors()


@dataclass(frozen=True)
class Evaluated:
    """A unit whose metrics are committed."""

    unit_id: str
    num_records: int
    """Measured records."""
    num_values: int
    reasons: Mapping[str, int]
    """Numbers of undefined values, by reason."""
