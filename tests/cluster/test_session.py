"""The Ray session: loopback, token, its own processes alone."""

import os
import subprocess
import sys
import tempfile

import pytest

from cluster.errors import ClusterError
from cluster.session import UNSAFE_SWITCHES, ray_session
from tests.jobs.jobs_of import ROOT

pytestmark = pytest.mark.servers

PROGRAM = """
import os, pathlib
from cluster.session import ray_session

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
    assert "running True" in done.stdout
    assert "left 0" in done.stdout


@pytest.mark.parametrize("switch", UNSAFE_SWITCHES)
def test_switches_that_let_files_run_code_are_refused(monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(ClusterError, match=f"{switch} lets files run code"), ray_session():
        pass
