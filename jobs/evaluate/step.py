"""The evaluate step: one model in memory, an explained unit in, the values of its metrics out, committed once."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blocksight.engine.catalog.entries import CONTROLS, flattered_by
from blocksight.engine.catalog.parameters import NoParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.explainer import State
from blocksight.engine.judging.sanity import Sanity
from blocksight.engine.metrics import MASKED, OF_MAPS
from blocksight.engine.metrics.localisation import Localisation
from blocksight.engine.metrics.metric import Maps, Metric, Region, Value
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.scoring.forward import Forward
from blocksight.engine.scoring.perturb import perturbation
from blocksight.engine.scoring.probe import plain_setting
from blocksight.engine.scoring.scorer import Scorer
from blocksight.jobs.evaluate.evaluation import (
    Evaluation,
    EvaluationContext,
    fragment_key,
    labels_of,
    region_of,
    regions_key,
)
from blocksight.jobs.explain.forward_pass import stored_forward
from blocksight.jobs.explain.learned import stored_state
from blocksight.jobs.explain.step import IMAGES_PER_CHUNK, lively, load, make_explainer, number_of, seed_of, stored
from blocksight.jobs.ledger.output import fragment_of, map_of
from blocksight.jobs.ledger.stop_request import Stop
from blocksight.jobs.plan.config import digest_of
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.records import Evaluated, Unit, UnitFailure, UnitInput, UnreconciledError
from blocksight.jobs.work.attempts import open_worker_stores
from blocksight.jobs.work.error_classes import is_of_unit
from blocksight.jobs.work.isolation import ProcessDiedError
from blocksight.jobs.work.unit import read_unit
from blocksight.jobs.work.watchdog import heartbeat, watchdog
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

OF_THE_INPUT = (MissingError, ChangedError, ObjectError, DamagedError)

Row = dict[str, Any]
Record = Sequence[Row]
"""The stored rows of one record, one per target."""


def metrics_of(
    evaluation: Evaluation,
    adapter: ModelAdapter,
    context: JobContext,
    batch_size: int,
    forward: Forward | None = None,
    learned: State | None = None,
) -> list[Metric]:
    """The evaluations that give the wanted values, each once; `learned` is what the explainer learned, if it does."""
    scorer = Scorer(adapter, perturbation(adapter, evaluation.baseline), batch_size, forward)
    found: list[Metric] = [make(scorer, evaluation.baseline) for make in MASKED.values()]
    found += [make() for make in OF_MAPS.values()]
    found.append(Localisation(regions_key(evaluation, context)))
    blocks = [block["name"] for block in context.facts.blocks]
    make = partial(make_explainer, config=context.config, blocks=blocks, batch_size=batch_size, state=learned)
    found.append(Sanity(adapter, make, evaluation.seed))
    return [metric for metric in found if set(metric.names) & set(evaluation.metrics)]


class EvaluateStep:
    """Measures whole units with one model."""

    def __init__(self, context: EvaluationContext, state: bytes | None) -> None:
        """Loads the model and checks it against the plan's. Raises ModelError."""
        job = context.job
        torch.set_num_threads(job.num_threads)
        self.context, self.evaluation, self.job = context, context.evaluation, job
        self.stores = open_worker_stores(job)
        self.adapter = load(job.config, state, job.device, job.import_path)
        if self.adapter.fingerprint != job.facts.weights_sha256:
            raise ModelError("these are other weights than those that the maps were made with")
        chosen = stored_forward(self.stores.output, self.adapter)
        self.adapter.module.register_forward_pre_hook(lambda *_: heartbeat())
        forward, self.setting = chosen or (None, plain_setting(job.device, job.batch_size))
        learned, _ = stored_state(self.stores.output, job.config) or (None, None)
        lively_forward = None if forward is None else lively(forward)
        self.metrics = metrics_of(self.evaluation, self.adapter, job, self.setting.batch_size, lively_forward, learned)
        wanted = CONTROLS if self.evaluation.controls else ()
        self.controls = {name: EXPLAINERS[name](self.adapter, NoParameters()) for name in wanted}

    def __call__(self, unit: Unit) -> Evaluated:
        """The unit's values, committed; those of another attempt count where they stand. Raises StoreError, and
        UnreconciledError where what was explained is damaged.
        """
        rows = fragment_of(self.stores.output, unit.fragment_key).to_pylist()
        chosen = [row for row in rows if row["status"] == OK and self.evaluation.holds(row["key"])]
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
        seen = [record for record in records if _place(record) in pixels]
        for start in range(0, len(seen), IMAGES_PER_CHUNK):
            chunk = seen[start : start + IMAGES_PER_CHUNK]
            yield from self._of_chunk(chunk, np.stack([pixels[_place(record)] for record in chunk]))
        for record in records:
            if _place(record) not in pixels:
                yield from self._without(record, "the image cannot be read any more, or changed")

    def _of_chunk(self, chunk: Sequence[Record], pixels: NDArray[np.uint8]) -> list[Row]:
        """The values of some records; where they fail together each is measured alone, and one that fails has none."""
        try:
            return list(self._rows_of(chunk, pixels))
        except Exception as error:
            if not is_of_unit(error):
                raise
            if len(chunk) == 1:
                return list(self._without(chunk[0], f"measuring failed: {type(error).__name__}: {error}"))
        return [row for record, own in zip(chunk, pixels, strict=True) for row in self._of_chunk([record], own[None])]

    def _rows_of(self, chunk: Sequence[Record], pixels: NDArray[np.uint8]) -> Iterator[Row]:
        maps = self._maps(chunk, pixels)
        yield from self._measured(chunk, maps, {})
        for name, explainer in self.controls.items():
            made = explainer.explain(maps.inputs_nchw, maps.target, maps.seeds)
            saliency = [[stored(one.saliency_hw) for one in own] for own in made]
            method = {"explainer": name, "parameters": digest_of({"control": name})[:16], "selected_by": None}
            yield from self._measured(chunk, replace(maps, saliency=saliency), method)

    def _pixels(self, unit: Unit) -> Mapping[tuple[str, int], NDArray[np.uint8]]:
        """The unit's images that can still be read, by shard and index; none where its shard is gone or broken."""
        taken = self._taken(unit, careful=False)
        if taken is None:
            return {}
        sound = [record for record in taken.records if record.reject_code is None]
        return {(one.shard, one.shard_index): own for one, own in zip(sound, taken.pixels, strict=True)}

    def _taken(self, unit: Unit, *, careful: bool) -> UnitInput | None:
        """The unit, read again, carefully where it fails; None: it cannot be read any more."""
        try:
            return read_unit(unit, self.stores.source, self.job.config, self.job.facts.input_size, careful=careful)
        except (*OF_THE_INPUT, ProcessDiedError):
            return None
        except Exception as error:
            if not is_of_unit(error):
                raise
        return None if careful else self._taken(unit, careful=True)

    def _maps(self, records: Sequence[Record], pixels: NDArray[np.uint8]) -> Maps:
        inputs = self.adapter.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        classes = torch.tensor([[row["target_index"] for row in record] for record in records])
        return Maps(
            inputs,
            ClassProbability(classes.to(self.adapter.device)),
            saliency=[[map_of(row).astype(np.float64) for row in record] for record in records],
            scores=[[row["score"] for row in record] for record in records],
            ranks=[[row["target_rank"] for row in record] for record in records],
            regions=[[self._region(row) for row in record] for record in records],
            seeds=[number_of(self.evaluation.seed, record[0]["key"]) for record in records],
            explainer_seeds=[seed_of(self.job.config, record[0]["key"]) for record in records],
        )

    def _region(self, row: Row) -> Region | str | None:
        """Where the row's target is, or in words why its annotation is of no use."""
        labels = labels_of(self.evaluation.class_map, row["target_index"], row["target_name"])
        original = (row["height"], row["width"])
        resize, input_size = self.job.config.resize, self.job.facts.input_size
        return region_of(self.context.truth, row["key"], labels, original, resize, input_size)

    def _measured(self, records: Sequence[Record], maps: Maps, method: Mapping[str, str | None]) -> Iterator[Row]:
        """The rows of some maps, record by record; `method` names a control."""
        stands = None if method else records[0][0]["metrics"]["protocol"]  # what `explain` measured already
        metrics = [metric for metric in self.metrics if metric.digest(self.setting) != stands]
        if method:  # a control looks at no weights, so that random ones say nothing of it
            metrics = [metric for metric in metrics if not isinstance(metric, Sanity)]
        found = [(metric, metric.evaluate(maps)) for metric in metrics]
        for image, record in enumerate(records):
            for index, row in enumerate(record):
                for metric, values in found:
                    yield from self._rows({**row, **method}, metric, values[image][index])

    def _rows(self, row: Row, metric: Metric, values: Mapping[str, Value]) -> Iterator[Row]:
        flattered = flattered_by(row.get("selected_by"))
        for name, value in values.items():
            if name in self.evaluation.metrics:
                told = (
                    Value(None, f"{row['selected_by']} picked this map among several") if name in flattered else value
                )
                yield _row(row, name, metric.digest(self.setting), told)

    def _without(self, record: Record, reason: str) -> Iterator[Row]:
        gone = Value(None, as_text(reason)[:MAX_ERROR_LENGTH])
        for row in record:
            for metric in self.metrics:
                yield from self._rows(row, metric, dict.fromkeys(metric.names, gone))


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


def measured(step: EvaluateStep, unit: Unit) -> Evaluated | UnitFailure:
    """What became of the unit; its trouble is its own, and the others go on."""
    try:
        with watchdog():
            return step(unit)
    except Exception as error:  # noqa: BLE001 - as the docstring says
        text = str(error) if isinstance(error, StoreError | UnreconciledError) else f"{type(error).__name__}: {error}"
        away = isinstance(error, UnavailableError)
        inputs = unit.objects[0].key
        return UnitFailure(unit.unit_id, unit.ordinal, inputs, "evaluate", text[:MAX_ERROR_LENGTH], away)


def run_units(
    units: Iterable[Unit], context: EvaluationContext, state: bytes | None, stop: Stop
) -> Iterator[Evaluated | UnitFailure]:
    """In this process, one unit after the other, until `stop` is requested. Raises ModelError at once."""
    step = EvaluateStep(context, state)
    for unit in units:
        if stop.reason is not None:
            return
        yield measured(step, unit)
