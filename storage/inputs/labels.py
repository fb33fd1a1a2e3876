"""The label of one record: how it is read, the same for tables, tar shards and folders."""

from typing import Any

from blocksight.storage.inputs.records import as_text
from blocksight.storage.limits import MAX_LABEL_BYTES

CUT = "…"


def label_of(value: Any) -> str | int | None:
    """What a data set writes as a label: a whole number as it is, anything else as text; None: there is none.

    Text that is longer than `MAX_LABEL_BYTES` is cut, and ends with `…`. NaN is how tables write that there is none.
    """
    if value in (None, "", b"") or value != value:  # NaN alone differs from itself
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = as_bytes_text(value) if isinstance(value, bytes) else as_text(str(value))
    body = text.encode()
    return text if len(body) <= MAX_LABEL_BYTES else body[:MAX_LABEL_BYTES].decode("utf-8", "ignore") + CUT


def as_bytes_text(data: bytes) -> str:
    """Bytes as text: what of them is no UTF-8 becomes codes."""
    return data.decode("utf-8", "backslashreplace")
