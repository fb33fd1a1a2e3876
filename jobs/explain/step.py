"""The explain step: takes a decoded unit, returns the fragment's rows; holds one model."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blocksight.engine import explainers
from blocksight.engine.catalog.composition import blocks_of, follows_gradients, maps_covariance
from blocksight.engine.catalog.entries import Fidelity, factory_of
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.catalog.sources import source_of
from blocksight.engine.catalog.target_expressions import Expression, Formula
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Explainer, Learner, State
from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.metrics.faithfulness import KeepTop
from blocksight.engine.metrics.metric import Maps, Value, score_of
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble, is_short_of_memory, told_by_device
from blocksight.engine.model.expressions import with_opposite
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.feature_targets import feature_vectors
from blocksight.engine.model.float32 import use_ieee_float32
from blocksight.engine.model.loading import load_model
from blocksight.engine.model.outputs import of_channels, with_one_output
from blocksight.engine.model.sources.timm_models import at_size
from blocksight.engine.model.targets import Target
from blocksight.engine.saliency import Map, is_flat
from blocksight.engine.scoring.forward import BufferedForward, Forward, empty_caches, release_memory
from blocksight.engine.scoring.setting_choice import eager_setting
from blocksight.jobs.explain.feature_vectors import with_feature_targets
from blocksight.jobs.explain.fidelity import doubts_of, fidelity_columns
from blocksight.jobs.explain.forward_pass import bounded, stored_forward
from blocksight.jobs.explain.learned import LEARNED_KEY, num_learning_images, stored_state
from blocksight.jobs.explain.target_names import resolved_targets
from blocksight.jobs.plan.config import MODEL_INPUT, MODEL_SHAPE, ConfigError, JobConfig, digest_of
from blocksight.jobs.plan.context import JobContext, let_import_from
from blocksight.jobs.plan.forward_setting import FORWARD_KEY, planned_forward
from blocksight.jobs.plan.label_files import stored_label_file
from blocksight.jobs.plan.labels import Labels
from blocksight.jobs.plan.records import (
    NO_VECTORS,
    BlockFacts,
    ModelFacts,
    RecordFacts,
    StoredVectors,
    UnitInput,
    UnitResult,
    UnreconciledError,
    with_reject,
)
from blocksight.jobs.worker.attempts import open_worker_stores
from blocksight.jobs.worker.error_classes import UnfitWorkerError, is_of_record, is_of_unit
from blocksight.jobs.worker.isolation import Isolated, ProcessDiedError
from blocksight.jobs.worker.memory import keep_freed_memory, with_less_at_once
from blocksight.jobs.worker.watchdog import heartbeat
from blocksight.storage.outputs.map_codec import quantised
from blocksight.storage.outputs.schema import OK, REJECTED
from blocksight.storage.rejects import Reject, RejectCode

IMAGES_PER_CHUNK = 32
"""Records on the device at once: bounds memory, changes no result."""

CPU_IMAGES_PER_PASS, GPU_IMAGES_PER_PASS = 4, 32
"""Images whose masks share forward passes, and whose gradients are computed at once."""

SATURATED_SHARE = 0.5
NEAR_TOP = 0.99

ITSELF = (
    "its similarity to itself has no gradient: take an explainer that masks, such as rise or occlusion, or libra(...)"
)

Row = dict[str, Any]


def load(
    config: JobConfig,
    state: bytes | None,
    device: str,
    import_path: str,
    readout: ReadoutName | None = None,
    known: StoredVectors = NO_VECTORS,
) -> ModelAdapter:
    """The configured model on a device, with IEEE float32. Raises ModelError.

    Its scores are read by `readout`, or as the configuration says; without both by a softmax. If targets are prompts,
    they are its classes; `known` holds what was computed for targets before.
    """
    if factory_of(config.model) is not None:  # the folder is trusted for the user's factory only
        let_import_from(import_path)
    adapter = load_model(config.model, weights=config.weights, state=state, seed=config.seed)
    return as_configured(adapter, config, device, readout, known)


def as_configured(
    adapter: ModelAdapter,
    config: JobConfig,
    device: str,
    readout: ReadoutName | None = None,
    known: StoredVectors = NO_VECTORS,
) -> ModelAdapter:
    """A loaded model, fed and read as the configuration says, on a device, with IEEE float32. Raises ModelError."""
    adapter.readout = readout or config.asked_readout or adapter.readout
    use_ieee_float32()  # now, because a user's factory may have changed it
    asked = {name: getattr(config, name) for name in MODEL_INPUT if name not in MODEL_SHAPE}
    names = asked.pop("class_names")
    if config.input_size is not None:
        adapter = at_size(adapter, config.input_size)
    fed = of_channels(adapter.fed(**asked), config.channels)
    if config.output_key is not None or source_of(config.model) is None:
        fed = with_one_output(fed, config.output_key)
    fed = fed.fed(class_names=names).to(device)
    if prompts := config.target_choice.prompts:
        fed = fed.with_prompts([one.split("|") for one in prompts], known.embeddings)
        fed.readout = readout or config.asked_readout or fed.readout
    if config.target_choice.has_features:
        fed = with_feature_targets(fed, config, resolved_targets(config, fed).features, known.features)
    return fed


def model_facts(adapter: ModelAdapter, config: JobConfig) -> ModelFacts:
    """Facts of the model, checked against the configuration. Raises ModelError and ConfigError."""
    resolved_targets(config, adapter)
    blocks = _blocks(adapter, config)
    make_explainer(adapter, config, [block.name for block in blocks])
    places = tuple(
        BlockFacts(name=block.name, channels=block.channels, height=block.grid[0], width=block.grid[1])
        for block in blocks
        if block.grid is not None
    )
    return ModelFacts(
        adapter.fingerprint,
        adapter.num_classes,
        adapter.input_size,
        places,
        mean=adapter.mean,
        std=adapter.std,
        notes=adapter.assumptions,
        embeddings=adapter.prompt_embeddings,
        features=feature_vectors(adapter),
    )


def refuse_other_weights(adapter: ModelAdapter, facts: ModelFacts) -> None:
    """Raises ModelError if a worker loaded other weights than the driver."""
    if adapter.fingerprint != facts.weights_sha256:
        raise ModelError("this worker loaded other weights than the driver: put the same file on every node")


def _blocks(adapter: ModelAdapter, config: JobConfig) -> Sequence[Place]:
    """The blocks that the explainer uses. Raises ModelError, and ConfigError for blocks that it would ignore."""
    used = blocks_of(config.method)
    if used == "none":
        if config.blocks:
            raise ConfigError(f"explainer {config.explainer} uses no blocks; leave --blocks out")
        return ()
    found = adapter.network.blocks(config.blocks)
    return found[-1:] if used == "last" else found


def make_explainer(
    adapter: ModelAdapter,
    config: JobConfig,
    blocks: Sequence[str],
    batch_size: int = 1,
    forward: Forward | None = None,
    images_per_pass: int | None = None,
    state: State | None = None,
) -> Explainer:
    """The configured explainer of a model. Raises ModelError if the model lacks what the explainer needs."""
    return explainers.make_explainer(
        config.explainer,
        adapter,
        config.explainer_parameters(),
        blocks=blocks,
        batch_size=batch_size,
        images_per_pass=images_per_pass or images_at_once(adapter),
        forward=forward,
        state=state,
        is_signed=config.signed,
    )


def images_at_once(adapter: ModelAdapter) -> int:
    """The number of images whose masks share forward passes on the model's device."""
    return GPU_IMAGES_PER_PASS if adapter.device.type == "cuda" else CPU_IMAGES_PER_PASS


class ExplainStep:
    """Explains whole units with one model."""

    def __init__(
        self,
        context: JobContext,
        state: bytes | None,
        adapter: ModelAdapter | None = None,
        beat: Callable[[], object] | None = None,
    ) -> None:
        """Loads the model and checks it against the plan. `state` holds the weights file's bytes, if any.

        `adapter` is a model in memory that is configured already; it is taken instead of loading one. `beat` is
        called before each forward pass, by default the heartbeat.
        """
        keep_freed_memory()
        torch.set_num_threads(context.num_threads)
        self.context, self.state = context, state
        config, facts = context.config, context.facts
        self.level: Fidelity | None = config.level
        self.adapter = adapter or load(
            config, state, context.device, context.import_path, context.readout, facts.vectors
        )
        refuse_other_weights(self.adapter, facts)
        self.beat = beat or heartbeat
        self.beating = self.adapter.module.register_forward_pre_hook(lambda *_: self.beat())
        learned = stored_state(open_worker_stores(context).output, config) if num_learning_images(config) else None
        self.learned, digest = learned or (None, None)
        self.has_forward_setting = False
        self.most_inputs: int | None = None
        self.images_per_pass = images_at_once(self.adapter)
        self._set_up(eager_setting(context.device, context.batch_size))
        parameters = config.explainer_parameters()
        names, num_classes = self.adapter.class_names, facts.num_classes
        self.labels = Labels(context.label_names, names, num_classes, config.label_classes, context.number_names)
        self.label_file = stored_label_file(open_worker_stores(context).output, config)
        self.targets = resolved_targets(config, self.adapter)
        self.is_signed = config.signed
        self.method = {
            "explainer": config.explainer,
            "parameters": parameters_digest(
                parameters, facts, digest, is_covariance=config.signed and maps_covariance(config.method)
            ),
        }

    def _set_up(self, setting: ForwardSetting, forward: Forward | None = None) -> None:
        """Makes the explainer, the full explainer and the metric, with this forward setting."""
        config = self.context.config
        self.setting = setting
        make = partial(
            make_explainer,
            self.adapter,
            blocks=[block["name"] for block in self.context.facts.blocks],
            batch_size=setting.batch_size,
            forward=forward and with_heartbeat(forward, self.beat),
            images_per_pass=self.images_per_pass,
            state=self.learned,
        )
        self.explainer = make(config)
        self.full_explainer = make(config.in_full()) if self.level == "auto" else self.explainer
        self.metric = KeepTop(self.explainer.scorer, baseline_of(config.explainer_parameters()))

    def _use_planned_forward(self) -> None:
        """Uses the plan's forward setting. Raises UnfitWorkerError if this machine cannot run it."""
        output = open_worker_stores(self.context).output
        try:
            planned = stored_forward(output, self.adapter, self.most_inputs)
        except ModelError as error:
            if is_short_of_memory(error):
                raise
            raise UnfitWorkerError(str(error)) from error
        if planned is None:
            raise UnreconciledError(f"the job's forward setting is missing: {FORWARD_KEY}; run the job again")
        forward, setting = planned
        self.use_forward(forward, setting)

    def use_forward(self, forward: Forward, setting: ForwardSetting) -> None:
        """Scores masks by this forward pass, which is of the plan's setting."""
        self._set_up(setting, forward)
        self.has_forward_setting = True

    def __call__(self, unit_input: UnitInput, *, careful: bool = False) -> UnitResult:
        """Every record's rows, in the records' order.

        If the model fails on the unit, its records are explained one by one, and only those that fail are
        rejected; `careful`: one by one in a child process, which may die.
        """
        unit_input = replace(unit_input, records=self._with_labels(unit_input.records))
        is_explainable = any(record.reject_code is None for record in unit_input.records)
        if (
            is_explainable and num_learning_images(self.context.config) and self.learned is None
        ):  # an error of the job, not of a record
            raise UnreconciledError(f"the state that {self.context.config.explainer} learned is missing: {LEARNED_KEY}")
        if careful:
            empty_caches(self.adapter)  # the child needs memory of the device too
            with Isolated(partial(ExplainStep, self.context, self.state)) as isolated:
                return self._explain_one_by_one(unit_input, isolated)
        try:
            return self._explain_all_that_fits(unit_input)
        except Exception as error:  # a user's model may raise anything; one by one shows which record is to blame
            if not is_of_unit(error) and device_trouble(error) is not DeviceTrouble.HOST_MEMORY:
                raise
        return self._explain_one_by_one(unit_input, self._explain_all_that_fits)

    def _explain_all_that_fits(self, unit_input: UnitInput) -> UnitResult:
        """As `_explain_all`, in the job's forward setting, with fewer inputs at once if memory is short."""

        def explain() -> UnitResult:
            if not self.has_forward_setting:
                self._use_planned_forward()
            return self._explain_all(unit_input)

        try:
            return with_less_at_once(explain, self._can_halve, self._halve)
        except Exception as error:
            try_device(self.adapter, error)
            if self.has_forward_setting or not is_short_of_memory(error):
                raise
            raise UnfitWorkerError(told_by_device(error)) from error

    def _with_labels(self, records: Sequence[RecordFacts]) -> tuple[RecordFacts, ...]:
        """The records with the labels of the user's file, or without labels, if the job says so."""
        if self.context.config.labels is None:
            return tuple(records)
        file = self.label_file
        return tuple(replace(one, label=None if file is None else file.label_of(one.key)) for one in records)

    def _can_halve(self) -> bool:
        return self._inputs_at_once() > 1 or self.images_per_pass > 1

    def _inputs_at_once(self) -> int:
        """Masked inputs per forward pass; of the plan's setting if its forward pass is not made yet."""
        if not self.has_forward_setting and self.most_inputs is None:
            planned = planned_forward(open_worker_stores(self.context).output)
            return self.setting.batch_size if planned is None else planned.setting.batch_size
        return self.setting.batch_size

    def _halve(self) -> None:
        """Halves the number of masked inputs and of images at once, from now on."""
        self.most_inputs = max(1, self._inputs_at_once() // 2)
        self.images_per_pass = max(1, self.images_per_pass // 2)
        self.has_forward_setting = False
        self._set_up(bounded(self.setting, self.most_inputs))
        release_memory(self.adapter)

    def _explain_one_by_one(self, unit_input: UnitInput, explain: Callable[[UnitInput], UnitResult]) -> UnitResult:
        """Explains each record as a unit; a record at which `explain` fails or dies is rejected.

        Raises what is not the record's fault.
        """
        start = time.perf_counter()
        pixels = iter(unit_input.pixels)
        rows: list[Row] = []
        for record in unit_input.records:
            alone = UnitInput(unit_input.unit, (record,), unit_input.pixels[:0])
            if record.reject_code is None:
                alone = replace(alone, pixels=next(pixels)[None])
            try:
                rows.extend(map(dict, explain(alone).rows))
            except Exception as error:  # noqa: BLE001 - `_blamed` raises what no record can cause
                rows.append(self._failed_row(alone, self._blamed(alone, error, explain)))
        seconds = time.perf_counter() - start
        return UnitResult(unit_input.unit, tuple(rows), len(unit_input.records), seconds, str(self.setting))

    def _blamed(self, alone: UnitInput, error: Exception, explain: Callable[[UnitInput], UnitResult]) -> Reject:
        """Why the one record is rejected. Raises the error, or UnfitWorkerError, if the record is not to blame."""
        died = isinstance(explain, Isolated) and has_died(error)
        if not died and not is_of_record(error, explain):
            raise error
        if died or device_trouble(error) is DeviceTrouble.HOST_MEMORY:
            try_another_picture(alone, error, explain)
        if died:
            return Reject(RejectCode.PROCESS_DIED, str(error))
        return Reject(RejectCode.MODEL_FAILED, f"{type(error).__name__}: {error}")

    def _failed_row(self, alone: UnitInput, reject: Reject) -> Row:
        record = with_reject(alone.records[0], reject, "explain")
        try:
            return self._rejected_row(alone, record)
        except Exception:  # noqa: BLE001 - the label itself may be the cause
            return self._rejected_row(alone, replace(record, label=None))

    def _explain_all(self, unit_input: UnitInput) -> UnitResult:
        start = time.perf_counter()
        decoded = [index for index, record in enumerate(unit_input.records) if record.reject_code is None]
        rows = [[self._rejected_row(unit_input, record)] for record in unit_input.records]
        for first in range(0, len(decoded), IMAGES_PER_CHUNK):
            chunk = decoded[first : first + IMAGES_PER_CHUNK]
            pixels = unit_input.pixels[first : first + IMAGES_PER_CHUNK]
            explained = self._explain([unit_input.records[index] for index in chunk], pixels)
            for index, own in zip(chunk, explained, strict=True):
                base = self._base_row(unit_input, unit_input.records[index])
                rows[index] = (
                    [self._rejected_row(unit_input, with_reject(unit_input.records[index], own, "explain"))]
                    if isinstance(own, Reject)
                    else [{**base, **row} for row in own]
                )
        flat = tuple(row for own in rows for row in own)
        return UnitResult(unit_input.unit, flat, len(rows), time.perf_counter() - start, str(self.setting))

    def _explain(self, records: Sequence[RecordFacts], pixels: NDArray[np.uint8]) -> list[list[Row] | Reject]:
        """Per record the rows of its targets, or the reject."""
        inputs, logits, targets = self._inputs_and_targets(records, pixels)
        usable = [index for index, own in enumerate(targets) if not isinstance(own, Reject)]
        outcome: list[list[Row] | Reject] = [own if isinstance(own, Reject) else [] for own in targets]
        if not usable:
            return outcome
        formulas = [own for own in targets if not isinstance(own, Reject)]
        target = self.adapter.target_of(formulas)
        seeds = [seed_of(self.context.config, records[index].key) for index in usable]
        doubts = [self._doubts(records[index], logits[index]) for index in usable]
        inputs = _at(inputs, usable)
        both = self._explanations(inputs, with_opposite(target) if self.is_signed else target, seeds, doubts)
        explanations = [own[: target.num_targets] for own in both]
        opposites = [own[target.num_targets :] for own in both]
        chosen = [self._chosen(own, logits[index]) for own, index in zip(formulas, usable, strict=True)]
        ranks = [[one["target_rank"] for one in own] for own in chosen]
        levels = [[grey_levels(one.saliency_hw) for one in own] for own in explanations]
        values = self.metric.evaluate(as_maps(inputs, target, explanations, levels, ranks, seeds))
        for place, index in enumerate(usable):
            own = self._outcome(chosen[place], explanations[place], levels[place], values[place], doubts[place])
            if self.is_signed and not isinstance(own, Reject):
                own = _with_opposites(own, opposites[place])
            label_rank = self._label_rank(records[index], logits[index])
            outcome[index] = own if isinstance(own, Reject) else [{**row, "label_rank": label_rank} for row in own]
        return outcome

    def _inputs_and_targets(
        self, records: Sequence[RecordFacts], pixels: NDArray[np.uint8]
    ) -> tuple[Tensor, Tensor, list[list[Formula] | Reject]]:
        """The records' inputs [N, C, H, W], logits [N, K], and targets or reject."""
        inputs = self.adapter.normalise(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2))
        outputs = self._outputs(inputs)
        targets = [self._targets(record, own) for record, own in zip(records, outputs, strict=True)]
        return inputs, self.adapter.of_classes(outputs), targets

    def teach(self, learner: Learner, records: Sequence[RecordFacts], pixels: NDArray[np.uint8]) -> int:
        """Shows the learner the first target of each record; returns the number of records shown."""
        found = self._learnable(records, pixels)
        if found is None:  # one by one shows which record is to blame
            alone = zip(records, pixels, strict=True) if len(records) > 1 else ()
            return sum(self.teach(learner, [record], own[None]) for record, own in alone)
        inputs, targets = found
        first = {index: own[0] for index, own in enumerate(targets) if not isinstance(own, Reject)}
        if first:
            chosen, target = torch.tensor(list(first)), self.adapter.target_of([[one] for one in first.values()])
            seeds = [seed_of(self.context.config, records[index].key) for index in first]
            learner.see(inputs[chosen.to(inputs.device)], target, seeds)
        return len(first)

    def _learnable(
        self, records: Sequence[RecordFacts], pixels: NDArray[np.uint8]
    ) -> tuple[Tensor, list[list[Formula] | Reject]] | None:
        """The records' inputs and targets; None if the model fails on them."""
        labelled = self._with_labels(records)
        try:
            inputs, _, targets = with_less_at_once(
                lambda: self._inputs_and_targets(labelled, pixels), self._can_halve, self._halve
            )
        except Exception as error:  # a user's model may raise anything
            try_device(self.adapter, error)
            if not is_of_unit(error):
                raise
            return None
        return inputs, targets

    def _label_rank(self, record: RecordFacts, logits: Tensor) -> int | None:
        """The label's place among the classes, from 1; None if the label is unknown."""
        label = self.labels.index(record.label)
        return None if label is None else ranks_of(logits, [label])[0]

    def _doubts(self, record: RecordFacts, logits: Tensor) -> tuple[str, ...]:
        """The reasons for full SISE, if the fidelity is `auto`."""
        if self.level != "auto":
            return ()
        return doubts_of(
            int(logits.argmax()),
            1.0 if self.adapter.readout == "identity" else float(self.adapter.scores(logits[None]).max()),
            self.labels.index(record.label),
            is_rare=record.label in self.context.rare_labels,
        )

    def _explanations(
        self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int], doubts: Sequence[Sequence[str]]
    ) -> list[list[Explanation]]:
        """One Explanation per image and target, with full SISE where there is a doubt."""
        found: dict[int, list[Explanation]] = {}
        for explainer, is_doubted in ((self.explainer, False), (self.full_explainer, True)):
            chosen = [image for image, own in enumerate(doubts) if bool(own) == is_doubted]
            images = torch.tensor(chosen, dtype=torch.int64)
            own = _at(inputs_nchw, chosen)
            made = explainer.explain(own, target.of(images), [seeds[image] for image in chosen])
            found |= zip(chosen, made, strict=True)
        return [found[image] for image in range(len(doubts))]

    def _outputs(self, inputs_nchw: Tensor) -> Tensor:
        """The unmasked images' outputs [N, K] on the CPU, from forward passes of one fixed shape."""
        size = min(self.explainer.images_per_pass, self.images_per_pass)
        *full, last = inputs_nchw.split(size)
        filler = last[-1:].expand(size - len(last), -1, -1, -1)
        with self.adapter.borrowed(), torch.inference_mode():
            passes = [*full, torch.cat([last, filler]) if len(filler) else last]
            return torch.cat([self.adapter.logits(one) for one in passes])[: len(inputs_nchw)].cpu()

    def _targets(self, record: RecordFacts, outputs: Tensor) -> list[Formula] | Reject:
        """The record's targets."""
        if not outputs.isfinite().all():
            return Reject(RejectCode.NON_FINITE, "the model's output for the image holds NaN or infinity")
        label = self.labels.index(record.label)
        if label is None and self.targets.needs_label:
            return Reject(RejectCode.LABEL_MISSING, f"the target is the label, and {record.label!r} means no class")
        same = self.targets.same_picture(outputs[len(outputs) - len(self.adapter.features) :])
        if same is not None and follows_gradients(self.context.config.method):
            return Reject(RejectCode.NO_GRADIENT, f"the picture is that of {same}, and {ITSELF}")
        return self.targets.formulas(self.adapter.of_classes(outputs[None])[0], label)

    def _chosen(self, formulas: Sequence[Formula], logits: Tensor) -> list[Row]:
        """The columns of a record's targets."""
        return [
            {
                **target_columns(expression, formula, self.adapter, logits),
                "target": self.targets.text_of(expression, formula),
            }
            for expression, formula in zip(self.targets.expressions, formulas, strict=True)
        ]

    def _outcome(
        self,
        chosen: Sequence[Row],
        explanations: Sequence[Explanation],
        levels: Sequence[NDArray[np.uint8]],
        values: Sequence[Mapping[str, Value]],
        doubts: Sequence[str],
    ) -> list[Row] | Reject:
        drops = [own["drop"].value for own in values]
        figures = [*(one.score for one in explanations), *(drop for drop in drops if drop is not None)]
        if not np.isfinite(figures).all() or not all(np.isfinite(one.saliency_hw).all() for one in explanations):
            return Reject(RejectCode.NON_FINITE, "a score, a gradient or a feature map holds NaN or infinity")
        rows = []
        for target, explanation, own, value in zip(chosen, explanations, levels, values, strict=True):
            fidelity = fidelity_columns(self.level, doubts, was_completed=explanation.was_completed)
            metrics = self._metrics(value, target["target_formula"])
            rows.append({**target, **_map_columns(explanation, own), **fidelity, "metrics": metrics})
        return rows

    def _metrics(self, values: Mapping[str, Value], formula: str) -> Row:
        increase = values["increase"].value
        return {
            "drop": values["drop"].value,
            "increase": None if increase is None else bool(increase),
            "protocol": self.metric.digest(self.setting, score_of(formula)),
        }

    def _base_row(self, unit_input: UnitInput, record: RecordFacts) -> Row:
        return {
            "key": record.key,
            "shard": record.shard,
            "shard_index": record.shard_index,
            "unit_id": unit_input.unit.unit_id,
            "status": OK,
            "sha256": record.sha256,
            "num_bytes": record.num_bytes,
            "format": record.format,
            "width": record.width,
            "height": record.height,
            "label": self.labels.index(record.label),
            "label_name": None if record.label is None else str(record.label),
            **self.method,
        }

    def _rejected_row(self, unit_input: UnitInput, record: RecordFacts) -> Row:
        reasons = {name: getattr(record, name) for name in ("reject_code", "reject_stage", "error")}
        return {**self._base_row(unit_input, record), "status": REJECTED, **reasons}


def _at(inputs_nchw: Tensor, chosen: Sequence[int]) -> Tensor:
    """The chosen inputs, which rise; not a copy if they are all."""
    return inputs_nchw if len(chosen) == len(inputs_nchw) else inputs_nchw[torch.tensor(chosen, dtype=torch.int64)]


def try_device(adapter: ModelAdapter, error: Exception) -> None:
    """Raises what the device raises, if no word of the error has told that it is lost: no record is to blame then."""
    if device_trouble(error) is None and adapter.device.type != "cpu":
        torch.ones(1, device=adapter.device).add(1).item()


def has_died(error: Exception) -> bool:
    """True if a child process died of the record, or lost its device."""
    return isinstance(error, ProcessDiedError) or device_trouble(error) is DeviceTrouble.LOST


def try_another_picture(alone: UnitInput, error: Exception, explain: Callable[[UnitInput], object]) -> None:
    """Explains a picture of noise in the record's place. Raises the error, or UnfitWorkerError, if it fails as well."""
    noise = np.random.default_rng(0).integers(0, 256, alone.pixels.shape, dtype=np.uint8)
    try:
        explain(replace(alone, pixels=noise))
    except Exception as again:
        if device_trouble(again) is DeviceTrouble.HOST_MEMORY:
            raise error from again
        if not isinstance(again, ProcessDiedError) and device_trouble(again) is None:
            return  # the process lives
        reason = str(again) if isinstance(again, ProcessDiedError) else told_by_device(again)
        raise UnfitWorkerError(
            f"a record cannot be explained ({first_line_of(error)}), and a picture of noise in its place neither: "
            f"{reason}"
        ) from again


def parameters_digest(parameters: Any, facts: ModelFacts, learned: str | None, *, is_covariance: bool = False) -> str:
    """The value of the column `parameters`; `learned` is the sha256 of the learned state."""
    held = ("embeddings", "features")  # by the weights
    model = {name: value for name, value in asdict(facts).items() if name not in held}
    known = {"parameters": asdict(parameters), "model": model}
    more = {"learned": learned, "signed": is_covariance or None}
    return digest_of({**known, **{name: value for name, value in more.items() if value is not None}})[:16]


def with_heartbeat(forward: Forward, beat: Callable[[], object] | None = None) -> Forward:
    """The forward pass with a heartbeat, or a call of `beat`: hooks on the module do not see compiled passes."""

    def run(inputs_nchw: Tensor) -> Tensor:
        (beat or heartbeat)()
        return forward(inputs_nchw)

    return BufferedForward(forward.buffer_nchw, run) if isinstance(forward, BufferedForward) else run


def baseline_of(parameters: Any) -> str:
    """The baseline of a job's metric: the explainer's own, or zero."""
    return getattr(parameters, "baseline", "zero")


def seed_of(config: JobConfig, key: str) -> int:
    """The seed of a record's map, from run seed, explainer and record key."""
    return number_of(config.seed, config.explainer, key)


def number_of(*parts: object) -> int:
    """A number in [0, 2^56), a hash of the parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def ranks_of(logits: Tensor, classes: Sequence[int]) -> list[int]:
    """The rank of each class among one image's logits, 1 is the highest (ties: the lower index)."""
    places = logits.argsort(descending=True, stable=True).argsort()
    return [int(places[index]) + 1 for index in classes]


def as_maps(
    inputs_nchw: Tensor,
    target: Target,
    explanations: Sequence[Sequence[Explanation]],
    levels: Sequence[Sequence[NDArray[np.uint8]]],
    ranks: Sequence[Sequence[int | None]],
    seeds: Sequence[int],
) -> Maps:
    """The input of the metrics. The maps are those of the stored grey levels, so that `evaluate` gives equal values."""
    return Maps(
        inputs_nchw,
        target,
        saliency=[[one / 255.0 for one in own] for own in levels],
        scores=[[one.score for one in own] for own in explanations],
        ranks=ranks,
        regions=[[None] * len(own) for own in explanations],
        seeds=seeds,
        explainer_seeds=seeds,
    )


def grey_levels(saliency_hw: Map) -> NDArray[np.uint8]:
    """The map in its stored form, in grey levels [H, W]; NaN counts as 0."""
    finite = saliency_hw if np.isfinite(saliency_hw).all() else np.nan_to_num(saliency_hw)
    return quantised(finite.astype(np.float32))


def as_stored(saliency_hw: Map) -> Map:
    """The map in [0, 1], quantised as in its stored form."""
    return grey_levels(saliency_hw) / 255.0


def target_columns(expression: Expression, formula: Formula, adapter: ModelAdapter, logits: Tensor) -> Row:
    """What a row says of its target, on an image with these logits [K]."""
    index = formula.target_class if expression.atom is not None else None
    names = {own: adapter.name_of(own) for _, own in formula.terms}
    is_logit = expression.atom is not None and expression.atom.kind == "text" and formula.reading == "logit"
    return {
        "target_index": index,
        "target_name": names[index] if is_logit and index is not None else formula.named(names),
        "target_source": expression.source,
        "target_rank": None if index is None else ranks_of(logits, [index])[0],
        "target_formula": formula.text,
    }


def _with_opposites(rows: Sequence[Row], opposites: Sequence[Explanation]) -> list[Row] | Reject:
    """A record's rows with the maps of what speaks against each target."""
    if not all(np.isfinite(one.saliency_hw).all() for one in opposites):
        return Reject(RejectCode.NON_FINITE, "a score, a gradient or a feature map holds NaN or infinity")
    found = []
    for row, one in zip(rows, opposites, strict=True):
        saliency = one.saliency_hw.astype(np.float32)
        extremes = {"map_negative_low": float(saliency.min()), "map_negative_high": float(saliency.max())}
        found.append({**row, "map_negative": grey_levels(one.saliency_hw), **extremes})
    return found


def _map_columns(explanation: Explanation, levels: NDArray[np.uint8]) -> Mapping[str, Any]:
    saliency = explanation.saliency_hw.astype(np.float32)
    low, high = saliency.min(), saliency.max()
    quality = explanation.quality
    return {
        "score": explanation.score,
        "map": levels,
        "map_low": float(low),
        "map_high": float(high),
        "is_flat": is_flat(saliency),
        "is_saturated": bool(high > low and (saliency >= low + NEAR_TOP * (high - low)).mean() > SATURATED_SHARE),
        "blocks": [
            {"name": block.name, "candidates": block.candidates, "kept": len(block.kept)}
            for block in explanation.blocks
        ],
        "num_forwards": explanation.num_forwards,
        "score_r2": quality.r2 if quality is not None else None,
        "map_error": quality.map_error if quality is not None else None,
        **explanation.products.as_columns(),
    }
