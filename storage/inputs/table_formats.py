"""Refuses folders of Delta, Iceberg and Hudi tables: their Parquet files hold deleted rows beside the live ones."""

import re
from collections.abc import Iterable

from blocksight.storage.stores.store import StoreError

FORMATS = {
    "Delta": (re.compile(r"(.*?)(?:^|/)_delta_log/"), "delta_scan"),
    "Iceberg": (re.compile(r"(.*?)(?:^|/)metadata/[^/]*\.metadata\.json[^/]*$"), "iceberg_scan"),
    "Hudi": (re.compile(r"(.*?)(?:^|/)\.hoodie/"), None),
}
"""By name: how the keys of a table's log begin, with the table's folder, and DuckDB's function that reads it."""


def refuse_table_formats(uri: str, keys: Iterable[str]) -> None:
    """Raises StoreError if one of a store's keys belongs to the log of such a table. `uri`: the store's root."""
    for key in keys:
        for name, (pattern, reader) in FORMATS.items():
            found = pattern.match(key)
            if found is not None:
                table = f"{uri}/{found[1]}" if found[1] else uri
                raise StoreError(
                    f"{table} is a table of {name} ({key[len(found[1]) :].lstrip('/')}): its Parquet files also hold "
                    f"deleted rows, and its log, which says which rows are live, is not read; write the live rows to "
                    f"plain Parquet first, {_way(table, reader)}"
                )


def _way(table: str, reader: str | None) -> str:
    if reader is None:
        return "for example with Spark"
    return f"for example with DuckDB: COPY (FROM {reader}('{table}')) TO 'live.parquet'"
