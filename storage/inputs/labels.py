"""Reads the label of one record, in the same way for tables, tar shards and folders."""

from typing import Any

from blocksight.storage.inputs.records import as_text
from blocksight.storage.limits import MAX_LABEL_BYTES

CUT = "…"


def label_of(value: Any) -> str | int | None:
    """The label that a data set writes: an integer stays one, all else becomes text. None: there is no label.

    Text longer than `MAX_LABEL_BYTES` is cut and ends with `…`. Tables write NaN for no label.
    """
    if value in (None, "", b"") or value != value:  # NaN alone differs from itself
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = as_bytes_text(value) if isinstance(value, bytes) else as_text(str(value))
    body = text.encode()
    return text if len(body) <= MAX_LABEL_BYTES else body[:MAX_LABEL_BYTES].decode("utf-8", "ignore") + CUT


def as_bytes_text(data: bytes) -> str:
    """Bytes as text; bytes that are not UTF-8 become escape codes."""
    return data.decode("utf-8", "backslashreplace")
