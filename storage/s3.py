"""S3 and what speaks like it, through s3fs: pinned reads, and one conditional PUT per object."""

import ipaddress
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast
from urllib.parse import urlsplit

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from fsspec.asyn import sync
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from storage.store import (
    AlreadyExistsError,
    ChangedError,
    MissingError,
    ObjectError,
    ObjectInfo,
    StoreError,
    UnavailableError,
    checked_key,
)

CONNECT_SECONDS = 4
"""Three attempts and the pauses between them end within 15 s at an endpoint that never answers."""
READ_SECONDS = 60
"""Of silence, not of the whole transfer."""
ATTEMPTS = 3
"""Per request, by botocore; s3fs's own repetition is set to one, for the two would multiply."""

CREDENTIALS_WANTED = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment, or run under a role"
)
MISSING_CODES = {"NoSuchKey", "404", "NotFound"}
CONFLICT_CODES = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "OperationAborted"}
BUSY_CODES = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "Throttling",
    "500",
    "502",
    "503",
    "504",
}
ARCHIVED_CODE = "InvalidObjectState"
FORBIDDEN_CODES = {"AccessDenied", "403", "Forbidden"}
"""What a store says of one object that may not be read, and of all where the credentials lack the right."""
DENIED_CODES = FORBIDDEN_CODES | {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthorizationHeaderMalformed",
}


METADATA_HOSTS = {"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"}
METADATA_ADDRESSES = {
    ipaddress.ip_address(text) for text in ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16")
}
"""Of clouds whose metadata service is not on a link-local address, or not on that alone."""


def check_endpoint(endpoint_url: str) -> None:
    """Refuses an endpoint with credentials in it, of another scheme, or on a metadata address (StoreError)."""
    if "@" in endpoint_url:
        raise StoreError(f"the endpoint URL holds user info; take it out and {CREDENTIALS_WANTED}")
    scheme, host = _scheme_and_host(endpoint_url)
    if scheme not in ("http", "https") or not host:
        raise StoreError(f"endpoint {endpoint_url!r} is not of the form https://host:port")
    address = _address(host)
    if host in METADATA_HOSTS or (address and (address.is_link_local or address in METADATA_ADDRESSES)):
        raise StoreError(f"endpoint {endpoint_url!r} is a link-local or metadata address, no object store")


def _scheme_and_host(url: str) -> tuple[str, str]:
    with suppress(ValueError):  # brackets or a port that are none
        parts = urlsplit(url)
        if parts.port != 0:
            return parts.scheme, (parts.hostname or "").rstrip(".")
    return "", ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in any spelling that the system's resolver takes (2852039166 is one); None: a name."""
    with suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    with suppress(ValueError):
        address = ipaddress.IPv6Address(host)
        return address.ipv4_mapped or address
    return None


class S3Store:
    """A bucket, or a prefix in one, as an object store. Credentials come from the environment alone."""

    def __init__(self, uri: str, endpoint_url: str | None = None) -> None:
        """`uri` is s3://bucket or s3://bucket/prefix. Connects on first use, once per process."""
        if endpoint_url is not None:
            check_endpoint(endpoint_url)
        self.bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        self._uri = f"s3://{self.bucket}/{prefix}" if prefix else f"s3://{self.bucket}"
        self.endpoint_url = endpoint_url
        if not self.bucket:
            raise StoreError(f"{uri!r} names no bucket; wanted s3://bucket/prefix")
        self._prefix = f"{prefix}/" if prefix else ""
        self._connection: tuple[int, S3FileSystem] | None = None
        self._endpoint = endpoint_url
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"S3Store({self._uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the connection: another process makes its own, from its own environment."""
        return S3Store, (self._uri, self.endpoint_url)

    @property
    def uri(self) -> str:
        return self._uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        wanted: dict[str, Any] = {"IfMatch": etag} if etag is not None else {}
        if start or length is not None:
            wanted["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        changed = ChangedError(f"{self._uri}/{key} has changed: it is not version {etag}")
        with self._explained(key, conflict=changed, reading=True):
            try:
                arguments = {"Bucket": self.bucket, "Key": self._key(key), **wanted}
                s3 = self.filesystem
                return cast(bytes, sync(s3.loop, _download, s3, arguments))
            except OSError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""
                raise

    def head(self, key: str) -> ObjectInfo | None:
        with self._explained(key):
            try:
                found = self._call("head_object", Key=self._key(key))
            except OSError as error:
                if _code(error) in MISSING_CODES:
                    return None
                raise
        return ObjectInfo(key, found["ContentLength"], found["ETag"], found.get("Metadata", {}))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        token: dict[str, str] = {}
        while True:
            with self._explained(prefix):
                page = self._call("list_objects_v2", Prefix=self._prefix + prefix, **token)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # a folder's marker is no object of ours
                    yield ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        with self._explained(key, conflict=AlreadyExistsError(f"{self._uri}/{key} stands already")):
            self._call("put_object", Key=self._key(key), Body=data, IfNoneMatch="*", Metadata=dict(metadata or {}))

    def put(self, key: str, data: bytes) -> None:
        kind = {"ContentType": "text/html; charset=utf-8"} if key.endswith(".html") else {}  # or a browser saves it
        with self._explained(key):
            self._call("put_object", Key=self._key(key), Body=data, **kind)

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._call("delete_object", Key=self._key(key))

    @property
    def filesystem(self) -> S3FileSystem:
        """The client of this process, for readers that take one of fsspec's: none survives a fork."""
        with self._lock:
            if self._connection is None or self._connection[0] != os.getpid():
                connection, self._endpoint = _connected(self.endpoint_url)
                self._connection = (os.getpid(), connection)
            return self._connection[1]

    def _key(self, key: str) -> str:
        """The key in the bucket."""
        return self._prefix + checked_key(key)

    def _call(self, method: str, **arguments: Any) -> Any:
        return self.filesystem.call_s3(method, Bucket=self.bucket, **arguments)

    @contextmanager
    def _explained(self, key: str, conflict: StoreError | None = None, *, reading: bool = False) -> Iterator[None]:
        """Turns the client's errors into sentences that name the object and never a credential."""
        try:
            yield
        except (*S3_RETRYABLE_ERRORS, OSError, ClientError, BotoCoreError, RecursionError) as error:
            if conflict is not None and _code(error) in CONFLICT_CODES:
                raise conflict from error
            sentence = self._sentence(key, error)
            if reading and _code(error) in FORBIDDEN_CODES | {ARCHIVED_CODE}:
                raise ObjectError(str(sentence)) from error
            raise sentence from error

    def _sentence(self, key: str, error: Exception) -> StoreError:
        where = f"{self._uri}/{key}" if key else self._uri
        at = f" at {self._endpoint}" if self._endpoint else ""
        code = _code(error)
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return StoreError(f"no credentials for {self._uri}{at}: {CREDENTIALS_WANTED}")
        if isinstance(error, RecursionError):
            return StoreError(f"{where}{at} is redirected without end: is that the store's own address?")
        if code in MISSING_CODES:
            return MissingError(f"there is no object {where}{at}")
        if code == "NoSuchBucket":
            return StoreError(f"there is no bucket {self.bucket!r}{at}")
        if code == ARCHIVED_CODE:
            return StoreError(f"{where}{at} is archived and cannot be read ({code}): restore it, or leave it out")
        if code in DENIED_CODES:
            return StoreError(f"access to {where}{at} was refused ({code}): {CREDENTIALS_WANTED}")
        if not code:
            return UnavailableError(f"{where}{at} cannot be reached: {type(error).__name__}: {error}")
        kind = UnavailableError if code in BUSY_CODES else StoreError
        return kind(f"{where}{at} failed with {code}: {error}")


def _connected(endpoint_url: str | None) -> tuple[S3FileSystem, str]:
    """A client with bounded patience, and the endpoint that it found, in the environment where none is given.

    Raises StoreError where that is refused.
    """
    connection = S3FileSystem(
        endpoint_url=endpoint_url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            # some stores do not know the checksums that newer clients add by default
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    connection.retries = 1
    try:
        client: Any = connection.connect()
    except ValueError:  # its text may hold credentials
        raise StoreError(
            "the endpoint in the environment (AWS_ENDPOINT_URL) is not of the form https://host:port"
        ) from None
    found = str(client.meta.endpoint_url)
    check_endpoint(found)
    return connection, found


async def _download(s3: S3FileSystem, arguments: Mapping[str, Any]) -> bytes:
    """Asks again where a body broke off: botocore's own attempts end with the headers."""
    for _ in range(ATTEMPTS - 1):
        reply = await s3._call_s3("get_object", **arguments)
        with suppress(*S3_RETRYABLE_ERRORS):
            return await _body(reply)
    return await _body(await s3._call_s3("get_object", **arguments))


async def _body(reply: Mapping[str, Any]) -> bytes:
    async with reply["Body"] as body:
        return await body.read()


def _code(error: BaseException) -> str:
    """The server's error code behind an exception of the client, or an empty text."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        if error.__cause__ is None:
            return ""
        error = error.__cause__
    return ""
