"""What `bench` measured on this machine, kept in the user's cache folder: `plan` says with it how long a job takes."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from blocksight.jobs.plan.config import JobConfig, digest_of


@dataclass(frozen=True)
class MeasuredCost:
    """What one record costs one worker of this machine."""

    seconds_per_record: float
    """Of one core's time, or of one GPU's."""
    forwards_per_record: float
    bytes_per_record: int
    day: str
    """ISO date of the measurement."""


def remember(config: JobConfig, device: str, cost: MeasuredCost) -> Path:
    """Writes the measurement over an earlier one of the same."""
    file = _file(config, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(cost)))
    return file


def recall(config: JobConfig, device: str) -> MeasuredCost | None:
    """The last measurement of the same model, explainer and preset on the same kind of device, if there is one."""
    try:
        return TypeAdapter(MeasuredCost).validate_json(_file(config, device).read_bytes())
    except (OSError, ValidationError):
        return None


def _file(config: JobConfig, device: str) -> Path:
    what = {
        "model": config.model,
        "weights": config.weights,
        "blocks": list(config.blocks),
        "explainer": config.explainer,
        "parameters": asdict(config.explainer_parameters()),
        "preset": config.preset,
        "precision": config.precision,
        "targets": config.target_choice.count,
        "chosen per record": config.fidelity == "auto",
        "device": device,
        "host": platform.node(),
    }
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "blocksight" / "bench" / f"{digest_of(what)[:16]}.json"
