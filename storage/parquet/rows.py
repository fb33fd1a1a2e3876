"""Makes tables and Parquet files from rows; a row's key that names no column is an error, not a lost value."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class UnknownColumnsError(Exception):
    """Raised if a row has a key that its table has no column for. The program is wrong, not the record."""


def table_of_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """The rows as a table with this schema. A key that a row lacks is null.

    Raises UnknownColumnsError for a key without a column, or without a field in a struct; pyarrow.ArrowInvalid or
    ArrowTypeError if a value does not fit.
    """
    kept, kind = [dict(row) for row in rows], pa.struct(list(schema))
    unknown = sorted({name for row in kept for name in _unknown(row, kind)})
    if unknown:
        raise UnknownColumnsError(
            f"a row has {', '.join(unknown)}, and the table's columns are {', '.join(schema.names)}: add the column "
            "to the schema, or correct the key"
        )
    return pa.Table.from_pylist(kept, schema=schema)


def parquet_of_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """The rows as one Parquet file, compressed by zstd. Raises as `table_of_rows`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table_of_rows(rows, schema), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _unknown(value: Any, kind: pa.DataType, place: str = "") -> Iterator[str]:
    """Yields the keys of a dict, and of the dicts inside, that the type has no field for: `metrics.drop`."""
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        fields = {field.name: field.type for field in kind}
        for name, own in value.items():
            if name not in fields:
                yield f"{place}{name}"
            elif pa.types.is_nested(fields[name]):
                yield from _unknown(own, fields[name], f"{place}{name}.")
    elif pa.types.is_list(kind) and pa.types.is_nested(kind.value_type) and isinstance(value, list | tuple):
        for item in value:
            yield from _unknown(item, kind.value_type, place)
