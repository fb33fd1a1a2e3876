"""Runs an export: prepares the folder, writes the records, and says what was left out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console

from blocksight.jobs.evaluate.known_truth import KnownTruth, known_truth
from blocksight.jobs.explain.block_tiles import refuse_without_blocks
from blocksight.jobs.export import fiftyone, overlays, spotlight, virelay
from blocksight.jobs.export.records import ExplainedRecord, ExplainedRecords
from blocksight.jobs.export.selection import Selection, selected
from blocksight.jobs.export.sql import columns_in, connect
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan, check_place, existing_plan
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.plan.text import counted
from blocksight.jobs.worker.progress import Tally, passing, progress
from blocksight.jobs.worker.rows import Output, existing_output, refuse_other_inputs
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.store import ObjectStore

Format = Literal["pictures", "numpy", "zarr", "fiftyone", "virelay", "spotlight", "quantus"]
FORMATS: tuple[Format, ...] = get_args(Format)
ARRAYS = ("numpy", "zarr")
"""Formats of maps without their images."""
Takes = Literal["blocks", "outputs"]
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
    """Ground truth whose boxes are drawn or become detections; by default what `evaluate` or `audit` was given."""
    keys: tuple[str, ...] = ()
    """The records; none: all."""
    where: str | None = None
    """SQL over the columns of the views `maps` and `metrics`."""
    gif: Takes | None = None
    """Pictures that move: over the blocks of SISE, or over the maps of `beside`."""
    beside: tuple[str, ...] = ()
    """Other outputs of the same data."""


def run_export(asked: ExportRequest, console: Console) -> Sequence[str]:
    """Writes the export and returns lines for the user: what was left out, and how to open it in the tool.

    Raises ConfigError (also if no record can be exported), StoreError, UnreconciledError or ModelError.
    """
    store = PatientStore(open_store(asked.output, asked.endpoint_url), SHORT_PATIENCE_SECONDS)
    plan = existing_plan(store)
    _refuse_useless(asked)
    with connect(asked.output, asked.endpoint_url) as connection:
        columns = columns_in(connection)
        selection = selected(connection, store, asked.keys, asked.where)
    if asked.form in ARRAYS:
        return _arrays(asked, store, plan, selection, console)
    records = ExplainedRecords(store, plan, columns, asked.endpoint_url, asked.limit, selection)
    known = _known_truth(asked, store)
    write = _writer(asked, store, plan, known.truth, console)
    folder = fresh_folder(asked.destination, {"data": plan.identity["data"], "output": store.uri})
    found = iter(records)
    first = next(found, None)
    if first is None:
        raise ConfigError(f"nothing of {asked.output} can be exported: {_account(records)}")
    if asked.form in ("virelay", "quantus") and not first.maps_of_classes:
        raise ConfigError(
            f"{asked.form} knows maps of classes alone, and {asked.output} explains {plan.identity['target']!r}: take "
            "fiftyone or spotlight"
        )
    lines = write(_shown(chain([first], found), records, console), records, folder)
    return [_account(records), *([] if known.note is None else [known.note]), *lines]


def _arrays(
    asked: ExportRequest, store: ObjectStore, plan: Plan, selection: Selection, console: Console
) -> Sequence[str]:
    """Writes the maps as arrays and returns lines for the user. Raises as `run_export`."""
    from blocksight.jobs.export import arrays

    make = arrays.sink_of(asked.form)
    folder = fresh_folder(asked.destination, {"data": plan.identity["data"], "output": store.uri})
    with passing(console, Tally(plan.num_records, None, verb="export")) as update:
        return arrays.write(store, plan, make, folder, selection, asked.limit, update)


def _refuse_useless(asked: ExportRequest) -> None:
    """Raises ConfigError for an option that the format has no use for."""
    useless = [
        ("--truth", asked.truth, ("fiftyone", "pictures"), "shows no objects"),
        ("--gif", asked.gif, ("pictures",), "moves nothing"),
        ("--beside", asked.beside or None, ("pictures",), "shows one output"),
    ]
    for option, given, forms, why in useless:
        if given is not None and asked.form not in forms:
            shown = ",".join(given) if isinstance(given, tuple) else given
            raise ConfigError(f"{option} {shown} is for {' and '.join(forms)} only: {asked.form} {why}")
    if (asked.gif == "outputs") != bool(asked.beside):
        raise ConfigError("--gif outputs moves over this output and those of --beside: give both, or neither")


def _known_truth(asked: ExportRequest, store: ObjectStore) -> KnownTruth:
    """The ground truth for the formats that show objects. Raises StoreError."""
    shows_objects = asked.form in ("fiftyone", "pictures")
    return known_truth(store, asked.truth, asked.endpoint_url) if shows_objects else KnownTruth()


def _frames(
    asked: ExportRequest, store: ObjectStore, plan: Plan, truth: Truth | None, console: Console
) -> overlays.Frames | None:
    """The frames of the GIFs; None for plain pictures. Raises ConfigError, ModelError and StoreError."""
    if asked.gif is None:
        return None
    if asked.gif == "outputs":
        others = [existing_output(name, asked.endpoint_url) for name in asked.beside]
        refuse_other_inputs([Output(asked.output, store, plan), *others])
        return overlays.output_frames(others, truth)
    refuse_without_blocks(plan.identity["explainer"], "--gif blocks", asked.output)
    from blocksight.jobs.explain.replay import Replay  # brings torch

    named = NamedModel(asked.model, asked.weights, asked.endpoint_url)
    return overlays.block_frames(plan, Replay(store, plan, named, console))


def _writer(asked: ExportRequest, store: ObjectStore, plan: Plan, truth: Truth | None, console: Console) -> Writer:
    """The function that writes the format. Raises ConfigError, StoreError or ModelError if it lacks something."""
    if asked.form == "quantus":
        from blocksight.jobs.explain.stored_model import model_of_output  # brings torch
        from blocksight.jobs.export import quantus

        named = NamedModel(asked.model, asked.weights, asked.endpoint_url)
        _, adapter = model_of_output(store, plan, named, console)
        return partial(quantus.write, adapter=adapter)
    replays = asked.gif == "blocks"
    for option, given in (("--model", asked.model), ("--weights", asked.weights)):
        if given is not None and not replays:
            raise ConfigError(
                f"{option} {given} is for quantus only, and for pictures with --gif blocks: {asked.form} needs no model"
            )
    if asked.form == "pictures":
        frames = _frames(asked, store, plan, truth, console)
        return partial(overlays.write, truth=truth, frames=frames)
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
    known = (records.plan.num_records, records.limit, records.selection.num_records)
    expected = min(count for count in known if count is not None)
    with progress(console, Tally(expected, None, verb="export")) as update:
        for record in found:
            yield record
            update(1)


def _account(records: ExplainedRecords) -> str:
    exported = counted(records.num_records, "record")
    until = "" if records.limit is None else " before the limit"
    left_out = f"{records.num_rejected:,} rejected, {records.num_gone:,} whose image is gone"
    return f"{exported} exported; left out{until}: {left_out}"
