"""A store that is away for a while: the same calls, asked again until it answers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from storage.store import (
    ChangedError,
    DamagedError,
    MissingError,
    ObjectError,
    ObjectInfo,
    ObjectStore,
    StoreError,
    UnavailableError,
)

PATIENCE_SECONDS = 360.0
"""A store may be away for five minutes and a job waits for it; beyond, the job ends and says how to go on."""
SHORT_PATIENCE_SECONDS = 10.0
"""Where a person waits, or no work is done yet: what is mistyped should show soon."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
TRIES_OF_ONE_OBJECT = 6
"""After so many failed reads of one object, with others that can be read between them, it is given up: about
15 s of pauses."""

NUM_WITNESSES = 3

Result = TypeVar("Result")


def witnesses_of(keys: Sequence[str]) -> tuple[str, ...]:
    """A few of these objects, evenly spread."""
    chosen = sorted(set(keys))
    count = min(NUM_WITNESSES, len(chosen))
    return tuple(chosen[len(chosen) * place // count] for place in range(count))


class PatientStore:
    """Any store, whose calls are repeated while it is unavailable; every other error goes through at once.

    A read that fails is told from a store that is away by reading one byte of other objects, the witnesses: where
    one of them can be read, the trouble is the object's own (ObjectError). Where none can, it is the store's
    (StoreError, or UnavailableError after the patience).

    A `create` whose reply was lost may be refused when it is repeated: the caller settles by the metadata
    whose object stands, as it must after any doubt.
    """

    def __init__(
        self,
        store: ObjectStore,
        seconds: float | None = None,
        *,
        waiting: Callable[[], None] = lambda: None,
        witnesses: Sequence[str] = (),
    ) -> None:
        """`seconds` of waiting per call, after which UnavailableError is raised; None: PATIENCE_SECONDS.

        `waiting` is called before every try: to wait for a store is no hang. `witnesses` are keys of a few objects.
        """
        self.store, self.waiting, self.witnesses = store, waiting, tuple(witnesses)
        self.seconds = PATIENCE_SECONDS if seconds is None else seconds

    @property
    def uri(self) -> str:
        return self.store.uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        read = partial(self.store.read, key, etag=etag, start=start, length=length)
        return self._patiently(lambda: self._judged(key, read))

    def head(self, key: str) -> ObjectInfo | None:
        return self._patiently(lambda: self.store.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As the store lists; from the beginning again where it broke off."""
        yield from self._patiently(lambda: [*self.store.list(prefix)])

    def unlisted(self) -> Iterator[tuple[str, str]]:
        yield from self._patiently(lambda: [*self.store.unlisted()])

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

    def _judged(self, key: str, read: Callable[[], bytes]) -> bytes:
        """The bytes, or an error that says whose trouble it is."""
        pause, tries = FIRST_PAUSE_SECONDS, 0
        while True:
            try:
                return self._allowed(key, read)
            except UnavailableError as error:
                tries += 1
                if not self._serves_others(key):
                    raise
                if tries == TRIES_OF_ONE_OBJECT:
                    raise ObjectError(f"{error}; other objects of {self.uri} can be read") from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self.waiting()

    def _allowed(self, key: str, read: Callable[[], bytes]) -> bytes:
        """The bytes; a refusal is told to be of this object, or of all."""
        try:
            return read()
        except (MissingError, ChangedError, DamagedError, UnavailableError):
            raise
        except StoreError as error:
            if self._serves_others(key):
                raise ObjectError(str(error)) from error
            if self._has_others(key):
                raise StoreError(f"{error}; nor can other objects of {self.uri} be read") from error
            raise

    def _has_others(self, key: str) -> bool:
        return any(witness != key for witness in self.witnesses)

    def _serves_others(self, key: str) -> bool:
        """Whether any other object can be read now; of a single object, whether the store still finds it."""
        if self.witnesses and not self._has_others(key):
            with suppress(StoreError):
                return self.store.head(key) is not None
        for witness in self.witnesses:
            if witness != key:
                with suppress(StoreError):
                    self.store.read(witness, start=0, length=1)
                    return True
        return False
