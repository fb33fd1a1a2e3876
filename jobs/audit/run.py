"""Runs an audit: reads all maps, clusters each class's maps, tries candidates for shortcuts, writes the result."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from blocksight.jobs.audit.candidates import MAX_CANDIDATES, candidates
from blocksight.jobs.audit.candidates import MIN_MAPS as LEAST_OF_CLASS
from blocksight.jobs.audit.clusters import MIN_MAPS as LEAST_OF_CLUSTERED
from blocksight.jobs.audit.clusters import NO_CLUSTER, ClassModel, class_model, clusters_of
from blocksight.jobs.audit.examples import Example, Place, place_of, write_examples
from blocksight.jobs.audit.measuring import MEASURED_FOLDER, AuditScope
from blocksight.jobs.audit.oddities import KEPT, OddestMaps, with_clusters
from blocksight.jobs.audit.result import AUDIT_KEY, ROWS_FOLDER, Audit, Shortcut, write_audit
from blocksight.jobs.audit.samples import Sample
from blocksight.jobs.audit.shortcuts import MEMBERS, OTHERS, judged, suspects_of, tried
from blocksight.jobs.audit.stream import StreamResult, stream
from blocksight.jobs.audit.trial import RANDOM_REGIONS, Trial
from blocksight.jobs.evaluate.evaluation import labels_of, read_class_map, region_of
from blocksight.jobs.evaluate.known_truth import remember_truth
from blocksight.jobs.explain.stored_model import model_of_output
from blocksight.jobs.ledger.output import model_facts
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.plan import DriftError, Plan, existing_plan
from blocksight.jobs.plan.preflight import readout_of
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.plan.text import counted
from blocksight.jobs.run.unit_pass import ONE_PROCESS
from blocksight.jobs.run.workers import device_here
from blocksight.jobs.worker.progress import tracked
from blocksight.jobs.worker.rows import Output, images_of
from blocksight.storage.images.decode import fit
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.outputs.pictures import Pixels
from blocksight.storage.parquet.rows import parquet_of_table
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.store import DamagedError, ObjectStore


@dataclass(frozen=True)
class AuditRequest:
    """An audit's options as the user gives them."""

    output: str
    truth: str | None = None
    class_map: Path | None = None
    weights: str | None = None
    tries: bool = True
    """Whether candidates for shortcuts are tried on the model."""
    seed: int = 0
    endpoint_url: str | None = None
    model: str | None = None
    """The model's name again; needed if it is the user's code."""


def run_audit(asked: AuditRequest, console: Console, execution: Execution = ONE_PROCESS) -> Audit:
    """Audits the records explained so far, and replaces an earlier audit. A call that broke off is gone on with.

    Maps are measured where `execution` says, for which it needs `workers` and `address`; all else is done here. Raises
    ConfigError, StoreError or ModelError for a wrong request before any work, and ClusterError.
    """
    store = PatientStore(open_store(asked.output, asked.endpoint_url))
    plan = existing_plan(store)
    scope = _scope(asked)
    trial = _trial(store, plan, asked, console) if asked.tries else None
    if asked.truth is not None and scope.truth is not None:
        remember_truth(store, asked.truth, scope.truth)
    console.print(_cost(plan, asked))
    streamed = _stream_maps(Output(asked.output, store, plan), scope, console, execution, asked.endpoint_url)
    models = _models(streamed.samples, asked.seed, console)
    store.delete(AUDIT_KEY)  # an earlier audit's rows are replaced next
    oddest = _write_rows(store, streamed, OddestMaps(models, _typical_on_object(streamed)), console)
    input_size = tuple(model_facts(store)["input_size"])
    of_classes = {target: model for target, model in models.items() if model.sample.is_of_class}
    shortcuts, examples, notes = _shortcuts(
        of_classes, trial, _InputImages(plan, asked, scope, input_size), asked, console
    )
    audit = Audit(
        fragments=streamed.fragments,
        settings={
            "seed": asked.seed,
            "truth": None if scope.truth is None else scope.truth.digest,
            "class_map": dict(scope.class_map),
            "tries": asked.tries,
        },
        num_rows=streamed.num_rows,
        num_maps=streamed.num_maps,
        num_rejected=streamed.num_rejected,
        num_right=streamed.num_right,
        gates=streamed.gates,
        groups=streamed.groups,
        clusters=tuple(one for model in models.values() for one in clusters_of(model, _sizes(model, oddest.sizes))),
        oddities=oddest.oddities(),
        shortcuts=shortcuts,
        notes=(*_missing(plan, streamed), *_raw(store), *streamed.notes, *_few(of_classes), *notes, *_unkept(oddest)),
    )
    write_examples(store, {place_of(one): examples.get(place_of(one), ()) for one in audit.findings})
    write_audit(store, audit)
    for info in list(store.list(MEASURED_FOLDER)):
        store.delete(info.key)
    return audit


def _cost(plan: Plan, asked: AuditRequest) -> str:
    """What the audit will take, in a sentence."""
    reads = f"cost: reads the maps of about {counted(plan.num_records, 'record')}"
    if not asked.tries:
        return reads
    images = min(MEMBERS + OTHERS, plan.num_records)
    forwards = MAX_CANDIDATES * images * (2 + RANDOM_REGIONS)  # each image as it is, changed, and by chance
    return f"{reads}, then tries at most {MAX_CANDIDATES} regions on the model: at most {forwards:,} forwards"


def _stream_maps(
    output: Output, scope: AuditScope, console: Console, execution: Execution, endpoint_url: str | None
) -> StreamResult:
    try:
        return stream(output, scope, console, execution, endpoint_url)
    except DamagedError as error:
        raise UnreconciledError(str(error)) from error


def _scope(asked: AuditRequest) -> AuditScope:
    if asked.class_map is not None and asked.truth is None:
        raise ConfigError("--class-map says what the labels of --truth mean; give both")
    truth = None if asked.truth is None else open_truth(asked.truth, asked.endpoint_url)
    return AuditScope(truth, read_class_map(asked.class_map), asked.seed)


def _trial(store: ObjectStore, plan: Plan, asked: AuditRequest, console: Console) -> Trial:
    """A trial on the job's model. Raises ModelError, and ConfigError if its weights are not those of the maps."""
    named = NamedModel(asked.model, asked.weights, asked.endpoint_url)
    try:
        _, adapter = model_of_output(store, plan, named, console, device_here("auto"))
    except DriftError as error:
        raise ConfigError(
            f"{error}\nname the model and the weights that the maps are of, or leave the trial out with --no-try"
        ) from error
    return Trial(adapter, asked.seed)


def _models(samples: Mapping[int, Sample], seed: int, console: Console) -> dict[int, ClassModel]:
    """The clustered maps of each class that has a sample."""
    known = [sample for sample in samples.values() if len(sample.keys)]
    return {
        sample.target_index: class_model(sample, seed)
        for sample in tracked(console, known, len(known), "cluster", "class")
    }


def _typical_on_object(streamed: StreamResult) -> dict[int, float]:
    """By class the median share of its maps that lies on the object."""
    by_name = {
        group.predicted: group.spreads["on_object"].q50
        for group in streamed.groups
        if group.kind == "predicted" and "on_object" in group.spreads
    }
    classes = (sample for sample in streamed.samples.values() if sample.is_of_class)
    named = {sample.target_index: sample.target_name for sample in classes}
    return {target: by_name[name] for target, name in named.items() if name in by_name}


def _write_rows(store: ObjectStore, streamed: StreamResult, oddest: OddestMaps, console: Console) -> OddestMaps:
    """Writes every map's row with its cluster and strangeness, and deletes rows of earlier audits."""
    units, written = streamed.measured.units, set[str]()
    for unit in tracked(console, units, len(units), "place", "unit"):
        rows = with_clusters(streamed.measured.rows(unit, streamed.shared), oddest.models)
        oddest.add(rows)
        key = f"{ROWS_FOLDER}{unit.fragment_key.rpartition('/')[2]}"
        store.put(key, parquet_of_table(rows))
        written.add(key)
    for info in list(store.list(ROWS_FOLDER)):
        if info.key not in written:
            store.delete(info.key)
    return oddest


def _sizes(model: ClassModel, sizes: Mapping[tuple[int, int], int]) -> list[int]:
    """The number of the class's maps in each cluster, then in none."""
    target = model.sample.target_index
    return [sizes.get((target, number), 0) for number in (*range(model.num_clusters), NO_CLUSTER)]


def _missing(plan: Plan, streamed: StreamResult) -> Iterator[str]:
    """A note on units without a fragment."""
    num_missing = len(plan.units) - len(streamed.measured.units)
    if num_missing:
        missing = f"{counted(num_missing, 'unit')} of {len(plan.units):,} without a fragment"
        yield f"{missing}: read: {counted(streamed.num_rows, 'row')} of the committed units"


def _raw(store: ObjectStore) -> Iterator[str]:
    """A note on scores that are no probabilities."""
    if readout_of(store) == "identity":
        yield "scores are the model's outputs themselves: effects are differences of them"


def _few(models: Mapping[int, ClassModel]) -> Iterator[str]:
    """Notes on classes that have too few maps for shortcuts or clusters."""
    sizes = [len(model.sample.keys) for model in models.values()]
    for least, what in ((LEAST_OF_CLASS, "shortcuts"), (LEAST_OF_CLUSTERED, "clusters")):
        few = sum(size < least for size in sizes)
        if few:
            yield f"no {what} are looked for in {few:,} of {counted(len(sizes), 'class')}: fewer than {least} maps each"


def _unkept(oddest: OddestMaps) -> list[str]:
    return [
        f"of {count:,} oddities ({reason}) the {KEPT} greatest are listed; all rows have their strangeness"
        for reason, count in oddest.found.items()
        if count > KEPT
    ]


class _InputImages:
    """Images of the data set at the model's input size, and the regions of their objects."""

    def __init__(self, plan: Plan, asked: AuditRequest, scope: AuditScope, input_size: tuple[int, int]) -> None:
        self.plan, self.asked, self.scope, self.input_size = plan, asked, scope, input_size
        self.seen: dict[str, Pixels] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def fetch(self, keys: set[str]) -> None:
        """Reads the records' images; an image that is gone or unreadable is left out."""
        resize = self.plan.identity["resize"]
        for key, pixels in images_of(self.plan, self.asked.endpoint_url, keys):
            self.seen[key] = fit(pixels, self.input_size, resize)
            self._sizes[key] = pixels.shape[0], pixels.shape[1]

    def region(self, key: str, target_index: int, target_name: str) -> NDArray[np.bool_] | None:
        """The region of the target's objects, bool [H, W] at the model's input size; None without ground truth."""
        labels = labels_of(self.scope.class_map, target_index, target_name)
        resize = self.plan.identity["resize"]
        found = region_of(self.scope.truth, key, labels, self._sizes[key], resize, self.input_size)
        return None if isinstance(found, str) else found


def _shortcuts(
    models: Mapping[int, ClassModel], trial: Trial | None, images: _InputImages, asked: AuditRequest, console: Console
) -> tuple[tuple[Shortcut, ...], Mapping[Place, Sequence[Example]], list[str]]:
    """The shortcuts, examples of their trials, and notes on what was left out."""
    if len(models) < 2:
        return (), {}, ["shortcuts are looked for between classes, and the maps explain one class alone"]
    found, num_more = candidates(list(models.values()))
    suspects = suspects_of(found, [model.sample for model in models.values()], asked.seed)
    if trial is not None or images.scope.truth is not None:
        images.fetch({key for one in suspects for key in (*one.members, *one.others)})
    outcomes = [
        tried(suspect, trial, images.seen, images.region)
        for suspect in tracked(console, suspects, len(suspects), "test", "region")
    ]
    notes = [f"{num_more:,} less certain candidates for shortcuts were left out"] if num_more else []
    examples = {place_of(shortcut): own for shortcut, own in outcomes}
    return judged([shortcut for shortcut, _ in outcomes]), examples, notes
