"""S3 and compatible servers as an object store, through s3fs: pinned reads, one conditional PUT per object."""

import asyncio
import base64
import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, cast

from botocore.exceptions import BotoCoreError, ClientError
from fsspec.asyn import sync
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from blocksight.storage.stores.locations import S3, normal_place
from blocksight.storage.stores.s3_client import ATTEMPTS, Connection, connect
from blocksight.storage.stores.s3_endpoints import endpoint_for
from blocksight.storage.stores.s3_errors import (
    CONFLICT_CODES,
    DELETE,
    HEAD,
    LIST,
    MISSING_CODES,
    RANGE_CODES,
    READ,
    UNSUPPORTED_STATUS,
    WRITE,
    Action,
    as_read_error,
    as_store_error,
    code_of,
    status_of,
)
from blocksight.storage.stores.s3_replies import (
    ERROR_BYTES,
    GetRequest,
    Listing,
    expected_length,
    refuse_error_body,
    refuse_failed_deletes,
    stored_metadata,
    version,
)
from blocksight.storage.stores.split_listing import PAGES_ALONE, ListingProgress, SplitListing
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    ObjectInfo,
    StoreError,
    UnavailableError,
    checked_key,
)

CHUNK_BYTES = 1 << 20
DIRECTORY_BUCKET = "--x-s3"
"""How the names of S3's directory buckets end."""
KEYS_PER_DELETE = 1_000
"""The most keys of one bulk delete."""
MAX_LAG_SECONDS = 90.0
"""How far a read may fall behind the slowest link: time for one read timeout of the client and one more attempt."""
MIN_BYTES_PER_SECOND = 16 << 10
"""The slowest link: it reads a window of 8 MiB before the watchdog ends the process."""


class S3Store:
    """A bucket, or a prefix in one, as an object store. Credentials come only from the environment."""

    def __init__(self, uri: str, endpoint_url: str | None = None) -> None:
        """`uri` is s3://bucket or s3://bucket/prefix, `endpoint_url` is URL or BUCKET=URL,BUCKET=URL.

        Connects on first use, once per process.
        """
        self._uri = normal_place(uri)
        self.bucket, _, prefix = self._uri.removeprefix(S3).partition("/")
        self.endpoint_url = endpoint_for(self._uri, endpoint_url)
        self._prefix = f"{prefix}/" if prefix else ""
        self._connection: Connection | None = None
        self._process = 0
        """The process that connected."""
        self._lock = threading.Lock()
        self._has_warned = False

    def __repr__(self) -> str:
        return f"S3Store({self._uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles no connection: another process makes its own, from its own environment."""
        return S3Store, (self._uri, self.endpoint_url)

    @property
    def uri(self) -> str:
        return self._uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        if length == 0 and etag is None:
            return b""
        wanted = GetRequest(etag, start, length)
        changed = ChangedError(f"{self._uri}/{key} has changed: it is not version {etag}")
        with self._errors_naming(key, READ, conflict=changed):
            try:
                place = {"Bucket": self.bucket, "Key": self._key(key)}
                s3 = self.filesystem
                return cast(bytes, sync(s3.loop, _download, s3, place, wanted, f"{self._uri}/{key}"))
            except OSError as error:
                if code_of(error) not in RANGE_CODES:
                    raise
                if etag is not None:
                    raise changed from error
                return b""

    def head(self, key: str) -> ObjectInfo | None:
        with self._errors_naming(key, HEAD):
            try:
                found = self._call("head_object", Key=self._key(key))
            except OSError as error:
                if code_of(error) in MISSING_CODES:
                    return None
                raise
        if "ContentLength" not in found or "ETag" not in found:
            listed = self._listed_entry(key)
            found = {**found, "ContentLength": listed["Size"], "ETag": listed["ETag"]}
        return ObjectInfo(key, found["ContentLength"], version(found["ETag"]), stored_metadata(found))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for entry in self._listed_entries(prefix):
            key = entry["Key"].removeprefix(self._prefix)
            if "ETag" in entry and "Size" in entry:
                yield ObjectInfo(key, entry["Size"], version(entry["ETag"]))
                continue
            found = self.head(key)  # slow, but needed: the listings of some stores lack one of the two
            if found is not None:
                yield ObjectInfo(key, found.size, found.etag)

    def _listed_entries(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        """The listing's entry of each object, each once."""
        listing = Listing(f"{self._uri}/{prefix}", self._prefix + prefix)
        progress = ListingProgress(self._uri)
        first: list[Mapping[str, Any]] = []
        options: dict[str, str] = {}
        for num_pages in count(1):
            page = self._page(Prefix=self._prefix + prefix, **options)
            entries = list(listing.new_entries(page))
            progress.add(len(entries))
            yield from entries
            token = listing.next_token(page)
            if token is None:
                break
            options = {"ContinuationToken": token}
            first += entries if num_pages <= PAGES_ALONE else []
            if num_pages == PAGES_ALONE and self._may_be_split(listing):
                rest = SplitListing(self._page, self._uri, progress).entries(self._prefix + prefix, first)
                if rest is not None:
                    known = {entry["Key"] for entry in first}
                    yield from (entry for entry in rest if entry["Key"] not in known)
                    break
        if listing.num_repeated and not self._has_warned:
            self._has_warned = True
            logging.getLogger(__name__).warning(
                "%s: the store lists %d keys more than once; each is taken once", self._uri, listing.num_repeated
            )

    def _page(self, **options: str) -> Mapping[str, Any]:
        """One page of a listing. Raises StoreError."""
        with self._errors_naming(options["Prefix"].removeprefix(self._prefix), LIST):
            return cast(Mapping[str, Any], self._call("list_objects_v2", **options))

    def _may_be_split(self, listing: Listing) -> bool:
        """True if the pages so far are as S3 makes them. Directory buckets list in no order."""
        return not listing.num_repeated and not self.bucket.endswith(DIRECTORY_BUCKET)

    def _listed_entry(self, key: str) -> Mapping[str, Any]:
        """The listing's entry of one object, for a HEAD without length or version. Raises StoreError."""
        for entry in self._listed_entries(key):
            if entry["Key"] == self._prefix + key and "ETag" in entry and "Size" in entry:
                return entry
        raise StoreError(
            f"{self._uri}/{key}: neither HEAD nor the listing has the object's length and version (ETag); use "
            "another store or another address of it"
        )

    def unlisted(self) -> Iterator[tuple[str, str]]:
        yield from ()  # a bucket holds only objects

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        with self._errors_naming(key, WRITE, conflict=AlreadyExistsError(f"{self._uri}/{key} already exists")):
            self._write(key, data, IfNoneMatch="*", Metadata=dict(metadata or {}))

    def put(self, key: str, data: bytes) -> None:
        kind = (
            {"ContentType": "text/html; charset=utf-8"} if key.endswith(".html") else {}
        )  # else a browser downloads it
        with self._errors_naming(key, WRITE):
            self._write(key, data, **kind)

    def delete(self, key: str) -> None:
        with self._errors_naming(key, DELETE):
            self._call("delete_object", Key=self._key(key))

    def delete_many(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), KEYS_PER_DELETE):
            some = keys[start : start + KEYS_PER_DELETE]
            named = {"Objects": [{"Key": self._key(key)} for key in some], "Quiet": True}
            with self._errors_naming(some[0], DELETE):
                try:
                    reply = self._call("delete_objects", Delete=named)
                except OSError as error:
                    if status_of(error) not in UNSUPPORTED_STATUS:
                        raise
                    reply = {}
                    for key in some:
                        self.delete(key)
            refuse_failed_deletes(reply, f"{self._uri}/{some[0]}")

    @property
    def filesystem(self) -> S3FileSystem:
        """This process's client, for readers that take an fsspec file system. A forked process makes a new one."""
        with self._lock:
            if self._connection is None or self._process != os.getpid():
                self._connection, self._process = connect(self._uri, self.endpoint_url), os.getpid()
            return self._connection.filesystem

    def _key(self, key: str) -> str:
        """The key in the bucket."""
        return self._prefix + checked_key(key)

    def _write(self, key: str, data: bytes, **arguments: Any) -> None:
        """One PUT with its checksum, which a bucket with Object Lock demands, and every store knows."""
        checksum = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        self._call("put_object", Key=self._key(key), Body=data, ContentMD5=checksum, **arguments)

    def _call(self, method: str, **arguments: Any) -> Any:
        return self.filesystem.call_s3(method, Bucket=self.bucket, **arguments)

    @contextmanager
    def _errors_naming(self, key: str, action: Action, conflict: StoreError | None = None) -> Iterator[None]:
        """Turns the client's errors into StoreErrors that name the action and the object, and no credential."""
        try:
            yield
        except (*S3_RETRYABLE_ERRORS, OSError, ClientError, BotoCoreError, RecursionError, ValueError) as error:
            if conflict is not None and code_of(error) in CONFLICT_CODES:
                raise conflict from error
            where = f"{self._uri}/{key}" if key else self._uri
            store_error = as_store_error(error, where, action, self._connection)
            raise (as_read_error(error, store_error) if action is READ else store_error) from error


async def _download(s3: S3FileSystem, place: Mapping[str, str], wanted: GetRequest, where: str) -> bytes:
    """The bytes. Raises UnavailableError if they take longer than on the slowest link."""
    deadline = asyncio.timeout(MAX_LAG_SECONDS)
    try:
        async with deadline:
            return await _complete_body(s3, place, wanted, where, deadline)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        slow = f"for {MAX_LAG_SECONDS:g} s it was silent or behind {MIN_BYTES_PER_SECOND:,} bytes a second"
        raise UnavailableError(f"{where} comes too slowly: {slow}") from error


async def _complete_body(
    s3: S3FileSystem, place: Mapping[str, str], wanted: GetRequest, where: str, deadline: asyncio.Timeout
) -> bytes:
    """The bytes. Repeats the request if a body breaks off or ends early: botocore retries only until the headers."""
    found = ""
    for attempt in range(ATTEMPTS):
        reply = await _checked_reply(s3, place, wanted, where)
        try:
            body = await _body(reply, wanted.length and max(wanted.length, ERROR_BYTES), deadline)
        except S3_RETRYABLE_ERRORS:
            if attempt + 1 == ATTEMPTS:
                raise
            continue
        refuse_error_body(reply, body, where)
        expected = expected_length(reply, wanted, where)
        if expected is None or len(body) == expected:
            return body
        found = f"{len(body)} bytes in place of {expected}"
    raise UnavailableError(f"{where} was sent with {found}, {ATTEMPTS} times in a row")


async def _checked_reply(
    s3: S3FileSystem, place: Mapping[str, str], wanted: GetRequest, where: str
) -> Mapping[str, Any]:
    """The store's reply in the wanted version. Raises ChangedError.

    The version is compared here as well: some stores ignore If-Match, and some find no match because they spell
    the version in two ways.
    """
    asked = {**place, **({"Range": wanted.range} if wanted.range else {})}
    if wanted.etag is None:
        return await s3._call_s3("get_object", **asked)
    try:
        reply = await s3._call_s3("get_object", **asked, IfMatch=wanted.etag)
    except OSError as error:
        if code_of(error) not in CONFLICT_CODES:
            raise
        reply = await s3._call_s3("get_object", **asked)
    etag = reply.get("ETag") or (await s3._call_s3("head_object", **place)).get("ETag")
    if etag is None or version(etag) != version(wanted.etag):
        reply["Body"].close()
        raise ChangedError(f"{where} has changed: version {etag}, wanted {wanted.etag}")
    return reply


async def _body(reply: Mapping[str, Any], most: int | None, deadline: asyncio.Timeout) -> bytes:
    """The body; at most one byte more than `most`, which shows that it is too long."""
    async with reply["Body"] as body:
        parts, num_bytes = [], 0
        while most is None or num_bytes <= most:
            part = await body.read(CHUNK_BYTES if most is None else min(CHUNK_BYTES, most + 1 - num_bytes))
            if not part:
                break
            parts.append(part)
            num_bytes += len(part)
            deadline.reschedule(extended_deadline(deadline.when(), asyncio.get_running_loop().time(), len(part)))
        return b"".join(parts)


def extended_deadline(deadline: float | None, now: float, num_bytes: int) -> float:
    """The new deadline of a read after `num_bytes` arrived: later by their time on the slowest link.

    It is at most `MAX_LAG_SECONDS` from `now`: bytes that came fast give no extra time.
    """
    latest = now + MAX_LAG_SECONDS
    return latest if deadline is None else min(deadline + num_bytes / MIN_BYTES_PER_SECOND, latest)
