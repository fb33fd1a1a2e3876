"""The measurements of `bench` on this machine, in the user's cache folder, and what a job costs by them."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from blocksight.jobs.plan.config import ConfigError, JobConfig, digest_of
from blocksight.jobs.plan.estimate import HOST_SECONDS, MeasuredRate, estimate
from blocksight.jobs.plan.forward_setting import PlannedForward
from blocksight.jobs.plan.units import Workforce

MOST_RECORD_SECONDS = 30 * 86_400.0


@dataclass(frozen=True)
class MeasuredCost:
    """The cost of one record on one worker of this machine. A file that holds no such figures is no measurement."""

    seconds_per_record: Annotated[float, Field(gt=0, le=MOST_RECORD_SECONDS)]
    """Time of one core, or of one GPU."""
    forwards_per_record: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes_per_record: Annotated[int, Field(ge=0)]
    day: str
    """ISO date of the measurement."""


def remember(config: JobConfig, device: str, cost: MeasuredCost) -> Path:
    """Writes the measurement; replaces an earlier one of the same configuration and device. Raises ConfigError."""
    try:
        file = _file(config, device)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(cost)))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the measurement cannot be kept ({error}): let XDG_CACHE_HOME name a folder") from error
    return file


def recall(config: JobConfig, device: str) -> MeasuredCost | None:
    """The last measurement of the same configuration on the same device; None if there is none."""
    try:
        return TypeAdapter(MeasuredCost).validate_json(_file(config, device).read_bytes())
    except (OSError, RuntimeError, ValidationError):
        return None


def remembered_rate(config: JobConfig, device: str) -> MeasuredRate | None:
    """The rate of one worker by the last measurement, with the host's share; None if there is none."""
    measured = recall(config, device)
    if measured is None:
        return None
    return MeasuredRate(measured.seconds_per_record + HOST_SECONDS, f"measured on {platform.node()} on {measured.day}")


def rate_of_forward(planned: PlannedForward, forwards_per_record: float) -> MeasuredRate | None:
    """The rate of one GPU by its measured forward passes, with the host's share; None if it was not measured."""
    if planned.forwards_per_second is None or planned.hardware is None:
        return None
    seconds = forwards_per_record / planned.forwards_per_second + HOST_SECONDS
    return MeasuredRate(seconds, f"measured: {planned.rate_text}")


@dataclass(frozen=True)
class ExpectedCost:
    """The cost of a whole job."""

    forwards_per_record: float
    num_bytes: int
    basis: str
    """Where the forwards come from, for people."""
    seconds: float | None
    """On all workers; None: the configuration was not measured on this machine."""


def expected_cost(config: JobConfig, num_records: int, workforce: Workforce) -> ExpectedCost:
    """The cost by this machine's measurement, or else by the estimate, which knows no time."""
    measured = recall(config, workforce.device)
    if measured is None:
        own = estimate(config, num_records, on_gpu=workforce.on_gpu)
        return ExpectedCost(own.forwards_per_record, own.num_bytes, own.basis, None)
    return ExpectedCost(
        forwards_per_record=measured.forwards_per_record,
        num_bytes=measured.bytes_per_record * num_records,
        basis=f"measured here on {measured.day}",
        seconds=measured.seconds_per_record * num_records / workforce.num_workers,
    )


def _file(config: JobConfig, device: str) -> Path:
    what = {
        "model": config.model,
        "weights": config.weights,
        "blocks": list(config.blocks),
        **({"input_size": config.input_size} if config.input_size is not None else {}),
        "explainer": config.explainer,
        "parameters": asdict(config.explainer_parameters()),
        "preset": config.preset,
        "precision": config.precision,
        "targets": config.target_choice.most_targets,
        **({"signed": True} if config.signed else {}),
        "chosen per record": config.fidelity == "auto",
        "device": device,
        "host": platform.node(),
    }
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()  # RuntimeError for a user without a home
    return Path(caches) / "blocksight" / "bench" / f"{digest_of(what)[:16]}.json"
