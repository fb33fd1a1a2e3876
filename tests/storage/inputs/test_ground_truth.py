"""Ground truth: three formats are read, records matched and regions computed; malformed files are refused."""

import io
import json
import struct
import unicodedata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blocksight.storage.images.decode import fit
from blocksight.storage.inputs.annotations import _mask, open_truth, read_truth
from blocksight.storage.inputs.ground_truth import AmbiguousTruthError, ImageTruth, Truth, TruthObject, boxes_in, region
from blocksight.storage.stores.store import StoreError
from tests.storage.by_hand import chunk, png_of
from tests.storage.memory import MemoryStore

VOC = """<annotation>
  <folder>VOC2012</folder><filename>2007_000027.jpg</filename>
  <size><width>486</width><height>500</height><depth>3</depth></size><segmented>0</segmented>
  <object>
    <name>person</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
    <bndbox><xmin>174</xmin><ymin>101</ymin><xmax>349</xmax><ymax>351</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>169</xmin><ymin>104</ymin><xmax>209</xmax><ymax>146</ymax></bndbox></part>
  </object>
  <object>
    <name>dog</name><difficult>1</difficult>
    <bndbox><xmin>1</xmin><ymin>45.5</ymin><xmax>486</xmax><ymax>500</ymax></bndbox>
  </object>
</annotation>"""

BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><annotation><filename>&c;</filename></annotation>"""

KNOWN_TEXT = (
    "mb0]1?00000000000000000000000000000000000000ROK55KK55KK55KK55KK55KK55KK55KK55KK55KK55i0000"
    "0000000000000000000000000000000000000000000000000000000cb0"
)
"""The run lengths by pycocotools 2.0 of the picture frame in the test."""

PIXELS = np.zeros((4, 8), bool)
PIXELS[1:3, 2:5] = True
PIXELS[3, 6] = True


def stored(**files) -> MemoryStore:
    store = MemoryStore()
    for name, data in files.items():
        store.put(name.replace("__", "."), data.encode() if isinstance(data, str) else data)
    return store


def voc(name="a.jpg", body="", width=8, height=4) -> str:
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation><filename>{name}</filename>{size}{body}</annotation>"


def coco(*objects, **image) -> str:
    image = {"id": 7, "file_name": "val/a.jpg", "width": 8, "height": 4, **image}
    annotations = [{"image_id": 7, "category_id": 3, **one} for one in objects]
    return json.dumps({"images": [image], "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]})


def table(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def png(pixels, mode=None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def named(*names) -> Truth:
    return Truth(tuple(ImageTruth(name, ()) for name in names))


def found(truth: Truth, key: str) -> str | None:
    image = truth.find(key)
    return image and image.name


def boxed(*boxes, width=8, height=4) -> ImageTruth:
    return ImageTruth("a", tuple(TruthObject("cat", box) for box in boxes), width, height)


def whole(image, labels=None, how: Any = "squash", original=(4, 8), size=None) -> np.ndarray:
    """The region, at the original size by default."""
    covered = region(image, labels, original, size or original, how)
    assert covered is not None
    return covered


def drawn(image, size, how: Any = "squash", labels=None, original=(4, 8)) -> list[str]:
    covered = region(image, labels, original, size, how)
    return [] if covered is None else ["".join(".#"[value] for value in row) for row in covered.astype(int)]


def slow_lengths(pixels) -> list[int]:
    """Run lengths, pixel by pixel down each column."""
    lengths, value = [0], False
    for column in range(pixels.shape[1]):
        for row in range(pixels.shape[0]):
            if bool(pixels[row, column]) != value:
                lengths.append(0)
                value = not value
            lengths[-1] += 1
    return lengths


def slow_text(lengths) -> str:
    """COCO's text of run lengths, as base-32 digits of a number in two's complement."""
    text = ""
    for index, length in enumerate(lengths):
        value = length - (lengths[index - 2] if index > 2 else 0)
        num_digits = 1
        while not -(16 * 32 ** (num_digits - 1)) <= value < 16 * 32 ** (num_digits - 1):
            num_digits += 1
        for place in range(num_digits):
            digit = value % 32**num_digits // 32**place % 32
            text += chr(48 + digit + (32 if place < num_digits - 1 else 0))
    return text


def slow_inside(polygon, x, y) -> bool:
    """The even-odd rule: counts the edges that a ray to the left crosses."""
    crossed = 0
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if min(y0, y1) <= y < max(y0, y1):
            crossed += x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
    return crossed % 2 == 1


def test_a_voc_file():
    truth = read_truth(stored(**{"Annotations/2007_000027__xml": VOC, "Annotations/._2007__xml": "x", "a__jpg": "x"}))
    (image,) = truth.images
    assert (image.name, image.width, image.height) == ("2007_000027.jpg", 486, 500)
    person, dog = image.objects
    assert person == TruthObject("person", (173, 100, 349, 351))
    assert dog == TruthObject("dog", (0, 44.5, 486, 500), difficult=True)
    covered = whole(image, {"person"}, original=(500, 486))
    by_hand = np.zeros((500, 486), bool)
    by_hand[101 - 1 : 351, 174 - 1 : 349] = True  # one-based, both ends inside
    assert np.array_equal(covered, by_hand)


def test_a_voc_file_without_a_name_or_a_size_goes_by_its_own():
    (image,) = read_truth(stored(**{"x/b__xml": voc(name="", width=0, height=0)})).images
    assert (image.name, image.width, image.height) == ("b", None, None)
    assert image.fits(3, 1000)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "DOCTYPE"),
        (BOMB.replace('"1.0"', '"1.0" encoding="UTF-16"').encode("utf-16"), "DOCTYPE"),
        ("<!DOCTYPE annotation SYSTEM 'file:///etc/passwd'><annotation/>", "DOCTYPE"),
        ("<annotation>&a;</annotation>", "entity"),
        ("<annotation>", "no element found"),
        ("", "no element found"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "klingon"),
        ("<html/>", "<html>"),
        (voc(body="<object><bndbox/></object>"), "<name>"),
        (voc(body="<object><name>a</name></object>"), "missing"),
        (voc(body="<object><name>a</name><bndbox><xmin>x</xmin></bndbox></object>"), "no numbers"),
        (VOC.replace("<xmax>349</xmax>", "<xmax>9</xmax>"), "ends before it begins"),
        (VOC.replace("<xmax>349</xmax>", "<xmax>inf</xmax>"), "beyond"),
        (voc(name="./"), "a file name"),
        (b"\0" * 40, "not well-formed"),
        (b"<" * ((1 << 20) + 1), "at most 1048576"),
    ],
)
def test_hostile_xml_is_refused(text, reason):
    with pytest.raises(StoreError, match=reason) as caught:
        read_truth(stored(a__xml=text))
    assert "memory:///a.xml" in str(caught.value)


def test_deep_xml_does_no_harm():
    deep = "<a>" * 100_000 + "</a>" * 100_000
    assert len(read_truth(stored(a__xml=voc(body=deep))).images) == 1


def test_coco_polygons_boxes_and_crowds():
    square = [1, 1, 3, 1, 3, 3, 1, 3]
    runs = {"size": [4, 8], "counts": slow_lengths(PIXELS)}
    text = coco(
        {"bbox": [1, 1, 2, 2], "segmentation": [square, [5, 0, 6, 0, 6, 1, 5, 1]], "iscrowd": 0},
        {"bbox": [2, 1, 5, 3], "segmentation": runs, "iscrowd": 1},
        {"bbox": [0.5, 1, 2, 2.25], "segmentation": []},
    )
    (image,) = read_truth(stored(a__json=text), "a.json").images
    polygons, crowd, box = image.objects
    assert polygons.polygons == (((1, 1), (3, 1), (3, 3), (1, 3)), ((5, 0), (6, 0), (6, 1), (5, 1)))
    assert box == TruthObject("cat", (0.5, 1, 2.5, 3.25))
    assert crowd.crowd
    assert crowd.mask is not None
    assert drawn(ImageTruth("a", (polygons,)), (4, 8)) == [".....#..", ".##.....", ".##.....", "........"]
    assert np.array_equal(whole(ImageTruth("a", (crowd,))), PIXELS)


def test_an_image_without_objects_has_a_truth_and_no_region():
    (image,) = read_truth(stored(a__json=coco())).images
    assert image == ImageTruth("val/a.jpg", (), 8, 4)
    assert region(image, None, (4, 8), (4, 8), "squash") is None


def test_compressed_run_lengths_known_from_pycocotools():
    assert slow_lengths(PIXELS) == [9, 2, 2, 2, 2, 2, 8, 1, 4]
    (image,) = read_truth(stored(a__json=coco({"segmentation": {"size": [4, 8], "counts": "9220006OL"}}))).images
    assert np.array_equal(whole(image), PIXELS)
    pixels = np.zeros((60, 80), bool)
    pixels[5:50, 10:70] = True
    pixels[20:30, 30:40] = False
    assert slow_text(slow_lengths(pixels)) == KNOWN_TEXT
    text = coco({"segmentation": {"size": [60, 80], "counts": KNOWN_TEXT}}, width=80, height=60)
    (image,) = read_truth(stored(a__json=text)).images
    assert np.array_equal(whole(image, original=(60, 80)), pixels)


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_against_a_slow_encoder(seed):
    rng = np.random.default_rng(seed)
    pixels = np.kron(rng.random((6, 5)) < (seed + 1) / 9, np.ones((9 * seed + 1, 7), bool)).astype(bool)
    pixels[0, 0] = seed % 2 == 0
    height, width = pixels.shape
    lengths = slow_lengths(pixels)
    for counts in (lengths, slow_text(lengths)):
        text = coco({"segmentation": {"size": [height, width], "counts": counts}}, width=width, height=height)
        (image,) = read_truth(stored(a__json=text)).images
        assert np.array_equal(whole(image, original=pixels.shape), pixels)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[" * 200_000, "recursion"),
        (b"\xff\xfe\xff", "decode"),
        ("[]", "`categories`"),
        ('{"images": [], "categories": []}', "`annotations`"),
        ('{"images": [], "categories": [7]}', "entry 0"),
        ('{"images": [], "categories": [{"id": [], "name": "a"}]}', "entry 0"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "2 entries and 1 ids"),
        (coco({"bbox": [0, 0, 1, 1], "image_id": 8}), "does not list"),
        (coco({"bbox": [0, 0, 1, 1], "category_id": 8}), "does not list"),
        (coco({}), "neither"),
        (coco({"bbox": [0, 0, 1]}), "list of 4 numbers"),
        (coco({"bbox": {"x": 1}}), "no numbers"),
        (coco({"bbox": [0, 0, -1, 1]}), "ends before"),
        (coco({"bbox": [0, 0, 10**400, 1]}), "no numbers"),
        (coco({"bbox": [0, 0, float("nan"), 1]}), "missing or beyond"),
        (coco({"segmentation": [[1, 2, 3, 4, 5]]}), "5 numbers"),
        (coco({"segmentation": [[1, 2, 3, 4]]}), "4 numbers"),
        (coco({"segmentation": [[[1, 2], [3]]]}), "no numbers"),
        (coco({"segmentation": {"counts": [32]}}), "size None"),
        (coco({"segmentation": {"size": [4, -8], "counts": [32]}}), "size"),
        (coco({"segmentation": {"size": [4, 8], "counts": [31]}}), "sum to 31; its 8 x 4 pixels are 32"),
        (coco({"segmentation": {"size": [4, 8], "counts": [33, -1]}}), "from 0"),
        (coco({"segmentation": {"size": [4, 8], "counts": [32.0]}}), "from 0"),
        (coco({"segmentation": {"size": [4, 8], "counts": "P"}}), "within"),
        (coco({"segmentation": {"size": [4, 8], "counts": "é"}}), "compressed"),
        (coco({"segmentation": {"size": [4, 8], "counts": "o" * 50_000}}), "compressed"),
        (coco({"segmentation": {"size": [1 << 20, 1 << 20], "counts": [1 << 40]}}), "from 0|at most"),
        (coco({"segmentation": {"size": [4, 9], "counts": [36]}}), "8 x 4 and 9 x 4"),
        (coco(file_name=""), "a file name"),
    ],
)
def test_malformed_coco_is_refused(text, reason):
    with pytest.raises(StoreError, match=reason) as caught:
        read_truth(stored(a__json=text))
    assert "memory:///a.json" in str(caught.value)


def test_a_label_of_no_text_is_kept_as_codes():
    (image,) = read_truth(stored(a__json=coco({"bbox": [0, 0, 1, 1]}).replace('"cat"', '"\\ud800"'))).images
    assert image.objects[0].label == "\\ud800"
    assert len(Truth((image,)).digest) == 64


def test_a_mask_has_at_most_as_many_pixels_as_an_image(monkeypatch):
    monkeypatch.setattr("blocksight.storage.inputs.annotations.MAX_IMAGE_PIXELS", 32)
    assert _mask(4, 8, np.array([32])).at(np.array([0]), np.array([0])).tolist() == [[False]]
    with pytest.raises(ValueError, match="a mask of 11 x 3 pixels"):
        _mask(3, 11, np.array([33]))


def test_an_object_without_any_shape_covers_nothing():
    box = TruthObject("x", (1, 1, 3, 3))
    alone, beside = (ImageTruth("a.jpg", objects, 8, 4) for objects in ((box,), (TruthObject("x"), box)))
    assert np.array_equal(whole(beside), whole(alone))


def test_columns_of_boxes():
    boxes = [[[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 4.0]], None, [[4.0, 0.0, 8.0, 4.0]]]
    data = table(key=["a/1", "2", "a/1"], boxes=boxes, labels=[[3, 4], [], [3]], label=["x", "y", "z"])
    store = stored(**{"t/part-0__parquet": data, "t/_SUCCESS": ""})
    first, second = read_truth(store).images
    assert first == ImageTruth("2", ())
    assert [one.label for one in second.objects] == ["3", "4", "3"]
    assert drawn(second, (4, 8), labels={"3"}) == ["##..####", "##..####", "....####", "....####"]


def test_boxes_without_labels_belong_to_every_target():
    data = table(key=[5], boxes=[[[0.0, 0.0, 8.0, 1.0]]])
    (image,) = read_truth(stored(a__parquet=data)).images
    assert (image.name, image.objects[0].label) == ("5", "")
    assert drawn(image, (2, 2), labels=["anything"], original=(2, 8)) == ["##", ".."]


@pytest.mark.parametrize(
    "data",
    [
        png(PIXELS),
        png(PIXELS.astype(np.uint8) * 3),
        png(PIXELS.astype(np.uint16) * 256),
        png(np.stack([PIXELS * np.uint8(0), PIXELS * np.uint8(9), PIXELS * np.uint8(0)], -1)),
    ],
    ids=["1", "L", "I;16", "RGB"],
)
def test_columns_of_masks(data):
    rows = table(key=["a", "a", "b"], mask=[data, png(~PIXELS), None], label=["cat", "dog", "cat"])
    image, empty = read_truth(stored(a__parquet=rows)).images
    assert (image.width, image.height, empty.objects) == (8, 4, ())
    assert np.array_equal(whole(image, {"cat"}), PIXELS)
    assert np.array_equal(whole(image, {"dog"}), ~PIXELS)
    assert whole(image).all()


def test_a_palette_mask_goes_by_its_indices():
    image = Image.fromarray(PIXELS.astype(np.uint8))
    image.putpalette([255, 255, 255, 0, 0, 0])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    (truth,) = read_truth(stored(a__parquet=table(key=["a"], mask=[buffer.getvalue()]))).images
    assert np.array_equal(whole(truth), PIXELS)


BOX = [[0.0, 0.0, 1.0, 1.0]]
LARGE = png_of(chunk(b"IHDR", struct.pack(">IIBBBBB", 9_000_000, 9_000_000, 8, 0, 0, 0, 0)))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"key": ["a"]}, "its columns are key; wanted"),
        ({"boxes": [BOX]}, "wanted `key`"),
        ({"key": ["a"], "boxes": [BOX], "mask": [b""]}, "one of"),
        ({"key": ["a"], "boxes": [["x"]]}, "list|cast|conver"),
        ({"key": [None], "boxes": [BOX]}, "null"),
        ({"key": ["a"], "boxes": [[[0.0, 1.0]]]}, "4 numbers"),
        ({"key": ["a"], "boxes": [[[3.0, 0.0, 1.0, 1.0]]]}, "ends before"),
        ({"key": ["a"], "boxes": [BOX], "labels": [["x", "y"]]}, "one for each"),
        ({"key": ["a"], "boxes": [BOX], "labels": [[None]]}, "one for each"),
        ({"key": ["a"], "mask": [b"nonsense"]}, "PNG"),
        ({"key": ["a"], "mask": [png(PIXELS)[:50]]}, "PNG"),
        ({"key": ["a"], "mask": [png(PIXELS).replace(b"IEND", b"IHDR")]}, "PNG"),
        ({"key": ["a"], "mask": [LARGE]}, "9000000 x 9000000 pixels, at most 89478485"),
        ({"key": ["a"], "mask": [png(np.zeros((2, 2, 4), np.uint8))]}, "alpha"),
        ({"key": ["a"], "mask": [png(PIXELS)], "label": [None]}, "no `label`"),
        ({"key": ["a", "a"], "mask": [png(PIXELS), png(PIXELS.T)]}, "4 x 8 and 8 x 4"),
        ({"key": pa.array([b"\xff"]), "boxes": [BOX]}, "UTF8"),
    ],
)
def test_malformed_tables_are_refused(columns, reason):
    with pytest.raises(StoreError, match=reason):
        read_truth(stored(a__parquet=table(**columns)))


def test_a_file_that_is_no_table_is_refused():
    with pytest.raises(StoreError, match=r"memory:///a\.parquet"):
        read_truth(stored(a__parquet=b"PAR1 and so on"))


def test_an_extension_type_is_refused():
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["a"]))
    with pytest.raises(StoreError, match="of the extension type arrow"):
        read_truth(stored(a__parquet=table(key=column, boxes=[BOX])))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds nothing"),
        ({"a__txt": "x"}, "1 like a.txt"),
        ({"a__xml": VOC, "b__json": coco()}, "1 like a.xml, 1 like b.json"),
        ({"a__json": coco(), "b__json": coco()}, "2 like a.json"),
        ({"a__xml": VOC, "b__xml": VOC}, "twice"),
    ],
)
def test_a_folder_holds_one_kind(files, reason):
    with pytest.raises(StoreError, match=reason):
        read_truth(stored(**files))


def test_opening_by_path(tmp_path):
    folder = tmp_path / "odd.json"
    folder.mkdir()
    (folder / "2007_000027.xml").write_text(VOC)
    (tmp_path / "a.json").write_text(coco())
    assert found(open_truth(f"{folder}/"), "2007_000027.jpg") == "2007_000027.jpg"
    assert found(open_truth(str(tmp_path / "a.json")), "a.jpg") == "val/a.jpg"
    assert found(open_truth(f"file://{tmp_path}/a.json"), "a.jpg") == "val/a.jpg"
    with pytest.raises(StoreError, match=r"b\.json is not there, or holds nothing"):
        open_truth(str(tmp_path / "b.json"))
    with pytest.raises(StoreError, match="holds nothing"):
        open_truth(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("2007_000027.jpg", "2007_000027.jpg"),
        ("cat/2007_000027.jpg", "2007_000027.jpg"),
        ("shard-000.tar/2007_000027", "2007_000027.jpg"),
        ("data/shard-000.tar/cat/2007_000027.jpg", "2007_000027.jpg"),
        ("cat/1.jpg", "photos/cat/1.jpg"),
        ("a.tar/cat/1", "photos/cat/1.jpg"),
        ("bucket/photos/dog/1.jpg", "photos/dog/1.jpg"),
        ("photos/dog/1.png", "photos/dog/1.jpg"),
        ("cow/1.jpg", None),
        ("00027.jpg", None),
        ("b.tar/17", "b.tar/17"),
        ("c.tar/17", None),
        ("x/2.5", "2.5"),
        ("x/2.jpg", None),
        ("win/3.jpg", "win\\3.JPG"),
        ("", None),
    ],
)
def test_a_record_finds_its_annotation(key, name):
    truth = named("2007_000027.jpg", "photos/cat/1.jpg", "photos/dog/1.jpg", "b.tar/17", "2.5", "win\\3.JPG")
    assert found(truth, key) == name


def test_the_longest_agreement_counts():
    truth = named("1.jpg", "cat/1.jpg")
    assert found(truth, "a/cat/1.jpg") == "cat/1.jpg"
    assert found(truth, "a/dog/1.jpg") == "1.jpg"


def test_what_could_be_two_is_never_guessed():
    truth = named("cat/1.jpg", "dog/1.jpg", "2.jpg", "2.png")
    with pytest.raises(AmbiguousTruthError, match=r"'cat/1\.jpg' and 'dog/1\.jpg'"):
        truth.find("1.jpg")
    with pytest.raises(AmbiguousTruthError):
        truth.find("a.tar/1")
    with pytest.raises(AmbiguousTruthError):
        truth.find("a.tar/2")
    assert found(truth, "2.png") == "2.png"


@pytest.mark.parametrize(("key", "name"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_from_a_mac_find_each_other(key, name):
    key, name = (unicodedata.normalize(form, "Müller 1.png") for form in (key, name))
    assert key != name
    truth = named(name, "Muller 1.png")
    assert found(truth, f"red/{key}") == name
    assert truth.find_exactly(f"red/{key}") is None
    label = unicodedata.normalize("NFD", "Tür")
    image = ImageTruth("a", (TruthObject(label, (0, 0, 4, 4)),), 8, 4)
    assert region(image, {unicodedata.normalize("NFC", "Tür")}, (4, 8), (4, 8), "squash").sum() == 16


def test_another_spelling_counts_only_where_nothing_else_matches_and_it_is_one():
    truth = named("cat_1.JPG", "Cat 2.jpg", "cat_2.jpg", "x/CAT 3.jpg", "x/cat_3.jpg")
    assert found(truth, "in/Cat 1.jpg") == "cat_1.JPG"
    assert found(truth, "in/cat_2.jpg") == "cat_2.jpg"
    with pytest.raises(AmbiguousTruthError):
        truth.find("x/Cat_3.jpg")


def test_the_digest_knows_content_and_no_order():
    one, two = TruthObject("cat", (0, 0, 1, 1)), TruthObject("dog", (0, 0, 1, 1))
    first, second = ImageTruth("a", (one, two)), ImageTruth("b", (one,))
    digest = Truth((first, second)).digest
    assert Truth((second, ImageTruth("a", (two, one)))).digest == digest
    others = [
        (first,),
        (first, ImageTruth("c", (one,))),
        (first, ImageTruth("b", (two,))),
        (first, ImageTruth("b", (one,), 8, 4)),
        (first, ImageTruth("b", (TruthObject("cat", (0, 0, 1, 2)),))),
        (first, ImageTruth("b", (TruthObject("cat", (0, 0, 1, 1), difficult=True),))),
        (first, ImageTruth("b", (TruthObject("cat", (0, 0, 1, 1), crowd=True),))),
        (first, ImageTruth("b", (TruthObject("cat", (0, 0, 1, 1), (((0, 0), (1, 0), (1, 1)),)),))),
    ]
    assert len({digest, *(Truth(images).digest for images in others)}) == 1 + len(others)
    counts = [slow_lengths(PIXELS), slow_text(slow_lengths(PIXELS)), slow_lengths(~PIXELS)]
    texts = [coco({"segmentation": {"size": [4, 8], "counts": one}}) for one in counts]
    same, compressed, other = (read_truth(stored(a__json=text)).digest for text in texts)
    assert same == compressed != other


def test_squash_by_hand():
    image = boxed((2, 1, 6, 3))
    assert drawn(image, (4, 8)) == ["........", "..####..", "..####..", "........"]
    assert drawn(image, (4, 4)) == ["....", ".##.", ".##.", "...."]
    assert drawn(image, (8, 8))[:4] == ["........", "........", "..####..", "..####.."]


def test_left_and_top_are_inside_right_and_bottom_are_not():
    # the four centres lie at x 2, 6 and y 1, 3: on the edges
    assert drawn(boxed((2, 1, 6, 3)), (2, 2)) == ["#.", ".."]
    assert drawn(boxed((2.1, 1, 6.1, 3)), (2, 2)) == [".#", ".."]


def test_crop_by_hand():
    # 8 x 4 to 4 x 4: columns 2 to 6 are seen; a box from 0 to 3 shows its last column
    assert drawn(boxed((0, 0, 3, 2)), (4, 4), "crop") == ["#...", "#...", "....", "...."]
    assert drawn(boxed((0, 0, 3.5, 2)), (2, 2), "crop") == ["#.", ".."]
    assert drawn(boxed((5, 3, 8, 4)), (4, 4), "crop") == ["....", "....", "....", "...#"]
    assert region(boxed((6, 0, 8, 4)), None, (4, 8), (4, 4), "crop") is None
    tall = boxed((0, 0, 4, 3), width=4, height=8)
    assert drawn(tall, (4, 4), "crop", original=(8, 4)) == ["####", "....", "....", "...."]


@pytest.mark.parametrize("how", ["squash", "crop"])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (2, 4), (12, 6)])
def test_the_region_lies_where_the_pixels_go(how, size):
    """A white box on black, resized as the model's input, is bright where the region is."""
    original = (24, 48)
    pixels = np.zeros((*original, 3), np.uint8)
    pixels[6:18, 12:30] = 255
    brightness = fit(pixels, size, how)[..., 0]
    covered = whole(boxed((12, 6, 30, 18), width=48, height=24), None, how, original, size)
    assert covered[brightness > 200].all()
    assert not covered[brightness < 55].any()


def test_a_small_box_has_its_nearest_pixel():
    assert drawn(boxed((0.1, 0.1, 0.3, 0.3)), (2, 2)) == ["#.", ".."]
    assert drawn(boxed((7, 3, 8, 3.5)), (2, 2)) == ["..", ".#"]
    assert not drawn(boxed((0, 0, 0, 4)), (2, 2))  # no area
    assert not drawn(boxed((0, 0, 1, 1)), (2, 2), "crop")  # cut off
    small = TruthObject("cat", (0, 0, 1, 1), (((0, 0), (1, 0), (1, 1)),))
    assert drawn(ImageTruth("a", (small,)), (2, 2)) == ["#.", ".."]
    beyond = boxed((-9, -9, -8, -8), (20, 20, 30, 30))
    assert not drawn(beyond, (2, 2))


def test_a_bent_object_that_misses_every_centre_is_not_given_one():
    """Its box is large, so the middle of the box may lie outside the object."""
    ring = TruthObject("cat", (0, 0, 8, 4), (((0, 0), (8, 0), (8, 0.2), (0.2, 0.2), (0.2, 4), (0, 4)),))
    assert not drawn(ImageTruth("a", (ring,)), (4, 4))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("how", ["squash", "crop"])
def test_polygons_against_a_slow_twin(seed, how):
    rng = np.random.default_rng(seed)
    polygon = [(float(x), float(y)) for x, y in rng.uniform(-2, 12, (7, 2)).round(seed % 3)]
    image = ImageTruth("a", (TruthObject("cat", polygons=(tuple(polygon),)),))
    covered = region(image, None, (6, 10), (9, 9), how)
    left, width = (0, 10) if how == "squash" else (2, 6)
    centres = [[(left + (column + 0.5) * width / 9, (row + 0.5) * 6 / 9) for column in range(9)] for row in range(9)]
    expected = np.array([[slow_inside(polygon, x, y) for x, y in row] for row in centres])
    assert np.array_equal(covered, expected) if covered is not None else not expected.any()


@pytest.mark.parametrize("seed", range(10))
def test_a_box_and_its_outline_cover_the_same(seed):
    left, top, right, bottom = np.random.default_rng(seed).integers(0, 9, 4).tolist()
    box = (min(left, right), min(top, bottom), max(left, right) + 1.0, max(top, bottom) + 1.0)
    left, top, right, bottom = box
    outline = ((left, top), (right, top), (right, bottom), (left, bottom))
    for size in ((5, 5), (10, 10), (7, 13)):
        of_box = whole(ImageTruth("a", (TruthObject("x", box),)), None, "squash", (10, 10), size)
        of_outline = whole(ImageTruth("a", (TruthObject("x", box, (outline,)),)), None, "squash", (10, 10), size)
        assert np.array_equal(of_box, of_outline)


@pytest.mark.parametrize(("how", "first"), [("squash", 0), ("crop", 2)])
def test_masks_are_sampled_where_the_centres_fall(how, first):
    (image,) = read_truth(stored(a__parquet=table(key=["a"], mask=[png(PIXELS)]))).images
    step = 2 if how == "squash" else 1
    expected = [[PIXELS[row, int(first + (column + 0.5) * step)] for column in range(4)] for row in range(4)]
    assert np.array_equal(whole(image, None, how, size=(4, 4)), expected)


def test_labels_choose_and_all_flags_count():
    objects = (
        TruthObject("cat", (0, 0, 1, 4), difficult=True),
        TruthObject("cat", (2, 0, 3, 4), crowd=True),
        TruthObject("dog", (4, 0, 5, 4)),
    )
    image = ImageTruth("a", objects, 8, 4)
    assert drawn(image, (1, 8), labels={"cat"}) == ["#.#....."]
    assert drawn(image, (1, 8), labels={"cat", "dog"}) == ["#.#.#..."]
    assert drawn(image, (1, 8)) == ["#.#.#..."]
    assert not drawn(image, (1, 8), labels={"cow"})
    assert not drawn(image, (1, 8), labels=())


def test_an_image_that_exif_turns_is_refused():
    image = boxed((0, 0, 8, 4))
    assert image.fits(4, 8)
    assert not image.fits(8, 4)
    with pytest.raises(StoreError, match=r"8 x 4 pixels.* 4 x 8; annotate it upright"):
        region(image, None, (8, 4), (4, 4), "squash")
    assert ImageTruth("a", (), width=8).fits(3, 8)


@pytest.mark.parametrize(
    ("one", "how", "size", "expected"),
    [
        (TruthObject("a", box=(10, 20, 30, 40)), "squash", (50, 50), (5, 20, 15, 40)),
        (TruthObject("a", box=(-5, 20, 300, 40)), "squash", (50, 50), (0, 20, 50, 40)),
        (TruthObject("a", box=(10, 20, 30, 40)), "crop", (50, 50), (0, 20, 5, 40)),  # the centre: columns 25 to 75
        (TruthObject("a", box=(0, 20, 20, 40)), "crop", (50, 50), None),
        (TruthObject("a", box=(10, 20, 10, 40)), "squash", (50, 50), None),
        (TruthObject("a", polygons=(((10, 20), (30, 40), (20, 20)),)), "squash", (50, 100), (10, 20, 30, 40)),
        (TruthObject("a", mask=_mask(50, 100, np.array([60, 3, 4937]))), "squash", (50, 100), (1, 10, 2, 13)),
        (TruthObject("a", mask=_mask(50, 100, np.array([5000]))), "squash", (50, 100), None),
        (TruthObject("a"), "squash", (50, 100), None),
    ],
)
def test_boxes_lie_where_the_picture_shows_the_object(one, how, size, expected):
    found = boxes_in(ImageTruth("x", (one,)), (50, 100), size, how)
    assert [label for label, _ in found] == ([] if expected is None else ["a"])
    if expected is not None:
        assert found[0][1] == pytest.approx(expected)


def test_boxes_of_an_annotation_at_another_size_are_refused():
    image = ImageTruth("x", (TruthObject("a", box=(0, 0, 1, 1)),), width=50, height=100)
    with pytest.raises(StoreError, match="annotate it upright"):
        boxes_in(image, (50, 100), (50, 50), "squash")
