"""Runs a job: settles plan and model, hands the open units to a runner, reconciles, and writes the manifest."""

import json
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.sizing import Sizing
from jobs.config import Execution, JobConfig
from jobs.context import JobContext, sha256_of, weights_bytes
from jobs.estimate import estimate
from jobs.plan import Plan, load_plan, make_plan, open_output, refuse_drift, settle_model, settle_plan
from jobs.progress import Tally, progress
from jobs.reconcile import Standing, finalize, stand
from jobs.records import ModelFacts, Receipt, Unit, UnitFailure
from jobs.units import Workforce
from storage.store import ObjectStore
from storage.stores import probe

CPU_BATCH_SIZE = 4
"""Masked inputs per forward on a CPU: larger batches fall out of the second-level cache."""
GPU_BATCH_SIZE = 256

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""Where the driver lists its GPUs: known without importing torch."""

PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy", "s3fs", "pillow")


def workforce_of(execution: Execution) -> Workforce:
    """What the plan may expect before any session is there: a cluster is joined for its GPUs."""
    on_gpu = execution.runner == "ray" and (execution.address is not None or NVIDIA_GPUS.exists())
    return Workforce(execution.workers or os.cpu_count() or 1, on_gpu)


@dataclass(frozen=True)
class RunOutcome:
    """What a run left behind."""

    standing: Standing
    failures: tuple[UnitFailure, ...]
    seconds: float
    """Wall time of the units of this run; 0 where nothing was to do."""
    manifest: dict[str, Any] | None
    """The final manifest; None while units are open."""


def plan_job(config: JobConfig, execution: Execution) -> tuple[ObjectStore, Plan]:
    """The output's plan: the one that stands there, or one made now. Writes nothing; refuses drift."""
    output = open_output(config)
    weights_sha256 = sha256_of(weights_bytes(config))
    standing = load_plan(output)
    if standing is None:
        return output, make_plan(config, weights_sha256=weights_sha256, workforce=workforce_of(execution))
    refuse_drift(config.identity(weights_sha256), standing.identity, "configuration")
    return output, standing


def run_job(config: JobConfig, execution: Execution, console: Console) -> RunOutcome:
    """Explains everything that is not committed yet; a finished job is left as it is.

    Everything that can be wrong with the program (data, model, blocks, store, configuration) raises before
    any unit is worked on: ConfigError, StoreError, ModelError, ClusterError.
    """
    output, plan = plan_job(config, execution)
    standing = stand(output, plan)
    if not standing.open_units:  # finished, or an input without a single record
        settle_plan(output, plan)
        return RunOutcome(standing, (), 0.0, finalize(output, standing))
    state = weights_bytes(config)
    facts = _check_model(config, state, console)
    probe(output, "_job/probe-")
    with _session(execution) as sizing:
        plan = settle_plan(output, plan)
        settle_model(output, facts)
        standing = stand(output, plan)
        context = _context(config, plan, facts, sizing, execution)
        _write_run(output, context, execution, sizing)
        failures, seconds = _run_units(standing.open_units, context, state, sizing, console)
    standing = stand(output, plan)
    manifest = None if standing.open_units else finalize(output, standing)
    return RunOutcome(standing, tuple(failures), seconds, manifest)


def _check_model(config: JobConfig, state: bytes | None, console: Console) -> ModelFacts:
    """Loads the model once in the driver, so that whatever is wrong with it is said before any work."""
    from jobs.explain import load, model_facts

    facts = model_facts(load(config, state, "cpu", str(Path.cwd())), config)
    candidates = sum(block["channels"] for block in facts.blocks)
    places = ", ".join(f"{b['name']} {b['channels']}@{b['height']}x{b['width']}" for b in facts.blocks)
    console.print(f"model: {config.model}, {facts.num_classes} classes, {candidates:,} candidate maps in {places}")
    return facts


def _session(execution: Execution) -> AbstractContextManager[Sizing | None]:
    """Starts or joins Ray and says how the job fits on it; None: in this process."""
    if execution.runner == "local":
        return nullcontext()
    from cluster.session import ray_session

    return ray_session(execution.address, num_actors=execution.workers)


def _context(
    config: JobConfig, plan: Plan, facts: ModelFacts, sizing: Sizing | None, execution: Execution
) -> JobContext:
    on_gpu = sizing is not None and sizing.gpus_per_actor > 0
    return JobContext(
        config,
        plan.fingerprint,
        facts,
        tuple(plan.label_names()),
        batch_size=execution.batch_size or (GPU_BATCH_SIZE if on_gpu else CPU_BATCH_SIZE),
        num_threads=sizing.threads_per_actor if sizing is not None else 1,
        device="cuda" if on_gpu else "cpu",
        import_path=str(Path.cwd()),
    )


def _run_units(
    units: Sequence[Unit],
    context: JobContext,
    state: bytes | None,
    sizing: Sizing | None,
    console: Console,
) -> tuple[list[UnitFailure], float]:
    """Works through the units behind a progress line; returns the failures and the wall time in seconds."""
    config = context.config
    num_records = sum(unit.num_records for unit in units)
    num_targets, on_gpu = config.target_choice.count, context.device != "cpu"
    guess = estimate(config.model, config.explainer_parameters(), num_records, num_targets, on_gpu=on_gpu)
    num_workers = sizing.num_actors if sizing is not None else 1
    expected = guess.seconds(num_workers) if guess.is_measured else None
    failures = []
    start = time.monotonic()
    with progress(console, Tally(num_records, expected)) as update:
        for outcome in _outcomes(units, context, state, sizing):
            update(outcome)
            if isinstance(outcome, UnitFailure):
                failures.append(outcome)
    return failures, time.monotonic() - start


def _outcomes(
    units: Sequence[Unit], context: JobContext, state: bytes | None, sizing: Sizing | None
) -> Iterator[Receipt | UnitFailure]:
    """What becomes of each unit, from the in-process runner or from Ray; each is imported only when used."""
    if sizing is None:
        from jobs import local

        return local.run_units(units, context, state)
    from jobs import pipeline

    return pipeline.run_units(units, context, state, sizing)


def _write_run(output: ObjectStore, context: JobContext, execution: Execution, sizing: Sizing | None) -> None:
    """Notes where and with what this run works: everything that may differ from run to run."""
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
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
    output.put(f"_job/runs/{run_id}/run.json", json.dumps(facts, indent=1).encode())
