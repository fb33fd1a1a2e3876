"""What a store must do for exactly-once output, and the errors it may raise."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class StoreError(Exception):
    """The store cannot do what was asked; the message is one sentence for the user, with the way out."""


class AlreadyExistsError(StoreError):
    """A create-once write met an object that stands already."""


class MissingError(StoreError):
    """The object is not there."""


class ChangedError(StoreError):
    """The object is there, but its version is not the one that was asked for."""


class UnavailableError(StoreError):
    """The store does not answer, or says that it cannot just now: the same call may succeed later."""


class DamagedError(StoreError):
    """The object is there, and its bytes are not what its name says."""


class ObjectError(StoreError):
    """This one object cannot be read, and asking again does not help; the store serves others.

    It is refused, archived, on a broken part of the disk, or its body stays short.
    """


class OutputError(StoreError):
    """This one object of an output cannot be written or read, however often it is asked for; others beside it can."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing or a HEAD says of one object."""

    key: str
    """Path below the store's root, with forward slashes."""
    size: int
    """Length in bytes."""
    etag: str
    """Version: the server's ETag, or for a local file its size and modification time in nanoseconds."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """User metadata, filled by `head` alone."""


def checked_key(key: str) -> str:
    """The key, if it names something below a store's root. Raises StoreError for one that may lead out of it.

    Keys come from listings, but also from plans and receipts that a stranger may have written.
    """
    if not key or key.startswith("/") or "\0" in key or {".", ".."} & set(key.split("/")):
        raise StoreError(f"{key!r} is no key of an object: wanted a path below the root, without `.` and `..`")
    return key


class ObjectStore(Protocol):
    """A root (folder, bucket or prefix) and the few operations that the commit protocol stands on."""

    @property
    def uri(self) -> str:
        """Where the root is, as a user would write it; never holds a credential."""
        ...

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """The object's bytes, or `length` of them from `start`.

        Raises `MissingError`, `ChangedError` where `etag` is given and the object has another, and `ObjectError`
        where this object alone is refused.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """The object's facts with its user metadata, or None where it is not there."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the store's own order (servers differ in theirs)."""
        ...

    def unlisted(self) -> Iterator[tuple[str, str]]:
        """Key and kind of what lies below the root and is no object, such as a link to a folder; none in a bucket."""
        ...

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the object whole, once: raises `AlreadyExistsError` where the key stands already."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Writes the object whole, replacing what stands there."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; nothing happens where it is not there."""
        ...
