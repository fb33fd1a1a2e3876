"""Writes the difference of two outputs: measures shared rows, finds their typical range, judges, sums up, draws."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NotRequired

from rich.console import Console
from typing_extensions import TypedDict

from blocksight.jobs.evaluate.evaluation import FOLDER
from blocksight.jobs.ledger.output import table_of
from blocksight.jobs.plan.config import CODE_VERSION, ConfigError, Execution
from blocksight.jobs.plan.documents import damaged, read_document
from blocksight.jobs.plan.forward_setting import planned_forward, protocol_of, setting_difference
from blocksight.jobs.plan.plan import check_place
from blocksight.jobs.plan.preflight import readout_difference
from blocksight.jobs.plan.records import Unit, UnreconciledError
from blocksight.jobs.plan.text import counted
from blocksight.jobs.run.unit_pass import ONE_PROCESS, Reopening, over_units
from blocksight.jobs.versus.joining import Joining, Tally
from blocksight.jobs.versus.pictures import Worst, contact_sheet_of
from blocksight.jobs.versus.rows import DIFFERENCE, MEASURED, measured
from blocksight.jobs.versus.summary import Sums, summary
from blocksight.jobs.versus.typical_range import TypicalRange, judged
from blocksight.jobs.worker.progress import tracked
from blocksight.jobs.worker.rows import Output, existing_output, refuse_other_inputs
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.parquet.rows import parquet_of_rows
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.store import AlreadyExistsError, MissingError, ObjectStore

MARK = "_difference.json"
"""Names the two outputs that a folder is the difference of; written first."""
SUMMARY = "summary.json"
"""Written last: if it exists, the difference is complete."""
COUNTS = "counts"
"""In the metadata of an object of measured rows: what was counted of its unit."""
ROWS, MEASURED_ROWS, PICTURE = "data/", "_measured/", "pictures/worst.png"
OURS = re.compile(
    r"(data|_measured)/([0-9a-f]{2}/)?\d{6}-[0-9a-f]{20}\.parquet|pictures/worst\.png|summary\.json|_difference\.json"
)


@dataclass(frozen=True)
class Difference:
    """The difference that was written."""

    summary: Mapping[str, Any]
    picture: str | None
    """Its key below the difference's root; None if no picture was drawn."""


def write_difference(
    a: Output,
    b: Output,
    store: ObjectStore,
    endpoint_url: str | None,
    console: Console,
    truth: Truth | None = None,
    execution: Execution = ONE_PROCESS,
) -> Difference:
    """Compares two outputs by record and target, and writes their difference over an older one.

    Boxes of `truth` are drawn in its picture. A call that broke off is gone on with if the outputs are what they were.

    Raises ConfigError if the outputs explain different data, share nothing, or `store` holds other files;
    UnreconciledError if an output is damaged; StoreError.
    """
    refuse_other_inputs([a, b])
    taken = {"data": a.plan.identity["data"], "output": a.store.uri, "the other output": b.store.uri}
    check_place(store.uri, taken)
    _clear(store, {"a": a.store.uri, "b": b.store.uri, "state": _state_of(a, b)})
    tally, typical = _measure(a, b, store, endpoint_url, execution, console)
    sums, worst = Sums(), Worst()
    for unit in tracked(console, a.plan.units, len(a.plan.units), "judge", "unit"):
        rows = _judge(store, unit, typical.threshold)
        if rows:
            sums.add(rows)
            worst.add(rows)
    if not sums.num_rows:
        _delete(store, [MARK, *_measured_keys(store)])
        raise ConfigError(_nothing_shared(a, b, tally))
    sheet = contact_sheet_of(a, b, endpoint_url, worst, truth)
    if sheet is not None:
        store.put(PICTURE, sheet)
    notes = (
        setting_difference({a.name: planned_forward(a.store), b.name: planned_forward(b.store)}),
        readout_difference({a.name: a.store, b.name: b.store}),
    )
    note = "; ".join(own for own in notes if own is not None) or None
    document = {"a": _facts(a), "b": _facts(b), "note": note, "picture": worst.title, **summary(tally, typical, sums)}
    store.put(SUMMARY, (json.dumps(document, indent=1) + "\n").encode())
    _delete(store, _measured_keys(store))
    return Difference(document, None if sheet is None else PICTURE)


def _facts(output: Output) -> dict[str, Any]:
    identity = output.plan.identity
    facts = {name: identity[name] for name in ("model", "weights", "explainer", "parameters", "target")}
    forward = protocol_of(planned_forward(output.store))
    return {"output": output.store.uri, "job": output.plan.fingerprint, **facts, "forward": forward}


def _state_of(a: Output, b: Output) -> str:
    """A digest of all that is compared: it changes when a unit or an evaluation is added."""
    names = sorted(
        f"{info.key} {info.etag}" for one in (a, b) for folder in ("data/", FOLDER) for info in one.store.list(folder)
    )
    return hashlib.sha256("\n".join([CODE_VERSION, *names]).encode()).hexdigest()


def _clear(store: ObjectStore, pair: Mapping[str, str]) -> None:
    """Removes an older difference of the same two outputs, its summary first, but for what a broken-off call measured.

    Raises ConfigError for any other file.
    """
    present = [info.key for info in store.list()]
    foreign = next((key for key in present if not OURS.fullmatch(key)), None)
    if foreign is None and present and MARK not in present:
        foreign = present[0]  # its name fits, but without the mark it may be another program's
    if foreign is not None:
        raise ConfigError(f"{store.uri} holds files that are no difference, such as {foreign!r}; choose an empty place")
    other = _pair_of(store) if present else None
    if other is not None and (other["a"], other["b"]) != (pair["a"], pair["b"]):
        shown = {name: other[name] for name in ("a", "b")}
        raise ConfigError(
            f"{store.uri} holds the difference of {shown}; that of {pair['a']} and {pair['b']} needs another place"
        )
    is_same = other is not None and other.get("state") == pair["state"]
    store.put(MARK, json.dumps(pair, indent=1).encode())
    outdated = [key for key in present if not (is_same and key.startswith(MEASURED_ROWS))]
    _delete(store, sorted((key for key in outdated if key != MARK), key=lambda key: key != SUMMARY))


def _delete(store: ObjectStore, keys: Iterable[str]) -> None:
    for key in keys:
        store.delete(key)


def _measured_keys(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list(MEASURED_ROWS)]


class Pair(TypedDict):
    """The URIs of the two outputs of a difference."""

    a: str
    b: str
    state: NotRequired[str]
    """Of what was compared; an older version did not write it."""


def _pair_of(store: ObjectStore) -> Pair:
    try:
        return read_document(store, MARK, Pair)
    except (UnreconciledError, MissingError) as error:
        raise ConfigError(f"{error}; choose another place") from error


@dataclass
class Measuring(Reopening):
    """Measures the pairs of a unit of A and writes their rows, in any process."""

    a: str
    """URIs of the outputs and of their difference."""
    b: str
    place: str
    endpoint_url: str | None

    @cached_property
    def joining(self) -> Joining:
        """The two outputs, opened where the rows are measured."""
        return Joining(*(existing_output(name, self.endpoint_url) for name in (self.a, self.b)))

    @cached_property
    def store(self) -> ObjectStore:
        """Where the rows are written."""
        return PatientStore(open_store(self.place, self.endpoint_url), SHORT_PATIENCE_SECONDS)

    def __call__(self, ordinal: int) -> None:
        """Writes the measured rows of the unit at this place of A's plan, with its counts."""
        plan, tally = self.joining.a.plan, Tally()
        unit = plan.units[ordinal]
        rows = [measured(pair, plan.identity["resize"]) for pair in self.joining.pairs_of(unit, tally)]
        with suppress(AlreadyExistsError):  # of another call, which wrote the same
            self.store.create(
                measured_key(unit), parquet_of_rows(rows, MEASURED), metadata={COUNTS: json.dumps(asdict(tally))}
            )


def _measure(
    a: Output, b: Output, store: ObjectStore, endpoint_url: str | None, execution: Execution, console: Console
) -> tuple[Tally, TypicalRange]:
    """Measures the units of A that are not measured yet; the counts of all, and how alike the maps usually are."""
    there = set(_measured_keys(store))
    left = [unit for unit in a.plan.units if measured_key(unit) not in there]
    work = Measuring(a.store.uri, b.store.uri, store.uri, endpoint_url)
    work.__dict__.update(joining=Joining(a, b), store=store)  # of this process
    over_units(work, left, execution, console, "compare")
    tally, typical = Tally(), TypicalRange()
    for unit in a.plan.units:
        tally += _counts_of(store, unit)
        typical.add(table_of(store, measured_key(unit), MEASURED))
    work.joining.count_rest(tally)
    return tally, typical


def _counts_of(store: ObjectStore, unit: Unit) -> Tally:
    """What was counted of a measured unit of A. Raises MissingError and UnreconciledError."""
    head = store.head(measured_key(unit))
    if head is None:
        raise MissingError(f"{store.uri}/{measured_key(unit)} is gone; the same `versus` measures it again")
    try:
        return Tally.of(json.loads(head.metadata[COUNTS]))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(store.uri, measured_key(unit), error) from error


def measured_key(unit: Unit) -> str:
    """The key of the measured rows of a unit of A."""
    return f"{MEASURED_ROWS}{unit.fragment_key.removeprefix(ROWS)}"


def _judge(store: ObjectStore, unit: Unit, threshold: float) -> list[dict[str, Any]]:
    """Judges the measured rows of a unit by the threshold, writes them to `data/` and returns them."""
    rows = [judged(row, threshold) for row in table_of(store, measured_key(unit), MEASURED).to_pylist()]
    if rows:
        store.put(unit.fragment_key, parquet_of_rows(rows, DIFFERENCE))
    return rows


def _nothing_shared(a: Output, b: Output, tally: Tally) -> str:
    """Says why there is no difference, and what to do."""
    start = f"{a.name} and {b.name} share no record and target"
    if tally.other_targets:
        return (
            f"{start}: {counted(tally.other_targets, 'record')} explained in both, for other targets "
            f"({a.plan.identity['target']!r} and {b.plan.identity['target']!r}); explain both with --target label, or "
            "with the same class numbers"
        )
    if tally.other_image:
        return f"{start}: {counted(tally.other_image, 'image')} changed between the two; explain again"
    still_open = counted(tally.a.open_units, "unit")
    return (
        f"{start}: {counted(tally.a.explained, 'record')} explained in the one ({still_open} open) and "
        f"{tally.b.explained} in the other ({tally.b.open_units} open)"
    )
