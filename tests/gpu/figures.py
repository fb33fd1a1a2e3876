"""Figures of a GPU: each is one JSON line, written at once, so that a cut loses nothing; and a summary of the lines."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]

DATA_SETS = {"ImageNet-val": 50_000, "ImageNet-train": 1_281_167}
GPUS = (1, 8, 64)
"""Numbers of GPUs that the hours are extrapolated to."""


class StageOverError(BaseException):
    """The time of a stage is up. No handler of ordinary errors takes it for one."""


@dataclass
class Figures:
    """Writes the figures of one stage after the other."""

    path: Path
    device: str
    is_smoke: bool
    """Small models and few cases: tests the script itself."""
    start: float = field(default_factory=time.monotonic)
    stage: str = ""
    ends: float = float("inf")
    """When the stage is over, by the same clock."""

    def say(self, **facts: Any) -> None:
        """Writes a line of the stage, to the disk."""
        line = {"stage": self.stage, "at": round(time.monotonic() - self.start, 1), **facts}
        with self.path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line, default=str)[:400], flush=True)

    @property
    def left(self) -> float:
        """Seconds until the stage is over."""
        return self.ends - time.monotonic()

    def has(self, seconds: float) -> bool:
        """True if the stage has so many seconds left; otherwise a line says that it was cut."""
        if self.left >= seconds:
            return True
        self.say(cut=f"{max(self.left, 0):.0f} s were left, {seconds:.0f} s are needed")
        return False


def read_lines(path: Path) -> list[Line]:
    """All whole lines of a file; a line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summary(lines: Sequence[Line]) -> str:
    """The lines as tables, one per stage, and the hours that follow from the measured rates."""
    stages = dict.fromkeys(line["stage"] for line in lines)
    tables = [_table(name, [line for line in lines if line["stage"] == name]) for name in stages]
    return "\n\n".join([*tables, _hours(lines)]).strip() + "\n"


def _table(stage: str, lines: Sequence[Line]) -> str:
    """One line per figure: its names, then its numbers."""
    return "\n".join([f"== {stage}", *(_row(line) for line in lines)])


def _row(line: Line) -> str:
    facts = {name: value for name, value in line.items() if name not in ("stage", "at")}
    return "  " + ", ".join(f"{name} {_short(value)}" for name, value in facts.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + "; ".join(map(_short, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_short(own)}" for name, own in value.items()) + "}"
    return str(value)


def _hours(lines: Sequence[Line]) -> str:
    """The hours of whole data sets, from the rates of the stage `passes`."""
    rates = [line for line in lines if line["stage"] == "passes" and "images_per_second" in line]
    rows = [
        f"  {line['model']}, {line['fidelity']}, {name}: "
        + ", ".join(f"{images / line['images_per_second'] / gpus / 3600:.3g} h on {gpus}" for gpus in GPUS)
        for line in rates
        for name, images in DATA_SETS.items()
    ]
    head = "== hours, extrapolated from one GPU in one process, without reading, writing and start"
    return "\n".join([head, *rows]) if rows else ""
