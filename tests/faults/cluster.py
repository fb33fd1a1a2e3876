"""A Ray cluster of several raylets and a bucket behind the fault proxy, whose processes a test can kill."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blocksight.cluster.bucket import EmbeddedBucket
from tests.faults.proxy import FaultProxy
from tests.jobs.jobs_of import ROOT

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 << 20}
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}


class RayCluster:
    """A head and further raylets, each with two logical CPUs. All of them end with the `with` body."""

    def __init__(self, num_nodes: int = 2, **head: Any) -> None:
        """`num_nodes` raylets beside the head; `head` changes the head's options."""
        self.num_nodes, self.head = num_nodes, {**NODE, "include_dashboard": False, **head}
        self.nodes: list[Any] = []

    def __enter__(self) -> "RayCluster":
        from ray.cluster_utils import Cluster

        self._before = dict(os.environ)
        # Ray writes the cluster's address into this folder, where every `ray.init()` of the machine looks for one
        self._folder = tempfile.TemporaryDirectory(prefix="bs", ignore_cleanup_errors=True)
        os.environ.update(SETTINGS, RAY_TMPDIR=self._folder.name)
        self.cluster = Cluster(initialize_head=True, head_node_args=self.head)
        for _ in range(self.num_nodes):
            self.add_node()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (pid for raylet in self.raylets for pid in (raylet, *children(raylet))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.cluster.shutdown()
        self._folder.cleanup()
        os.environ.clear()
        os.environ.update(self._before)

    @property
    def address(self) -> str:
        return self.cluster.address

    def logs(self) -> str:
        """The raylets' logs so far."""
        folder = Path(self.cluster.head_node.get_session_dir_path(), "logs")
        return "".join(path.read_text(errors="replace") for path in folder.glob("raylet*"))

    @property
    def raylets(self) -> list[int]:
        """Process ids of the raylets, the head's first."""
        return [_raylet(node) for node in (self.cluster.head_node, *self.nodes)]

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(**NODE))

    def kill_node(self, number: int) -> None:
        """Kills a raylet and all its workers at once. `number` counts the nodes beside the head."""
        node = self.nodes.pop(number)
        for pid in (_raylet(node), *children(_raylet(node))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)

    def workers(self, title: str = "Map") -> list[int]:
        """Process ids of the workers that run a task or actor whose name contains `title`."""
        found = [pid for raylet in self.raylets for pid in children(raylet)]
        return [pid for pid in found if title in command_line(pid) and "ray::IDLE" not in command_line(pid)]


def _raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def children(pid: int) -> list[int]:
    """Process ids of the living children of all its threads."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(text) for text in path.read_text().split()]
    return found


def command_line(pid: int) -> str:
    """The process's command line; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class FragileBucket:
    """SeaweedFS behind a fault proxy. Its address stays the same when the server dies and comes back."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.bucket = EmbeddedBucket("blocksight-faults", folder)
        self.seed = seed

    def __enter__(self) -> "FragileBucket":
        self._before = dict(os.environ)
        self.bucket.__enter__()
        self.proxy = FaultProxy(self.bucket.port, self.seed)
        self.proxy.__enter__()
        os.environ.update(self.bucket.environment, AWS_ENDPOINT_URL=self.proxy.endpoint_url)
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.__exit__(None, None, None)
        self.bucket.__exit__(None, None, None)
        os.environ.clear()
        os.environ.update(self._before)

    @property
    def uri(self) -> str:
        return self.bucket.uri

    @property
    def endpoint_url(self) -> str:
        return self.proxy.endpoint_url

    @contextmanager
    def killed(self) -> Iterator[None]:
        """Kills the server with SIGKILL before the body, and restarts it on the same folder after it."""
        for pid in children(os.getpid()):
            if "weed" in command_line(pid).split(" ")[0]:
                os.killpg(pid, signal.SIGKILL)
        yield
        self.bucket.__exit__(None, None, None)
        self.bucket.__enter__()
        self.proxy.upstream_port = self.bucket.port
