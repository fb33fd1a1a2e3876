"""The Ray session: starts Ray for one job and stops it afterwards, or joins a running cluster."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

# Ray reads this when it is imported. Without it, a call after the end of a session starts another one, or joins any
# cluster that RAY_ADDRESS or a file names.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import ray
from ray.exceptions import RayError

from blocksight.cluster.cores import usable_cores
from blocksight.cluster.errors import ClusterError, ClusterNotReadyError
from blocksight.cluster.nodes import POLL_SECONDS, Tell, joined_nodes, wait_for_workers, withdrawn_request
from blocksight.cluster.sizing import Device, Sizing, local_cpus, object_store_bytes, size_for
from blocksight.cluster.switches import refuse_unsafe_switches

CONNECT_SECONDS = 5.0
MAX_FOLDER_BYTES = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10")
"""Longest folder for Ray's session: a socket's path may have 107 bytes."""
SHORT_FOLDER = "/tmp"
LOG_LEVEL = "fatal"
"""At a lower level, Ray's core prints messages for its developers to the terminal."""


@dataclass(frozen=True)
class Waiting:
    """How long a job waits for a cluster that is still coming, and for what."""

    seconds: float
    min_actors: int
    tell: Tell
    """Shows what has joined, one line for each change."""


@contextmanager
def ray_session(
    address: str | None = None,
    num_actors: int | None = None,
    device: Device = "auto",
    waiting: Waiting | None = None,
    py_modules: Sequence[str] = (),
) -> Iterator[Sizing]:
    """Starts Ray on this machine (token, no dashboard), or joins the cluster at `address` (host:port, auto).

    Yields the job's sizing. A started session is stopped afterwards; a joined cluster keeps running. Ray listens
    on every interface of the machine, so only the token keeps others out. Raises ClusterError if the session
    does not start, cannot be joined or is too small, and ClusterNotReadyError if it is so after the time of `waiting`.
    `py_modules` are folders of packages that a joined cluster's workers get a copy of.
    """
    refuse_unsafe_switches()
    if ray.is_initialized():
        raise ClusterError("this process has a Ray session already; end it with ray.shutdown() first")
    try:
        if address is None:
            _start_ray(num_actors)
        else:
            _join_ray(address, 0.0 if waiting is None else waiting.seconds, py_modules)
        with nullcontext() if waiting is None else withdrawn_request():
            yield _sizing(num_actors, device, waiting)
    finally:
        ray.shutdown()


def _sizing(num_actors: int | None, device: Device, waiting: Waiting | None) -> Sizing:
    if waiting is None:
        return size_for(joined_nodes(), num_actors, device)
    return wait_for_workers(num_actors, waiting.min_actors, device, waiting.seconds, waiting.tell)


def _start_ray(num_actors: int | None) -> None:
    _set_up_environment()
    try:
        with _silent_standard_error():
            ray.init(
                address="local",
                num_cpus=local_cpus(usable_cores(), num_actors),
                object_store_memory=object_store_bytes(num_actors or usable_cores(), _memory_bytes()),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"Ray does not start on this machine: {error}") from error


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _join_ray(address: str, seconds: float, py_modules: Sequence[str]) -> None:
    """Joins the cluster; tries for so many seconds. Raises ClusterError, or ClusterNotReadyError after some waiting."""
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address!r} is an address of Ray Client, through which no job runs: start the command on a machine of "
            "the cluster, with --address auto, or HOST:PORT of its head as `ray start` printed it"
        )
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", LOG_LEVEL)
    # else Ray rebuilds the environment of `uv run` on each worker, beside the one that is installed there
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    deadline = time.monotonic() + seconds
    while True:
        try:
            _try_to_join(address, py_modules)
        except ClusterNotReadyError as error:
            if time.monotonic() > deadline:
                raise error if seconds else ClusterError(str(error)) from error
            time.sleep(POLL_SECONDS)
        else:
            return


def _try_to_join(address: str, py_modules: Sequence[str]) -> None:
    _check_answers(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    environment = {"py_modules": [os.path.realpath(one) for one in py_modules]} if py_modules else None
    try:
        with _silent_standard_error():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    except OSError as error:
        raise ClusterNotReadyError(f"the Ray cluster at {address!r} cannot be joined: {error}") from error
    except (RuntimeError, ValueError, RayError) as error:  # such as another version of Ray, or a wrong token
        raise ClusterError(f"the Ray cluster at {address!r} cannot be joined: {error}") from error


def _check_answers(address: str) -> None:
    """Raises ClusterNotReadyError if nothing answers at the address. Ray itself would try for more than four minutes.

    Raises ClusterError for what is no address.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"{address!r} is not the address of a Ray cluster; wanted host:port, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OverflowError as error:
        raise ClusterError(f"{address!r} is not the address of a Ray cluster: {error}") from error
    except OSError as error:
        raise ClusterNotReadyError(f"no Ray cluster answers at {address!r}: {error}") from error


def _set_up_environment() -> None:
    """Sets a new token, in no file, and turns usage reports off, unless the user has set the variables.

    Ray itself enables token authentication for a session that it starts here.
    """
    _shorten_folder()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", LOG_LEVEL)


def _shorten_folder() -> None:
    """Puts Ray's session into /tmp, with a warning, if the paths of its sockets in TMPDIR would be too long.

    Raises ClusterError if the user's RAY_TMPDIR is too long.
    """
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    num_bytes = len(os.fsencode(os.environ.get(name, "")))
    if num_bytes <= MAX_FOLDER_BYTES:
        return
    if name == "RAY_TMPDIR":
        raise ClusterError(
            f"RAY_TMPDIR has {num_bytes} bytes, and the paths of Ray's sockets there would be too long: name a folder "
            f"of at most {MAX_FOLDER_BYTES} bytes"
        )
    os.environ["RAY_TMPDIR"] = SHORT_FOLDER
    logging.getLogger(__name__).warning(
        "TMPDIR is too long for Ray's sockets: Ray's session is in %s; RAY_TMPDIR names another folder", SHORT_FOLDER
    )


@contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Silences standard error: Ray's core prints its log level there at its start. Errors are raised all the same."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
