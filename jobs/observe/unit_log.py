"""The log of units: one JSON object per line and unit, for log collectors."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from io import FileIO
from typing import Any

from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.records import DeadLetter, Outcome, Receipt, UnitFailure
from blocksight.jobs.plan.text import plain

STANDARD_ERROR = "-"

Log = Callable[[Outcome, float], None]
"""Takes an outcome, and the seconds of work in it."""


@contextmanager
def unit_log(path: str | None, run_id: str, part: str | None, tell: Callable[[str], object]) -> Iterator[Log]:
    """Logs the outcomes that the body passes on, to the end of a file or to standard error; None: nowhere.

    Raises ConfigError at once if the file cannot be written. A disk that is full later ends no job; it is told once.
    """
    with ExitStack() as stack:
        write = _writer(path, stack)
        is_told = False

        def log(outcome: Outcome, seconds: float) -> None:
            nonlocal is_told
            facts = unit_facts(outcome, seconds)
            if facts:
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                try:
                    write(json.dumps({"time": now, "run": run_id, "part": part, **facts}) + "\n")
                except OSError as error:
                    if not is_told:
                        tell(f"--log-json {path}: {error.strerror}; lines of units are lost, and the job goes on")
                    is_told = True

        yield log


def _writer(path: str | None, stack: ExitStack) -> Callable[[str], object]:
    """What writes a line; the file is closed by the stack. A line is one write: tasks of an array may share a file."""
    if path is None:
        return lambda _: None
    if path == STANDARD_ERROR:
        return lambda line: sys.stderr.write(line)  # what it is when the line comes: a progress bar takes its place
    try:
        file = stack.enter_context(FileIO(path, "ab"))
    except OSError as error:
        raise ConfigError(f"--log-json {path}: {error.strerror}; name a file in a folder that exists") from error
    return lambda line: file.write(line.encode("ascii"))


def unit_facts(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """What a line says of a unit that came to an end; nothing of one that was not begun or was given back.

    JSON writes ASCII alone, and `plain` takes what is left of control: no key can forge a line, or steer a terminal.
    """
    if isinstance(outcome, Receipt):
        return {
            **_of_unit("committed", outcome, outcome.attempt, outcome.worker, seconds),
            "records": outcome.num_records,
            "rejected": outcome.num_rejected,
            "rejects": dict(outcome.rejects),
        }
    if isinstance(outcome, UnitFailure | DeadLetter):
        return {
            **_of_unit("dead" if isinstance(outcome, DeadLetter) else "failed", outcome, None, None, seconds),
            "inputs": plain(outcome.inputs),
            "stage": outcome.stage,
            "error": plain(outcome.error),
        }
    return {}


def _of_unit(
    what: str, outcome: Receipt | UnitFailure | DeadLetter, attempt: str | None, worker: str | None, seconds: float
) -> dict[str, Any]:
    return {
        "outcome": what,
        "unit": outcome.unit_id,
        "ordinal": outcome.ordinal,
        "attempt": attempt,
        "node": worker and worker.rpartition(":")[0],
        "seconds": round(seconds, 3),
    }
