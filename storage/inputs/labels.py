"""Reads the label of one record, in the same way for tables, tar shards and folders."""

import json
import math
from typing import Any
from urllib.parse import unquote

from blocksight.storage.inputs.records import as_text
from blocksight.storage.limits import MAX_LABEL_BYTES

CUT = "…"
LABEL_FOLDER = "label="
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""What such a folder is called for rows without a label."""


def label_of(value: Any) -> str | int | None:
    """The label that a data set writes: a whole number is an integer, all else becomes text. None: there is no label.

    A list of one label is that label. Several labels, and a struct, become JSON text. Text longer than
    `MAX_LABEL_BYTES` is cut and ends with `…`. Tables write NaN for no label.
    """
    plain = _plain(value)
    if plain is None or isinstance(plain, int):
        return plain
    text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
    body = text.encode()
    return text if len(body) <= MAX_LABEL_BYTES else body[:MAX_LABEL_BYTES].decode("utf-8", "ignore") + CUT


def partition_label(key: str) -> str | int | None:
    """The label in a folder `label=VALUE` of a key, as Hive, Spark and pyarrow write it; None: there is none."""
    values = [part.removeprefix(LABEL_FOLDER) for part in key.split("/")[:-1] if part.startswith(LABEL_FOLDER)]
    return label_of(unquote(values[-1])) if values and values[-1] != NO_VALUE else None


def folder_label(key: str) -> str | int | None:
    """The label of a loose image: that of a folder `label=VALUE`, else its folder's name."""
    if f"/{LABEL_FOLDER}" in f"/{key}":
        return partition_label(key)
    *folders, _ = [part for part in key.split("/") if part not in ("", ".")] or [""]
    return label_of(folders[-1] if folders else "")


def _plain(value: Any) -> Any:
    """The value in JSON's types. Whole numbers are integers: a column with gaps becomes floating-point in pandas."""
    if value in (None, "", b"") or value != value:  # NaN alone differs from itself
        return None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, list):
        items = [_plain(one) for one in value]
        return (items[0] if items else None) if len(items) < 2 else items
    if isinstance(value, dict):
        return {as_text(str(name)): _plain(one) for name, one in value.items()}
    return as_bytes_text(value) if isinstance(value, bytes) else as_text(str(value))


def is_several(label: str | int | None) -> bool:
    """True if the text is that of several labels, or of a struct."""
    return isinstance(label, str) and label[:1] in ("[", "{") and label[-1:] in ("]", "}", CUT)


def as_bytes_text(data: bytes) -> str:
    """Bytes as text; bytes that are not UTF-8 become escape codes."""
    return data.decode("utf-8", "backslashreplace")
