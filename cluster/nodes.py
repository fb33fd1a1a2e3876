"""The nodes of a joined Ray cluster: waits for them, asks the autoscaler for more, and says what changes."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from blocksight.cluster.errors import ClusterError, ClusterNotReadyError
from blocksight.cluster.sizing import Device, Sizing, bundle_of, size_for

POLL_SECONDS = 2.0
WATCH_SECONDS = 10.0
MOST_ACTORS = 100_000
"""The limit of a pool that takes every node that joins: more than any cluster has."""

Tell = Callable[[str], None]
"""Shows one line to the user."""


def joined_nodes() -> list[dict[str, float]]:
    """The resources of each living node of the connected session."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def described(nodes: list[dict[str, float]]) -> str:
    """The nodes for people, such as `3 nodes with 6 CPUs and 1 GPU`."""
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{_counted(len(nodes), 'node')} with {_counted(cpus, 'CPU')} and {_counted(gpus, 'GPU')}"


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def wait_for_workers(num_actors: int | None, min_actors: int, device: Device, seconds: float, tell: Tell) -> Sizing:
    """Waits until `min_actors` fit on the joined nodes, and asks Ray's autoscaler for them and for `num_actors`.

    The sizing is that of the nodes that have joined; its pool may grow up to `num_actors`, or with every node that
    joins. Raises ClusterNotReadyError after so many seconds.
    """
    deadline, said = time.monotonic() + seconds, ""
    while True:
        nodes = joined_nodes()
        on_gpu = device == "gpu" or (device == "auto" and _has_gpus(nodes))
        _ask_for(num_actors or min_actors, on_gpu=on_gpu)
        try:
            fits = size_for(nodes, None, device)
        except ClusterError:
            fits = None
        if fits is not None and fits.num_actors >= min_actors:
            return replace(
                fits,
                num_actors=min(fits.num_actors, num_actors or fits.num_actors),
                most_actors=num_actors or MOST_ACTORS,
            )
        if time.monotonic() > deadline:
            raise ClusterNotReadyError(
                f"after {seconds:,.0f} s of --wait {0 if fits is None else fits.num_actors} of {min_actors} explain "
                f"actors fit on the Ray cluster, which has {described(nodes)}: see why its nodes do not come, wait "
                "longer, or ask for fewer with --min-workers"
            )
        now = f"waiting for {min_actors} explain actor{'' if min_actors == 1 else 's'}: {described(nodes)}"
        if now != said:
            tell(said := now)
        time.sleep(POLL_SECONDS)


def _has_gpus(nodes: list[dict[str, float]]) -> bool:
    return any(node.get("GPU", 0) for node in nodes)


def _ask_for(num_actors: int, *, on_gpu: bool) -> None:
    """Tells Ray's autoscaler, if the cluster has one. The hint stays until it is withdrawn, also after the driver."""
    request_resources(bundles=[bundle_of(on_gpu=on_gpu)] * num_actors)


@contextmanager
def withdrawn_request() -> Iterator[None]:
    """Withdraws what the body asked of the autoscaler, also when a signal ends the process."""
    previous: Any = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, _exit_by_signal)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
        with suppress(RayError, RuntimeError):  # the cluster may be gone
            request_resources(bundles=[])


def _exit_by_signal(number: int, _frame: object) -> None:
    sys.exit(128 + number)


@dataclass
class NodeWatch:
    """Tells of nodes that join or leave while a job runs."""

    tell: Tell
    said: str = ""
    last: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Looks at most every ten seconds; a session that does not answer is no news."""
        if time.monotonic() - self.last < WATCH_SECONDS:
            return
        self.last = time.monotonic()
        with suppress(RayError, RuntimeError):
            now = described(joined_nodes())
            if self.said and now != self.said:
                self.tell(f"the Ray cluster has {now}; before: {self.said}")
            self.said = now
