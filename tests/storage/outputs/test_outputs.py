"""Fragments and pictures: their columns, bytes, batches and sizes."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from blocksight.storage.outputs.drawings import Cell, with_cells, with_path
from blocksight.storage.outputs.fragments import SCHEMA_3, encode_fragment, fragment_batches, read_fragment
from blocksight.storage.outputs.pictures import Tile, colours, contact_sheet, overlay, resized
from blocksight.storage.outputs.schema import RANKS_FROM_0, SCHEMA
from blocksight.storage.stores.store import DamagedError
from tests.storage.memory import MemoryStore


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


def test_maps_are_stored_as_they_are_and_what_repeats_as_a_dictionary():
    group = pq.ParquetFile(io.BytesIO(encode_fragment([row(map=b"\x89")] * 9, {}))).metadata.row_group(0)
    columns = {group.column(place).path_in_schema: group.column(place) for place in range(group.num_columns)}
    assert not columns["map"].has_dictionary_page
    assert columns["status"].has_dictionary_page


def test_a_fragment_is_read_in_batches():
    store = MemoryStore()
    store.put("f", encode_fragment([row(shard_index=number) for number in range(5)], {}))
    batches = [*fragment_batches(store, store.head("f"), ["shard_index", "key"], 2, 64)]
    assert {batch.num_rows for batch in batches} <= {1, 2}
    assert [one for batch in batches for one in batch["shard_index"].to_pylist()] == list(range(5))
    store.put("f", b"no fragment")
    with pytest.raises(DamagedError, match="verify"):
        [*fragment_batches(store, store.head("f"), ["key"], 2, 64)]


def test_an_overlay_by_hand():
    """A quarter of the map's colour where it is 0, three quarters where it is 1."""
    pixels = np.full((1, 2, 3), 200, np.uint8)
    saliency = np.array([[0.0, 1.0]], np.float32)
    wanted = [[0.75 * 200 + 0.25 * colours(saliency)[0, 0], 0.25 * 200 + 0.75 * colours(saliency)[0, 1]]]
    assert np.array_equal(overlay(pixels, saliency), np.rint(wanted))


def test_below_cells_and_paths_the_picture_is_dimmed():
    pixels = np.full((100, 120, 3), 200, np.uint8)
    celled = with_cells(pixels, [Cell((10, 10, 60, 60), 1.0, "a")], (5, 5, 90, 90))
    walked = with_path(pixels, [(30.0, 30.0), (-50.0, 500.0)])
    for made in (celled, walked):
        assert made.shape == pixels.shape
        assert made.dtype == np.uint8
        assert (made[0, 119] == 110).all()  # 0.55 of it
    assert np.array_equal(celled[30, 55], colours(np.ones((1, 1)))[0, 0])
    assert (walked[88:, :12] != 110).any()  # a point outside is marked at the edge


def test_pictures_have_their_sizes():
    pixels = np.full((20, 30, 3), 100, np.uint8)
    saliency = np.zeros((20, 30), np.float32)
    saliency[5, 5] = 1
    assert overlay(pixels, saliency).shape == (20, 30, 3)
    assert overlay(pixels, saliency)[5, 5].sum() > overlay(pixels, saliency)[0, 0].sum()
    assert resized(saliency, (40, 60)).shape == (40, 60)
    sheet = contact_sheet([Tile(pixels, "one"), Tile(pixels, "two"), Tile(pixels, "three")], columns=2)
    legend = 16 + 8
    assert sheet.size == (max(2 * 38, sheet.width - 8) + 8, 2 * 68 + 8 + legend)
    with pytest.raises(ValueError, match="at least one tile"):
        contact_sheet([], 2)


def test_an_older_fragment_is_read_with_ranks_from_1_and_no_rank_of_the_label():
    """Version 3 of the schema counted `target_rank` from 0 and had no `label_rank`."""
    rows = [row(target_rank=0), row(shard_index=1, target_rank=4), row(shard_index=2, status="rejected")]
    body = encode_fragment(rows, {}, SCHEMA_3.with_metadata({"blocksight.schema": RANKS_FROM_0}))
    found = read_fragment(body)
    assert found.schema.equals(SCHEMA)
    assert found["target_rank"].to_pylist() == [1, 5, None]
    assert found["label_rank"].to_pylist() == [None] * 3
    assert read_fragment(body, ["label_rank", "key", "target_rank"]).column_names == [
        "label_rank",
        "key",
        "target_rank",
    ]
    store = MemoryStore()
    store.put("f", body)
    batches = [*fragment_batches(store, store.head("f"), ["label_rank", "target_rank"], 2, 64)]
    assert [one for batch in batches for one in batch["target_rank"].to_pylist()] == [1, 5, None]
    assert {batch["label_rank"].null_count for batch in batches} <= {1, 2}


def test_all_colour_of_an_overlay_is_the_maps():
    """A red object below a map of one value looks like a grey object of the same brightness."""
    red = np.zeros((1, 2, 3), np.uint8)
    red[0, 0] = (255, 0, 0)
    red[0, 1] = round(0.299 * 255)
    for value in (0.0, 0.5, 1.0):
        first, second = overlay(red, np.full((1, 2), value))[0].astype(int)
        assert np.abs(first - second).max() <= 1


def test_a_legend_shows_every_colour_from_least_to_most():
    sheet = np.asarray(contact_sheet([Tile(np.full((20, 30, 3), 100, np.uint8), "one")], 1))
    bar = sheet[-8 - 8]
    wanted = colours(np.linspace(0, 1, 160)[None])[0]
    starts = [start for start in range(sheet.shape[1] - 160) if np.array_equal(bar[start : start + 160], wanted)]
    assert len(starts) == 1  # a narrow sheet is as wide as the legend
    assert (sheet[-24:-8, : starts[0]] < 128).any()  # the word before it
    assert (sheet[-24:-8, starts[0] + 160 :] < 128).any()  # and after it
