"""Loose images: one object is one record, and the folder it lies in is its label."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from storage.labels import label_of
from storage.limits import MAX_IMAGE_BYTES
from storage.records import RawRecord, too_many_bytes
from storage.rejects import Reject, RejectCode
from storage.store import ChangedError, MissingError, ObjectInfo, ObjectStore


def read_images(store: ObjectStore, objects: Sequence[ObjectInfo]) -> Iterator[RawRecord]:
    """The records in the given order, each read at the version that was planned.

    One that is gone, changed or too large comes out with its reason; the store's own trouble goes through
    (StoreError).
    """
    for info in objects:
        label = label_of(PurePosixPath(info.key).parent.name)
        try:
            data, reject = _read(store, info), None
        except MissingError as error:
            data, reject = None, Reject(RejectCode.INPUT_MISSING, str(error))
        except ChangedError as error:
            data, reject = None, Reject(RejectCode.INPUT_CHANGED, str(error))
        except Reject as too_large:
            data, reject = None, too_large
        yield RawRecord(info.key, info.key, 0, label, data, reject)


def _read(store: ObjectStore, info: ObjectInfo) -> bytes:
    if info.size > MAX_IMAGE_BYTES:
        raise too_many_bytes(info.size)
    return store.read(info.key, etag=info.etag)
