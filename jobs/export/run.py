"""Runs an export: prepares the folder, writes the records, and says what was left out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from rich.console import Console

from blocksight.jobs.evaluate.known_truth import KnownTruth, known_truth
from blocksight.jobs.export import fiftyone, spotlight, virelay
from blocksight.jobs.export.records import ExplainedRecord, ExplainedRecords
from blocksight.jobs.export.sql import columns_in, connect
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan, check_place, existing_plan
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.plan.text import counted
from blocksight.jobs.worker.progress import Tally, progress
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.store import ObjectStore

Format = Literal["fiftyone", "virelay", "spotlight", "quantus"]
Writer = Callable[[Iterable[ExplainedRecord], ExplainedRecords, Path], Sequence[str]]
"""Takes the records with progress, their reader, and an empty folder; returns lines for the user."""


@dataclass(frozen=True)
class ExportRequest:
    """An export's options as the user gives them."""

    output: str
    form: Format
    destination: str
    limit: int | None = None
    weights: str | None = None
    endpoint_url: str | None = None
    model: str | None = None
    """The model's name again; needed if it is the user's code."""
    truth: str | None = None
    """Ground truth for FiftyOne's detections; by default what `evaluate` or `audit` was given."""


def run_export(asked: ExportRequest, console: Console) -> Sequence[str]:
    """Writes the export and returns lines for the user: what was left out, and how to open it in the tool.

    Raises ConfigError (also if no record can be exported), StoreError, UnreconciledError or ModelError.
    """
    store = PatientStore(open_store(asked.output, asked.endpoint_url), SHORT_PATIENCE_SECONDS)
    plan = existing_plan(store)
    with connect(asked.output, asked.endpoint_url) as connection:
        columns = columns_in(connection)
    records = ExplainedRecords(store, plan, columns, asked.endpoint_url, asked.limit)
    known = _known_truth(asked, store)
    write = _writer(asked, store, plan, known.truth, console)
    folder = fresh_folder(asked.destination, {"data": plan.identity["data"], "output": store.uri})
    found = iter(records)
    first = next(found, None)
    if first is None:
        raise ConfigError(f"nothing of {asked.output} can be exported: {_account(records)}")
    lines = write(_shown(chain([first], found), records, console), records, folder)
    return [_account(records), *([] if known.note is None else [known.note]), *lines]


def _known_truth(asked: ExportRequest, store: ObjectStore) -> KnownTruth:
    """The ground truth for FiftyOne, which alone shows objects. Raises ConfigError for another format, StoreError."""
    if asked.form == "fiftyone":
        return known_truth(store, asked.truth, asked.endpoint_url)
    if asked.truth is not None:
        raise ConfigError(f"--truth {asked.truth} is for fiftyone only: {asked.form} shows no objects")
    return KnownTruth()


def _writer(asked: ExportRequest, store: ObjectStore, plan: Plan, truth: Truth | None, console: Console) -> Writer:
    """The function that writes the format. Raises ConfigError, StoreError or ModelError if it lacks something."""
    if asked.form == "quantus":
        from blocksight.jobs.explain.stored_model import model_of_output  # brings torch
        from blocksight.jobs.export import quantus

        named = NamedModel(asked.model, asked.weights, asked.endpoint_url)
        _, adapter = model_of_output(store, plan, named, console)
        return partial(quantus.write, adapter=adapter)
    for option, given in (("--model", asked.model), ("--weights", asked.weights)):
        if given is not None:
            raise ConfigError(f"{option} {given} is for quantus only: {asked.form} shows no model input")
    if asked.form == "virelay":
        virelay.check_installed()
    if asked.form == "fiftyone":
        return partial(fiftyone.write, truth=truth)
    return {"virelay": virelay.write, "spotlight": spotlight.write}[asked.form]


def fresh_folder(destination: str, taken: Mapping[str, str]) -> Path:
    """Makes the local folder and returns it.

    Raises ConfigError if it is no local folder, is not empty, or overlaps a place in `taken` (URIs by name).
    """
    if "://" in destination:
        raise ConfigError("an export goes to a local folder, not to a URI: the tools read it from there")
    folder = Path(destination).expanduser().absolute()
    check_place(str(folder), taken)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} holds files already; name a folder that is empty or not there yet")
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror or error}") from error
    return folder


def _shown(found: Iterable[ExplainedRecord], records: ExplainedRecords, console: Console) -> Iterator[ExplainedRecord]:
    """The records, with a progress line."""
    expected = min(records.plan.num_records, records.limit or records.plan.num_records)
    with progress(console, Tally(expected, None, verb="export")) as update:
        for record in found:
            yield record
            update(1)


def _account(records: ExplainedRecords) -> str:
    exported = counted(records.num_records, "record")
    until = "" if records.limit is None else " before the limit"
    left_out = f"{records.num_rejected:,} rejected, {records.num_gone:,} whose image is gone"
    return f"{exported} exported; left out{until}: {left_out}"
