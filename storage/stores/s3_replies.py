"""Checks the replies of an S3 server: versions, ranges, lengths and listings."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blocksight.storage.stores.store import StoreError, UnavailableError

HEX_TAG = re.compile(r"[0-9A-Fa-f]{32}(-[0-9]+)?")
CONTENT_RANGE = re.compile(r"bytes\s+(\d+)-(\d+)/(\d+|\*)")
ERROR_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
LISTING_FIELDS = ("IsTruncated", "Contents", "KeyCount", "MaxKeys", "Name")
ERROR_BYTES = 1000
"""Bytes of a body that are searched for an error."""
MAX_IDLE_PAGES = 100
"""Pages in a row without a new key after which a listing is given up. AWS sends a few after many deletions."""


PACKED_KEYS = 1_000
"""Keys of a listing that are packed together."""


@dataclass(frozen=True)
class GetRequest:
    """One GET: the version and the range of bytes."""

    etag: str | None
    start: int
    length: int | None

    @property
    def range(self) -> str | None:
        """The Range header; None: the whole object."""
        if not self.start and not self.length:
            return None
        return f"bytes={self.start}-{'' if self.length is None else self.start + self.length - 1}"


def version(etag: str) -> str:
    """An ETag in normal spelling: quoted, not weak, hexadecimal digits in lower case."""
    core = etag.strip().removeprefix("W/").removeprefix("w/").strip('"')
    return f'"{core.lower() if HEX_TAG.fullmatch(core) else core}"'


def refuse_error_body(reply: Mapping[str, Any], body: bytes, where: str) -> None:
    """Raises UnavailableError if a reply of status 200 holds an error; it then has no ETag."""
    if "ETag" not in reply and b"<Error>" in body[:ERROR_BYTES]:
        code = ERROR_CODE.search(body[:ERROR_BYTES])
        code_text = code[1].decode() if code else "no code"
        raise UnavailableError(f"{where} is answered with status 200 and an error inside ({code_text})")


def expected_length(reply: Mapping[str, Any], wanted: GetRequest, where: str) -> int | None:
    """Bytes that the body must have; None if the reply does not say.

    Raises StoreError if the reply is not the requested range.
    """
    if wanted.range is None:
        return reply.get("ContentLength")
    sent = CONTENT_RANGE.fullmatch(reply.get("ContentRange", "").strip())
    if sent is None:
        return _unranged_length(reply, wanted, where)
    first, last, total = int(sent[1]), int(sent[2]), sent[3]
    asked = wanted.length if wanted.length is not None else last + 1 - first
    if total != "*":
        left = int(total) - wanted.start
        asked = left if wanted.length is None else min(wanted.length, left)
    if first != wanted.start or last + 1 - first > asked:
        raise StoreError(
            f"{where}: the store answers {wanted.range} with the range {first}-{last}; images in tar shards and "
            "Parquet cannot be read from it, use another store or another address of it"
        )
    return asked


def _unranged_length(reply: Mapping[str, Any], wanted: GetRequest, where: str) -> int | None:
    """Expected bytes of a reply without a range. Raises StoreError if its body cannot be the requested bytes."""
    length = reply.get("ContentLength")
    is_partial = reply["ResponseMetadata"]["HTTPStatusCode"] == 206
    fits = length is None or wanted.length is None or length <= wanted.length
    if fits and (is_partial or wanted.start == 0):
        return wanted.length if wanted.etag is not None and wanted.length is not None else length
    raise StoreError(
        f"{where}: the store ignores the Range header ({wanted.range} is answered with {length} bytes, the whole "
        "object); use another store or another address of it"
    )


def stored_metadata(reply: Mapping[str, Any]) -> dict[str, str]:
    """User metadata with names in lower case: some gateways capitalise them."""
    return {name.lower(): value for name, value in reply.get("Metadata", {}).items()}


def refuse_failed_deletes(reply: Mapping[str, Any], where: str) -> None:
    """Raises StoreError if the reply to a bulk delete names an object that is still there."""
    for failed in reply.get("Errors", []):
        if failed.get("Code") != "NoSuchKey":
            raise StoreError(
                f"deleting {where} and others was refused for {failed.get('Key')!r} ({failed.get('Code')}): "
                "the credentials in use may lack s3:DeleteObject"
            )


class Listing:
    """One listing, read page by page.

    A repeated key is taken once: the pages of some gateways overlap.
    """

    def __init__(self, where: str, prefix: str) -> None:
        self.where, self.prefix = where, prefix
        self.num_repeated = 0
        self._keys = _SeenKeys()
        self._tokens: set[str] = set()
        self._num_idle = 0

    def new_entries(self, page: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The page's new objects, without folder markers.

        Raises StoreError for a key outside the prefix, a negative size, and a reply that is no listing.
        """
        if not any(name in page for name in LISTING_FIELDS):
            raise StoreError(f"{self.where}: the store's answer is no listing; is that its S3 address?")
        before = len(self._keys)
        for entry in page.get("Contents", []):
            key = entry.get("Key")
            if not key:
                raise StoreError(f"{self.where}: the store lists an object without a name")
            if not key.startswith(self.prefix):
                raise StoreError(f"{self.where}: the store lists {key!r}, which does not begin with {self.prefix!r}")
            if entry.get("Size", 0) < 0:
                raise StoreError(f"{self.where}: the store lists {key!r} with {entry['Size']} bytes")
            if not self._keys.is_new(key):
                self.num_repeated += 1
                continue
            if not key.endswith("/"):  # a folder marker is not our object
                yield entry
        self._num_idle = 0 if len(self._keys) > before else self._num_idle + 1

    def next_token(self, page: Mapping[str, Any]) -> str | None:
        """The next page's token; None after the last page. Raises StoreError if the listing does not end."""
        token = page.get("NextContinuationToken")
        if not token:
            if page.get("IsTruncated"):
                raise StoreError(f"{self.where}: the listing is truncated, and the store sends no continuation token")
            return None
        if token in self._tokens or self._num_idle >= MAX_IDLE_PAGES:
            if (
                page.get("IsTruncated") is False
            ):  # some servers send a token on the last page, and repeat pages if it is used
                return None
            raise StoreError(
                f"{self.where}: the listing does not move on after {len(self._keys)} keys; the store ignores the "
                "continuation token, use another store or another address of it"
            )
        self._tokens.add(token)
        return token


class _SeenKeys:
    """The keys that a listing has named: packed while they ascend, and in a set from the first that does not."""

    def __init__(self) -> None:
        self._count, self._last = 0, ""
        self._ascending: list[str] = []
        self._packed: list[bytes] = []
        self._keys: set[str] | None = None

    def __len__(self) -> int:
        return self._count

    def is_new(self, key: str) -> bool:
        """True if the key was not named before; it is from now on."""
        if self._keys is None and key > self._last:
            self._note(key)
        else:
            if self._keys is None:
                self._keys = {*self._unpacked()}
            if key in self._keys:
                return False
            self._keys.add(key)
        self._count += 1
        return True

    def _note(self, key: str) -> None:
        self._last = key
        self._ascending.append(key)
        if len(self._ascending) == PACKED_KEYS:
            self._packed.append(zlib.compress(json.dumps(self._ascending).encode()))
            self._ascending = []

    def _unpacked(self) -> Iterator[str]:
        for packed in self._packed:
            yield from json.loads(zlib.decompress(packed))
        yield from self._ascending
        self._packed, self._ascending = [], []
