"""Measures a real GPU: `python -m tests.gpu --output figures.jsonl`, in about nine minutes.

Needs torch's CUDA build and the engine, and none of Ray, pydantic and pyarrow.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Timer
from types import FrameType

import torch

from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble
from tests.gpu.figures import Figures, StageOverError, read_lines, summary
from tests.gpu.stages import STAGES, Stage, worker

GRACE_SECONDS = 20.0
"""A stage that does not end so long after its time hangs in the driver: the process begins again without it."""


def main(typed: Sequence[str] | None = None) -> None:
    """Runs the stages and prints the summary. Exit code 2 without a GPU."""
    asked = _parser().parse_args(typed)
    if not asked.smoke and not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} finds none here (nvidia-smi shows what the driver sees); nothing was "
            "measured. `--smoke` tests this script without one",
            file=sys.stderr,
        )
        sys.exit(2)
    run = Figures(asked.output, "cpu" if asked.smoke else "cuda", asked.smoke)
    if asked.worker_seconds:
        print(worker(run, asked.worker_seconds))
        return
    stages = _chosen(asked.only)
    if not asked.append:
        asked.output.write_text("")
    ends = time.monotonic() + asked.seconds
    for place, stage in enumerate(stages):
        _run_stage(run, stage, ends, partial(_begin_again, run, asked, stages[place + 1 :], ends))
    print(f"\n{summary(read_lines(asked.output))}\nall figures: {asked.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("figures.jsonl"), help="one JSON line per figure")
    parser.add_argument("--seconds", type=float, default=560, help="time in all; the last stages are cut")
    parser.add_argument("--only", default="", help=f"stages to run, of {', '.join(one.name for one in STAGES)}")
    parser.add_argument("--append", action="store_true", help="keeps the lines that the file has")
    parser.add_argument("--smoke", action="store_true", help="tests the script on a CPU: small models, few cases")
    parser.add_argument("--worker-seconds", type=float, default=0, help=argparse.SUPPRESS)
    return parser


def _chosen(only: str) -> list[Stage]:
    known = [one.name for one in STAGES]
    asked = only.split(",") if only else known
    unknown = [name for name in asked if name not in known]
    if unknown:
        sys.exit(f"no stage {unknown[0]!r}: the stages are {', '.join(known)}")
    return [one for one in STAGES if one.name in asked]


def _begin_again(run: Figures, asked: argparse.Namespace, left: Sequence[Stage], ends: float) -> None:
    """Replaces this process, whose device is lost, by one for the stages that are left."""
    run.say(device_lost="the stages that are left run in a new process" if left else "no stage is left")
    if left:
        options = ["--output", str(asked.output), "--append", "--only", ",".join(one.name for one in left)]
        options += ["--seconds", f"{max(ends - time.monotonic(), 0):.0f}", *(["--smoke"] if asked.smoke else [])]
        os.execv(sys.executable, [sys.executable, "-m", "tests.gpu", *options])


def _run_stage(run: Figures, stage: Stage, ends: float, begin_again: Callable[[], None]) -> None:
    """Runs a stage within its time; if the device is lost, a new process runs the others."""
    run.stage, run.ends = stage.name, min(time.monotonic() + stage.seconds, ends)
    begun = time.monotonic()
    try:
        with _deadline(run, begin_again):
            stage.measure(run)
    except StageOverError:
        run.say(cut=f"after {time.monotonic() - begun:.0f} s")
    except Exception as error:  # noqa: BLE001 - the other stages are measured all the same
        run.say(error=f"{type(error).__name__}: {error}"[:400])
        if device_trouble(error) is DeviceTrouble.LOST:
            begin_again()
    run.say(done_after=round(time.monotonic() - begun, 1))
    if run.device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _deadline(run: Figures, begin_again: Callable[[], None]) -> Iterator[None]:
    """Raises StageOverError in the body when the time is up; a body that does not notice ends the process."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise StageOverError

    def hangs() -> None:
        run.say(error=f"hangs: no answer {GRACE_SECONDS:.0f} s after its time")
        begin_again()

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(run.left, 0.01))
    timer = Timer(max(run.left, 0.01) + GRACE_SECONDS, hangs)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
