"""How the records of an output and the images of a ground truth find each other, in one line."""

import unicodedata

from blocksight.jobs.evaluate.truth_counts import truth_line
from blocksight.jobs.plan.plan import existing_plan
from blocksight.storage.inputs.ground_truth import ImageTruth, Truth
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import run_here
from tests.jobs.tiny import folder_of_tars, picture


def line(output, *names):
    store = LocalStore(output)
    return truth_line(store, existing_plan(store), Truth(tuple(ImageTruth(name, ()) for name in sorted(names))))


def test_annotated_images_without_a_record_and_other_spellings_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    for name in (unicodedata.normalize("NFD", "Müller.png"), "a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(picture(1))
    run_here(tmp_path / "in", tmp_path / "out", explainer="gradcam")
    said = line(tmp_path / "out", unicodedata.normalize("NFC", "Müller.png"), "a.png", "c.png", "d.png")
    assert said == (
        "ground truth: 2 of 3 records have an annotated image; 1 of them by a name in another spelling; "
        "2 annotated images without a record: 'c.png', 'd.png'"
    )
    assert "1 record with more than one match" in line(tmp_path / "out", "x/a.png", "y/a.png")


def test_the_keys_of_shards_come_from_the_fragments(tmp_path):
    run_here(folder_of_tars(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    assert line(tmp_path / "out", "000.png", "999.png").startswith("ground truth: 1 of ")
