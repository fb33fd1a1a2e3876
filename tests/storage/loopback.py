"""A bucket on loopback, in this process, whose replies a test can change as real gateways do."""

import hashlib
import html
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blocksight.storage.stores.s3 import S3Store


@dataclass
class Asked:
    """One request."""

    method: str
    key: str
    """Empty for a listing."""
    query: dict[str, str]
    headers: dict[str, str]
    """Headers, with names in lower case."""
    body: bytes


@dataclass
class Reply:
    """One reply. A header that is None is not sent. Without a length, the end of the connection ends the body."""

    status: int = 200
    headers: dict[str, str | None] = field(default_factory=dict)
    body: bytes = b""
    pause: float = 0.0
    """Seconds of pause before each byte of the body."""


def refused(status: int, code: str) -> Reply:
    """An error reply in S3's XML."""
    return Reply(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


def etag_of(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


class Bucket:
    """Holds objects by key, and the requests so far.

    `manners(asked, reply)` may change a reply or return another one; `listed(key, entry)` may change an
    object's entry in the listing, a dict of its XML elements.
    """

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.reset(objects or {})
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def reset(self, objects: dict[str, bytes]) -> None:
        """Resets the bucket: only these objects, no changed replies and no requests."""
        self.objects = dict(objects)
        self.metadata: dict[str, dict[str, str]] = {}
        self.page_size = 1000
        self.overlap = 0
        self.manners: Callable[[Asked, Reply], Reply | None] = lambda _asked, reply: reply
        self.listed: Callable[[str, dict[str, str]], dict[str, str]] = lambda _key, entry: entry
        self.asked: list[Asked] = []

    def __enter__(self) -> "Bucket":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, asked: Asked) -> Reply:
        with self._lock:
            self.asked.append(asked)
            reply = self._listing(asked) if not asked.key else self._object(asked)
            return self.manners(asked, reply) or reply

    def _object(self, asked: Asked) -> Reply:
        held = self.objects.get(asked.key)
        if asked.method == "PUT":
            if asked.headers.get("if-none-match") and held is not None:
                return refused(412, "PreconditionFailed")
            self.objects[asked.key] = asked.body
            own = {name: value for name, value in asked.headers.items() if name.startswith("x-amz-meta-")}
            self.metadata[asked.key] = own
            return Reply(headers={"ETag": etag_of(asked.body)})
        if asked.method == "DELETE":
            self.objects.pop(asked.key, None)
            return Reply(204)
        if held is None:
            return refused(404, "NoSuchKey")
        if asked.headers.get("if-match", etag_of(held)) != etag_of(held):
            return refused(412, "PreconditionFailed")
        return self._body(asked, held)

    def _body(self, asked: Asked, held: bytes) -> Reply:
        headers = {"ETag": etag_of(held), **self.metadata.get(asked.key, {})}
        wanted = asked.headers.get("range")
        if wanted is None:
            return Reply(200, headers, held)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(held)) + 1, len(held))
        if start >= len(held):
            return refused(416, "InvalidRange")
        content_range = f"bytes {start}-{stop - 1}/{len(held)}"
        return Reply(206, {**headers, "Content-Range": content_range}, held[start:stop])

    def _listing(self, asked: Asked) -> Reply:
        prefix, delimiter = asked.query.get("prefix", ""), asked.query.get("delimiter", "")
        after = asked.query.get("start-after", "")
        names = {_up_to(key, prefix, delimiter) for key in self.objects if key.startswith(prefix) and key > after}
        keys = sorted(names, key=str.encode)
        token = asked.query.get("continuation-token", "0")
        start = int(token) if token.isdigit() else 0
        shown, stop = keys[start : start + self.page_size], start + self.page_size
        more = stop < len(keys)
        token = f"<NextContinuationToken>{stop - self.overlap}</NextContinuationToken>" if more else ""
        encoding = asked.query.get("encoding-type")
        groups = [key for key in shown if delimiter and key.endswith(delimiter) and key != prefix]
        entries = "".join(_group(key, encoding) if key in groups else self._entry(key, encoding) for key in shown)
        encoding_type = f"<EncodingType>{encoding}</EncodingType>" if encoding else ""
        facts = f"<IsTruncated>{str(more).lower()}</IsTruncated>{encoding_type}{token}"
        body = f"<ListBucketResult>{facts}{entries}</ListBucketResult>"
        return Reply(200, {"Content-Type": "application/xml"}, body.encode())

    def _entry(self, key: str, encoding: str | None) -> str:
        shown = urllib.parse.quote(key) if encoding == "url" else key  # XML has no control characters
        held = self.objects[key]
        entry = self.listed(key, {"Key": shown, "Size": str(len(held)), "ETag": etag_of(held)})
        return (
            f"<Contents>{''.join(f'<{name}>{html.escape(value)}</{name}>' for name, value in entry.items())}</Contents>"
        )


def _up_to(key: str, prefix: str, delimiter: str) -> str:
    """The key, up to the first delimiter after the prefix."""
    name, found, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (key.removeprefix(prefix), "", "")
    return prefix + name + found


def _group(key: str, encoding: str | None) -> str:
    shown = urllib.parse.quote(key) if encoding == "url" else key
    return f"<CommonPrefixes><Prefix>{html.escape(shown)}</Prefix></CommonPrefixes>"


@contextmanager
def served() -> Iterator[tuple[Bucket, S3Store]]:
    """A bucket, and a store below d/ in it that asks once where the server fails: for many tests, for a client takes a
    while to make."""
    with pytest.MonkeyPatch.context() as patch, Bucket() as running:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setattr("blocksight.storage.stores.s3_client.ATTEMPTS", 1)
        yield running, S3Store("s3://b/d", running.url)


def _handler_of(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            place = urllib.parse.urlsplit(self.path)
            key = urllib.parse.unquote(place.path).lstrip("/").partition("/")[2]
            query = dict(urllib.parse.parse_qsl(place.query, keep_blank_values=True))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = bucket.answer(Asked(self.command, key, query, headers, body))
            self.send_response(reply.status)
            sent = {"Content-Length": str(len(reply.body)), **reply.headers}
            for name, value in sent.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.send_body(reply)
            self.close_connection = sent["Content-Length"] is None

        def send_body(self, reply: Reply) -> None:
            if not reply.pause:
                self.wfile.write(reply.body)
                return
            with suppress(OSError):  # the client has closed the connection
                for number in range(len(reply.body)):
                    time.sleep(reply.pause)
                    self.wfile.write(reply.body[number : number + 1])

        do_GET = do_PUT = do_HEAD = do_DELETE = handle_any

        def log_message(self, *_arguments: object) -> None:
            """Prints nothing."""

    return Handler
