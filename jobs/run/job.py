"""Runs a job: writes plan and model facts, hands the open units to a runner, reconciles, and writes the manifest."""

import json
import platform
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.sizing import Sizing
from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.jobs.explain.fidelity import rare_labels
from blocksight.jobs.explain.learned import num_learning_images, stored_state
from blocksight.jobs.ledger.attempt_markers import end_interrupted, is_under_way
from blocksight.jobs.ledger.garbage import PROBE_PREFIX, tidy_attempts
from blocksight.jobs.ledger.receipt_batches import ReceiptBatches
from blocksight.jobs.ledger.reconcile import JobState, Manifest, final_manifest, finalize, num_accepted, read_job_state
from blocksight.jobs.ledger.stop_request import GO_ON, RUNS_FOLDER, Stop, stopped_by_signals, unfinished_from
from blocksight.jobs.observe.local_files import check_local_files
from blocksight.jobs.observe.otlp import Sender, sending
from blocksight.jobs.observe.run_metrics import RunMetrics
from blocksight.jobs.observe.unit_log import unit_log
from blocksight.jobs.plan.config import Execution, JobConfig
from blocksight.jobs.plan.context import JobContext, sha256_of, weights_bytes
from blocksight.jobs.plan.estimate import GPU_FORWARDS_PER_SECOND, MeasuredRate, estimate
from blocksight.jobs.plan.forward_setting import PlannedForward, planned_forward
from blocksight.jobs.plan.label_files import ensure_label_file, with_label_file
from blocksight.jobs.plan.machine_rates import rate_of_forward, remembered_rate
from blocksight.jobs.plan.model_input import fed_text, with_model_file
from blocksight.jobs.plan.plan import (
    UNIT_FOLDERS,
    FoundInput,
    Plan,
    ensure_labels,
    ensure_model,
    ensure_plan,
    find_input,
    load_plan,
    open_output,
    refuse_drift,
    refuse_older,
    stored_vectors,
)
from blocksight.jobs.plan.preflight import Preflight, ensure_preflight, stored_preflight
from blocksight.jobs.plan.records import (
    NO_VECTORS,
    ModelFacts,
    Outcome,
    Receipt,
    StoredVectors,
    UnfinishedError,
    Unit,
    UnitFailure,
    UnitReturned,
)
from blocksight.jobs.plan.target_files import with_target_files
from blocksight.jobs.plan.text import counted, printable
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.run.budgets import Budget, FirstUnits, exceeded_budgets
from blocksight.jobs.run.explainer_choice import with_explainer
from blocksight.jobs.run.labels import read_labels
from blocksight.jobs.run.workers import (
    check_gpu,
    device_of,
    let_import_modules,
    refuse_missing_gpu,
    session_of,
    tell_of,
    workers_text,
    workforce_of,
)
from blocksight.jobs.worker.progress import Notices, Tally, progress
from blocksight.storage.stores.opening import probe
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.store import ObjectStore, StoreError

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter  # which needs torch

PROBE_FROM_SECONDS = 120.0
"""Jobs that take less on all GPUs together are not worth the probe, because compiling takes minutes."""

PREFLIGHT_SECONDS = 120.0
"""How long the driver of a part waits for another one's preflight; one that died leaves none."""
PREFLIGHT_POLL_SECONDS = 1.0

PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy", "s3fs", "pillow")


@dataclass(frozen=True)
class RunSummary:
    """What one run did."""

    failures: tuple[UnitFailure, ...] = ()
    """Units that failed and are still open."""
    seconds: float = 0.0
    """Wall time of its units; 0 if there were none."""
    stopped: str | None = None
    """Why it stopped early; None if it did not."""
    is_hopeless: bool = False
    """It was stopped because no record was explained."""
    in_hand: tuple[Unit, ...] = ()
    """If it was stopped: its units that did not come back, in order; those in front were begun."""
    busy: float | None = None
    """Fraction of the workers' time spent explaining, 0 to 1; the rest is start-up and waiting for the last units.
    None without units, and where workers may have joined meanwhile."""


@dataclass(frozen=True)
class RunOutcome:
    """The result of a run."""

    job_state: JobState
    manifest: Manifest | None
    """The final manifest; None if units are open, or more are dead than the budget allows."""
    exceeded_budgets: tuple[str, ...]
    """Sentences on the exceeded budgets; empty while units are open."""
    ran: RunSummary
    forward: PlannedForward | None = None
    """How masks were scored; None if no unit was begun."""
    num_open_elsewhere: int = 0
    """Open units of other parts, if only one part was asked for."""


def begun_or_new(config: JobConfig) -> tuple[ObjectStore, Plan | FoundInput]:
    """The output with its plan, or with the listed input of a new one. Writes nothing. Raises DriftError."""
    config = with_target_files(with_model_file(config))
    output = PatientStore(open_output(config), SHORT_PATIENCE_SECONDS)
    weights_sha256 = sha256_of(weights_bytes(config))
    stored = load_plan(output)
    if stored is None:
        return output, find_input(config, weights_sha256=weights_sha256)
    refuse_older(stored, output.uri)
    refuse_drift(config.identity(weights_sha256), stored.identity, "configuration")
    return output, stored


def plan_for(made: Plan | FoundInput, workforce: Workforce) -> Plan:
    """The stored plan, or a new one for these workers, at the rate that was measured on this machine."""
    if isinstance(made, Plan):
        return made
    if workforce.rate is None:
        workforce = replace(workforce, rate=remembered_rate(made.config, workforce.device))
    return made.cut(workforce)


def plan_job(config: JobConfig, execution: Execution) -> tuple[ObjectStore, Plan]:
    """The output and its plan, made now if none is stored. Writes nothing. Raises DriftError."""
    output, made = begun_or_new(with_explainer(config)[0])
    return output, made if isinstance(made, Plan) else plan_for(made, workforce_of(execution))


def run_job(config: JobConfig, execution: Execution, console: Console) -> RunOutcome:
    """Explains everything that is not committed yet; does nothing for a finished job.

    Wrong data, model, blocks, store or configuration raise before the first unit: ConfigError, StoreError,
    ModelError, ClusterError. UnfinishedError is raised if the store fails for good afterwards.
    """
    refuse_missing_gpu(execution)
    check_local_files(execution.metrics_file, execution.log_json)
    let_import_modules(execution)
    config, label_file = with_label_file(with_target_files(with_model_file(config)))
    config, choice = with_explainer(config)
    if choice is not None:
        console.print(f"explainer: {printable(choice)}")
    output, made = begun_or_new(config)
    plan = plan_for(made, Workforce(1, on_gpu=False))  # a new one is cut anew once the workers are known
    for note in (f"no input: {plan.ignored_text}", *plan.notes) if plan.ignored else plan.notes:
        console.print(f"data: {printable(note)}")
    job_state = _read_job_state(output, plan.part(execution.part))
    if not job_state.open_units and (isinstance(made, Plan) or not plan.units):  # finished, or without a single record
        return _outcome_of(output, ensure_plan(output, plan), job_state, execution, RunSummary())
    state = weights_bytes(config)
    stored = stored_preflight(output) if execution.part is None else awaited_preflight(output)
    adapter, facts = check_model(config, state, console, stored and stored.readout, stored_vectors(output))
    labels = read_labels(config, plan, adapter, label_file)
    console.print(f"labels: {printable(labels)}")
    probe(output, PROBE_PREFIX)
    if stored is not None:
        check_as_stored(output, adapter, facts, stored, console)
    preflight = stored or _preflight(adapter, config, facts, plan, output, careful=execution.runner == "ray")
    _print_preflight(preflight, console)
    with session_of(execution, tell_of(console)) as sizing:
        console.print(f"workers: {workers_text(execution, sizing)}")
        check_gpu(sizing)
        context = context_of(config, plan, facts, sizing, execution, preflight.readout)
        planned = planned_forward(output) or _chosen_forward(adapter, context, plan, state, sizing, execution, console)
        _refuse_other_batch_size(planned, execution)
        del adapter  # the workers load their own
        plan = ensure_plan(output, plan_for(made, _measured_workforce(context, planned, sizing, execution)))
        preflight = ensure_preflight(output, preflight)
        ensure_model(output, facts)
        ensure_labels(output, labels)
        if label_file is not None:
            ensure_label_file(output, label_file)
        check_stored_settings(output, config)
        _ensure_forward(output, planned, console)
        job_state = _read_job_state(output, plan.part(execution.part))
        _write_run(output, context, execution, sizing)
        output = PatientStore(output, unit_folders=UNIT_FOLDERS)
        _learn(output, context, plan.units, state, sizing, console)
        stop = Stop(output, context.run_id)
        batches = ReceiptBatches(PatientStore(output, SHORT_PATIENCE_SECONDS), context.run_id)
        budget = Budget(execution.max_reject_fraction, execution.max_dead_units)
        with stopped_by_signals(stop, cuts_off=sizing is None):
            first_units = FirstUnits.of(job_state, budget)
            part = None if execution.part is None else str(execution.part)
            logged = unit_log(execution.log_json, context.run_id, part, tell_of(console))
            with sending(context.run_id, part, tell_of(console)) as sender, logged as log:
                metrics = _metrics_of(job_state, sizing, sender)

                def observe(outcome: Outcome) -> None:
                    seconds = metrics.add(outcome)
                    log(outcome, seconds)
                    sender.unit(outcome, seconds)

                with metrics.shown(execution.metrics_file):
                    ran = _run_units(job_state, context, state, sizing, console, stop, first_units, batches, observe)
    try:
        stop.clear()
        metrics.store(output, context.run_id)
        if ran.stopped is not None:
            end_interrupted(output, ran.in_hand, context.run_id)
        job_state = read_job_state(output, plan.part(execution.part))
        for unit_id in job_state.unbatched:  # of runs that were killed
            batches.add(job_state.receipts[unit_id])
        batches.flush()
        return _outcome_of(output, plan, job_state, execution, ran)
    except StoreError as error:
        raise UnfinishedError(f"{error}; {GO_ON}") from error


def awaited_preflight(output: ObjectStore) -> Preflight | None:
    """The stored preflight; if another driver is at it, as the tasks of an array begin together, it is waited for."""
    from blocksight.jobs.explain.preflight import STEP

    deadline = time.monotonic() + PREFLIGHT_SECONDS
    while (stored := stored_preflight(output)) is None and time.monotonic() < deadline and is_under_way(output, STEP):
        time.sleep(PREFLIGHT_POLL_SECONDS)
    return stored


def _read_job_state(output: ObjectStore, plan: Plan) -> JobState:
    """The job state, even if single receipts cannot be read or written."""
    return read_job_state(PatientStore(output, SHORT_PATIENCE_SECONDS, unit_folders=UNIT_FOLDERS), plan)


def _outcome_of(
    output: ObjectStore, plan: Plan, job_state: JobState, execution: Execution, ran: RunSummary
) -> RunOutcome:
    """The result of a run; writes the manifest if no unit is open and the dead units are within their budget.

    Of several parts the one that ends last finds no open unit, and writes the manifest of all.
    """
    planned = planned_forward(output)
    if job_state.open_units:
        return RunOutcome(job_state, None, (), ran, planned)
    if execution.part is not None:
        whole = read_job_state(output, plan)
        if whole.open_units:
            beyond = exceeded_budgets(job_state, Budget(execution.max_reject_fraction, execution.max_dead_units))
            return RunOutcome(job_state, None, tuple(beyond), ran, planned, len(whole.open_units))
        job_state = whole
    manifest = final_manifest(output, job_state.plan)
    budget = Budget(execution.max_reject_fraction, max(execution.max_dead_units, num_accepted(manifest)))
    beyond = exceeded_budgets(job_state, budget)
    if len(job_state.dead) > budget.max_dead_units:
        return RunOutcome(job_state, None, tuple(beyond), ran, planned)
    is_new = manifest is None
    manifest = finalize(output, job_state)
    if is_new:
        tidy_attempts(output)
    return RunOutcome(job_state, manifest, tuple(beyond), ran, planned)


def note_random_weights(adapter: "ModelAdapter", config: JobConfig) -> None:
    """Adds a loud note to a factory's model if nobody named its weights and they are random."""
    from blocksight.engine.model.loading import random_weights_of

    loud = random_weights_of(config.model, adapter, config.seed) if config.weights is None else None
    if loud is not None:
        adapter.notes = (*adapter.notes, loud)


def check_model(
    config: JobConfig,
    state: bytes | None,
    console: Console,
    readout: ReadoutName | None = None,
    known: StoredVectors = NO_VECTORS,
) -> "tuple[ModelAdapter, ModelFacts]":
    """Loads the model once in the driver, so that its errors are raised before any work.

    `readout` and `known`, what was computed for targets, are of the output, if it was begun. Raises ModelError and
    ConfigError.
    """
    from blocksight.jobs.explain.preflight import in_a_sentence
    from blocksight.jobs.explain.step import load, model_facts

    with in_a_sentence(config.model):
        adapter = load(config, state, "cpu", str(Path.cwd()), readout, known)
        note_random_weights(adapter, config)
        facts = model_facts(adapter, config)
    candidates = sum(block["channels"] for block in facts.blocks)
    places = ", ".join(f"{b['name']} {b['channels']}@{b['height']}x{b['width']}" for b in facts.blocks)
    seen = f", {counted(candidates, 'candidate map')} in {places}" if places else ""
    console.print(f"model: {config.model}, {counted(facts.num_classes, 'class')}{seen}")
    console.print(f"fed: {fed_text(facts.input_size, facts.mean, facts.std)}, resize {config.resize}")
    for note in adapter.assumptions:
        console.print(f"model: {printable(note)}")
    return adapter, facts


def check_as_stored(
    output: ObjectStore, adapter: "ModelAdapter", facts: ModelFacts, stored: Preflight, console: Console
) -> None:
    """Proves that the model is the one that the output was begun with. Raises DriftError and ModelError."""
    from blocksight.jobs.explain.preflight import print_findings
    from blocksight.jobs.explain.stored_model import refuse_changed

    print_findings(refuse_changed(output, adapter, facts, stored), console)


def _preflight(
    adapter: "ModelAdapter", config: JobConfig, facts: ModelFacts, plan: Plan, output: ObjectStore, *, careful: bool
) -> Preflight:
    """Examines the model and tries the explainer. Raises ModelError."""
    from blocksight.jobs.explain.preflight import examined_for

    return examined_for(adapter, config, facts, plan, output, careful=careful)


def _print_preflight(preflight: Preflight, console: Console) -> None:
    from blocksight.jobs.explain.preflight import print_findings

    console.print(f"model check: {preflight}")
    print_findings(preflight.findings, console)


def _chosen_forward(
    adapter: "ModelAdapter",
    context: JobContext,
    plan: Plan,
    state: bytes | None,
    sizing: Sizing | None,
    execution: Execution,
    console: Console,
) -> PlannedForward:
    """A forward setting for a new job: of the driver's model on CPUs, and on GPUs of one worker for all.

    It is chosen before the plan is written, so that an unusable precision leaves no output. If a GPU fails over the
    timing, the setting is chosen by rule. Raises ModelError and ClusterError.
    """
    from blocksight.jobs.explain.forward_choice import choose_here
    from blocksight.jobs.explain.forward_pass import choose_forward, forward_request

    on_gpu = device_of(execution, sizing) == "cuda"
    is_timed = execution.tune or (on_gpu and _least_seconds(context, plan, sizing) >= PROBE_FROM_SECONDS)
    request = forward_request(context.config, execution.batch_size, is_timed=is_timed)
    if not on_gpu:
        return choose_forward(adapter, request)
    if sizing is None:
        return choose_here(context, state, request)
    from blocksight.jobs.run.pipeline import choose_on_worker

    try:
        return choose_on_worker(context, state, request, sizing)
    except ClusterError as error:
        if not is_timed:
            raise
        console.print(f"WARNING: {printable(error)}; it was timing forward settings, and one is chosen by rule now")
    return choose_on_worker(context, state, replace(request, is_timed=False), sizing)


def _refuse_other_batch_size(planned: PlannedForward, execution: Execution) -> None:
    """Raises DriftError if the batch size that was asked for is not the plan's."""
    if execution.batch_size is not None:
        ours, theirs = ({"batch_size": size} for size in (execution.batch_size, planned.setting.batch_size))
        refuse_drift(ours, theirs, "forward setting")


def _ensure_forward(output: ObjectStore, planned: PlannedForward, console: Console) -> None:
    """Writes the forward setting into the plan and prints it."""
    from blocksight.jobs.explain.forward_pass import precision_warning, write_forward

    planned = write_forward(output, planned)
    console.print(f"masks are scored by {planned}")
    warning = precision_warning(planned)
    if warning is not None:
        console.print(warning)


def check_stored_settings(output: ObjectStore, config: JobConfig) -> None:
    """Reads the stored forward setting and learned state, so that damage is found before any work.

    Raises UnreconciledError and StoreError.
    """
    planned_forward(output)
    stored_state(output, config)


def context_of(
    config: JobConfig,
    plan: Plan,
    facts: ModelFacts,
    sizing: Sizing | None,
    execution: Execution,
    readout: ReadoutName = "softmax",
) -> JobContext:
    """What every worker of this run needs to know."""
    device = device_of(execution, sizing)
    counts = plan.label_counts()
    return JobContext(
        config,
        plan.fingerprint,
        f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}",
        facts,
        () if config.labels is not None else plan.class_folders or tuple(sorted(counts)),
        batch_size=execution.batch_size,
        num_threads=sizing.threads_per_actor if sizing is not None else 1,
        device=device,
        import_path=str(Path.cwd()),
        rare_labels=rare_labels(counts if config.labels is None else {}),
        readout=readout,
        number_names=() if config.labels is not None else plan.number_names,
        witnesses=plan.witnesses,
    )


def _least_seconds(context: JobContext, plan: Plan, sizing: Sizing | None) -> float:
    """The wall time of the whole job on all GPUs, by the constants."""
    num_forwards = plan.num_records * forwards_per_record(context)
    return num_forwards / GPU_FORWARDS_PER_SECOND / (1 if sizing is None else sizing.num_actors)


def forwards_per_record(context: JobContext) -> float:
    """By the estimate; a guess is at most the number of feature maps."""
    guess = estimate(context.config, 1, on_gpu=True)
    if guess.is_measured:
        return guess.forwards_per_record
    num_maps = sum(block["channels"] for block in context.facts.blocks)
    return min(guess.forwards_per_record, num_maps * context.config.target_choice.most_targets)


def _measured_workforce(
    context: JobContext, planned: PlannedForward, sizing: Sizing | None, execution: Execution
) -> Workforce:
    """The workers of this run, with a GPU's rate if it was measured, and the size of the model's input."""
    joined = sizing and Workforce(execution.workers or sizing.num_actors, on_gpu=sizing.gpus_per_actor > 0)
    workers = joined or workforce_of(execution)
    rate = rate_of_forward(planned, forwards_per_record(context))
    num_workers = workers.num_workers * (1 if execution.part is None else execution.part.of)
    return replace(workers, num_workers=num_workers, rate=rate, input_size=context.facts.input_size)


def _learn(
    output: ObjectStore,
    context: JobContext,
    units: Sequence[Unit],
    state: bytes | None,
    sizing: Sizing | None,
    console: Console,
) -> None:
    """Runs the first pass of a method that learns, here or on a worker; other methods have none."""
    if not num_learning_images(context.config):
        return
    from blocksight.jobs.explain.first_pass import ensure_learned, learn

    def run() -> Iterator[int | bytes]:
        if sizing is None:
            return learn(context, units, state)
        from blocksight.jobs.run.pipeline import learn_on_worker

        return learn_on_worker(context, units, state, sizing)

    ensure_learned(output, context, units, run, console)


def _run_units(
    job_state: JobState,
    context: JobContext,
    state: bytes | None,
    sizing: Sizing | None,
    console: Console,
    stop: Stop,
    first_units: FirstUnits,
    batches: ReceiptBatches,
    observe: Callable[[Outcome], None],
) -> RunSummary:
    """Explains the open units and shows the progress.

    Requests a stop if the store does not answer, or if no record of the first units is explained. Raises
    UnfinishedError if the job cannot go on after its first unit, and ClusterError or ModelError before it.
    """
    config, units = context.config, job_state.open_units
    num_records = sum(unit.num_records for unit in units)
    guess = estimate(config, num_records, on_gpu=context.device != "cpu")
    num_workers = sizing.num_actors if sizing is not None else 1
    rate = job_state.plan.rate
    expected = guess.seconds(num_workers) if guess.is_measured else None
    if rate is not None:
        expected = rate.seconds_per_record * num_records / num_workers
    failures: list[UnitFailure] = []
    notices = Notices(console)
    explain_seconds = 0.0
    came_back: set[str] = set()
    begun = False
    start = time.monotonic()
    progressing = progress(console, Tally(num_records, expected))
    # nothing of it may outlive the Ray session
    outcomes = closing(_outcomes(units, context, state, sizing, stop, rate, tell_of(console)))
    with unfinished_from(lambda: begun, stop), progressing as update, outcomes as arriving, batches:
        for outcome in arriving:
            if isinstance(outcome, UnitReturned):
                notices.tell(outcome)
                continue
            begun = True
            came_back.add(outcome.unit_id)
            update(outcome)
            observe(outcome)
            first_units.add(outcome)
            if isinstance(outcome, Receipt):
                batches.add(outcome)
                explain_seconds += outcome.explain_seconds or 0.0
            if isinstance(outcome, UnitFailure):
                failures.append(outcome)
                if outcome.store_is_away:
                    stop.request("the store does not answer")
            if first_units.is_hopeless:
                stop.request(first_units.verdict())
    seconds = time.monotonic() - start
    grows = sizing is not None and sizing.most_actors is not None
    busy = None if grows else explain_seconds / (seconds * num_workers)
    in_hand = () if stop.reason is None else tuple(unit for unit in units if unit.unit_id not in came_back)
    return RunSummary(tuple(failures), seconds, stop.reason, first_units.is_hopeless, in_hand, busy)


def _metrics_of(job_state: JobState, sizing: Sizing | None, sender: Sender) -> RunMetrics:
    """The metrics of this run; on Ray each process exports what it measures."""
    num_units = len(job_state.open_units)
    if sizing is None:
        return RunMetrics(num_units, 1, send=sender.samples)
    from blocksight.jobs.run.pipeline import export

    num_workers = None if sizing.most_actors is not None else sizing.num_actors
    return RunMetrics(num_units, num_workers, export, sender.samples)


def _outcomes(
    units: Sequence[Unit],
    context: JobContext,
    state: bytes | None,
    sizing: Sizing | None,
    stop: Stop,
    rate: MeasuredRate | None,
    tell: Callable[[str], None],
) -> Generator[Outcome, None, None]:
    """The outcome of each unit, from the local runner or from Ray; each is imported only when used."""
    if sizing is None:
        from blocksight.jobs.run import local

        return local.run_units(units, context, state, stop)
    from blocksight.jobs.run import pipeline

    return pipeline.run_units(units, context, state, sizing, stop, rate, tell)


def _write_run(output: ObjectStore, context: JobContext, execution: Execution, sizing: Sizing | None) -> None:
    """Writes everything that may differ from run to run: host, packages, execution, sizing."""
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "execution": execution.model_dump(),
        "sizing": asdict(sizing) if sizing is not None else None,
        "batch_size": context.batch_size,
        "device": context.device,
    }
    output.put(f"{RUNS_FOLDER}{context.run_id}/run.json", json.dumps(facts, indent=1).encode())
