"""Keeps the reader of a shard between two units of it, so that the next unit goes on and reads no byte again."""

import atexit
from dataclasses import dataclass
from typing import Generic, TypeVar

from blocksight.storage.stores.store import ObjectInfo, ObjectStore

Reader = TypeVar("Reader")


@dataclass(frozen=True)
class _Paused(Generic[Reader]):
    store: ObjectStore
    info: ObjectInfo
    position: int
    """The reader has passed everything before it, and nothing behind it."""
    reader: Reader

    def serves(self, store: ObjectStore, info: ObjectInfo, start: int) -> bool:
        is_same = self.store is store and (self.info.key, self.info.etag) == (info.key, info.etag)
        return is_same and self.position <= start


class PausedReader(Generic[Reader]):
    """The one reader that a process keeps. It serves one shard of one store in one version, forwards only."""

    def __init__(self) -> None:
        self._kept: list[_Paused[Reader]] = []
        atexit.register(self._kept.clear)  # a generator that outlives its module prints an error

    def take(self, store: ObjectStore, info: ObjectInfo, start: int) -> Reader | None:
        """The kept reader, if it serves this shard and has not passed `start`. None is kept afterwards."""
        kept, self._kept[:] = self._kept[:1], []
        return next((one.reader for one in kept if one.serves(store, info, start)), None)

    def keep(self, store: ObjectStore, info: ObjectInfo, position: int, reader: Reader) -> None:
        """Keeps a reader that has passed everything before `position`, and nothing behind it."""
        self._kept[:] = [_Paused(store, info, position, reader)]
