"""S3 and what speaks like it, through s3fs: pinned reads, and one conditional PUT per object."""

import ipaddress
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from storage.store import AlreadyExistsError, ChangedError, MissingError, ObjectInfo, StoreError

CONNECT_SECONDS = 5
READ_SECONDS = 60
ATTEMPTS = 3
"""Per request, by botocore; s3fs's own repetition is set to one, for the two would multiply."""

CREDENTIALS_WANTED = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment, or run under a role"
)
MISSING_CODES = {"NoSuchKey", "404", "NotFound"}
CONFLICT_CODES = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "OperationAborted"}
DENIED_CODES = {
    "AccessDenied",
    "403",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthorizationHeaderMalformed",
}


def check_endpoint(endpoint_url: str) -> None:
    """Refuses an endpoint with credentials in it, of another scheme, or on a metadata address (StoreError)."""
    parts = urlsplit(endpoint_url)
    if "@" in parts.netloc:
        raise StoreError(f"the endpoint URL holds user info; take it out and {CREDENTIALS_WANTED}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StoreError(f"endpoint {endpoint_url!r} is not of the form https://host:port")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return
    if address.is_link_local or address == ipaddress.ip_address("fd00:ec2::254"):
        raise StoreError(f"endpoint {endpoint_url!r} is a link-local or metadata address, no object store")


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

    def __repr__(self) -> str:
        return f"S3Store({self._uri!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the connection: another process makes its own, from its own environment."""
        return {name: value for name, value in self.__dict__.items() if name != "_s3"}

    @property
    def uri(self) -> str:
        return self._uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        wanted: dict[str, Any] = {"IfMatch": etag} if etag is not None else {}
        if start or length is not None:
            wanted["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        with self._explained(key, conflict=ChangedError(f"{self._uri}/{key} has changed: it is not version {etag}")):
            try:
                arguments = {"Bucket": self.bucket, "Key": self._prefix + key, **wanted}
                return cast(bytes, sync(self._s3.loop, self._get, arguments))
            except OSError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""
                raise

    def head(self, key: str) -> ObjectInfo | None:
        with self._explained(key):
            try:
                found = self._call("head_object", Key=self._prefix + key)
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
            self._call("put_object", Key=self._prefix + key, Body=data, IfNoneMatch="*", Metadata=dict(metadata or {}))

    def put(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self._call("put_object", Key=self._prefix + key, Body=data)

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._call("delete_object", Key=self._prefix + key)

    @cached_property
    def _s3(self) -> S3FileSystem:
        connection = S3FileSystem(
            endpoint_url=self.endpoint_url,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"max_attempts": ATTEMPTS, "mode": "standard"},
                # some stores do not know the checksums that newer clients add by default
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        )
        connection.retries = 1
        return connection

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._s3.call_s3(method, Bucket=self.bucket, **arguments)

    async def _get(self, arguments: Mapping[str, Any]) -> bytes:
        reply = await self._s3._call_s3("get_object", **arguments)
        async with reply["Body"] as body:
            return await body.read()

    @contextmanager
    def _explained(self, key: str, conflict: StoreError | None = None) -> Iterator[None]:
        """Turns the client's errors into sentences that name the object and never a credential."""
        where = f"{self._uri}/{key}" if key else self._uri
        at = f" at {self.endpoint_url}" if self.endpoint_url else ""
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreError(f"no credentials for {self._uri}{at}: {CREDENTIALS_WANTED}") from error
        except (TimeoutError, OSError, ClientError, BotoCoreError) as error:
            code = _code(error)
            if code in CONFLICT_CODES and conflict is not None:
                raise conflict from error
            if code in MISSING_CODES:
                raise MissingError(f"there is no object {where}{at}") from error
            if code == "NoSuchBucket":
                raise StoreError(f"there is no bucket {self.bucket!r}{at}") from error
            if code in DENIED_CODES:
                raise StoreError(f"access to {where}{at} was refused ({code}): {CREDENTIALS_WANTED}") from error
            raise StoreError(f"{where}{at} cannot be reached: {code or type(error).__name__}: {error}") from error


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
