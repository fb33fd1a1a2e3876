"""Runs an export: prepares the folder, writes the records, and says what was left out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from blocksight.jobs.audit.result import FOLDER as AUDIT_FOLDER
from blocksight.jobs.evaluate.evaluation import FOLDER as EVALUATIONS
from blocksight.jobs.evaluate.known_truth import KnownTruth, known_truth
from blocksight.jobs.explain.block_tiles import refuse_without_blocks
from blocksight.jobs.export import overlays, virelay
from blocksight.jobs.export.fiftyone import FiftyOne
from blocksight.jobs.export.overlays import Pictures
from blocksight.jobs.export.parts import Exporting, Form, begin, export_parts
from blocksight.jobs.export.records import ExplainedRecord, ExplainedRecords
from blocksight.jobs.export.selection import selected
from blocksight.jobs.export.spotlight import Spotlight
from blocksight.jobs.export.sql import columns_in, connect
from blocksight.jobs.plan.config import CODE_VERSION, ConfigError, Execution, digest_of
from blocksight.jobs.plan.plan import Plan, check_place, existing_plan
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.plan.text import counted
from blocksight.jobs.run.unit_pass import ONE_PROCESS
from blocksight.jobs.worker.progress import Tally, progress
from blocksight.jobs.worker.rows import Output, existing_output, refuse_other_inputs
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.store import ObjectStore

Format = Literal["pictures", "numpy", "zarr", "fiftyone", "virelay", "spotlight", "quantus"]
FORMATS: tuple[Format, ...] = get_args(Format)
ARRAYS = ("numpy", "zarr")
"""Formats of maps without their images."""
WHOLE = ("virelay", "quantus")
"""Formats that one process writes, in one pass: their files grow row by row."""
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


def run_export(asked: ExportRequest, console: Console, execution: Execution = ONE_PROCESS) -> Sequence[str]:
    """Writes the export and returns lines for the user: what was left out, and how to open it in the tool.

    Units are exported where `execution` says, for which it needs `workers` and `address`; one that broke off is gone on
    with. Raises ConfigError (also if no record can be exported), StoreError, UnreconciledError, ClusterError or
    ModelError.
    """
    store = PatientStore(open_store(asked.output, asked.endpoint_url), SHORT_PATIENCE_SECONDS)
    plan = existing_plan(store)
    _refuse_useless(asked)
    _refuse_workers(asked, execution)
    with connect(asked.output, asked.endpoint_url) as connection:
        columns = columns_in(connection)
        selection = selected(connection, store, asked.keys, asked.where)
    records = ExplainedRecords(store, plan, columns, asked.endpoint_url, asked.limit, selection)
    known = _known_truth(asked, store)
    notes = [] if known.note is None else [known.note]
    if asked.form in WHOLE:
        return [*_whole(asked, records, console), *notes]
    form = _form(asked, store, plan, known.truth, console)
    folder = local_folder(asked.destination, {"data": plan.identity["data"], "output": store.uri})
    begin(folder, {**_facts(asked), "truth": known.truth and known.truth.digest, "state": _state_of(store)})
    work = Exporting(asked.output, asked.endpoint_url, columns, asked.limit, selection, form, str(folder))
    work.__dict__["reader"] = records  # of this process
    first, *others = export_parts(work, records.units, ONE_PROCESS if asked.gif == "blocks" else execution, console)
    return [first, *notes, *others]


def _facts(asked: ExportRequest) -> dict[str, Any]:
    """What of a request decides the export's bytes, beside the output's own."""
    names = ("form", "limit", "keys", "where", "gif", "beside", "model", "weights")
    return {"output": asked.output, **{name: getattr(asked, name) for name in names}, "code": CODE_VERSION}


def _state_of(store: ObjectStore) -> str:
    """A digest of all that is exported: it changes when a unit, an evaluation or an audit is added."""
    infos = (info for folder in ("data/", EVALUATIONS, AUDIT_FOLDER) for info in store.list(folder))
    return digest_of({info.key: info.etag for info in infos})


def _whole(asked: ExportRequest, records: ExplainedRecords, console: Console) -> Sequence[str]:
    """Writes a format that one process writes, record by record. Raises as `run_export`."""
    store, plan = records.store, records.plan
    write = _writer(asked, store, plan, console)
    folder = fresh_folder(asked.destination, {"data": plan.identity["data"], "output": store.uri})
    found = iter(records)
    first = next(found, None)
    if first is None:
        raise ConfigError(f"nothing of {asked.output} can be exported: {_account(records)}")
    if not first.maps_of_classes:
        raise ConfigError(
            f"{asked.form} knows maps of classes alone, and {asked.output} explains {plan.identity['target']!r}: take "
            "fiftyone or spotlight"
        )
    lines = write(_shown(chain([first], found), records, console), records, folder)
    return [_account(records), *lines]


def _refuse_workers(asked: ExportRequest, execution: Execution) -> None:
    """Raises ConfigError for several processes, where one writes all."""
    given = f"--workers {execution.workers}" if (execution.workers or 1) > 1 else None
    given = given if execution.address is None else f"--address {execution.address}"
    by_one = asked.form if asked.form in WHOLE else "--gif blocks" if asked.gif == "blocks" else None
    if by_one is not None and given is not None:
        raise ConfigError(f"{given} is of no use: one process writes {by_one}; leave it out")


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


def _frames(asked: ExportRequest, store: ObjectStore, plan: Plan, console: Console) -> overlays.Frames | None:
    """Frames of GIFs by a replay. Raises ConfigError, also for outputs of other data, ModelError and StoreError."""
    if asked.gif == "outputs":
        others = [existing_output(name, asked.endpoint_url) for name in asked.beside]
        refuse_other_inputs([Output(asked.output, store, plan), *others])
    if asked.gif != "blocks":
        return None
    refuse_without_blocks(plan.identity["explainer"], "--gif blocks", asked.output)
    from blocksight.jobs.explain.replay import Replay  # brings torch

    named = NamedModel(asked.model, asked.weights, asked.endpoint_url)
    return overlays.block_frames(plan, Replay(store, plan, named, console))


def _form(asked: ExportRequest, store: ObjectStore, plan: Plan, truth: Truth | None, console: Console) -> Form:
    """The format that is made of parts. Raises ConfigError, StoreError or ModelError if it lacks something."""
    _refuse_model(asked)
    if asked.form in ARRAYS:
        from blocksight.jobs.export import arrays

        return arrays.Arrays(arrays.sink_of(asked.form), bool(plan.identity.get("signed")))
    if asked.form == "spotlight":
        return Spotlight()
    if asked.form == "fiftyone":
        return FiftyOne(truth)
    replayed = _frames(asked, store, plan, console)
    return Pictures(truth, asked.beside, asked.endpoint_url, replayed)


def _refuse_model(asked: ExportRequest) -> None:
    """Raises ConfigError if a model is named that no map is made with."""
    for option, given in (("--model", asked.model), ("--weights", asked.weights)):
        if given is not None and asked.gif != "blocks":
            raise ConfigError(
                f"{option} {given} is for quantus only, and for pictures with --gif blocks: {asked.form} needs no model"
            )


def _writer(asked: ExportRequest, store: ObjectStore, plan: Plan, console: Console) -> Writer:
    """The function that writes the format. Raises ConfigError, StoreError or ModelError if it lacks something."""
    if asked.form == "virelay":
        _refuse_model(asked)
        virelay.check_installed()
        return virelay.write
    from blocksight.jobs.explain.stored_model import model_of_output  # brings torch
    from blocksight.jobs.export import quantus

    named = NamedModel(asked.model, asked.weights, asked.endpoint_url)
    _, adapter = model_of_output(store, plan, named, console)
    return partial(quantus.write, adapter=adapter)


def fresh_folder(destination: str, taken: Mapping[str, str]) -> Path:
    """Makes the local folder and returns it. Raises ConfigError as `local_folder`, and if it is not empty."""
    folder = local_folder(destination, taken)
    if any(folder.iterdir()):
        raise ConfigError(f"{folder} holds files already; name a folder that is empty or not there yet")
    return folder


def local_folder(destination: str, taken: Mapping[str, str]) -> Path:
    """Makes the local folder if it is not there, and returns it.

    Raises ConfigError if it is no local folder, or overlaps a place in `taken` (URIs by name).
    """
    if "://" in destination:
        raise ConfigError("an export goes to a local folder, not to a URI: the tools read it from there")
    folder = Path(destination).expanduser().absolute()
    check_place(str(folder), taken)
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
