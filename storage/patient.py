"""A store that is away for a while: the same calls, asked again until it answers."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from storage.store import ObjectInfo, ObjectStore, UnavailableError

PATIENCE_SECONDS = 360.0
"""A store may be away for five minutes and a job waits for it; beyond, the job ends and says how to go on."""
SHORT_PATIENCE_SECONDS = 10.0
"""Where a person waits, or no work is done yet: what is mistyped should show soon."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0

Result = TypeVar("Result")


class PatientStore:
    """Any store, whose calls are repeated while it is unavailable; every other error goes through at once.

    A `create` whose reply was lost may be refused when it is repeated: the caller settles by the metadata
    whose object stands, as it must after any doubt.
    """

    def __init__(
        self, store: ObjectStore, seconds: float | None = None, *, waiting: Callable[[], None] = lambda: None
    ) -> None:
        """`seconds` of waiting per call, after which UnavailableError is raised; None: PATIENCE_SECONDS.

        `waiting` is called before every try: to wait for a store is no hang.
        """
        self.store, self.waiting = store, waiting
        self.seconds = PATIENCE_SECONDS if seconds is None else seconds

    @property
    def uri(self) -> str:
        return self.store.uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        return self._patiently(lambda: self.store.read(key, etag=etag, start=start, length=length))

    def head(self, key: str) -> ObjectInfo | None:
        return self._patiently(lambda: self.store.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As the store lists; from the beginning again where it broke off."""
        yield from self._patiently(lambda: [*self.store.list(prefix)])

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        self._patiently(lambda: self.store.create(key, data, metadata=metadata))

    def put(self, key: str, data: bytes) -> None:
        self._patiently(lambda: self.store.put(key, data))

    def delete(self, key: str) -> None:
        self._patiently(lambda: self.store.delete(key))

    def _patiently(self, call: Callable[[], Result]) -> Result:
        deadline = time.monotonic() + self.seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            self.waiting()
            try:
                return call()
            except UnavailableError:
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
