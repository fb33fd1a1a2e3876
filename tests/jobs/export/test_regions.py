"""`blocksight regions`: rows in are rows out, each fragment once, COCO JSON that another reader reads, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from blocksight.engine.regions import RegionRule
from blocksight.jobs.export import regions
from blocksight.jobs.export.regions import find_regions
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.run.unit_pass import ONE_PROCESS
from blocksight.jobs.worker.rows import existing_output
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.outputs.schema import REGIONS
from blocksight.storage.stores.opening import open_store
from tests.jobs.jobs_of import blocksight, fragments_in, rows_in, run_here
from tests.jobs.tiny import CLASSES, folder_of_images, hostile_table


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records of two maps, and three rejected ones."""
    root = tmp_path_factory.mktemp("regions")
    run_here(folder_of_images(root / "data"), root / "maps", explainer="gradcam", target="top-2", resize="crop")
    return root / "maps"


def found(output: object, *options: object) -> dict:
    done = blocksight("regions", output, "--json", *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert ("outlined: 10/10 images" in done.stderr) == (figures["counts"]["made"] > 0)
    return figures


def tables(folder: str) -> list[dict]:
    return [row for file in sorted(Path(folder, "data").rglob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_rows_in_are_rows_out_and_join_by_key_and_target(output):
    figures = found(output, "--parts", "all")
    rows, stored = tables(figures["folder"]), rows_in(open_store(str(output)))
    join = ("key", "shard", "shard_index", "target_index", "target", "explainer", "parameters")
    assert [[row[name] for name in join] for row in rows] == [[row[name] for name in join] for row in stored]
    assert all((row["reason"] is None) == bool(row["parts"]) for row in rows)
    assert all(len(row["parts"]) == row["num_parts"] for row in rows)
    counts = figures["counts"]
    assert (counts["records"], counts["maps"], counts["with_regions"], counts["open_units"]) == (7, 14, 14, 0)
    assert counts["reasons"] == {"the record was rejected": 3}
    assert counts["parts"] == sum(len(row["parts"]) for row in rows)
    schema = pq.read_schema(next(Path(figures["folder"], "data").rglob("*.parquet")))
    assert schema.names == REGIONS.names


def test_another_reader_finds_the_same_boxes_in_the_original(output):
    """30 x 40 pixels, cropped to the middle 30 columns: no box lies outside of them."""
    figures = found(output, "--threshold", "share:0.2", "--parts", "all")
    (key,) = figures["coco"]
    images = {image.name: image for image in open_truth(str(output / key)).images}
    wanted: dict[str, list] = {}
    for row in tables(figures["folder"]):
        boxes = [tuple(part[side] for side in ("left", "top", "right", "bottom")) for part in row["parts"]]
        if boxes:
            wanted.setdefault(row["key"], []).extend((row["target_name"], box) for box in boxes)
    assert {name: [(one.label, one.box) for one in image.objects] for name, image in images.items()} == wanted
    for image in images.values():
        assert (image.width, image.height) == (40, 30)
        for one in image.objects:
            assert one.box is not None
            assert one.mask is not None
            assert 5 <= one.box[0] < one.box[2] <= 35
            pixels = one.mask.at(np.arange(30), np.arange(40))
            assert one.box == _bounds(pixels)
            assert one.label in CLASSES


def _bounds(pixels: np.ndarray) -> tuple[int, ...]:
    rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_the_same_command_leaves_what_is_there_and_other_settings_are_another_folder(output, monkeypatch):
    options = ("--threshold", "energy:0.4", "--smooth", "1")
    first = found(output, *options)
    before = fragments_in(open_store(str(output)))
    files = {path: path.read_bytes() for path in Path(first["folder"]).rglob("*") if path.is_file()}
    monkeypatch.setattr(regions, "region_row", lambda *_: pytest.fail("a stored fragment is made again"))
    again = found(output, *options)
    assert (first["counts"]["made"], again["counts"]["made"], again["counts"]["kept"]) == (1, 0, 1)
    assert {path: path.read_bytes() for path in Path(first["folder"]).rglob("*") if path.is_file()} == files
    monkeypatch.undo()
    assert found(output, "--threshold", "energy:0.41", "--smooth", "1")["folder"] != first["folder"]
    assert fragments_in(open_store(str(output))) == before


def test_processes_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.001)
    monkeypatch.setattr("blocksight.cluster.sizing.MOST_UNIT_SECONDS", 0.002)
    data = folder_of_images(tmp_path / "data", 12)
    for place in ("one", "two"):
        run_here(data, tmp_path / place, explainer="gradcam")
    outputs = [existing_output(str(tmp_path / place)) for place in ("one", "two")]
    assert len(outputs[0].plan.units) > 2
    monkeypatch.setattr("blocksight.jobs.run.unit_pass.LEAST_RECORDS", 0)
    rule = RegionRule.parse("energy:0.5", "all", 0.0)
    made = [
        find_regions(one, rule, Console(quiet=True), execution)
        for one, execution in zip(outputs, (ONE_PROCESS, Execution(workers=2)), strict=True)
    ]
    assert made[0] == made[1]
    folders = [tmp_path / place / made[0].folder for place in ("one", "two")]
    first, second = (
        {file.relative_to(own): file.read_bytes() for file in own.rglob("*") if file.is_file()} for own in folders
    )
    assert first == second


def test_a_fragment_that_another_run_wrote_first_is_kept(output, monkeypatch):
    first = found(output, "--threshold", "share:0.3")
    folder = Path(first["folder"]).relative_to(output).as_posix() + "/"

    def unseen(store, prefix=""):
        return [info for info in store.store.list(prefix) if prefix != folder]

    monkeypatch.setattr("blocksight.storage.stores.retrying.PatientStore.list", unseen)
    again = found(output, "--threshold", "share:0.3")
    assert again["counts"]["made"] == 1
    assert {**again["counts"], "made": 0} == {**first["counts"], "made": 0}


def test_flat_maps_are_counted_with_their_reason(tmp_path):
    data = folder_of_images(tmp_path / "data", 3, bad=False)
    run_here(data, tmp_path / "maps", model="tests.jobs.tiny:make_against", explainer="gradcam", target="ant")
    done = blocksight("regions", tmp_path / "maps")
    assert done.returncode == 0
    assert "3 the map is flat" in done.stdout
    (file,) = (tmp_path / "maps" / "regions").rglob("*.parquet")
    assert {row["reason"] for row in pq.read_table(file).to_pylist()} == {"the map is flat"}
    (coco,) = (tmp_path / "maps" / "regions").rglob("coco.json")
    tree = json.loads(coco.read_text())
    assert (len(tree["images"]), tree["annotations"]) == (3, [])


def test_strangers_names_are_data(tmp_path):
    run_here(hostile_table(tmp_path / "data"), tmp_path / "maps", model="tests.jobs.tiny:make_hostile")
    done = blocksight("regions", tmp_path / "maps")
    assert done.returncode == 0
    (coco,) = (tmp_path / "maps" / "regions").rglob("coco.json")
    named = {row["key"] for row in rows_in(open_store(str(tmp_path / "maps"))) if row["status"] == "ok"}
    assert {image["file_name"] for image in json.loads(coco.read_text())["images"]} == named


def test_an_unfinished_job_is_outlined_as_far_as_it_is(output, tmp_path):
    shutil.copytree(output, tmp_path / "maps")
    for path in ((tmp_path / "maps/data"), (tmp_path / "maps/_job/final")):
        shutil.rmtree(path)
    done = blocksight("regions", tmp_path / "maps", "--json")
    assert done.returncode == 4
    assert "1 unit of the job still open" in done.stderr
    assert json.loads(done.stdout)["counts"]["open_units"] == 1


def test_a_damaged_fragment_is_named_and_nothing_is_written_for_it(output, tmp_path):
    shutil.copytree(output, tmp_path / "maps")
    (file,) = (tmp_path / "maps/data").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    done = blocksight("regions", tmp_path / "maps", "--threshold", "share:0.11")
    assert done.returncode == 5
    assert file.name in done.stderr
    shutil.rmtree(tmp_path / "maps/data")
    shutil.copytree(output / "data", tmp_path / "maps/data")
    assert found(tmp_path / "maps", "--threshold", "share:0.11")["counts"]["maps"] == 14


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--threshold", "0.2"), "0.2 may be share:0.2 or energy:0.2"),
        (("--threshold", "otsu:3"), "known: otsu, share:0.2"),
        (("--smooth", "-1"), "smooth -1 is not from 0 to 100"),
        (("--parts", "some"), "'some' is not one of"),
    ],
)
def test_what_is_no_setting_is_refused(output, options, told):
    done = blocksight("regions", output, *options)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())


def test_a_job_goes_on_after_its_regions_were_made(output):
    found(output)
    assert blocksight("verify", output).returncode == 0
