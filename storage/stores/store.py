"""The interface of an object store for exactly-once output, and its errors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class StoreError(Exception):
    """The store cannot do what was asked. The message is one sentence for the user, and says what to do."""


class AlreadyExistsError(StoreError):
    """A create-once write found an object with that key."""


class MissingError(StoreError):
    """The object does not exist."""


class ChangedError(StoreError):
    """The object exists in another version than the requested one."""


class UnavailableError(StoreError):
    """The store does not answer or is busy: the same call may succeed later."""


class DamagedError(StoreError):
    """The object exists, and its bytes are not valid for its kind."""


class ObjectError(StoreError):
    """This one object cannot be read, also after retries; the store serves others.

    It is refused, archived, on a broken part of the disk, or its body is too short each time.
    """


class OutputError(StoreError):
    """This one object of an output cannot be written or read, also after retries; others beside it can."""


NO_METADATA: Mapping[str, str] = {}
"""Of all objects in a listing together: a dict for each of millions would take more than their keys."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object's facts, from a listing or a HEAD."""

    key: str
    """Path below the store's root, with forward slashes."""
    size: int
    """Length in bytes."""
    etag: str
    """Version: the server's ETag; for a local file, its size and modification time in nanoseconds."""
    metadata: Mapping[str, str] = field(default_factory=lambda: NO_METADATA)
    """User metadata; only `head` fills them."""


FOLLOWED_LINKS = "links to folders (followed)"
"""Kind of the unlisted entries whose files are listed under the link's name."""


def is_hidden(key: str) -> bool:
    """True if a part of the key begins with `_` or `.`: readers of data folders skip it."""
    return any(part.startswith(("_", ".")) for part in key.split("/"))


def checked_key(key: str) -> str:
    """The key, unchanged. Raises StoreError for a key that may lead out of the store's root.

    Keys come from listings, and from plans and receipts, which may be untrusted.
    """
    if not key or key.startswith("/") or "\0" in key or {".", ".."} & set(key.split("/")):
        raise StoreError(f"{key!r} is not an object's key; wanted a path below the root, without `.` and `..`")
    return key


class ObjectStore(Protocol):
    """A root (folder, bucket or prefix) and the operations that the commit protocol needs."""

    @property
    def uri(self) -> str:
        """The root's path or URI, without credentials."""
        ...

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """The object's bytes, or `length` of them from `start`.

        Raises `MissingError`; `ChangedError` if `etag` is given and the object has another; `ObjectError` if only
        this object is refused.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """The object's facts with its user metadata, or None if it does not exist."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the store's own order, which differs by server."""
        ...

    def unlisted(self) -> Iterator[tuple[str, str]]:
        """Key and kind of entries below the root that are no objects, such as links to folders; none in a bucket."""
        ...

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the whole object once. Raises `AlreadyExistsError` if the key exists."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Writes the whole object, and replaces an existing one."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; does nothing if it does not exist."""
        ...

    def delete_many(self, keys: Sequence[str]) -> None:
        """Removes the objects, with as few requests as the store allows; keys that do not exist are left out."""
        ...
