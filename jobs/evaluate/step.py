"""The evaluate step: takes an explained unit, commits the values of its metrics once; holds one model."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blocksight.engine.catalog.entries import CONTROLS, metrics_biased_by
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.parameters import NoParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.explainer import State
from blocksight.engine.judging.sanity import Sanity
from blocksight.engine.metrics import OF_MAPS, masked_metrics
from blocksight.engine.metrics.localisation import Localisation
from blocksight.engine.metrics.metric import Maps, Metric, Region, Value, score_of
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import is_short_of_memory
from blocksight.engine.scoring.forward import Forward, release_memory
from blocksight.engine.scoring.setting_choice import eager_setting
from blocksight.jobs.evaluate.evaluation import (
    Evaluation,
    EvaluationContext,
    fragment_key,
    ground_truth_protocol,
    labels_of,
    region_of,
)
from blocksight.jobs.explain.forward_pass import bounded, stored_forward
from blocksight.jobs.explain.learned import stored_state
from blocksight.jobs.explain.step import (
    IMAGES_PER_CHUNK,
    as_stored,
    load,
    make_explainer,
    number_of,
    seed_of,
    try_device,
    with_heartbeat,
)
from blocksight.jobs.explain.target_names import formulas_of
from blocksight.jobs.ledger.output import fragment_of, map_of
from blocksight.jobs.ledger.stop_request import Stop
from blocksight.jobs.plan.config import digest_of
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.forward_setting import planned_forward
from blocksight.jobs.plan.records import Evaluated, Unit, UnitFailure, UnitInput, UnitReturned, UnreconciledError
from blocksight.jobs.worker.attempts import done_here, is_of_worker, open_worker_stores, returned, told_error
from blocksight.jobs.worker.error_classes import UnfitWorkerError, is_of_unit
from blocksight.jobs.worker.isolation import ProcessDiedError
from blocksight.jobs.worker.memory import with_less_at_once
from blocksight.jobs.worker.unit import read_unit
from blocksight.jobs.worker.watchdog import heartbeat, watchdog
from blocksight.storage.inputs.records import as_text
from blocksight.storage.outputs.fragments import encode_fragment
from blocksight.storage.outputs.schema import EVALUATION, MAX_ERROR_LENGTH, OK
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    DamagedError,
    MissingError,
    ObjectError,
    StoreError,
    UnavailableError,
)

INPUT_ERRORS = (MissingError, ChangedError, ObjectError, DamagedError)

Row = dict[str, Any]
Record = Sequence[Row]
"""The stored rows of one record, one per target."""


NO_CLASS = "the target is of no single class, and the ground truth says where classes are"


def metrics_of(
    evaluation: Evaluation,
    adapter: ModelAdapter,
    context: JobContext,
    batch_size: int,
    forward: Forward | None = None,
    learned: State | None = None,
) -> list[Metric]:
    """The metrics that give the wanted values, each once; `learned` is the state of an explainer that learns.

    Raises ModelError if the model cannot be measured by one of them.
    """
    found: list[Metric] = list(masked_metrics(adapter, evaluation.baseline, batch_size, forward))
    found += [make() for make in OF_MAPS.values()]
    found.append(Localisation(ground_truth_protocol(evaluation, context)))
    if set(Sanity.names) & set(evaluation.metrics):
        blocks = [block["name"] for block in context.facts.blocks]
        make = partial(make_explainer, config=context.config, blocks=blocks, batch_size=batch_size, state=learned)
        found.append(Sanity(adapter, make, evaluation.seed))
    return [metric for metric in found if set(metric.names) & set(evaluation.metrics)]


class EvaluateStep:
    """Measures whole units with one model."""

    def __init__(self, context: EvaluationContext, state: bytes | None) -> None:
        """Loads the model and checks it against the plan. Raises ModelError."""
        job = context.job
        torch.set_num_threads(job.num_threads)
        self.context, self.evaluation, self.job = context, context.evaluation, job
        self.stores = open_worker_stores(job)
        self.adapter = load(job.config, state, job.device, job.import_path, job.readout, job.facts.vectors)
        if self.adapter.fingerprint != job.facts.weights_sha256:
            raise ModelError("the maps were made with other weights: name the same weights file")
        self.adapter.module.register_forward_pre_hook(lambda *_: heartbeat())
        self.learned, _ = stored_state(self.stores.output, job.config) or (None, None)
        planned = planned_forward(self.stores.output)
        self.has_forward = planned is None
        self._set_up(eager_setting(job.device, job.batch_size) if planned is None else planned.setting)
        wanted = CONTROLS if self.evaluation.controls else ()
        self.controls = {name: EXPLAINERS[name](self.adapter, NoParameters()) for name in wanted}

    def _set_up(self, setting: ForwardSetting, forward: Forward | None = None) -> None:
        """Makes the metrics, with this forward setting."""
        self.setting = setting
        forward = forward and with_heartbeat(forward)
        self.metrics = metrics_of(self.evaluation, self.adapter, self.job, setting.batch_size, forward, self.learned)

    def _use_planned_forward(self) -> None:
        """Makes the plan's forward pass. Raises UnfitWorkerError if this machine cannot run it."""
        try:
            planned = stored_forward(self.stores.output, self.adapter, self.setting.batch_size)
        except ModelError as error:
            raise UnfitWorkerError(str(error)) from error
        if planned is not None:
            forward, setting = planned
            self._set_up(setting, forward)
        self.has_forward = True

    def _can_halve(self) -> bool:
        return self.setting.batch_size > 1

    def _halve(self) -> None:
        """Halves the number of masked inputs at once, from now on."""
        self.has_forward = False
        self._set_up(bounded(self.setting, self.setting.batch_size // 2))
        release_memory(self.adapter)

    def __call__(self, unit: Unit) -> Evaluated:
        """Commits the unit's values, unless another attempt already has.

        Raises StoreError, UnfitWorkerError, and UnreconciledError if the unit's fragment is damaged.
        """
        rows = fragment_of(self.stores.output, unit.fragment_key).to_pylist()
        chosen = [row for row in rows if row["status"] == OK and self.evaluation.includes(row["key"])]
        records = [list(own) for _, own in groupby(chosen, key=itemgetter("shard", "shard_index"))]
        values = list(self._values(unit, records)) if records else []
        provenance = {"blocksight.job": self.job.fingerprint, "blocksight.unit": unit.unit_id}
        body = encode_fragment(values, provenance, EVALUATION)
        key = fragment_key(self.context.folder, unit)
        try:
            self.stores.output.create(key, body)
        except StoreError as error:  # another attempt was first, or the reply was lost
            if not isinstance(error, AlreadyExistsError) and self.stores.output.head(key) is None:
                raise
        reasons = Counter(row["reason"] for row in values if row["reason"] is not None)
        return Evaluated(unit.unit_id, len(records), len(values), dict(reasons))

    def _values(self, unit: Unit, records: Sequence[Record]) -> Iterator[Row]:
        pixels = self._pixels(unit)
        readable = [record for record in records if _place(record) in pixels]
        for start in range(0, len(readable), IMAGES_PER_CHUNK):
            chunk = readable[start : start + IMAGES_PER_CHUNK]
            yield from self._chunk_rows(chunk, np.stack([pixels[_place(record)] for record in chunk]))
        for record in records:
            if _place(record) not in pixels:
                yield from self._rows_without_values(record, "the image cannot be read any more, or changed")

    def _chunk_rows(self, chunk: Sequence[Record], pixels: NDArray[np.uint8]) -> list[Row]:
        """The rows of some records. If they fail together each is measured alone; one that fails gets no values."""
        try:
            return with_less_at_once(lambda: self._measured_rows(chunk, pixels), self._can_halve, self._halve)
        except Exception as error:
            try_device(self.adapter, error)
            if not is_of_unit(error) and not (is_short_of_memory(error) and len(chunk) > 1):
                raise
            if len(chunk) == 1:
                return list(self._rows_without_values(chunk[0], f"measuring failed: {type(error).__name__}: {error}"))
        return [row for record, own in zip(chunk, pixels, strict=True) for row in self._chunk_rows([record], own[None])]

    def _measured_rows(self, chunk: Sequence[Record], pixels: NDArray[np.uint8]) -> list[Row]:
        if not self.has_forward:
            self._use_planned_forward()
        return list(self._rows_with_controls(chunk, self._maps(chunk, pixels)))

    def _rows_with_controls(self, chunk: Sequence[Record], maps: Maps) -> Iterator[Row]:
        yield from self._rows_of_maps(chunk, maps, {})
        for name, explainer in self.controls.items():
            made = explainer.explain(maps.inputs_nchw, maps.target, maps.seeds)
            saliency = [[as_stored(one.saliency_hw) for one in own] for own in made]
            method = {"explainer": name, "parameters": digest_of({"control": name})[:16], "selected_by": None}
            yield from self._rows_of_maps(chunk, replace(maps, saliency=saliency), method)

    def _pixels(self, unit: Unit) -> Mapping[tuple[str, int], NDArray[np.uint8]]:
        """The unit's readable images, by shard and index; empty if its shard is gone or damaged."""
        unit_input = self._unit_input(unit, careful=False)
        if unit_input is None:
            return {}
        decoded = [record for record in unit_input.records if record.reject_code is None]
        return {(one.shard, one.shard_index): own for one, own in zip(decoded, unit_input.pixels, strict=True)}

    def _unit_input(self, unit: Unit, *, careful: bool) -> UnitInput | None:
        """The unit's decoded records, read carefully if that fails; None if it cannot be read any more."""
        try:
            return read_unit(unit, self.stores.source, self.job.config, self.job.facts.input_size, careful=careful)
        except (*INPUT_ERRORS, ProcessDiedError):
            return None
        except Exception as error:
            if not is_of_unit(error):
                raise
        return None if careful else self._unit_input(unit, careful=True)

    def _maps(self, records: Sequence[Record], pixels: NDArray[np.uint8]) -> Maps:
        inputs = self.adapter.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        return Maps(
            inputs,
            self.adapter.target_of([formulas_of(record, self.adapter) for record in records]),
            saliency=[[map_of(row).astype(np.float64) for row in record] for record in records],
            scores=[[row["score"] for row in record] for record in records],
            ranks=[[row["target_rank"] for row in record] for record in records],
            regions=[[self._region(row) for row in record] for record in records],
            seeds=[number_of(self.evaluation.seed, record[0]["key"]) for record in records],
            explainer_seeds=[seed_of(self.job.config, record[0]["key"]) for record in records],
        )

    def _region(self, row: Row) -> Region | str | None:
        """The region of the row's target, or why its annotation is unusable."""
        if row["target_index"] is None:
            return NO_CLASS
        labels = labels_of(self.evaluation.class_map, row["target_index"], row["target_name"])
        original = (row["height"], row["width"])
        resize, input_size = self.job.config.resize, self.job.facts.input_size
        return region_of(self.context.truth, row["key"], labels, original, resize, input_size)

    def _rows_of_maps(self, records: Sequence[Record], maps: Maps, method: Mapping[str, str | None]) -> Iterator[Row]:
        """The rows of some maps, record by record; `method` names a control."""
        explained = None if method else records[0][0]["metrics"]["protocol"]  # measured by `explain` already
        first = score_of(records[0][0]["target_formula"])
        metrics = [metric for metric in self.metrics if metric.digest(self.setting, first) != explained]
        if method:  # a control uses no weights, so that random weights change nothing
            metrics = [metric for metric in metrics if not isinstance(metric, Sanity)]
        found = [(metric, metric.evaluate(maps)) for metric in metrics]
        for image, record in enumerate(records):
            for index, row in enumerate(record):
                for metric, values in found:
                    yield from self._rows({**row, **method}, metric, values[image][index])

    def _rows(self, row: Row, metric: Metric, values: Mapping[str, Value]) -> Iterator[Row]:
        flattered = metrics_biased_by(row.get("selected_by"))
        for name, value in values.items():
            if name in self.evaluation.metrics:
                if name in flattered:
                    value = Value(None, f"{row['selected_by']} picked this map among several")
                yield _row(row, name, metric.digest(self.setting, score_of(row["target_formula"])), value)

    def _rows_without_values(self, record: Record, reason: str) -> Iterator[Row]:
        missing = Value(None, as_text(reason)[:MAX_ERROR_LENGTH])
        for row in record:
            for metric in self.metrics:
                yield from self._rows(row, metric, dict.fromkeys(metric.names, missing))


def _place(record: Record) -> tuple[str, int]:
    return record[0]["shard"], record[0]["shard_index"]


def _row(row: Row, name: str, protocol: str, value: Value) -> Row:
    copied = {column: row[column] for column in EVALUATION.names[: EVALUATION.names.index("metric")]}
    number, reason = value.value, value.reason
    if number is not None and not np.isfinite(number):
        number, reason = None, "the value is not finite"
    return {
        **copied,
        "metric": name,
        "protocol": protocol,
        "value": number,
        "reason": reason,
        "curve": value.curve,
    }


def evaluated(step: Callable[[], EvaluateStep], unit: Unit) -> Evaluated | UnitFailure | UnitReturned:
    """Evaluates a unit; an error becomes a UnitFailure or UnitReturned, so that the other units go on."""
    try:
        with watchdog():
            return step()(unit)
    except Exception as error:  # noqa: BLE001 - see the docstring
        if is_of_worker(error):
            return returned(unit, error)
        text = str(error) if isinstance(error, UnreconciledError) else told_error(error)
        is_away = isinstance(error, UnavailableError)
        inputs = unit.objects[0].key
        return UnitFailure(unit.unit_id, unit.ordinal, inputs, "evaluate", text[:MAX_ERROR_LENGTH], is_away)


def run_units(
    units: Iterable[Unit], context: EvaluationContext, state: bytes | None, stop: Stop
) -> Generator[Evaluated | UnitFailure | UnitReturned, None, None]:
    """Evaluates the units in this process, one by one, until `stop` is requested.

    Raises ModelError, and UnfitWorkerError as soon as this process can measure no unit.
    """
    step = EvaluateStep(context, state)
    for unit in units:
        if stop.reason is not None:
            return
        yield done_here(evaluated(lambda: step, unit))
