"""Wraps a store and counts its calls by verb and outcome."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from blocksight.jobs.observe.registry import OF_PROCESS
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    MissingError,
    ObjectInfo,
    ObjectStore,
    UnavailableError,
)

OUTCOME_OF = {
    AlreadyExistsError: "exists",
    MissingError: "missing",
    ChangedError: "changed",
    UnavailableError: "unavailable",
}
"""Every other error is `refused`."""
STOPS = (KeyboardInterrupt, SystemExit)
"""What ends a call before its answer; a reader that has seen enough of a list (GeneratorExit) is none of them."""


class CountedStore:
    """The store. It belongs inside what repeats calls, so that each of them counts."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    @property
    def uri(self) -> str:
        return self.store.uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        with _counted("read"):
            return self.store.read(key, etag=etag, start=start, length=length)

    def head(self, key: str) -> ObjectInfo | None:
        with _counted("head"):
            return self.store.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with _counted("list"):
            yield from self.store.list(prefix)

    def unlisted(self) -> Iterator[tuple[str, str]]:
        with _counted("list"):
            yield from self.store.unlisted()

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        with _counted("create"):
            self.store.create(key, data, metadata=metadata)

    def put(self, key: str, data: bytes) -> None:
        with _counted("put"):
            self.store.put(key, data)

    def delete(self, key: str) -> None:
        with _counted("delete"):
            self.store.delete(key)

    def delete_many(self, keys: Sequence[str]) -> None:
        with _counted("delete"):
            self.store.delete_many(keys)


@contextmanager
def _counted(verb: str) -> Iterator[None]:
    outcome = "ok"
    try:
        yield
    except STOPS:
        outcome = "interrupted"
        raise
    except Exception as error:
        outcome = OUTCOME_OF.get(type(error), "refused")
        raise
    finally:
        OF_PROCESS.add("blocksight_store_requests_total", verb, outcome)
