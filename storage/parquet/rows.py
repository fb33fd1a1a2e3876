"""Makes tables and Parquet files from rows; a row's key that names no column is an error, not a lost value."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Fields = Mapping[str, "Fields"]
"""Names of fields, each with those inside it; empty if it is no struct."""


class UnknownColumnsError(Exception):
    """Raised if a row has a key that its table has no column for. The program is wrong, not the record."""


def table_of_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """The rows as a table with this schema. A key that a row lacks is null.

    Raises UnknownColumnsError for a key without a column, or without a field in a struct; pyarrow.ArrowInvalid or
    ArrowTypeError if a value does not fit.
    """
    kept, fields = [dict(row) for row in rows], _field_names(pa.struct(list(schema)))
    unknown = sorted({name for row in kept for name in _unknown(row, fields)})
    if unknown:
        raise UnknownColumnsError(
            f"a row has {', '.join(unknown)}, and the table's columns are {', '.join(schema.names)}: add the column "
            "to the schema, or correct the key"
        )
    return pa.Table.from_pylist(kept, schema=schema)


def parquet_of_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """The rows as one Parquet file, compressed by zstd. Raises as `table_of_rows`."""
    return parquet_of_table(table_of_rows(rows, schema))


def parquet_of_table(table: pa.Table) -> bytes:
    """The table as one Parquet file, compressed by zstd; the same bytes for the same values in the same chunks."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _field_names(kind: pa.DataType) -> Fields:
    """The fields of a struct, or of a list of structs, with those inside them; empty for another type."""
    while pa.types.is_list(kind):
        kind = kind.value_type
    return {field.name: _field_names(field.type) for field in kind} if pa.types.is_struct(kind) else {}


def _unknown(value: Any, fields: Fields, place: str = "") -> Iterator[str]:
    """Yields the keys of a dict, or of a list of dicts, that are no field: `metrics.drop`."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _unknown(item, fields, place)
    elif isinstance(value, dict):
        for name, own in value.items():
            if name not in fields:
                yield f"{place}{name}"
            elif own is not None and fields[name]:
                yield from _unknown(own, fields[name], f"{place}{name}.")
