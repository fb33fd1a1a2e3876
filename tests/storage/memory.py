"""A store in memory with a bucket's semantics, for tests of the protocol."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence

from blocksight.storage.stores.store import AlreadyExistsError, ChangedError, MissingError, ObjectInfo


class MemoryStore:
    """Objects in a dict behind a lock. The version is a digest of the bytes, like a bucket's ETag."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, Mapping[str, str]]] = {}
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return "memory://"

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        found = self._found(key)
        if found is None:
            raise MissingError(f"there is no object {key}")
        data, _ = found
        if etag is not None and _etag(data) != etag:
            raise ChangedError(f"{key} has changed: version {_etag(data)}, wanted {etag}")
        return data[start : None if length is None else start + length]

    def head(self, key: str) -> ObjectInfo | None:
        found = self._found(key)
        if found is None:
            return None
        data, metadata = found
        return ObjectInfo(key, len(data), _etag(data), metadata)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            found = [(key, data) for key, (data, _) in self._objects.items() if key.startswith(prefix)]
        for key, data in found:
            yield ObjectInfo(key, len(data), _etag(data))

    def unlisted(self) -> Iterator[tuple[str, str]]:
        yield from ()

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        with self._lock:
            if key in self._objects:
                raise AlreadyExistsError(f"{key} already exists")
            self._objects[key] = (bytes(data), dict(metadata or {}))

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._objects[key] = (bytes(data), {})

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)

    def delete_many(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.delete(key)

    def _found(self, key: str) -> tuple[bytes, Mapping[str, str]] | None:
        with self._lock:
            return self._objects.get(key)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
