"""Objects' boxes are drawn wherever a record is shown: in `show`, `report`, `versus` and FiftyOne's detections."""

import base64
import io
import json
from shutil import copytree

import numpy as np
import pytest
from PIL import Image

from blocksight.jobs.evaluate.known_truth import TRUTH_KEY, known_truth, remember_truth
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.report.page import REPORT_KEY
from blocksight.jobs.versus.run import PICTURE
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.outputs.drawings import TRUTH_COLOUR
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import StoreError
from tests.jobs.jobs_of import called, model_of, rows_in, run_here
from tests.jobs.tiny import folder_of_images


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two outputs of the same images, and COCO boxes: the right half of every image but the first."""
    base = tmp_path_factory.mktemp("boxes")
    folder_of_images(base / "in", 6, bad=False)
    for name in ("out", "other"):
        run_here(base / "in", base / name, explainer="gradcam")
    write_boxes(base / "boxes.json", rows_in(LocalStore(base / "out"))[1:])
    return base


def write_boxes(file, rows):
    document = {
        "images": [{"id": number, "file_name": row["key"]} for number, row in enumerate(rows)],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": 7,
                "iscrowd": 0,
                "bbox": [row["width"] / 2, 0, row["width"] / 2, row["height"]],
            }
            for number, row in enumerate(rows)
        ],
    }
    file.write_text(json.dumps(document))


@pytest.fixture
def base(made, tmp_path):
    return copytree(made, tmp_path / "base")


def drawn(pixels, tolerance=0):
    """Where the picture has the colour of the boxes, bool [H, W]."""
    return (np.abs(pixels.astype(int) - TRUTH_COLOUR) <= tolerance).all(-1)


def key_at(base, place):
    return rows_in(LocalStore(base / "out"))[place]["key"]


def shown(base, place, *options):
    code, printed = called("show", base / "out", key_at(base, place), "--picture", base / "one.png", *options)
    assert code == 0, printed
    with Image.open(base / "one.png") as picture:
        return np.asarray(picture.convert("RGB")), printed


def test_show_draws_boxes_of_given_truth_on_image_and_overlay(base):
    found, _ = shown(base, 1, "--truth", base / "boxes.json")
    step = (found.shape[1] - 8) // 3
    side = step - 8
    image, over, saliency = (drawn(found[:, 8 + place * step :][:, :side]) for place in range(3))
    for one in (image, over):
        columns = np.flatnonzero(one.sum(0) > 0.6 * side)  # the box's left and right edge
        assert columns.min() == pytest.approx(side / 2, abs=2)
        assert columns.max() >= side - 3
    assert not saliency.any()
    none, _ = shown(base, 0, "--truth", base / "boxes.json")  # its record has no annotation
    assert not drawn(none).any()
    assert not drawn(shown(base, 1)[0]).any()


def test_truth_that_evaluate_or_audit_was_given_is_known(base):
    for command in ("evaluate", "audit"):
        (base / "out" / TRUTH_KEY).unlink(missing_ok=True)
        options = ("--metrics", "ebpg", "--runner", "local") if command == "evaluate" else ()
        code, printed = called(
            command, base / "out", "--truth", base / "boxes.json", "--model", model_of(base / "out"), *options
        )
        assert code == 0, printed
        assert drawn(shown(base, 1)[0]).any(), command


def test_known_truth_that_has_changed_or_gone_is_said_and_not_drawn(base):
    store, file = LocalStore(base / "out"), base / "boxes.json"
    assert known_truth(store, None, None).note is None
    remember_truth(store, str(file), open_truth(str(file)))
    assert known_truth(store, None, None).truth == open_truth(str(file))
    write_boxes(file, rows_in(store)[:2])
    found, printed = shown(base, 1)
    assert not drawn(found).any()
    assert f"the ground truth at {file} has changed: name it with --truth" in printed
    file.unlink()
    assert "the ground truth cannot be read any more" in shown(base, 1)[1]
    code, printed = called("report", base / "out")
    assert code == 0, printed
    assert "No boxes are drawn, the ground truth cannot be read any more" in (base / "out" / REPORT_KEY).read_text()
    with pytest.raises(StoreError):
        known_truth(store, str(file), None)
    store.put(TRUTH_KEY, b"{}")
    with pytest.raises(UnreconciledError, match=r"truth\.json"):
        known_truth(store, None, None)


def test_the_report_draws_them(base):
    code, printed = called("report", base / "out", "--truth", base / "boxes.json")
    assert code == 0, printed
    page = (base / "out" / REPORT_KEY).read_text()
    assert "Light blue boxes are the objects of the ground truth" in page
    jpegs = [part.split('"')[0] for part in page.split("data:image/jpeg;base64,")[1:]]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in jpegs]
    edges = [drawn(one, tolerance=60).mean(0).max() > 0.5 for one in pictures]  # a column of the box's colour
    assert sum(edges) == 2 * 5  # image and overlay, of five records


def test_versus_draws_them(base):
    code, printed = called(
        "versus", base / "out", base / "other", "--output", base / "difference", "--truth", base / "boxes.json"
    )
    assert code == 0, printed
    with Image.open(base / "difference" / PICTURE) as picture:
        found = drawn(np.asarray(picture.convert("RGB")))
    assert [found[:, place * 328 :][:, :328].any() for place in range(3)] == [True, True, True]


def test_fiftyone_has_them_as_detections(base):
    code, printed = called("export", base / "out", "fiftyone", base / "fo", "--truth", base / "boxes.json")
    assert code == 0, printed
    samples = json.loads((base / "fo" / "samples.json").read_text())["samples"]
    found = {sample["key"]: sample.get("ground_truth_objects") for sample in samples}
    assert found.pop(key_at(base, 0)) is None
    for objects in found.values():
        assert objects["_cls"] == "Detections"
        [one] = objects["detections"]
        assert (one["_cls"], one["label"]) == ("Detection", "thing")
        assert one["bounding_box"] == pytest.approx([0.5, 0, 0.5, 1])
    fields = {own["name"]: own for own in json.loads((base / "fo" / "metadata.json").read_text())["sample_fields"]}
    assert fields["ground_truth_objects"]["embedded_doc_type"] == "fiftyone.core.labels.Detections"
    code, printed = called("export", base / "out", "spotlight", base / "sp", "--truth", base / "boxes.json")
    assert (code, "is for fiftyone and pictures only" in printed) == (2, True)
