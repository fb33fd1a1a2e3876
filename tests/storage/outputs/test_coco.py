"""Regions in the original picture: against a slow twin and an independent reader; COCO documents of bounded size."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from blocksight.storage.images.fitting import centred_box
from blocksight.storage.inputs.annotations import read_truth
from blocksight.storage.outputs.coco import CocoWriter, compressed, placed
from tests.storage.memory import MemoryStore


def slow_place(mask_hw: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """Pixel by pixel, from the sentence."""
    high, wide = mask_hw.shape
    left, top, right, bottom = (0, 0, size[1], size[0]) if how == "squash" else centred_box(size[::-1], (wide, high))
    down, across = (bottom - top) / high, (right - left) / wide
    found = np.zeros(size, np.bool_)
    for row, column in np.ndindex(size):
        y, x = row + 0.5, column + 0.5
        if top <= y < bottom and left <= x < right:
            cell = min(int((y - top) / down), high - 1), min(int((x - left) / across), wide - 1)
            found[row, column] = mask_hw[cell]
    return found


def document(rows: list[dict], **options) -> list[dict]:
    writer = CocoWriter({"of": "a test"}, **options)
    documents = [full for row in rows for full in writer.add([row])]
    return [json.loads(text) for text in (*documents, writer.document())]


def row_of(mask_hw: np.ndarray, size: tuple[int, int], how: str = "squash", **more) -> dict:
    place = placed(mask_hw, size, how)
    part = {name: getattr(place, name) for name in ("left", "top", "right", "bottom", "counts")}
    part |= {"pixels": place.area, "area": 0.1, "energy": 0.5}
    named = {"key": "a.png", "width": size[1], "height": size[0], "target_index": 3, "target_name": "cat", "score": 0.9}
    return {**named, "parts": [part], **more}


def read_back(tree: dict):
    store = MemoryStore()
    store.put("coco.json", json.dumps(tree).encode())
    return read_truth(store, "coco.json").images


masks = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(lambda size: arrays(np.bool_, size))
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@given(masks, sizes, st.sampled_from(["squash", "crop"]))
def test_a_region_is_where_the_slow_twin_has_it(mask_hw, size, how):
    if not mask_hw.any():
        with pytest.raises(ValueError, match="without a pixel"):
            placed(mask_hw, size, how)
        return
    row, wanted = row_of(mask_hw, size, how), slow_place(mask_hw, size, how)
    (image,) = read_back(document([row])[0])
    (found,) = image.objects
    assert found.mask is not None
    pixels = found.mask.at(np.arange(size[0]), np.arange(size[1]))
    if wanted.any():
        assert np.array_equal(pixels, wanted)
    rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    assert found.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert row["parts"][0]["pixels"] == pixels.sum() >= 1
    assert (found.label, image.name, image.width, image.height) == ("cat", "a.png", size[1], size[0])


def test_a_crop_is_undone_by_hand():
    """A picture of 4 x 8 pixels is cropped to its middle; the left half of the map is columns 2 and 3."""
    left = np.array([[True, False], [True, False]])
    place = placed(left, (4, 8), "crop")
    assert (place.left, place.top, place.right, place.bottom, place.area) == (2, 0, 4, 4, 8)
    place = placed(left, (4, 8), "squash")
    assert (place.left, place.top, place.right, place.bottom, place.area) == (0, 0, 4, 4, 16)


def test_a_whole_picture_is_one_run():
    assert placed(np.ones((2, 3), np.bool_), (4, 6), "squash").counts == compressed(np.array([0, 24]))


def test_a_region_smaller_than_a_pixel_has_the_nearest_one():
    mask = np.zeros((100, 100), np.bool_)
    mask[70, 98] = True
    place = placed(mask, (2, 3), "squash")
    assert (place.left, place.top, place.right, place.bottom, place.area) == (2, 1, 3, 2, 1)


def test_memory_does_not_grow_with_the_picture():
    mask = np.zeros((8, 8), np.bool_)
    mask[2:4, 2:4] = True
    place = placed(mask, (80_000, 80_000), "squash")
    assert place.area == 20_000**2
    assert len(place.counts) < 300_000


def test_documents_are_cut_at_the_limit_and_each_is_whole():
    mask = np.array([[True, False], [False, True]])
    rows = [row_of(mask, (10, 12), key=f"{number}.png", target_name=f"class {number % 3}") for number in range(9)]
    rows = [{**row, "target_index": number % 3} for number, row in enumerate(rows)]
    documents = document(rows, max_bytes=700)
    assert len(documents) > 2
    images = [image for one in documents for image in one["images"]]
    assert [image["id"] for image in images] == list(range(1, 10))
    assert [image.name for one in documents for image in read_back(one)] == [row["key"] for row in rows]


def test_targets_keep_their_class_numbers_and_others_get_their_own():
    mask = np.array([[True]])
    named = [(3, "cat"), (3, "logit(cat)"), (None, "cat-dog"), (None, "dog-cat"), (5, "cat")]
    rows = [row_of(mask, (4, 4), key=f"{n}", target_index=n, target_name=name) for n, name in named]
    rows = [{**row, "key": f"{number}.png"} for number, row in enumerate(rows)]
    (tree,) = document(rows)
    numbers = {(one["id"], one["name"]) for one in tree["categories"]}
    assert {(3, "cat"), (5, "cat")} < numbers
    assert len({number for number, _ in numbers}) == 5
    assert [image.objects[0].label for image in read_back(tree)] == [name for _, name in named]
