"""Runs an evaluation: writes its settings, hands the units to a runner, and counts the open units."""

import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from blocksight.cluster.sizing import Sizing
from blocksight.engine.catalog.entries import CONTROLS, METRICS
from blocksight.jobs.evaluate.evaluation import (
    Evaluation,
    EvaluationContext,
    chosen_metrics,
    ensure_evaluation,
    forwards_per_map,
    open_units,
    read_class_map,
)
from blocksight.jobs.evaluate.known_truth import remember_truth
from blocksight.jobs.evaluate.truth_counts import truth_line
from blocksight.jobs.ledger.stop_request import GO_ON, Stop, stopped_by_signals, unfinished_from
from blocksight.jobs.plan.config import ConfigError, Execution, JobConfig
from blocksight.jobs.plan.context import sha256_of, weights_bytes
from blocksight.jobs.plan.machine_rates import recall
from blocksight.jobs.plan.plan import ensure_model, existing_plan, refuse_other_configuration
from blocksight.jobs.plan.preflight import UNEXAMINED, stored_preflight
from blocksight.jobs.plan.records import Evaluated, UnfinishedError, Unit, UnitFailure, UnitReturned
from blocksight.jobs.plan.stored_config import NamedModel, config_of
from blocksight.jobs.plan.target_files import vectors_of_output
from blocksight.jobs.plan.text import clock, counted, printable
from blocksight.jobs.run.job import check_as_stored, check_model, check_stored_settings, context_of
from blocksight.jobs.run.workers import (
    check_gpu,
    let_import_modules,
    refuse_missing_gpu,
    session_of,
    tell_of,
    workforce_of,
)
from blocksight.jobs.worker.progress import Notices, Tally, progress
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.store import StoreError

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter


@dataclass(frozen=True)
class EvaluationRequest:
    """A user's request, as typed."""

    output: str
    metrics: str = "all"
    share: float = 1.0
    """Fraction of the records that are measured."""
    controls: bool = False
    """Also measures control maps, which do not depend on the model."""
    seed: int = 0
    baseline: Literal["zero", "black", "drop"] = "zero"
    truth: str | None = None
    class_map: Path | None = None
    model: str | None = None
    """Must be named again if it is code."""
    weights: str | None = None
    endpoint_url: str | None = None


@dataclass(frozen=True)
class EvaluationOutcome:
    """The result of a run."""

    folder: str
    """Below the output's root."""
    num_open: int
    """Units without values."""
    done: Sequence[Evaluated]
    """By this run."""
    failures: Sequence[UnitFailure]
    stopped: str | None


def run_evaluation(asked: EvaluationRequest, execution: Execution, console: Console) -> EvaluationOutcome:
    """Measures every committed map that is not measured yet; repeating a request resumes it.

    A wrong request raises before any work: ConfigError, StoreError, ModelError, ClusterError. UnfinishedError is
    raised if the work breaks off.
    """
    refuse_missing_gpu(execution)
    let_import_modules(execution)
    output = PatientStore(open_store(asked.output, asked.endpoint_url))
    plan = existing_plan(output)
    truth = None if asked.truth is None else open_truth(asked.truth, asked.endpoint_url)
    config = config_of(plan, asked.output, NamedModel(asked.model, asked.weights, asked.endpoint_url))
    evaluation = _evaluation(asked, truth)
    if not any(True for _ in output.list("data/")):
        raise ConfigError(f"nothing is explained in {output.uri} yet: run `blocksight explain` first")
    line = None if truth is None else truth_line(output, plan, truth)
    if line is not None:
        console.print(printable(line))
    folder = evaluation.folder(plan)
    if asked.truth is not None and truth is not None:
        remember_truth(output, asked.truth, truth)
    units = open_units(output, plan, folder)
    if not units:
        return EvaluationOutcome(folder, 0, (), (), None)
    state = weights_bytes(config)
    refuse_other_configuration(config.identity(sha256_of(state)), plan)
    preflight = stored_preflight(output) or UNEXAMINED
    adapter, facts = check_model(config, state, console, preflight.readout, vectors_of_output(output, config))
    check_as_stored(output, adapter, facts, preflight, console)
    _refuse_undroppable(adapter, evaluation)
    ensure_evaluation(output, plan, evaluation)
    ensure_model(output, facts)
    del adapter  # the workers load their own
    check_stored_settings(output, config)
    console.print(_cost(evaluation, config, units, execution))
    stop = Stop(output, f"evaluate-{uuid.uuid4().hex[:8]}")
    with session_of(execution, tell_of(console)) as sizing, stopped_by_signals(stop, cuts_off=sizing is None):
        check_gpu(sizing)
        context = EvaluationContext(
            context_of(config, plan, facts, sizing, execution, preflight.readout), evaluation, folder, truth
        )
        done, failures = _run(units, context, state, sizing, stop, console)
    try:
        stop.clear()
        num_open = len(open_units(output, plan, folder))
    except StoreError as error:
        raise UnfinishedError(f"{error}; {GO_ON}") from error
    return EvaluationOutcome(folder, num_open, done, failures, stop.reason)


def _refuse_undroppable(adapter: "ModelAdapter", evaluation: Evaluation) -> None:
    """Raises ModelError if the metrics leave tokens out, and the model cannot do without."""
    if evaluation.baseline == "drop":
        from blocksight.engine.model.token_dropping import TokenDropping

        TokenDropping(adapter)


def _cost(evaluation: Evaluation, config: JobConfig, units: Sequence[Unit], execution: Execution) -> str:
    """What the open units of an evaluation will take, in a sentence."""
    num_maps = round(sum(unit.num_records for unit in units) * evaluation.share) * config.target_choice.most_targets
    num_maps *= 1 + len(CONTROLS) * evaluation.controls
    per_map = forwards_per_map(evaluation.metrics)
    num_explanations = sum(METRICS[name].explanations for name in evaluation.metrics)
    again = f" and {counted(num_explanations, 'explanation')}" if num_explanations else ""
    text = f"cost: about {counted(num_maps, 'map')}, {counted(per_map, 'forward')}{again} each"
    workforce = workforce_of(execution)
    measured = recall(config, workforce.device)
    if measured is None or not measured.forwards_per_record:
        return f"{text}; the time is not measured for this model here (`blocksight plan --probe`)"
    records = num_maps * (per_map / measured.forwards_per_record + num_explanations / config.target_choice.most_targets)
    seconds = records * measured.seconds_per_record / workforce.num_workers
    workers = counted(workforce.num_workers, "GPU" if workforce.on_gpu else "CPU core")
    return f"{text}: about {clock(seconds)} on {workers} (measured here on {measured.day})"


def _evaluation(asked: EvaluationRequest, truth: Truth | None) -> Evaluation:
    if not 0 < asked.share <= 1:
        raise ConfigError(f"--metrics-sample must be in (0, 1], got {asked.share:g}")
    if asked.class_map is not None and truth is None:
        raise ConfigError("--class-map says what the labels of --truth mean; give both")
    return Evaluation(
        metrics=chosen_metrics(asked.metrics, has_truth=truth is not None),
        share=asked.share,
        controls=asked.controls,
        seed=asked.seed,
        baseline=asked.baseline,
        class_map=read_class_map(asked.class_map),
        truth_digest=None if truth is None else truth.digest,
    )


def _run(
    units: Sequence[Unit],
    context: EvaluationContext,
    state: bytes | None,
    sizing: Sizing | None,
    stop: Stop,
    console: Console,
) -> tuple[list[Evaluated], list[UnitFailure]]:
    """Evaluates the units and shows the progress. Raises UnfinishedError if the work breaks off."""
    done: list[Evaluated] = []
    failures: list[UnitFailure] = []
    notices = Notices(console)
    expected = round(sum(unit.num_records for unit in units) * context.evaluation.share)
    progressing = progress(console, Tally(expected, None, verb="evaluate"))
    outcomes = closing(
        _outcomes(units, context, state, sizing, stop, tell_of(console))
    )  # nothing of it may outlive the Ray session
    with unfinished_from(lambda: done, stop), progressing as update, outcomes as arriving:
        for outcome in arriving:
            if isinstance(outcome, UnitReturned):
                notices.tell(outcome)
                continue
            update(outcome)
            if isinstance(outcome, UnitFailure):
                failures.append(outcome)
                if outcome.store_is_away:
                    stop.request("the store does not answer")
            else:
                done.append(outcome)
    return done, failures


def _outcomes(
    units: Sequence[Unit],
    context: EvaluationContext,
    state: bytes | None,
    sizing: Sizing | None,
    stop: Stop,
    tell: Callable[[str], None],
) -> Generator[Evaluated | UnitFailure | UnitReturned, None, None]:
    if sizing is None:
        from blocksight.jobs.evaluate import step

        return step.run_units(units, context, state, stop)
    from blocksight.jobs.run import pipeline

    return pipeline.evaluate_units(units, context, state, sizing, stop, tell)
