"""Opens a store by its URI, and probes whether it can hold exactly-once output."""

import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.locations import S3, normal_place, split_pattern, split_place
from blocksight.storage.stores.object_columns import evenly_spread
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.s3_endpoints import endpoint_for
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    MissingError,
    ObjectError,
    ObjectInfo,
    ObjectStore,
    StoreError,
    UnavailableError,
)

NUM_WRITERS = 4
NUM_SAMPLES = 8
"""Objects of an input that are tried before it counts as unreadable."""


class WeakStoreError(StoreError):
    """The store breaks a condition of exactly-once output, for example: a second writer can replace an object."""


def open_store(uri: str, endpoint_url: str | None = None, *, follows_links: bool = False) -> ObjectStore:
    """The store with this root: a local path, file://PATH or s3://BUCKET/PREFIX. Raises StoreError for other text.

    `follows_links`: see `LocalStore`.
    """
    place = normal_place(uri)
    if place.startswith(S3):
        from blocksight.storage.stores.s3 import (
            S3Store,  # slow to import (most of a second), and local jobs do not need it
        )

        return S3Store(place, endpoint_url)
    return LocalStore(Path(place), follows_links=follows_links)


def open_file(uri: str, endpoint_url: str | None = None) -> tuple[ObjectStore, str]:
    """The store that holds one file, with short retries, and the file's key there.

    Raises StoreError if the URI cannot be a file's.
    """
    place = normal_place(uri)
    folder, name = split_place(place)
    if not name:
        raise StoreError(f"{folder} names no file; wanted a path, file:///PATH or s3://bucket/key")
    return PatientStore(open_store(folder, endpoint_for(place, endpoint_url)), SHORT_PATIENCE_SECONDS), name


def open_bucket(uri: str, endpoint_url: str | None = None) -> tuple[ObjectStore, str]:
    """The whole bucket that holds one object, with short retries, and the object's key there.

    Raises StoreError if the URI is no object's in a bucket.
    """
    place = normal_place(uri)
    bucket, _, key = place.removeprefix(S3).partition("/")
    if not place.startswith(S3) or not key:
        raise StoreError(f"{uri} names no object in a bucket; wanted s3://bucket/key")
    return PatientStore(open_store(f"{S3}{bucket}", endpoint_for(place, endpoint_url)), SHORT_PATIENCE_SECONDS), key


def open_named(
    uri: str, endpoint_url: str | None = None, *, wait_seconds: float = SHORT_PATIENCE_SECONDS
) -> tuple[ObjectStore, str]:
    """The store of a folder or prefix and "", or the store that holds a single object and the object's key.

    The store decides which of the two it is, never the spelling: a prefix may be called data.v1. A name with `*` that
    is neither gives the store of the folder before it, and the pattern in place of a key. `wait_seconds`: how long to
    wait for the store, here and in each call of the store that is returned. A name that is both an object and a prefix
    is the object, unless that is empty.
    """
    place = normal_place(uri)
    folder, name = split_place(place)
    endpoint_url = endpoint_for(place, endpoint_url)  # of the place; its parent may have another

    def opened(root: str) -> PatientStore:
        return PatientStore(open_store(root, endpoint_url, follows_links=True), wait_seconds)

    if name and _is_object(opened(folder), name):
        return opened(folder), name
    store = opened(uri)
    root, pattern = split_pattern(place)
    if pattern and next(iter(store.list()), None) is None:
        return opened(root), pattern
    return store, ""


def _is_object(store: ObjectStore, name: str) -> bool:
    try:
        found = store.head(name)
    except UnavailableError:
        raise
    except StoreError:
        return False  # credentials for the prefix alone may not allow HEAD of its name
    if found is None:
        return False
    return found.size > 0 or next(iter(store.list(f"{name}/")), None) is None


def probe(store: ObjectStore, prefix: str) -> None:
    """Checks that the store creates an object once and reports it correctly.

    Leaves no object behind, unless this role may not delete: a job needs no right to.

    A second create of one key must fail. Of four creates at once exactly one must succeed and be read back. Length,
    version, metadata, range and listing of an object must match what was written. Raises WeakStoreError if a check
    fails, and StoreError if nothing can be written.
    """
    key = f"{prefix}{uuid.uuid4().hex}"
    with _removed_afterwards(store, f"{key}-twice") as twice:
        _check_second_create_fails(store, twice)
    with _removed_afterwards(store, f"{key}-race") as race:
        _check_one_writer_wins(store, race)
    with _removed_afterwards(store, f"{key}-echo") as echo:
        _check_read_back(store, echo)
    if store.head(echo) is not None and _is_removed(store, echo):
        raise _weak_store_error(store, "an object that was deleted is still there")


def probe_reads(store: ObjectStore, objects: Sequence[ObjectInfo]) -> None:
    """Checks on a few listed objects that the store returns the requested version and range.

    One good object is enough. Raises StoreError if the store ignores ranges, or none of the objects can be read.
    """
    chosen = evenly_spread(lambda: (info for info in objects if info.size > 1), NUM_SAMPLES)
    errors: list[StoreError] = []
    for info in chosen:
        try:
            _check_ranges(store, info)
            return
        except UnavailableError:
            return  # the readers wait for a busy store
        except (MissingError, ChangedError, ObjectError) as error:
            errors.append(error)
    if errors:
        raise StoreError(f"no object that was tried ({len(errors)}) can be read as {store.uri} lists it: {errors[0]}")


@contextmanager
def _removed_afterwards(store: ObjectStore, key: str) -> Iterator[str]:
    """Yields the key and deletes its object afterwards; not after a store's error, as another call may take long."""
    try:
        yield key
    except WeakStoreError:
        _is_removed(store, key)
        raise
    _is_removed(store, key)


def _is_removed(store: ObjectStore, key: str) -> bool:
    """Removes the object. Returns False if this role may not; raises UnavailableError."""
    try:
        store.delete(key)
    except UnavailableError:
        raise
    except StoreError:
        return False
    return True


def _check_second_create_fails(store: ObjectStore, key: str) -> None:
    try:
        is_first = _creates_first(store, key, b"first")
    except UnavailableError:
        raise
    except StoreError as error:
        store.put(key, b"first")  # raises where nothing can be written at all
        raise _weak_store_error(
            store, f"it writes objects and refuses the condition If-None-Match ({error})"
        ) from error
    if not is_first:
        raise StoreError(f"{store.uri} refuses to create {key}, though no other writer knows that key")
    if _creates_first(store, key, b"second"):
        raise _weak_store_error(store, "a second write of the same object succeeded (it ignores If-None-Match)")


def _creates_first(store: ObjectStore, key: str, body: bytes) -> bool:
    """True if this write created the object. After an error, the stored bytes decide: the reply may be lost."""
    try:
        store.create(key, body)
    except StoreError as error:
        try:
            stored = store.read(key)
        except MissingError:
            raise error from None
        if stored != body and not isinstance(error, AlreadyExistsError):
            raise
        return stored == body
    return True


def _check_one_writer_wins(store: ObjectStore, key: str) -> None:
    start = threading.Barrier(NUM_WRITERS)

    def race(body: bytes) -> bytes | None:
        start.wait()
        return body if _creates_first(store, key, body) else None

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        outcomes = pool.map(race, (f"racer {number}".encode() for number in range(NUM_WRITERS)))
        winners = [body for body in outcomes if body is not None]
    if len(winners) != 1 or store.read(key) != winners[0]:
        raise _weak_store_error(
            store, f"of {NUM_WRITERS} writers at once {len(winners)} won (it ignores If-None-Match)"
        )


def _check_read_back(store: ObjectStore, key: str) -> None:
    body, metadata = b"0123456789", {"attempt": "Probe-1", "ok": "1"}
    with suppress(AlreadyExistsError):  # only we know the key: a reply was lost, and the client repeated the call
        store.create(key, body, metadata=metadata)
    info = store.head(key)
    if info is None or info.size != len(body):
        raise _weak_store_error(store, f"an object of {len(body)} bytes has {info.size if info else 'none'} by HEAD")
    if {name: info.metadata.get(name) for name in metadata} != metadata:
        raise _weak_store_error(store, f"of an object's metadata {metadata} it keeps {dict(info.metadata)}")
    if [(one.key, one.size, one.etag) for one in store.list(key)] != [(key, info.size, info.etag)]:
        raise _weak_store_error(
            store, "its listing does not name an object that was written, with its length and version (ETag)"
        )
    if store.read(key, etag=info.etag, start=3, length=4) != body[3:7]:
        raise _weak_store_error(store, "it answers a range with other bytes")
    store.put(key, body * 2)
    try:
        store.read(key, etag=info.etag)
    except ChangedError:
        return
    raise _weak_store_error(store, "an object that was replaced keeps its version (ETag), or is not replaced")


def _check_ranges(store: ObjectStore, info: ObjectInfo) -> None:
    def read(start: int, length: int) -> bytes:
        return store.read(info.key, etag=info.etag, start=start, length=length)

    head = read(0, 2)
    if len(head) != 2 or read(1, 1) != head[1:] or len(read(info.size - 1, 1)) != 1:
        raise StoreError(
            f"{store.uri} answers a range of {info.key} with other bytes than were asked for; use another store or "
            "another address of it"
        )
    if _is_longer(store, info):
        raise StoreError(
            f"{store.uri} lists {info.key} with {info.size} bytes, and more are there; use another store or another "
            "address of it"
        )


def _is_longer(store: ObjectStore, info: ObjectInfo) -> bool:
    """True if there are bytes beyond the listed length. Stores refuse that range in many ways."""
    try:
        return bool(store.read(info.key, etag=info.etag, start=info.size, length=1))
    except UnavailableError:
        raise
    except StoreError:
        return False


def _weak_store_error(store: ObjectStore, seen: str) -> WeakStoreError:
    return WeakStoreError(
        f"{store.uri} cannot hold exactly-once output: {seen}; use AWS S3, a current SeaweedFS or another store with "
        "conditional writes, or a local folder"
    )
