"""Writes the difference of two outputs: measures shared rows, finds their typical range, judges, sums up, draws."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.console import Console
from typing_extensions import TypedDict

from blocksight.jobs.ledger.output import table_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.documents import read_document
from blocksight.jobs.plan.forward_setting import planned_forward, protocol_of, setting_difference
from blocksight.jobs.plan.plan import check_place
from blocksight.jobs.plan.preflight import readout_difference
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.text import counted
from blocksight.jobs.versus.joining import Tally, joined
from blocksight.jobs.versus.pictures import Worst, contact_sheet_of
from blocksight.jobs.versus.rows import DIFFERENCE, MEASURED, measured
from blocksight.jobs.versus.summary import Sums, summary
from blocksight.jobs.versus.typical_range import TypicalRange, judged
from blocksight.jobs.worker.progress import tracked
from blocksight.jobs.worker.rows import Output, refuse_other_inputs
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.parquet.rows import parquet_of_rows
from blocksight.storage.stores.store import MissingError, ObjectStore

MARK = "_difference.json"
"""Names the two outputs that a folder is the difference of; written first."""
SUMMARY = "summary.json"
"""Written last: if it exists, the difference is complete."""
ROWS, MEASURED_ROWS, PICTURE = "data/", "_measured/", "pictures/worst.png"
OURS = re.compile(r"(data|_measured)/\d{6}-[0-9a-f]{20}\.parquet|pictures/worst\.png|summary\.json|_difference\.json")


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
) -> Difference:
    """Compares two outputs by record and target, and writes their difference over an older one.

    Boxes of `truth` are drawn in its picture.

    Raises ConfigError if the outputs explain different data, share nothing, or `store` holds other files;
    UnreconciledError if an output is damaged; StoreError.
    """
    refuse_other_inputs([a, b])
    taken = {"data": a.plan.identity["data"], "output": a.store.uri, "the other output": b.store.uri}
    check_place(store.uri, taken)
    _clear(store, {"a": a.store.uri, "b": b.store.uri})
    tally, typical = Tally(), TypicalRange()
    names = list(_measure(a, b, store, tally, typical, console))
    if not names:
        store.delete(MARK)
        raise ConfigError(_nothing_shared(a, b, tally))
    sums, worst = Sums(), Worst()
    for name in names:
        rows = _judge(store, name, typical.threshold)
        sums.add(rows)
        worst.add(rows)
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
    return Difference(document, None if sheet is None else PICTURE)


def _facts(output: Output) -> dict[str, Any]:
    identity = output.plan.identity
    facts = {name: identity[name] for name in ("model", "weights", "explainer", "parameters", "target")}
    forward = protocol_of(planned_forward(output.store))
    return {"output": output.store.uri, "job": output.plan.fingerprint, **facts, "forward": forward}


def _clear(store: ObjectStore, pair: Mapping[str, str]) -> None:
    """Removes an older difference of the same two outputs, its summary first. Raises ConfigError for any other file."""
    present = [info.key for info in store.list()]
    foreign = next((key for key in present if not OURS.fullmatch(key)), None)
    if foreign is None and present and MARK not in present:
        foreign = present[0]  # its name fits, but without the mark it may be another program's
    if foreign is not None:
        raise ConfigError(f"{store.uri} holds files that are no difference, such as {foreign!r}; choose an empty place")
    if present and (other := _pair_of(store)) != pair:
        raise ConfigError(f"{store.uri} holds the difference of {other}; that of {dict(pair)} needs another place")
    store.put(MARK, json.dumps(pair, indent=1).encode())
    for key in sorted(present, key=lambda key: key != SUMMARY):
        if key != MARK:
            store.delete(key)


class Pair(TypedDict):
    """The URIs of the two outputs of a difference."""

    a: str
    b: str


def _pair_of(store: ObjectStore) -> Pair:
    try:
        return read_document(store, MARK, Pair)
    except (UnreconciledError, MissingError) as error:
        raise ConfigError(f"{error}; choose another place") from error


def _measure(
    a: Output, b: Output, store: ObjectStore, tally: Tally, typical: TypicalRange, console: Console
) -> Iterator[str]:
    """Writes the measured rows, one file per fragment of A that shares any, and yields the files' names."""
    for unit, pairs in tracked(console, joined(a, b, tally), len(a.plan.units), "compare", "unit"):
        if pairs:
            rows = [measured(pair, a.plan.identity["resize"]) for pair in pairs]
            typical.add(rows)
            name = unit.fragment_key.removeprefix(ROWS)
            _put(store, f"{MEASURED_ROWS}{name}", rows, MEASURED)
            yield name


def _judge(store: ObjectStore, name: str, threshold: float) -> list[dict[str, Any]]:
    """Judges the measured rows of one file by the threshold, moves them to `data/` and returns them."""
    table = table_of(store, f"{MEASURED_ROWS}{name}", MEASURED)
    rows = [judged(row, threshold) for row in table.to_pylist()]
    _put(store, f"{ROWS}{name}", rows, DIFFERENCE)
    store.delete(f"{MEASURED_ROWS}{name}")
    return rows


def _put(store: ObjectStore, key: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    store.put(key, parquet_of_rows(rows, schema))


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
