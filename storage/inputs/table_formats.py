"""Refuses folders of Delta, Iceberg and Hudi tables: their Parquet files hold deleted rows beside the live ones."""

import re
from collections.abc import Iterable, Iterator

from blocksight.storage.stores.store import ObjectInfo, StoreError

FORMATS = {
    "Delta": (re.compile(r"(.*?)(?:^|/)_delta_log/"), "delta_scan"),
    "Iceberg": (re.compile(r"(.*?)(?:^|/)metadata/[^/]*\.metadata\.json[^/]*$"), "iceberg_scan"),
    "Hudi": (re.compile(r"(.*?)(?:^|/)\.hoodie/"), None),
}
"""By name: how the keys of a table's log begin, with the table's folder, and DuckDB's function that reads it."""


class TableLogs:
    """Notices the log of such a table among the objects of a listing. `uri`: the store's root."""

    def __init__(self, uri: str) -> None:
        self._uri, self._fault = uri, ""

    def noticed(self, infos: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
        """The objects unchanged; the first that belongs to a log is remembered."""
        for info in infos:
            self._fault = self._fault or self._fault_of(info.key)
            yield info

    def refuse(self) -> None:
        """Raises StoreError if there was a log."""
        if self._fault:
            raise StoreError(self._fault)

    def _fault_of(self, key: str) -> str:
        for name, (pattern, reader) in FORMATS.items():
            found = pattern.match(key)
            if found is not None:
                table = f"{self._uri}/{found[1]}" if found[1] else self._uri
                return (
                    f"{table} is a table of {name} ({key[len(found[1]) :].lstrip('/')}): its Parquet files also hold "
                    f"deleted rows, and its log, which says which rows are live, is not read; write the live rows to "
                    f"plain Parquet first, {_way(table, reader)}"
                )
        return ""


def _way(table: str, reader: str | None) -> str:
    if reader is None:
        return "for example with Spark"
    return f"for example with DuckDB: COPY (FROM {reader}('{table}')) TO 'live.parquet'"
