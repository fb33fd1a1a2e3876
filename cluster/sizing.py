"""Computes a job's sizing: actors, their CPU and GPU shares, and the sizes of units. Arithmetic alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

from blocksight.cluster.errors import ClusterError

LEAST_UNIT_SECONDS = 10.0
"""In a shorter unit the overhead (about 50 ms) is noticeable."""
MOST_UNIT_SECONDS = 300.0
MOST_UNIT_SHARE = 1 / 20
"""Longest unit as a part of one worker's share of the work: workers wait for the last unit."""
MOST_UNIT_BYTES = 64 << 20
"""Of a unit's output."""
MOST_UNIT_PIXEL_BYTES = 128 << 20
"""Of a unit's decoded images: they pass through Ray's object store as one block."""

LEAST_STORE_BYTES = 1 << 30
MOST_STORE_SHARE = 0.3
UNITS_PER_ACTOR = 3

TASK_CPUS = 0.5
"""CPUs of a read or commit task. It must differ from an actor's, or Ray fuses the steps into one."""
ACTOR_CPUS = 1.0
LEAST_ACTOR_CPUS = 0.1

Device = Literal["auto", "gpu", "cpu"]
"""What the user wants actors to run on; `auto`: GPUs if the session has any."""


@dataclass(frozen=True)
class Sizing:
    """How the explain step is spread over a session."""

    num_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    cpus_per_task: float
    threads_per_actor: int
    """CPU threads of the model. One thread gives the same bits on every machine of one type."""
    most_actors: int | None = None
    """How many there may be once more nodes have joined; None: the number does not grow."""
    idle_gpus: int = 0
    """GPUs for which their nodes have no CPU."""


def size_for(nodes: Sequence[Mapping[str, float]], num_actors: int | None = None, device: Device = "auto") -> Sizing:
    """The sizing for a session whose nodes have these resources (`CPU`, `GPU`), with `num_actors` or as many as fit.

    One actor per GPU, which takes less than a CPU where a node has more GPUs than CPUs; without GPUs one per CPU. Both
    with room for a read or commit task. Raises ClusterError if the actors do not fit, as Ray itself would wait for
    ever without a message, and if `device` is `gpu` and there is none.
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = 0 if device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "gpu" and not gpus:
        raise ClusterError(
            f"--device gpu: the Ray session has {cpus:g} CPUs and no GPU: add GPU nodes, or choose --device cpu"
        )
    share = _cpus_beside_a_gpu(nodes) if gpus else ACTOR_CPUS
    available = _num_fitting(nodes, share, on_gpu=gpus > 0)
    wanted = num_actors or available
    if wanted < 1 or wanted > available:
        raise ClusterError(
            f"{max(1, wanted)} explain actors need {max(1, wanted) * share + TASK_CPUS:g} CPUs"
            f"{' and as many GPUs as actors' if gpus else ''}; the Ray session has {cpus:g} CPUs and {gpus} GPUs: "
            f"ask for fewer --workers, join a larger cluster with --address, or let it grow with --wait"
        )
    idle = gpus - available if gpus and num_actors is None else 0
    return Sizing(wanted, 1.0 if gpus else 0.0, share, TASK_CPUS, threads_per_actor=1, idle_gpus=idle)


def _num_fitting(nodes: Sequence[Mapping[str, float]], share: float, *, on_gpu: bool) -> int:
    """Actors of this share of a CPU that fit on the nodes, with room for a task on one of them."""
    places = [
        min(floor(node.get("CPU", 0.0) / share + 1e-9), int(node.get("GPU", 0)) if on_gpu else 1 << 30)
        for node in nodes
    ]
    left = [node.get("CPU", 0.0) - count * share for node, count in zip(nodes, places, strict=True)]
    missing = TASK_CPUS - max(left, default=0.0)
    return max(0, sum(places) - max(0, ceil(missing / share - 1e-9)))


def _cpus_beside_a_gpu(nodes: Sequence[Mapping[str, float]]) -> float:
    """The CPUs of an actor that has a GPU: one, or what the poorest node has for each, in tenths, less a task."""
    is_room_elsewhere = any(node.get("CPU", 0.0) >= TASK_CPUS and not int(node.get("GPU", 0)) for node in nodes)
    for_tasks = 0.0 if is_room_elsewhere else TASK_CPUS
    equal = min((node.get("CPU", 0.0) - for_tasks) / int(node["GPU"]) for node in nodes if int(node.get("GPU", 0)))
    share = min(ACTOR_CPUS, max(LEAST_ACTOR_CPUS, floor(equal * 10 + 1e-9) / 10))
    return share if share != TASK_CPUS else TASK_CPUS - LEAST_ACTOR_CPUS


def bundle_of(*, on_gpu: bool) -> dict[str, float]:
    """What one more actor needs of a node that is still to come."""
    return {"GPU": 1.0, "CPU": TASK_CPUS} if on_gpu else {"CPU": ACTOR_CPUS}


def local_cpus(num_cores: int, num_actors: int | None) -> int:
    """Logical CPUs of a session that is started for the job: one actor per core, and room for tasks.

    Read and commit tasks need a few percent of a core, so they share the cores with the actors.
    """
    return ceil(max(num_cores, num_actors or 0) * ACTOR_CPUS) + 1


def object_store_bytes(num_actors: int, memory_bytes: int) -> int:
    """Object store of a session on a machine with this memory: three units of pixels per actor.

    That is the one that is explained, the one that waits, and the one that is read. At least 1 GiB, and at most 30 % of
    the memory, which is also Ray's own rule.
    """
    wanted = max(LEAST_STORE_BYTES, num_actors * UNITS_PER_ACTOR * MOST_UNIT_PIXEL_BYTES)
    return min(wanted, max(LEAST_STORE_BYTES, int(MOST_STORE_SHARE * memory_bytes)))


def unit_records(
    seconds_per_record: float,
    bytes_per_record: float,
    num_records: int,
    num_workers: int,
    pixel_bytes_per_record: float = 1.0,
) -> int:
    """Records of a full unit, at least 1: 10 s of work or more, at most 5 minutes and 1/20 of a worker's share.

    The minimum wins over the share, and the limits of 64 MiB of output and of 128 MiB of pixels over both. Seconds
    and bytes per record must be greater than zero.
    """
    share = num_records / max(1, num_workers) * seconds_per_record * MOST_UNIT_SHARE
    seconds = max(LEAST_UNIT_SECONDS, min(MOST_UNIT_SECONDS, share))
    by_time = ceil(seconds / seconds_per_record)
    by_bytes = min(MOST_UNIT_BYTES // bytes_per_record, MOST_UNIT_PIXEL_BYTES // pixel_bytes_per_record)
    return max(1, min(by_time, int(by_bytes)))


def shrinking_sizes(num_records: int, first: int, floor: int, num_workers: int) -> list[int]:
    """Unit sizes that sum to `num_records` and shrink towards the end (guided self-scheduling).

    Each unit is half of a worker's share of the remaining records, within [floor, first]. `first` wins over
    `floor`; only the last unit may be smaller.
    """
    sizes = []
    left = num_records
    while left > 0:
        wanted = min(first, max(floor, left // (2 * max(1, num_workers))))
        sizes.append(min(left, max(1, wanted)))
        left -= sizes[-1]
    return sizes
