"""Rows become tables: a missing key is null, an unknown key is an error."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.storage.outputs.fragments import encode_fragment
from blocksight.storage.parquet.rows import UnknownColumnsError, parquet_of_rows, table_of_rows

POINT = pa.struct([("x", pa.int64()), ("name", pa.string())])
SCHEMA = pa.schema([("key", pa.string()), ("size", pa.int64()), ("first", POINT), ("points", pa.list_(POINT))])


def test_a_missing_key_is_null():
    assert table_of_rows([{"key": "a"}], SCHEMA).to_pylist() == [
        {"key": "a", "size": None, "first": None, "points": None}
    ]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"key": "a", "num_bytes": 3}, "a row has num_bytes, and the table's columns are key, size, first, points"),
        ({"first": {"x": 1, "label": "b"}}, "a row has first.label,"),
        ({"points": [{"x": 1}, {"y": 1}]}, r"a row has points\.y,"),
        ({"points": [{"y": 1}], "SIZE": 2}, r"a row has SIZE, points\.y,"),
    ],
)
def test_a_key_without_a_column_is_an_error(row, named):
    with pytest.raises(UnknownColumnsError, match=named):
        table_of_rows([{"key": "sound"}, row], SCHEMA)


def test_a_renamed_column_of_the_output_is_no_silent_null():
    row = {"key": "k", "shard": "s", "shard_index": 0, "unit_id": "u", "status": "ok"}
    encode_fragment([{**row, "metrics": {"drop": 1.0}}], {})
    with pytest.raises(UnknownColumnsError, match=r"metrics\.fall, score_at_end, and"):
        encode_fragment([{**row, "score_at_end": 0.5, "metrics": {"fall": 1.0}}], {})


def test_a_file_holds_the_rows():
    rows = [{"key": "a", "size": 1, "first": {"x": 1, "name": None}, "points": []}]
    assert pq.read_table(io.BytesIO(parquet_of_rows(iter(rows), SCHEMA))).to_pylist() == rows
