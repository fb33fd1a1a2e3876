"""The Ray session: started for one job and stopped after it, or joined and left as it was."""

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.sizing import Sizing, local_cpus, size_for
from blocksight.cluster.switches import refuse_unsafe_switches

OBJECT_STORE_BYTES = 1 << 30
"""Of a session on this machine: a few units of pixels per actor."""
CONNECT_SECONDS = 5.0
QUIET = "fatal"
"""Below that Ray's core writes advice to its developers on our users' screens."""


@contextmanager
def ray_session(address: str | None = None, num_actors: int | None = None) -> Iterator[Sizing]:
    """Starts Ray on this machine (token, no dashboard), or joins the cluster at `address` (host:port, auto).

    Yields how the job fits on it. What was started is stopped afterwards; a joined cluster goes on. Ray
    listens on every interface of the machine: the token is what keeps strangers out. Raises ClusterError
    where the session cannot be had or is too small.
    """
    refuse_unsafe_switches()
    if ray.is_initialized():
        raise ClusterError("this process has a Ray session already; end it with ray.shutdown() first")
    try:
        if address is None:
            _start(num_actors)
        else:
            _join(address)
        yield size_for(ray.cluster_resources(), num_actors)
    finally:
        ray.shutdown()


def _start(num_actors: int | None) -> None:
    _set_up_environment()
    try:
        with _silent_standard_error():
            ray.init(
                address="local",
                num_cpus=local_cpus(os.cpu_count() or 1, num_actors),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"Ray does not start on this machine: {error}") from error


def _join(address: str) -> None:
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", QUIET)
    _refuse_silence(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"the Ray cluster at {address!r} cannot be joined: {error}") from error


def _refuse_silence(address: str) -> None:
    """Says at once that nobody is there; Ray itself tries for more than four minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"{address!r} is no address of a Ray cluster; wanted host:port, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address!r}: {error}") from error


def _set_up_environment() -> None:
    """A token of this process's own, in no file, and no usage report, unless the user says otherwise.

    Ray itself turns token authentication on for a session that it starts here.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", QUIET)


@contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Ray's core reports its own log level there when it starts; what goes wrong is raised all the same."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
