"""The map codec, fragments, and pictures."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from storage.fragments import encode_fragment, read_fragment
from storage.maps import MAX_ERROR, MapError, decode_map, encode_map
from storage.pictures import Tile, contact_sheet, overlay, resized, side_by_side
from storage.schema import SCHEMA

maps = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.floats(-5, 5, width=32))


@settings(max_examples=100, deadline=None)
@given(maps)
def test_a_decoded_map_is_within_the_stated_error(saliency):
    stored = encode_map(saliency)
    assert (stored.height, stored.width) == saliency.shape
    assert (stored.low, stored.high) == (saliency.min(), saliency.max())
    span = np.float64(stored.high) - stored.low
    wanted = (saliency.astype(np.float64) - stored.low) / span if span > 0 else np.zeros(saliency.shape)
    assert np.abs(decode_map(stored.data) - wanted).max() <= MAX_ERROR + 1e-6


def test_the_same_map_gives_the_same_bytes():
    saliency = np.random.default_rng(0).random((50, 50)).astype(np.float32)
    assert encode_map(saliency).data == encode_map(saliency.copy()).data


def test_a_map_that_is_not_finite_cannot_be_stored():
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode_map(np.array([[0.0, np.nan]]))


def png(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def huge():
    body = bytearray(png("L", (4, 4)))
    body[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(body)


@pytest.mark.parametrize(
    "data", [b"", b"x" * 40, png("RGB", (4, 4)), png("I;16", (4, 4)), huge(), png("L", (9, 9))[:45]]
)
def test_bytes_that_are_no_map_are_refused(data):
    with pytest.raises(MapError):
        decode_map(data)


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
    with pytest.raises(ValueError, match="not a fragment"):
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
