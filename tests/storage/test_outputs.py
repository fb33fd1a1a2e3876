"""The map codec, fragments, and pictures."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage.fragments import encode_fragment, read_fragment
from storage.pictures import Tile, contact_sheet, overlay, resized, side_by_side
from storage.schema import SCHEMA
from storage.store import DamagedError


def row(**values):
    base = {"key": "k", "shard": "s", "shard_index": 0, "unit_id": "u", "status": "ok"}
    return {**base, **values}


def test_a_fragment_holds_its_rows_and_nothing_that_changes():
    rows = [
        row(
            map=b"\x89",
            blocks=[{"name": "b", "candidates": 8, "kept": 3}],
            metrics={"drop": 1.5, "increase": True, "protocol": "p"},
        ),
        row(shard_index=1, status="rejected", reject_code="corrupt"),
    ]
    body = encode_fragment(rows, {"blocksight.unit": "u"})
    assert body == encode_fragment(rows, {"blocksight.unit": "u"})
    found = read_fragment(body)
    assert found.schema.names == SCHEMA.names
    assert found["blocks"][0].as_py()[0]["kept"] == 3
    assert found["map"].to_pylist() == [b"\x89", None]
    assert pq.ParquetFile(io.BytesIO(body)).schema_arrow.metadata[b"blocksight.unit"] == b"u"
    assert all(field.metadata[b"meaning"] for field in found.schema)


def test_other_tables_are_no_fragments():
    import pyarrow as pa

    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(DamagedError, match="has other columns than those that are written there: a, accumulated_maps"):
        read_fragment(sink.getvalue())


def test_pictures_have_their_sizes():
    pixels = np.full((20, 30, 3), 100, np.uint8)
    saliency = np.zeros((20, 30), np.float32)
    saliency[5, 5] = 1
    assert overlay(pixels, saliency).shape == (20, 30, 3)
    assert overlay(pixels, saliency)[5, 5].sum() > overlay(pixels, saliency)[0, 0].sum()
    assert side_by_side(pixels, saliency).shape == (20, 3 * 30 + 16, 3)
    assert resized(saliency, (40, 60)).shape == (40, 60)
    sheet = contact_sheet([Tile(pixels, "one"), Tile(pixels, "two"), Tile(pixels, "three")], columns=2)
    assert sheet.size == (2 * 38 + 8, 2 * 68 + 8)
    with pytest.raises(ValueError, match="at least one tile"):
        contact_sheet([], 2)
