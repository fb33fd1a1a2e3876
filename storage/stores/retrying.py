"""A store that is away for a while: the same calls, asked again until it answers."""

import errno
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from blocksight.storage.stores.error_classes import MACHINE_ERRNOS
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    DamagedError,
    MissingError,
    ObjectError,
    ObjectInfo,
    ObjectStore,
    OutputError,
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
SECONDS_OF_ONE_OBJECT = 150.0
"""Failed reads of one object that took so long are enough, from the second on: it hangs, or comes too slowly."""

NUM_WITNESSES = 3
PROBE_NAME = "_probe-"
"""Begins the name of an object that is written beside one that cannot be, and removed at once."""

Result = TypeVar("Result")


def witnesses_of(keys: Sequence[str]) -> tuple[str, ...]:
    """A few of these objects, evenly spread."""
    chosen = sorted(set(keys))
    count = min(NUM_WITNESSES, len(chosen))
    return tuple(chosen[len(chosen) * place // count] for place in range(count))


def is_probe(key: str) -> bool:
    """Whether an object only tries what can be written beside it: left by a process that died, it means nothing."""
    return key.rpartition("/")[2].startswith(PROBE_NAME)


class PatientStore:
    """Any store, whose calls are repeated while it is unavailable; every other error goes through at once.

    A read that fails is told from a store that is away by reading one byte of other objects, the witnesses: where
    one of them can be read, the trouble is the object's own (ObjectError). Where none can, it is the store's
    (StoreError, or UnavailableError after the patience).

    In the folders of an output where each object is of one unit, any call that fails for good is judged by
    writing as many bytes beside that object: where they can be written, the trouble is the object's (OutputError).

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
        unit_folders: tuple[str, ...] = (),
    ) -> None:
        """`seconds` of waiting per call, after which UnavailableError is raised; None: PATIENCE_SECONDS.

        `waiting` is called before every try: to wait for a store is no hang. `witnesses` are keys of a few objects,
        `unit_folders` begin the keys of objects that are of one unit each.
        """
        self.store, self.waiting, self.witnesses = store, waiting, tuple(witnesses)
        self.unit_folders = unit_folders
        self.seconds = PATIENCE_SECONDS if seconds is None else seconds

    @property
    def uri(self) -> str:
        return self.store.uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        read = partial(self.store.read, key, etag=etag, start=start, length=length)
        return self._told_apart(key, 0, lambda: self._judged(key, read))

    def head(self, key: str) -> ObjectInfo | None:
        return self._told_apart(key, 0, lambda: self.store.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As the store lists; from the beginning again where it broke off."""
        yield from self._patiently(lambda: [*self.store.list(prefix)])

    def unlisted(self) -> Iterator[tuple[str, str]]:
        yield from self._patiently(lambda: [*self.store.unlisted()])

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        self._told_apart(key, len(data), lambda: self._create(key, data, metadata))

    def put(self, key: str, data: bytes) -> None:
        self._told_apart(key, len(data), lambda: self.store.put(key, data))

    def delete(self, key: str) -> None:
        self._told_apart(key, 0, lambda: self.store.delete(key))

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

    def _create(self, key: str, data: bytes, metadata: Mapping[str, str] | None) -> None:
        """Creates the object. Raises UnavailableError where the store says that one stands and shows none."""
        try:
            self.store.create(key, data, metadata=metadata)
        except (AlreadyExistsError, MissingError) as error:
            if not self._is_of_one_unit(key) or self.store.head(key) is not None:
                raise
            raise UnavailableError(f"{error}, says the store, and has no such object") from error

    def _is_of_one_unit(self, key: str) -> bool:
        return key.startswith(self.unit_folders)

    def _told_apart(self, key: str, num_bytes: int, call: Callable[[], Result]) -> Result:
        """What the call gives in the end; an error says whether it is this object's alone."""
        try:
            return self._patiently(call)
        except StoreError as error:
            is_judged = self._is_of_one_unit(key) and _may_be_of_one_object(error)
            if not is_judged or not self._takes_others(key, num_bytes):
                raise
        try:
            return call()  # the store may be back since
        except StoreError as error:
            if not _may_be_of_one_object(error):
                raise
            raise OutputError(f"{error}; other objects beside it can be written") from error

    def _takes_others(self, key: str, num_bytes: int) -> bool:
        """Whether so many bytes can be written beside the object: a full disk may still take a few."""
        probe = f"{key.rpartition('/')[0]}/{PROBE_NAME}{uuid.uuid4().hex}"
        try:
            self.store.create(probe, bytes(num_bytes))
        except StoreError:
            return False
        finally:
            with suppress(StoreError):
                self.store.delete(probe)
        return True

    def _judged(self, key: str, read: Callable[[], bytes]) -> bytes:
        """The bytes, or an error that says whose trouble it is."""
        pause, tries, seconds = FIRST_PAUSE_SECONDS, 0, 0.0
        while True:
            begun = time.monotonic()
            try:
                return self._allowed(key, read)
            except UnavailableError as error:
                tries, seconds = tries + 1, seconds + time.monotonic() - begun
                if not self._serves_others(key):
                    raise
                if tries == TRIES_OF_ONE_OBJECT or (tries > 1 and seconds >= SECONDS_OF_ONE_OBJECT):
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


def _may_be_of_one_object(error: StoreError) -> bool:
    """Whether an error leaves open whose trouble it is: not one that says more, nor what the machine lacks."""
    if type(error) is StoreError and getattr(error.__cause__, "errno", None) in MACHINE_ERRNOS - {errno.EIO}:
        return False
    return type(error) in (StoreError, ObjectError, UnavailableError)
