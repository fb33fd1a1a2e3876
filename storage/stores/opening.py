"""Opens a store by its URI, and probes whether it can carry exactly-once output."""

import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.locations import S3, normal_place, split_place
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
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

RACERS = 4
NUM_SAMPLES = 8
"""Objects of an input that are tried before it is taken for unreadable."""


class WeakStoreError(StoreError):
    """The store lets a second writer replace what stands: output there could not be exactly-once."""


def open_store(uri: str, endpoint_url: str | None = None) -> ObjectStore:
    """The store with this root: a local path, file://PATH or s3://BUCKET/PREFIX. Raises StoreError for others."""
    place = normal_place(uri)
    if place.startswith(S3):
        from blocksight.storage.stores.s3 import (
            S3Store,  # its clients take most of a second to import, and local jobs need none
        )

        return S3Store(place, endpoint_url)
    return LocalStore(Path(place))


def open_file(uri: str, endpoint_url: str | None = None) -> tuple[ObjectStore, str]:
    """The store that holds one file, and its key there. Raises StoreError where the URI can name none."""
    folder, name = split_place(normal_place(uri))
    if not name:
        raise StoreError(f"{folder} names no file; wanted a path, file:///PATH or s3://bucket/key")
    return open_store(folder, endpoint_url), name


def open_named(
    uri: str, endpoint_url: str | None = None, *, wait_seconds: float = SHORT_PATIENCE_SECONDS
) -> tuple[ObjectStore, str]:
    """The store below a folder or a prefix and "", or the store that holds a single object and its key there.

    Which of the two it is comes from the store, asked for so long, and never from the name's spelling: a prefix
    may be called data.v1. A name that is both an object and a prefix is the object, unless that is empty.
    """
    folder, name = split_place(normal_place(uri))
    if name:
        store = open_store(folder, endpoint_url)
        if _is_object(PatientStore(store, wait_seconds), name):
            return store, name
    return open_store(uri, endpoint_url), ""


def _is_object(store: ObjectStore, name: str) -> bool:
    try:
        found = store.head(name)
    except UnavailableError:
        raise
    except StoreError:
        return False  # whoever may list a prefix alone may not ask for the object of its name
    if found is None:
        return False
    return found.size > 0 or next(iter(store.list(f"{name}/")), None) is None


def probe(store: ObjectStore, prefix: str) -> None:
    """Proves that the store creates an object once and says what is true of it, and leaves nothing behind.

    A second write of one key must fail, and of four at once exactly one must win and be read back. Length, version,
    metadata, range and listing of an object must be those that it was written with. Raises WeakStoreError where that
    does not hold, and StoreError where nothing can be written.
    """
    key = f"{prefix}{uuid.uuid4().hex}"
    with _removed(store, f"{key}-twice") as twice:
        _second_must_fail(store, twice)
    with _removed(store, f"{key}-race") as race:
        _one_must_win(store, race)
    with _removed(store, f"{key}-echo") as echo:
        _must_echo(store, echo)
    if store.head(echo) is not None:
        raise _weak(store, "an object that was deleted is still there")


def probe_reads(store: ObjectStore, objects: Sequence[ObjectInfo]) -> None:
    """Proves, on a few of the listed objects, that they come at their version and in the ranges that are asked for.

    One that holds is enough. Raises StoreError for a store that serves no range, and where none of them can be read.
    """
    candidates = [info for info in objects if info.size > 1]
    chosen = candidates[:: max(1, len(candidates) // NUM_SAMPLES)][:NUM_SAMPLES]
    troubles: list[StoreError] = []
    for info in chosen:
        try:
            _must_serve_ranges(store, info)
            return
        except UnavailableError:
            return  # a store that is busy is waited for by those who read
        except (MissingError, ChangedError, ObjectError) as trouble:
            troubles.append(trouble)
    if troubles:
        raise StoreError(
            f"none of the {len(troubles)} objects that were tried can be read as {store.uri} lists them: {troubles[0]}"
        )


@contextmanager
def _removed(store: ObjectStore, key: str) -> Iterator[str]:
    """The key, whose object goes in the end; a store that fails is not asked again, for it may take its time."""
    try:
        yield key
    except WeakStoreError:
        store.delete(key)
        raise
    store.delete(key)


def _second_must_fail(store: ObjectStore, key: str) -> None:
    try:
        is_first = _is_first(store, key, b"first")
    except UnavailableError:
        raise
    except StoreError as error:
        store.put(key, b"first")  # raises where nothing can be written at all
        raise _weak(store, f"it writes objects and refuses the condition If-None-Match ({error})") from error
    if not is_first:
        raise StoreError(f"{store.uri} refuses to create {key}, and nobody else can have created it")
    if _is_first(store, key, b"second"):
        raise _weak(store, "a second write of the same object succeeded (it ignores If-None-Match)")


def _is_first(store: ObjectStore, key: str, body: bytes) -> bool:
    """Whether this write created the object; a reply that was lost is settled by what stands."""
    try:
        store.create(key, body)
    except StoreError as error:
        try:
            stands = store.read(key)
        except MissingError:
            raise error from None
        if stands != body and not isinstance(error, AlreadyExistsError):
            raise
        return stands == body
    return True


def _one_must_win(store: ObjectStore, key: str) -> None:
    start = threading.Barrier(RACERS)

    def race(body: bytes) -> bytes | None:
        start.wait()
        return body if _is_first(store, key, body) else None

    with ThreadPoolExecutor(RACERS) as pool:
        outcomes = pool.map(race, (f"racer {number}".encode() for number in range(RACERS)))
        winners = [body for body in outcomes if body is not None]
    if len(winners) != 1 or store.read(key) != winners[0]:
        raise _weak(store, f"of {RACERS} writers at once {len(winners)} won (it ignores If-None-Match)")


def _must_echo(store: ObjectStore, key: str) -> None:
    body, metadata = b"0123456789", {"attempt": "Probe-1", "ok": "1"}
    with suppress(AlreadyExistsError):  # the name is ours alone: a reply was lost, and the client asked again
        store.create(key, body, metadata=metadata)
    info = store.head(key)
    if info is None or info.size != len(body):
        raise _weak(store, f"an object of {len(body)} bytes has {info.size if info else 'none'} by HEAD")
    if {name: info.metadata.get(name) for name in metadata} != metadata:
        raise _weak(store, f"of an object's metadata {metadata} it keeps {dict(info.metadata)}")
    if [(one.key, one.size, one.etag) for one in store.list(key)] != [(key, info.size, info.etag)]:
        raise _weak(store, "its listing does not name an object that was written, with its length and version (ETag)")
    if store.read(key, etag=info.etag, start=3, length=4) != body[3:7]:
        raise _weak(store, "it answers a range with other bytes")
    store.put(key, body * 2)
    try:
        store.read(key, etag=info.etag)
    except ChangedError:
        return
    raise _weak(store, "an object that was replaced keeps its version (ETag), or is not replaced")


def _must_serve_ranges(store: ObjectStore, info: ObjectInfo) -> None:
    def read(start: int, length: int) -> bytes:
        return store.read(info.key, etag=info.etag, start=start, length=length)

    head = read(0, 2)
    if len(head) != 2 or read(1, 1) != head[1:] or len(read(info.size - 1, 1)) != 1:
        raise StoreError(
            f"{store.uri} answers a range of {info.key} with other bytes than were asked for; use another store or "
            "another address of it"
        )
    if _goes_on(store, info):
        raise StoreError(
            f"{store.uri} lists {info.key} with {info.size} bytes, and more are there; use another store or another "
            "address of it"
        )


def _goes_on(store: ObjectStore, info: ObjectInfo) -> bool:
    """Whether there are bytes behind the listed length; stores refuse that range in many ways."""
    try:
        return bool(store.read(info.key, etag=info.etag, start=info.size, length=1))
    except UnavailableError:
        raise
    except StoreError:
        return False


def _weak(store: ObjectStore, seen: str) -> WeakStoreError:
    return WeakStoreError(
        f"{store.uri} cannot hold exactly-once output: {seen}; use AWS S3, a current SeaweedFS or another store with "
        "conditional writes, or a local folder"
    )
