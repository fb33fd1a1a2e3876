"""Stores that fail on purpose: wrappers in which a test decides the result of each call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from blocksight.storage.stores.store import ObjectInfo, ObjectStore


class Crash(BaseException):
    """Raised where a process dies: no `except Exception` catches it."""


class InterceptedStore:
    """A store around another one; `intercept(name, key, call)` makes `call()`, delays it, skips it or raises."""

    def __init__(self, store: ObjectStore, intercept: Callable[[str, str, Callable[[], Any]], Any]) -> None:
        self.store, self.intercept = store, intercept

    @property
    def uri(self) -> str:
        return self.store.uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        return self.intercept("read", key, lambda: self.store.read(key, etag=etag, start=start, length=length))

    def head(self, key: str) -> ObjectInfo | None:
        return self.intercept("head", key, lambda: self.store.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from self.intercept("list", prefix, lambda: [*self.store.list(prefix)])

    def unlisted(self) -> Iterator[tuple[str, str]]:
        yield from self.store.unlisted()

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        self.intercept("create", key, lambda: self.store.create(key, data, metadata=metadata))

    def put(self, key: str, data: bytes) -> None:
        self.intercept("put", key, lambda: self.store.put(key, data))

    def delete(self, key: str) -> None:
        self.intercept("delete", key, lambda: self.store.delete(key))

    def delete_many(self, keys: Sequence[str]) -> None:
        if keys:
            self.intercept("delete", keys[0], lambda: self.store.delete_many(keys))


class MortalCalls:
    """An interceptor that raises Crash at the call with index `deadly`, before or after the store's work."""

    def __init__(self, deadly: int, *, after: bool) -> None:
        self.deadly, self.after = deadly, after
        self.made: list[str] = []

    def __call__(self, name: str, key: str, call: Callable[[], Any]) -> Any:
        self.made.append(f"{name} {key}")
        if len(self.made) > self.deadly + 1:
            raise Crash  # a dead process makes no calls
        is_deadly = len(self.made) == self.deadly + 1
        if is_deadly and not self.after:
            raise Crash
        result = call()
        if is_deadly:
            raise Crash
        return result
