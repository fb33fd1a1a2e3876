"""Reads loose images: one object is one record, and its folder's name is the label."""

from collections.abc import Iterator, Sequence

from blocksight.storage.inputs.labels import folder_label
from blocksight.storage.inputs.records import RawRecord, read_failed, too_many_bytes
from blocksight.storage.limits import MAX_IMAGE_BYTES
from blocksight.storage.rejects import Reject, RejectCode
from blocksight.storage.stores.error_classes import is_of_record
from blocksight.storage.stores.store import ChangedError, MissingError, ObjectError, ObjectInfo, ObjectStore

CODES = {
    MissingError: RejectCode.INPUT_MISSING,
    ChangedError: RejectCode.INPUT_CHANGED,
    ObjectError: RejectCode.INPUT_UNREADABLE,
}


def read_images(store: ObjectStore, objects: Sequence[ObjectInfo]) -> Iterator[RawRecord]:
    """The records in the given order, each read at its planned version.

    A missing, changed, refused or too large object becomes a rejected record. Errors of the store itself are
    raised (StoreError).
    """
    for info in objects:
        data, reject = _read(store, info)
        yield RawRecord(info.key, info.key, 0, folder_label(info.key), data, reject)


def _read(store: ObjectStore, info: ObjectInfo) -> tuple[bytes | None, Reject | None]:
    """The image's bytes or the reject."""
    if info.size > MAX_IMAGE_BYTES:
        return None, too_many_bytes(info.size)
    try:
        return store.read(info.key, etag=info.etag, length=info.size), None
    except tuple(CODES) as error:
        return None, Reject(CODES[type(error)], str(error))
    except Exception as error:
        if not is_of_record(error):
            raise
        return None, read_failed(error)
