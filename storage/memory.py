"""A store in memory with a bucket's semantics, for tests of the protocol."""

import hashlib
import threading
from collections.abc import Iterator, Mapping

from storage.store import AlreadyExistsError, ChangedError, MissingError, ObjectInfo


class MemoryStore:
    """A dict behind a lock."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, Mapping[str, str]]] = {}
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return "memory://"

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        info = self.head(key)
        if info is None:
            raise MissingError(f"there is no object {key}")
        if etag is not None and info.etag != etag:
            raise ChangedError(f"{key} has changed: version {info.etag}, wanted {etag}")
        data = self._objects[key][0]
        return data[start : None if length is None else start + length]

    def head(self, key: str) -> ObjectInfo | None:
        with self._lock:
            if key not in self._objects:
                return None
            data, metadata = self._objects[key]
        return ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest()[:16], metadata)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            keys = sorted(key for key in self._objects if key.startswith(prefix))
        for key in keys:
            info = self.head(key)
            if info is not None:
                yield ObjectInfo(info.key, info.size, info.etag)

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        with self._lock:
            if key in self._objects:
                raise AlreadyExistsError(f"{key} stands already")
            self._objects[key] = (bytes(data), dict(metadata or {}))

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._objects[key] = (bytes(data), {})

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)
