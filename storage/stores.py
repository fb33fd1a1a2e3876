"""Opens a store by its URI, and probes whether it can carry exactly-once output."""

import threading
import uuid
from pathlib import Path

from storage.local import LocalStore
from storage.store import AlreadyExistsError, ObjectStore, StoreError

RACERS = 4


class WeakStoreError(StoreError):
    """The store lets a second writer replace what stands: output there could not be exactly-once."""


def open_store(uri: str, endpoint_url: str | None = None) -> ObjectStore:
    """The store with this root: a local path, file://PATH or s3://BUCKET/PREFIX. Raises StoreError for others."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri))
    if scheme == "file":
        return LocalStore(Path(rest))
    if scheme == "s3":
        from storage.s3 import S3Store  # its clients take most of a second to import, and local jobs need none

        return S3Store(uri, endpoint_url)
    raise StoreError(f"{uri!r}: {scheme}:// is not known; known: a local path, file://, s3://")


def probe(store: ObjectStore, prefix: str) -> None:
    """Proves that the store creates an object once, and leaves nothing behind.

    A second write of one key must fail, and of four at once exactly one must win and be read back.
    Raises WeakStoreError where that does not hold, and StoreError where nothing can be written.
    """
    key = f"{prefix}{uuid.uuid4().hex}"
    try:
        _second_must_fail(store, f"{key}-twice")
        _one_must_win(store, f"{key}-race")
    finally:
        for name in ("twice", "race"):
            store.delete(f"{key}-{name}")


def _second_must_fail(store: ObjectStore, key: str) -> None:
    store.create(key, b"first")
    try:
        store.create(key, b"second")
    except AlreadyExistsError:
        return
    raise _weak(store, "a second write of the same object succeeded")


def _one_must_win(store: ObjectStore, key: str) -> None:
    winners: list[bytes] = []
    start = threading.Barrier(RACERS)

    def race(body: bytes) -> None:
        start.wait()
        try:
            store.create(key, body)
        except StoreError:
            return
        winners.append(body)

    racers = [threading.Thread(target=race, args=(f"racer {number}".encode(),)) for number in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    if len(winners) != 1 or store.read(key) != winners[0]:
        raise _weak(store, f"of {RACERS} writers at once {len(winners)} believed to be the first")


def _weak(store: ObjectStore, seen: str) -> WeakStoreError:
    return WeakStoreError(
        f"{store.uri} cannot hold exactly-once output: {seen} (it ignores If-None-Match); use AWS S3, a current "
        "SeaweedFS or another store with conditional writes, or a local folder"
    )
