"""Wraps a store: repeats calls while it is unavailable, and tells errors of one object from errors of the store."""

import errno
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import TypeVar

from blocksight.storage.stores.error_classes import MACHINE_ERRNOS
from blocksight.storage.stores.object_columns import collected, evenly_spread
from blocksight.storage.stores.retry_budget import BUDGET
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
"""How long a job waits for an unavailable store; then it ends and says how to resume."""
SHORT_PATIENCE_SECONDS = 10.0
"""The same while a user waits or before any work is done: a typing error should show soon."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
MAX_TRIES_PER_OBJECT = 6
"""Failed reads of one object, while others can be read, after which it is given up: about 15 s of pauses."""
MAX_SECONDS_PER_OBJECT = 150.0
"""Time in failed reads of one object, two or more, after which it is given up: it hangs or is too slow."""

NUM_WITNESSES = 3
PROBE_NAME = "_probe-"
"""Prefix of the name of a probe: an object that is written beside one that cannot be, and removed at once."""

Result = TypeVar("Result")


def witnesses_of(objects: Callable[[], Iterable[ObjectInfo]]) -> tuple[str, ...]:
    """Keys of a few of these objects, evenly spread: to read when another one fails. Equal keys are neighbours."""
    return tuple(evenly_spread(lambda: (key for key, _ in groupby(info.key for info in objects())), NUM_WITNESSES))


def is_probe(key: str) -> bool:
    """True if the object is a probe, left by a process that died. It holds no data."""
    return key.rpartition("/")[2].startswith(PROBE_NAME)


class PatientStore:
    """Wraps a store and repeats calls while it is unavailable. Raises every other error at once.

    After a failed read, it reads one byte of other objects, the witnesses. If one can be read, only this object
    fails (ObjectError). If none can, the store fails (StoreError, or UnavailableError once the time is up).

    In folders of an output where each object belongs to one unit, a call that fails for good is checked by writing
    as many bytes beside the object. If that succeeds, only this object fails (OutputError).

    A repeated `create` may be refused because only the first reply was lost. The caller compares the object's
    metadata to find out who created it.
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
        """`seconds`: the longest wait per call before UnavailableError; None: PATIENCE_SECONDS.

        `waiting` is called before each try, for example to reset a watchdog. `witnesses`: keys of a few objects.
        `unit_folders`: prefixes of the keys that belong to one unit each. A patient store is taken out of its wrap, for
        two patiences would multiply.
        """
        self.store: ObjectStore = store.store if isinstance(store, PatientStore) else store
        self.waiting, self.witnesses = waiting, tuple(witnesses)
        self.unit_folders = unit_folders
        self.seconds = PATIENCE_SECONDS if seconds is None else seconds

    @property
    def uri(self) -> str:
        return self.store.uri

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        read = partial(self.store.read, key, etag=etag, start=start, length=length)
        return self._call_or_classify(key, 0, lambda: self._read_or_classify(key, read))

    def head(self, key: str) -> ObjectInfo | None:
        return self._call_or_classify(key, 0, lambda: self.store.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Lists as the store does; starts over if the listing breaks off."""
        yield from self._retried(lambda: collected(self.store.list(prefix))).drained()

    def unlisted(self) -> Iterator[tuple[str, str]]:
        yield from self._retried(lambda: [*self.store.unlisted()])

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        self._call_or_classify(key, len(data), lambda: self._create(key, data, metadata))

    def put(self, key: str, data: bytes) -> None:
        self._call_or_classify(key, len(data), lambda: self.store.put(key, data))

    def delete(self, key: str) -> None:
        self._call_or_classify(key, 0, lambda: self.store.delete(key))

    def delete_many(self, keys: Sequence[str]) -> None:
        self._retried(lambda: self.store.delete_many(keys))

    def _retried(self, call: Callable[[], Result]) -> Result:
        deadline = time.monotonic() + self.seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            self.waiting()
            try:
                result = call()
            except UnavailableError:
                left = deadline - time.monotonic()
                if pause > left:
                    raise
                time.sleep(min(BUDGET.seconds_to_wait(pause), LONGEST_PAUSE_SECONDS, left))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                BUDGET.succeeded()
                return result

    def _create(self, key: str, data: bytes, metadata: Mapping[str, str] | None) -> None:
        """Creates the object. Raises UnavailableError if the store says that it exists and does not show it."""
        try:
            self.store.create(key, data, metadata=metadata)
        except (AlreadyExistsError, MissingError) as error:
            if not self._belongs_to_one_unit(key) or self.store.head(key) is not None:
                raise
            raise UnavailableError(f"{error}, but the store has no such object") from error

    def _belongs_to_one_unit(self, key: str) -> bool:
        return key.startswith(self.unit_folders)

    def _call_or_classify(self, key: str, num_bytes: int, call: Callable[[], Result]) -> Result:
        """The call's result. Raises OutputError if only this object fails, else the store's error."""
        try:
            return self._retried(call)
        except StoreError as error:
            may_be_its_own = self._belongs_to_one_unit(key) and _may_be_of_one_object(error)
            if not may_be_its_own or not self._can_write_others(key, num_bytes):
                raise
        try:
            return call()  # the store may have recovered
        except StoreError as error:
            if not _may_be_of_one_object(error):
                raise
            raise OutputError(f"{error}; other objects beside it can be written") from error

    def _can_write_others(self, key: str, num_bytes: int) -> bool:
        """True if `num_bytes` can be written beside the object; a full disk may still take a few bytes."""
        probe = f"{key.rpartition('/')[0]}/{PROBE_NAME}{uuid.uuid4().hex}"
        try:
            self.store.create(probe, bytes(num_bytes))
        except StoreError:
            return False
        finally:
            with suppress(StoreError):
                self.store.delete(probe)
        return True

    def _read_or_classify(self, key: str, read: Callable[[], bytes]) -> bytes:
        """The bytes. Raises ObjectError if only this object fails, else the store's error."""
        pause, tries, seconds = FIRST_PAUSE_SECONDS, 0, 0.0
        while True:
            started = time.monotonic()
            try:
                return self._read_once(key, read)
            except UnavailableError as error:
                tries, seconds = tries + 1, seconds + time.monotonic() - started
                if not self._can_read_others(key):
                    raise
                if tries == MAX_TRIES_PER_OBJECT or (tries > 1 and seconds >= MAX_SECONDS_PER_OBJECT):
                    raise ObjectError(f"{error}; other objects of {self.uri} can be read") from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self.waiting()

    def _read_once(self, key: str, read: Callable[[], bytes]) -> bytes:
        """The bytes, from one try. If the store refuses, raises ObjectError or StoreError: this object, or all."""
        try:
            return read()
        except (MissingError, ChangedError, DamagedError, UnavailableError):
            raise
        except StoreError as error:
            if self._can_read_others(key):
                raise ObjectError(str(error)) from error
            if self._has_other_witnesses(key):
                raise StoreError(f"{error}; nor can other objects of {self.uri} be read") from error
            raise

    def _has_other_witnesses(self, key: str) -> bool:
        return any(witness != key for witness in self.witnesses)

    def _can_read_others(self, key: str) -> bool:
        """True if another object can be read now. If there is no other: True if the store still finds this one."""
        if self.witnesses and not self._has_other_witnesses(key):
            with suppress(StoreError):
                return self.store.head(key) is not None
        for witness in self.witnesses:
            if witness != key:
                with suppress(StoreError):
                    self.store.read(witness, start=0, length=1)
                    return True
        return False


def _may_be_of_one_object(error: StoreError) -> bool:
    """True if the error may be of one object alone: its class does not tell, and the machine lacks nothing."""
    if type(error) is StoreError and getattr(error.__cause__, "errno", None) in MACHINE_ERRNOS - {errno.EIO}:
        return False
    return type(error) in (StoreError, ObjectError, UnavailableError)
