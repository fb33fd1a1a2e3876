"""The Ray session starts with a token, refuses unsafe switches, and ends only its own processes."""

import os
import socket
import subprocess
import sys
import tempfile

import pytest

from blocksight.cluster.errors import ClusterError, ClusterNotReadyError
from blocksight.cluster.session import Waiting, _set_up_environment, ray_session
from blocksight.cluster.switches import UNSAFE_SWITCHES
from tests.jobs.jobs_of import ROOT

pytestmark = pytest.mark.servers

PROGRAM = """
import os, pathlib
from blocksight.cluster.session import ray_session

def mine():
    found = []
    for path in pathlib.Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                text = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if os.environ["RAY_TMPDIR"].encode() in text and int(path.name) != os.getpid():
                found.append(int(path.name))
    return found

with ray_session(num_actors=2) as sizing:
    import ray
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    print("actors", sizing.num_actors, "threads", sizing.threads_per_actor, "token", is_token_auth_enabled())
    from ray._private.auto_init_hook import enable_auto_connect
    print("connects by itself", enable_auto_connect)
    print("running", len(mine()) > 0, "dashboard", repr(ray.get_runtime_context().gcs_address)[:11])
import time
for _ in range(100):
    if not mine():
        break
    time.sleep(0.1)
print("left", len(mine()))
"""


def test_a_session_is_started_with_a_token_and_stopped():
    with tempfile.TemporaryDirectory(prefix="bs") as short:  # a socket's path may have 107 bytes at most
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={**os.environ, "RAY_TMPDIR": short},
            capture_output=True,
            text=True,
            check=False,
        )
    assert "actors 2 threads 1 token True" in done.stdout, done.stdout + done.stderr
    assert "running True" in done.stdout, done.stderr
    assert "connects by itself False" in done.stdout
    assert "left 0" in done.stdout


@pytest.mark.parametrize("switch", UNSAFE_SWITCHES)
def test_switches_that_let_files_run_code_are_refused(monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(ClusterError, match=f"{switch} lets input files run code"), ray_session():
        pass


@pytest.mark.parametrize("address", ["local", "host", "host:port", "host:99999"])
def test_addresses_that_are_none_are_refused(address):
    with pytest.raises(ClusterError, match=f"'{address}'"), ray_session(address):
        pass


def test_an_address_of_ray_client_is_refused_with_what_to_give_instead():
    with pytest.raises(ClusterError, match=r"Ray Client.*--address auto"), ray_session("ray://head:10001"):
        pass


def test_a_temporary_folder_that_is_too_long_for_sockets_is_left(monkeypatch, caplog):
    for name in ("RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 40}")
    monkeypatch.setenv("RAY_TMPDIR", "/short")
    _set_up_environment()
    assert os.environ["RAY_TMPDIR"] == "/short"
    monkeypatch.delenv("RAY_TMPDIR")
    _set_up_environment()
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    assert "TMPDIR is too long for Ray's sockets: Ray's session is in /tmp" in caplog.text
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 40}")
    with pytest.raises(ClusterError, match="RAY_TMPDIR has 45 bytes"):
        _set_up_environment()


def test_an_address_without_an_answer_is_named_at_once(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    for wanted in (address, "auto"):
        with pytest.raises(ClusterError, match=f"no Ray cluster answers at '{address}'"), ray_session(wanted):
            pass


def test_an_address_that_does_not_answer_yet_is_tried_again(monkeypatch):
    tries = []
    monkeypatch.setattr("blocksight.cluster.session.POLL_SECONDS", 0.01)
    monkeypatch.setattr("blocksight.cluster.session._check_answers", tries.append)
    monkeypatch.setattr("ray.init", lambda **_: (_ for _ in ()).throw(ConnectionError("not yet")))
    waiting = Waiting(0.2, 1, print)
    with pytest.raises(ClusterNotReadyError, match="cannot be joined: not yet"), ray_session("h:1", waiting=waiting):
        pass
    assert len(tries) > 3
    tries.clear()
    monkeypatch.setattr("ray.init", lambda **_: (_ for _ in ()).throw(RuntimeError("Version mismatch")))
    with pytest.raises(ClusterError, match="Version mismatch"), ray_session("h:1", waiting=waiting):
        pass
    assert len(tries) == 1


def test_a_session_that_was_already_running_is_left_alone(monkeypatch):
    ended = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(True))
    with pytest.raises(ClusterError, match="has a Ray session already"), ray_session():
        pass
    assert not ended
