"""The host's share: the CPU time of a record beside the model, in this process and through Ray."""

import io
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from blocksight.cluster.sizing import Sizing
from blocksight.jobs.bench.cpu_meter import CpuMeter
from blocksight.jobs.explain.forward_pass import choose_forward, forward_request, write_forward
from blocksight.jobs.explain.step import ExplainStep
from blocksight.jobs.ledger.stop_request import Stop
from blocksight.jobs.plan.config import ConfigError, Execution, JobConfig, load_config
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.forward_setting import PlannedForward
from blocksight.jobs.plan.plan import Plan, make_plan, open_output
from blocksight.jobs.plan.records import ModelFacts, Outcome, Receipt, UnfinishedError, Unit
from blocksight.jobs.plan.text import counted
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.run.job import check_model, context_of
from blocksight.jobs.run.local import run_unit
from blocksight.jobs.run.workers import session_of, tell_of
from blocksight.jobs.worker.attempts import open_worker_stores

MODEL = "blocksight.jobs.bench.tiny_network:tiny_network"
SIDE = 224
"""Of the model's inputs and of the maps."""
STEPS = ("read", "explain", "commit")

NUM_IMAGES, SHARD_IMAGES = 6_000, 500
"""Images that are made where no data are given, and how many of them are in a shard."""
NUM_PICTURES, PICTURE_SIDE, COARSE_SIDE = 64, 96, 12
"""Different pictures among them, their side, and the side that they are enlarged from, so that they are smooth."""

ACTORS = 2
"""Explain actors, if the user says no other number: what is measured is a core's rate, and not the machine's."""
ROUNDS = 2
"""This process and Ray, in turns."""
PART = 4
"""This process explains one unit in so many; it needs no more to be measured."""
UNITS_ASIDE = 4
"""So many units of each actor come before the measured ones, and as many after them: while those are under way the
session starts, and then runs dry."""


@dataclass(frozen=True)
class HostShare:
    """CPU time of a record of a job whose model costs next to nothing."""

    records: int
    """In each round."""
    rejected: int
    units: int
    actors: int
    """Of the Ray session."""
    steps: Mapping[str, float]
    """Milliseconds of a record in this process: read and decode, explain, commit."""
    in_process: float
    """Their sum."""
    through_ray: float
    """Milliseconds of a record in all processes of the Ray session, this one included, while all actors work."""

    @property
    def ratio(self) -> float:
        """A core's rate through Ray over its rate in this process."""
        return self.in_process / self.through_ray

    def figures(self) -> dict[str, object]:
        """The figures as plain values."""
        return {
            "model": MODEL,
            "explainer": "gradcam",
            "records": self.records,
            "rejected": self.rejected,
            "units": self.units,
            "actors": self.actors,
            "milliseconds": {**self.steps, "in process": self.in_process, "through Ray": self.through_ray},
            "records_per_second_of_a_core": {
                "in process": 1e3 / self.in_process,
                "through Ray": 1e3 / self.through_ray,
            },
            "ratio": self.ratio,
        }


def measure_host(
    data: str | None, endpoint_url: str | None, limit: int | None, actors: int | None, console: Console
) -> HostShare:
    """Measures both ways of running the same job, in turns; outputs are temporary.

    Raises ConfigError if the data make too few units, StoreError, ClusterError, and UnfinishedError if a unit fails.
    """
    with TemporaryDirectory(prefix="blocksight-host-") as folder:
        if data is None:
            console.print(f"making {counted(limit or NUM_IMAGES, 'image')} of {PICTURE_SIDE} x {PICTURE_SIDE} pixels")
            data = str(make_shards(Path(folder) / "data", limit or NUM_IMAGES))
        asked = {"data": data, "endpoint_url": endpoint_url, "limit": limit, "output": str(Path(folder) / "maps")}
        config, _ = load_config(None, {**asked, "model": MODEL, "explainer": "gradcam", "input_size": (SIDE, SIDE)})
        with CpuMeter() as meter:
            return _compare(_job(config, Path(folder), actors or ACTORS), actors or ACTORS, meter, console)


@dataclass(frozen=True)
class _Job:
    """The job that is run both ways, each time into an output of its own."""

    config: JobConfig
    folder: Path
    plan: Plan
    facts: ModelFacts
    planned: PlannedForward
    numbers: Iterator[int]

    def context(self, execution: Execution, sizing: Sizing | None) -> JobContext:
        """What the workers of one run need to know; its output exists and holds the forward setting."""
        config = self.config.model_copy(update={"output": str(self.folder / f"maps-{next(self.numbers)}")})
        write_forward(open_output(config), self.planned)
        return context_of(config, self.plan, self.facts, sizing, execution)


def _job(config: JobConfig, folder: Path, actors: int) -> _Job:
    """The planned job. Raises ConfigError if its units are too few."""
    plan = make_plan(config, weights_sha256=None, workforce=Workforce(actors, on_gpu=False))
    least = 2 * UNITS_ASIDE * actors + 1
    if len(plan.units) < least:
        raise ConfigError(
            f"{counted(plan.num_records, 'record')} make {counted(len(plan.units), 'unit')}, and {least} are needed "
            f"to tell the work of {counted(actors, 'actor')} from their start: name more data, or fewer --workers"
        )
    adapter, facts = check_model(config, None, Console(quiet=True))
    planned = choose_forward(adapter, forward_request(config, None, is_timed=False))
    return _Job(config, folder, plan, facts, planned, count())


def _compare(job: _Job, actors: int, meter: CpuMeter, console: Console) -> HostShare:
    """The figures of all rounds, this process and Ray in turns."""
    execution = Execution(runner="ray", workers=actors, device="cpu")
    units = job.plan.units
    some = units[::PART]
    steps: dict[str, float] = dict.fromkeys(STEPS, 0.0)
    through_ray: list[float] = []
    receipts: list[Receipt] = []
    num_here = 0
    with session_of(execution) as sizing:
        assert sizing is not None  # of Ray
        console.print("warming up")
        explain = ExplainStep(job.context(Execution(runner="local", device="cpu"), None), None)
        _run_here(job, units[:1], explain, dict(steps))
        for number in range(1, ROUNDS + 1):
            console.print(f"round {number} of {ROUNDS}")
            num_here += sum(own.num_records for own in _run_here(job, some, explain, steps))
            seconds, receipts = _run_through_ray(job, execution, sizing, meter, console)
            through_ray.append(seconds)
    per_record = {name: 1e3 * seconds / num_here for name, seconds in steps.items()}
    return HostShare(
        records=sum(own.num_records for own in receipts),
        rejected=sum(own.num_rejected for own in receipts),
        units=len(units),
        actors=actors,
        steps=per_record,
        in_process=sum(per_record.values()),
        through_ray=1e3 * sum(through_ray) / ROUNDS,
    )


def _run_here(job: _Job, units: Sequence[Unit], explain: ExplainStep, steps: dict[str, float]) -> list[Receipt]:
    """Explains the units in this process, and adds each step's CPU seconds."""

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        steps[name] += time.process_time() - start

    context = job.context(Execution(runner="local", device="cpu"), None)
    stores = open_worker_stores(context)
    return list(_committed(run_unit(unit, context, stores, lambda: explain, timed) for unit in units))


def _run_through_ray(
    job: _Job, execution: Execution, sizing: Sizing, meter: CpuMeter, console: Console
) -> tuple[float, list[Receipt]]:
    """Explains all units on the Ray session; the CPU seconds of a record in all its processes, and the receipts.

    Counted between two arrivals of receipts, at which the same number of units is under way.
    """
    from blocksight.jobs.run import pipeline

    context, units = job.context(execution, sizing), job.plan.units
    stop = Stop(open_output(context.config), context.run_id)
    aside = UNITS_ASIDE * sizing.num_actors
    first, last = aside - 1, len(units) - aside - 1
    done: list[Receipt] = []
    seconds, num_records = 0.0, 0
    for receipt in _committed(pipeline.run_units(units, context, None, sizing, stop, None, tell_of(console))):
        if first < len(done) <= last:
            num_records += receipt.num_records
        if len(done) in (first, last):
            seconds = meter.seconds() - seconds
        done.append(receipt)
    return seconds / num_records, done


def _committed(outcomes: Iterable[Outcome]) -> Iterator[Receipt]:
    """The receipts as they arrive. Raises UnfinishedError for a unit without one."""
    for outcome in outcomes:
        if not isinstance(outcome, Receipt):
            raise UnfinishedError(f"a unit was not explained, so that nothing can be measured: {outcome}")
        yield outcome


def make_shards(folder: Path, num_images: int) -> Path:
    """Writes smooth PNGs into tar shards, always the same ones, and returns the folder."""
    folder.mkdir(parents=True)
    pictures = _pictures(min(num_images, NUM_PICTURES))
    for first in range(0, num_images, SHARD_IMAGES):
        with tarfile.open(folder / f"{first // SHARD_IMAGES:06d}.tar", "w") as shard:
            for number in range(first, min(first + SHARD_IMAGES, num_images)):
                body = pictures[number % len(pictures)]
                member = tarfile.TarInfo(f"{number:09d}.png")
                member.size = len(body)
                shard.addfile(member, io.BytesIO(body))
    return folder


def _pictures(number: int) -> list[bytes]:
    """So many PNGs."""
    rng = np.random.default_rng(0)
    return [_png(rng.integers(0, 256, (COARSE_SIDE, COARSE_SIDE, 3), np.uint8)) for _ in range(number)]


def _png(coarse: NDArray[np.uint8]) -> bytes:
    body = io.BytesIO()
    Image.fromarray(coarse).resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC).save(body, "PNG")
    return body.getvalue()
