"""The figures that `--json` prints: plain values of what the tables of the same commands show."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np
from rich.console import Console

from blocksight.engine.catalog import entries
from blocksight.jobs.cli.app import console
from blocksight.jobs.ledger.accuracy import Accuracy
from blocksight.jobs.ledger.receipts import metric_means
from blocksight.jobs.ledger.reconcile import JobState
from blocksight.jobs.plan.config import MODEL_INPUT, JobConfig
from blocksight.jobs.plan.machine_rates import expected_cost
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Evaluated
from blocksight.jobs.plan.units import Workforce


def progress_console(as_json: bool) -> Console:
    """Where a command's progress and notes go: standard error if standard output holds JSON alone."""
    return Console(stderr=True, highlight=False, soft_wrap=True) if as_json else console


def print_json(figures: Any) -> None:
    """Prints plain values, data classes and numpy scalars as one JSON document; NaN and infinity are null."""
    sys.stdout.write(json.dumps(_plain(figures), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(own) for name, own in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    if isinstance(value, Iterable):
        return [_plain(own) for own in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def plan_figures(job: JobConfig, plan: Plan, workforce: Workforce) -> dict[str, Any]:
    """The plan and its cost; `seconds` is null if the model was not measured on this machine."""
    cost = expected_cost(job, plan.num_records, workforce)
    return {
        "layout": plan.layout,
        "objects": plan.num_objects,
        "input_bytes": plan.num_bytes,
        "records": plan.num_records,
        "records_are_exact": plan.is_exact,
        "units": len(plan.units),
        "rate": plan.rate,
        "model_input": {name: plan.identity[name] for name in MODEL_INPUT if name in plan.identity},
        "ignored": plan.ignored,
        "unreadable": plan.troubles,
        "forwards_per_record": cost.forwards_per_record,
        "seconds": cost.seconds,
        "workers": workforce.num_workers,
        "on_gpu": workforce.on_gpu,
        "output_bytes": cost.num_bytes,
        "is_measured": cost.seconds is not None,
        "fingerprint": plan.fingerprint,
    }


def job_figures(output: str, job_state: JobState) -> dict[str, Any]:
    """How far a job is, its counts, its dead units and the means of what was measured."""
    return {
        "output": output,
        "configuration": job_state.plan.identity,
        "units": len(job_state.plan.units),
        "rate": job_state.plan.rate,
        "committed": len(job_state.receipts),
        "open": len(job_state.open_units),
        "dead": [asdict(letter) for letter in job_state.dead.values()],
        "planned_records": job_state.plan.num_records,
        "records": job_state.total("num_records"),
        "explained": job_state.total("num_ok"),
        "rejected": job_state.total("num_rejected"),
        "rejects": job_state.rejects,
        "forwards": job_state.total("num_forwards"),
        "bytes": job_state.total("num_bytes"),
        "maps": job_state.num_maps,
        "flat_maps": job_state.num_flat,
        "accuracy": job_state.accuracy and _accuracy(job_state.accuracy),
        "warnings": job_state.warnings,
        "metrics": metric_means(job_state.receipts.values()),
    }


def _accuracy(own: Accuracy) -> dict[str, Any]:
    return {
        "records": own.num_records,
        "right": own.num_right,
        "in_first_5": own.num_in_first_5,
        "labels_without_class": own.no_class,
        "chance": own.chance,
        "majority": own.majority,
    }


def evaluation_figures(done: Iterable[Evaluated], place: str, num_open: int) -> dict[str, Any]:
    """What an evaluation's run measured, and where the values are."""
    return {"files": f"{place}data", "open": num_open, "units": [asdict(own) for own in done]}


def catalog_figures(what: str, name: str | None) -> dict[str, Any]:
    """The entries of `explainers`, `metrics` or `models` by name, with parameters and their defaults."""
    return {own: _entry(entry) for own, entry in entries.CATALOGUE[what].items() if name in (None, own)}


def _entry(entry: Any) -> dict[str, Any]:
    texts = {field.name: getattr(entry, field.name) for field in fields(entry)}
    facts: dict[str, Any] = {name: text for name, text in texts.items() if isinstance(text, str)}
    if "parameters" in texts:
        facts["parameters"] = {
            field.name: {"default": _plain(getattr(texts["parameters"], field.name, None)), **field.metadata}
            for field in fields(texts["parameters"])
        }
    return facts
