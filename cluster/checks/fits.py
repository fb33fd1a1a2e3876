"""Says whether a planned job fits the machines that a file asks for: memory, disk, number of workers, time, places."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from math import floor

from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.job_file import Offer
from blocksight.cluster.checks.pods import containers
from blocksight.cluster.checks.quantities import quantity, slurm_bytes, slurm_seconds
from blocksight.cluster.checks.slurm import header
from blocksight.cluster.sizing import ACTOR_CPUS, MOST_UNIT_PIXEL_BYTES, TASK_CPUS, UNITS_PER_ACTOR

ACTOR_BYTES = 2 << 30
"""Of an explain actor: Python, torch, a model and its activations."""
RAY_BYTES = 1 << 30
"""Of Ray's own processes on a node."""
GPUS = ("nvidia.com/gpu", "amd.com/gpu")


@dataclass(frozen=True)
class PlanFigures:
    """What a plan says of a job."""

    data: str
    output: str
    num_units: int
    driver_bytes: int
    """Memory of the driver while it plans and receives receipts."""
    work_seconds: float | None
    """On one worker; None: no worker was measured."""


@dataclass(frozen=True)
class Machines:
    """What a file asks for. A place without a value: the file does not say it."""

    head_memory: Place
    head_bytes: float | None
    worker_memory: Place
    worker_bytes: float | None
    actors_per_worker: int
    workers: Place
    num_workers: int
    time: Place
    seconds: float | None


def fit_findings(figures: PlanFigures, machines: Machines) -> Iterator[Finding]:
    """What of a planned job does not fit the machines."""
    yield from _memory(machines, figures)
    most = machines.num_workers * machines.actors_per_worker
    if most > figures.num_units:
        why = f"{most} explain actors for {figures.num_units} units: machines stand idle, and cost"
        yield machines.workers.finding("fit", why, f"ask for workers of {figures.num_units} actors at most")
    if figures.work_seconds is not None and machines.seconds is not None and most:
        needed = figures.work_seconds / most
        if needed > machines.seconds:
            why = f"the job takes about {_hours(needed)} on {most} actors, and ends after {_hours(machines.seconds)}"
            yield machines.time.finding("fit", why, "give it more time or workers; the same command goes on")


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h"


def _memory(machines: Machines, figures: PlanFigures) -> Iterator[Finding]:
    driver = figures.driver_bytes + RAY_BYTES
    if machines.head_bytes is not None and machines.head_bytes < driver:
        why = f"the driver of this plan needs {_gib(driver)}, and has {_gib(machines.head_bytes)}"
        yield machines.head_memory.finding("fit", why, f"give it {_gib(driver)}")
    worker = machines.actors_per_worker * (ACTOR_BYTES + UNITS_PER_ACTOR * MOST_UNIT_PIXEL_BYTES) + RAY_BYTES
    if machines.worker_bytes is not None and machines.worker_bytes < worker:
        why = f"{machines.actors_per_worker} actors need {_gib(worker)}, and have {_gib(machines.worker_bytes)}"
        yield machines.worker_memory.finding("fit", why, f"give it {_gib(worker)}, or fewer cores")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.3g} GiB"


def place_findings(place: Place, text: str, figures: PlanFigures) -> Iterator[Finding]:
    """Whether a configuration, at a place of a file, names the data and output of the plan."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # which the rule for configurations says
    for key, wanted in (("data", figures.data), ("output", figures.output)):
        given = values.get(key)
        if isinstance(given, str) and given.rstrip("/") != wanted.rstrip("/"):
            yield place.finding("fit", f"{key} is {given!r}, the plan is of {wanted!r}", "name the same in both")


def machines_of_job(job: Place) -> Machines:
    """What a RayJob asks for; of several groups the largest number of workers in all, and the first one's size."""
    cluster = job["spec"]["rayClusterSpec"]
    head = next(containers(cluster["headGroupSpec"]["template"]["spec"]), cluster)
    group = cluster["workerGroupSpecs"][0]
    worker = next(containers(group["template"]["spec"]), group)
    memory = worker["resources"]["limits"]["memory"]
    scales = cluster["enableInTreeAutoscaling"].value
    counts = [one["maxReplicas" if scales else "replicas"].value for one in cluster["workerGroupSpecs"].items()]
    time = job["spec"]["activeDeadlineSeconds"]
    return Machines(
        head_memory=head["resources"]["limits"]["memory"],
        head_bytes=_bytes(head["resources"]["limits"]["memory"]),
        worker_memory=memory,
        worker_bytes=_bytes(memory),
        actors_per_worker=_actors(worker),
        workers=group["maxReplicas" if scales else "replicas"],
        num_workers=sum(count for count in counts if isinstance(count, int)),
        time=time,
        seconds=time.value if isinstance(time.value, int) else None,
    )


def offer_of(job: Place) -> Offer:
    """What the workers of a RayJob give to its driver."""
    groups = list(job["spec"]["rayClusterSpec"]["workerGroupSpecs"].items())
    scales = job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"].value
    has_gpus, most = False, 0
    folders: list[str] = []
    for group in groups:
        worker = next(containers(group["template"]["spec"]), group)
        has_gpus = has_gpus or _gpus(worker) > 0
        count = group["maxReplicas" if scales else "replicas"].value
        most += count * _actors(worker) if isinstance(count, int) else 0
        folders += [mount["mountPath"].text for mount in worker["volumeMounts"].items() if mount["mountPath"].text]
    return Offer(has_gpus, most, tuple(folders))


def _bytes(place: Place) -> float | None:
    found = quantity(place.value)
    return None if found is None else float(found)


def _actors(container: Place) -> int:
    """Explain actors of a worker's pod: one per GPU, or one per core that a task leaves over."""
    cpus = quantity(container["resources"]["limits"]["cpu"].value)
    return _gpus(container) or floor((float(cpus or 1) - TASK_CPUS) / ACTOR_CPUS)


def _gpus(container: Place) -> int:
    limits = container["resources"]["limits"]
    return int(sum(quantity(limits[name].value) or 0 for name in GPUS))


def machines_of_script(script: Place) -> Machines:
    """What a script of sbatch asks for. The driver stands on one of the nodes."""
    options = header(script.text)

    def line(name: str) -> Place:
        return Place(script.file, None, f"line {options.get(name, ('', 1))[1]}")

    def value(name: str) -> str:
        return options.get(name, ("", 0))[0]

    gpus = re.search(r"(\d+)$", value("gpus-per-node"))
    cpus = int(value("cpus-per-task")) if value("cpus-per-task").isdecimal() else 1
    num_nodes = int(value("nodes")) if value("nodes").isdecimal() else 1
    memory = slurm_bytes(value("mem"))
    return Machines(
        head_memory=line("mem"),
        head_bytes=memory,
        worker_memory=line("mem"),
        worker_bytes=memory,
        actors_per_worker=int(gpus[1]) if gpus else max(1, cpus - 1),
        workers=line("nodes"),
        num_workers=num_nodes,
        time=line("time"),
        seconds=slurm_seconds(value("time")),
    )


def machines_of_task(task: Place) -> Machines:
    """What a task of SkyPilot asks for: one machine, on which the driver stands too."""
    resources = task["resources"]
    gpus = resources["accelerators"]
    given = [one for _, one in gpus.entries()]
    counts = [one.value for one in given if isinstance(one.value, int)]
    memory = re.match(r"(\d+)", str(resources["memory"].value))
    size = None if memory is None else int(memory[1]) * (1 << 30)
    return Machines(
        head_memory=resources["memory"],
        head_bytes=size,
        worker_memory=resources["memory"],
        worker_bytes=size,
        actors_per_worker=max(counts, default=1),
        workers=gpus,
        num_workers=1,
        time=task,
        seconds=None,
    )
