"""Computes a job's sizing: actors, their CPU and GPU shares, and the sizes of units. Arithmetic alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from blocksight.cluster.errors import ClusterError

LEAST_UNIT_SECONDS = 10.0
"""In a shorter unit the overhead (about 50 ms) is noticeable."""
MOST_UNIT_SECONDS = 300.0
MOST_UNIT_SHARE = 1 / 20
"""Longest unit as a part of one worker's share of the work: workers wait for the last unit."""
MOST_UNIT_BYTES = 64 << 20

TASK_CPUS = 0.5
"""CPUs of a read or commit task. It must differ from an actor's, or Ray fuses the steps into one."""
ACTOR_CPUS = 1.0


@dataclass(frozen=True)
class Sizing:
    """How the explain step is spread over a session."""

    num_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    cpus_per_task: float
    threads_per_actor: int
    """CPU threads of the model. One thread gives the same bits on every machine of one type."""


def size_for(resources: Mapping[str, float], num_actors: int | None = None) -> Sizing:
    """The sizing for a session with these resources (`CPU`, `GPU`), with `num_actors` actors or as many as fit.

    One actor per GPU; without GPUs, one per CPU, with room for a read or commit task. Raises ClusterError if
    the actors do not fit: Ray itself would wait for ever without a message.
    """
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    fitting = int((cpus - TASK_CPUS) // ACTOR_CPUS)
    available = min(gpus, fitting) if gpus else fitting
    wanted = num_actors or available
    if wanted < 1 or wanted > available:
        raise ClusterError(
            f"{max(1, wanted)} explain actors need {max(1, wanted) * ACTOR_CPUS + TASK_CPUS:g} CPUs"
            f"{' and as many GPUs as actors' if gpus else ''}; the Ray session has {cpus:g} CPUs and {gpus} GPUs: "
            f"ask for fewer --workers or join a larger cluster with --address"
        )
    return Sizing(wanted, 1.0 if gpus else 0.0, ACTOR_CPUS, TASK_CPUS, threads_per_actor=1)


def local_cpus(num_cores: int, num_actors: int | None) -> int:
    """Logical CPUs of a session that is started for the job: one actor per core, and room for tasks.

    Read and commit tasks need a few percent of a core, so they share the cores with the actors.
    """
    return ceil(max(num_cores, num_actors or 0) * ACTOR_CPUS) + 1


def unit_records(seconds_per_record: float, bytes_per_record: float, num_records: int, num_workers: int) -> int:
    """Records of a full unit, at least 1: 10 s of work or more, at most 5 minutes and 1/20 of a worker's share.

    The minimum wins over the share, and the limit of 64 MiB of output over both. Seconds and bytes per record
    must be greater than zero.
    """
    share = num_records / max(1, num_workers) * seconds_per_record * MOST_UNIT_SHARE
    seconds = max(LEAST_UNIT_SECONDS, min(MOST_UNIT_SECONDS, share))
    by_time = ceil(seconds / seconds_per_record)
    return max(1, min(by_time, int(MOST_UNIT_BYTES // bytes_per_record)))


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
