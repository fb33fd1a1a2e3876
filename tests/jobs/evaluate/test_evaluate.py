"""Evaluations of an output, and comparison tables: values, resumption, sampling, ground truth."""

import inspect
import json
import os
import shutil
import signal
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from blocksight.engine.catalog.entries import METRICS
from blocksight.jobs.cli.analysis_commands import evaluate
from blocksight.jobs.evaluate import compare as compare_module
from blocksight.jobs.evaluate import stored_values
from blocksight.jobs.evaluate.compare import Output, compare, rows_of_table
from blocksight.jobs.evaluate.evaluation import (
    FOLDER,
    Evaluation,
    chosen_metrics,
    evaluation_folders,
    open_units,
    read_class_map,
    value_tables,
)
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.run.evaluation import EvaluationRequest
from blocksight.jobs.worker.isolation import ProcessDiedError
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.inputs.ground_truth import region
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import MissingError
from tests.jobs.jobs_of import called, fragments_in, model_of, rows_in, run_here
from tests.jobs.outputs import evaluated, output_of_small_units
from tests.jobs.tiny import folder_of_images, folder_of_tables, folder_of_tars
from tests.storage.memory import MemoryStore


def values_in(output, outcome):
    folder = output / outcome.folder / "data"
    return [row for file in sorted(folder.iterdir()) for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def output(tmp_path, monkeypatch):
    return output_of_small_units(tmp_path, monkeypatch)


@pytest.fixture
def boxes(tmp_path):
    """Ground truth with an object of class c0 in the left half of two pictures."""
    coco = {
        "images": [{"id": 1, "file_name": "000.png"}, {"id": 2, "file_name": "001.png"}],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 7, "bbox": [0, 0, 10, 24], "iscrowd": 0} for n in (1, 2)
        ],
    }
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(coco))
    return file


def explained(output):
    return [row for row in rows_in(LocalStore(output)) if row["status"] == "ok"]


# ---------------------------------------------------------------- evaluate


def test_a_request_asks_by_default_for_what_the_command_does():
    options = inspect.signature(evaluate).parameters
    asked = {field.name: field.default for field in fields(EvaluationRequest) if field.default is not MISSING}
    asked["metrics_sample"] = asked.pop("share")
    assert asked == {name: options[name].default for name in asked}
    ways_to_run = {"workers", "runner", "address", "device", "wait", "min_workers", "py_modules", "batch_size"}
    assert options.keys() - asked.keys() == {"as_json", "output", *ways_to_run}


def test_every_map_has_every_value_once_and_nothing_is_rewritten(output):
    before = fragments_in(LocalStore(output))
    values = values_in(output, evaluated(output))
    names = [name for name in chosen_metrics("all", has_truth=False) if name not in ("drop", "increase")]
    wanted = {(row["key"], row["target_index"], name) for row in explained(output) for name in names}
    assert {(row["key"], row["target_index"], row["metric"]) for row in values} == wanted
    assert len(values) == len(wanted)
    assert all((row["value"] is None) == (row["reason"] is not None) for row in values)
    assert fragments_in(LocalStore(output)) == before
    assert not {"ebpg", "sanity"} & {row["metric"] for row in values}


def test_the_stored_drop_equals_the_drop_of_the_decoded_map(output):
    """`explain` measures the quantised map, so its Drop equals the Drop of the decoded map."""
    from blocksight.engine.metrics.faithfulness import KeepTop
    from blocksight.jobs.evaluate.step import EvaluateStep

    stored = {(row["key"], row["target_index"]): row["metrics"] for row in explained(output)}
    original = EvaluateStep._rows_of_maps

    def all_of_them(self, records, maps, method):
        metric = next(one for one in self.metrics if isinstance(one, KeepTop))
        for record, values in zip(records, metric.evaluate(maps), strict=True):
            for row, own in zip(record, values, strict=True):
                seen.append((row, metric.digest(self.setting), own))
        return original(self, records, maps, method)

    seen = []
    EvaluateStep._rows_of_maps = all_of_them
    try:
        evaluated(output)
    finally:
        EvaluateStep._rows_of_maps = original
    assert len(seen) == len(stored)
    for row, digest, own in seen:
        kept = stored[row["key"], row["target_index"]]
        assert digest == kept["protocol"]
        assert own["drop"].value == pytest.approx(kept["drop"], abs=1e-4)
        assert own["increase"].value == 100 * kept["increase"]


def test_a_stopped_evaluation_leaves_no_stop_request_and_resumes(output, monkeypatch):
    from blocksight.jobs.evaluate import step as evaluate

    original = evaluate.evaluated

    def interrupted(step, unit):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(step, unit)

    monkeypatch.setattr(evaluate, "evaluated", interrupted)
    first = evaluated(output)
    assert first.stopped == "SIGTERM"
    assert len(first.done) == 1
    assert first.num_open > 0
    assert not list((output / "_job" / "runs").glob("*/stop"))
    monkeypatch.setattr(evaluate, "evaluated", original)
    again = evaluated(output)
    assert again.num_open == 0
    assert len(again.done) == first.num_open


def test_the_same_evaluation_resumes(output):
    outcome = evaluated(output)
    whole = fragments_in_evaluation(output, outcome)
    assert evaluated(output).done == ()
    for file in list((output / outcome.folder / "data").rglob("*.parquet"))[1:]:
        file.unlink()
    assert open_units(LocalStore(output), load_plan(LocalStore(output)), outcome.folder)
    again = evaluated(output)
    assert (again.folder, len(again.done), again.num_open) == (outcome.folder, len(whole) - 1, 0)
    assert fragments_in_evaluation(output, again) == whole
    other = evaluated(output, metrics="entropy")
    assert other.folder != outcome.folder
    assert evaluation_folders(LocalStore(output)) == sorted([outcome.folder, other.folder])


def fragments_in_evaluation(output, outcome):
    return {file.name: file.read_bytes() for file in (output / outcome.folder / "data").rglob("*.parquet")}


def test_a_probe_of_what_can_be_written_is_no_fragment_of_an_evaluation():
    store = MemoryStore()
    store.put("evaluations/e/data/_probe-1", b"\0\0")
    assert list(value_tables(store, "evaluations/e/")) == []


def test_a_sample_is_a_seeded_share_of_the_records(output):
    whole = {row["key"] for row in explained(output)}
    samples = [
        {row["key"] for row in values_in(output, evaluated(output, metrics="entropy", share=0.5, seed=seed))}
        for seed in (1, 2, 3)
    ]
    assert all(sample <= whole for sample in samples)
    assert len({frozenset(sample) for sample in samples}) > 1
    share = Evaluation((), 0.3, False, 1)
    held = [share.includes(f"{number}.png") for number in range(4000)]
    assert 0.27 < np.mean(held) < 0.33
    assert held == [Evaluation(("x",), 0.3, True, 1).includes(f"{number}.png") for number in range(4000)]
    assert sum(Evaluation((), 1.0, False, 0).includes(str(number)) for number in range(100)) == 100


def test_ground_truth_is_measured_where_it_is_and_null_elsewhere(output, boxes, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"thing": [explained(output)[0]["target_index"]]}))
    classes = read_class_map(tmp_path / "map.json")
    outcome = evaluated(output, metrics="ebpg,miou,bbox,pointing", truth=str(boxes), class_map=tmp_path / "map.json")
    truth, maps = open_truth(str(boxes)), {(row["key"], row["target_index"]): row for row in explained(output)}
    found = [row for row in values_in(output, outcome) if row["metric"] == "ebpg"]
    assert {row["value"] is None for row in found} == {True, False}
    for row in found:
        stored, image = maps[row["key"], row["target_index"]], truth.find(row["key"])
        if image is None or row["target_index"] not in dict(classes)["thing"]:
            assert (row["value"], row["reason"]) == (None, "no ground truth for the target")
            continue
        where = region(image, {"thing"}, (stored["height"], stored["width"]), (32, 32), "squash")
        saliency = map_of(stored).astype(float)
        assert row["value"] == pytest.approx(100 * saliency[where].sum() / saliency.sum())


def test_an_unusable_annotation_is_null_with_its_reason(output, boxes):
    coco = json.loads(boxes.read_text())
    coco["images"][0] |= {"width": 7, "height": 9}  # of another size than the picture, as EXIF would turn it
    coco["images"] += [{"id": 3, "file_name": "a/001.png"}, {"id": 4, "file_name": "b/001.png"}]
    coco["images"].pop(1)
    coco["annotations"][1]["image_id"] = 3
    boxes.write_text(json.dumps(coco))
    outcome = evaluated(output, metrics="ebpg,entropy", truth=str(boxes))
    assert outcome.failures == []
    rows = [row for row in values_in(output, outcome) if row["metric"] == "ebpg"]
    reasons = {row["key"]: row["reason"] for row in rows}
    assert "was annotated at 7 x 9 pixels" in reasons["ant/000.png"]
    assert {row["value"] for row in rows} == {None}


def test_controls_are_measured_as_methods_of_their_own(output):
    values = values_in(output, evaluated(output, metrics="deletion,drop", controls=True))
    methods = {row["explainer"] for row in values}
    assert methods == {"gradcam", "random", "gaussian", "edges"}
    drops = {row["explainer"] for row in values if row["metric"] == "drop"}
    assert drops == {"random", "gaussian", "edges"}  # the maps' own is stored by `explain`
    assert len({row["parameters"] for row in values}) == 4


def test_an_image_that_is_gone_leaves_its_values_undefined(output, tmp_path):
    gone = next(row for row in explained(output) if row["key"].endswith("png"))
    (tmp_path / "in" / gone["key"]).unlink()
    values = values_in(output, evaluated(output, metrics="entropy"))
    assert {row["reason"] for row in values if row["key"] == gone["key"]} == {
        "the image cannot be read any more, or changed"
    }
    assert all(row["value"] is not None for row in values if row["key"] != gone["key"])


def test_a_record_that_measuring_fails_on_has_a_reason_and_the_others_their_values(output, monkeypatch):
    from blocksight.jobs.evaluate.step import EvaluateStep

    chosen = explained(output)[0]["key"]
    original = EvaluateStep._maps

    def fails(self, records, pixels):
        if any(record[0]["key"] == chosen for record in records):
            raise ZeroDivisionError("by nothing")
        return original(self, records, pixels)

    monkeypatch.setattr(EvaluateStep, "_maps", fails)
    outcome = evaluated(output, metrics="entropy")
    assert (outcome.num_open, outcome.failures) == (0, [])
    values = values_in(output, outcome)
    reasons = {row["reason"] for row in values if row["key"] == chosen}
    assert reasons == {"measuring failed: ZeroDivisionError: by nothing"}
    assert all(row["value"] is not None for row in values if row["key"] != chosen)


def gone(unit, *_arguments, careful):
    raise MissingError("gone")


def failing(unit, *_arguments, careful):
    raise ProcessDiedError("Aborted") if careful else ZeroDivisionError("by nothing")


@pytest.mark.parametrize("read", [gone, failing])
def test_a_shard_that_cannot_be_read_again_leaves_its_values_undefined(tmp_path, monkeypatch, read):
    run_here(folder_of_tables(tmp_path / "in"), tmp_path / "out", explainer="gradient")
    monkeypatch.setattr("blocksight.jobs.evaluate.step.read_unit", read)
    outcome = evaluated(tmp_path / "out", metrics="entropy")
    assert (outcome.num_open, outcome.failures) == (0, [])
    reasons = {row["reason"] for row in values_in(tmp_path / "out", outcome)}
    assert reasons == {"the image cannot be read any more, or changed"}


@pytest.mark.parametrize("make", [folder_of_tars, folder_of_tables])
def test_every_layout_is_measured(tmp_path, make):
    run_here(make(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    values = values_in(tmp_path / "out", evaluated(tmp_path / "out", metrics="insertion"))
    assert {row["key"] for row in values} == {row["key"] for row in explained(tmp_path / "out")}
    assert all(0 <= row["value"] <= 1 and len(row["curve"]) == 29 for row in values)


def test_the_sanity_check_runs_when_it_is_asked_for(output):
    values = values_in(output, evaluated(output, metrics="sanity", share=0.6, seed=2))
    assert {row["metric"] for row in values} == {"sanity"}
    assert all(0 <= row["value"] <= 1 and len(row["curve"]) == 4 for row in values)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"metrics": "insertoin"}, "metric 'insertoin' is not known; known: insertion"),
        ({"metrics": "ebpg"}, "ebpg needs --truth"),
        ({"metrics": ","}, "--metrics names none"),
        ({"share": 0.0}, r"must be in \(0, 1\], got 0"),
        ({"class_map": "x"}, "--class-map says what the labels of --truth mean"),
    ],
)
def test_an_impossible_request_is_refused_before_any_work(output, asked, sentence):
    with pytest.raises(ConfigError, match=sentence):
        evaluated(output, **asked)
    assert not (output / FOLDER).exists()


def test_a_file_that_is_no_class_map_is_refused(tmp_path):
    for text in ("[1]", '{"a": "b"}', '{"a": [true]}', "{"):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(ConfigError, match="class map"):
            read_class_map(tmp_path / "map.json")


# ---------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def images_of_two(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("images") / "in", 9, bad=False)


@pytest.fixture(scope="module")
def two_as_made(images_of_two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.3)
        for name in ("gradcam", "layercam"):
            run_here(images_of_two, folder / name, target="top-2", explainer=name)
        evaluated(folder / "gradcam", metrics="entropy,deletion", controls=True)
        evaluated(folder / "layercam", metrics="entropy")
    return folder


@pytest.fixture
def two(two_as_made, tmp_path, monkeypatch):
    """A copy of two outputs with evaluations, in units of a few records."""
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.3)
    return Path(shutil.copytree(two_as_made, tmp_path / "two"))


def outputs(*folders):
    stores = [LocalStore(folder) for folder in folders]
    return [Output(str(store.root), store, load_plan(store)) for store in stores]


def names_of(table):
    return [method.name for method in table.methods]


def test_outputs_of_other_inputs_are_refused(two):
    run_here(folder_of_images(two / "other", 3), two / "elsewhere", target="top-2", explainer="gradcam")
    with pytest.raises(ConfigError, match="cannot be compared: data is"):
        compare(outputs(two / "gradcam", two / "elsewhere"))


def test_the_table_is_made_of_the_stored_rows(two):
    table = compare(outputs(two / "gradcam", two / "layercam"))
    assert names_of(table) == ["gradcam", "layercam", "random", "gaussian", "edges"]
    assert [column.metric for column in table.columns] == ["drop", "increase", "deletion", "entropy"]
    cells = {(names_of(table)[cell.method], cell.column.metric): cell for cell in table.cells}
    for name in ("gradcam", "layercam"):
        drops = [row["metrics"]["drop"] for row in explained(two / name)]
        assert cells[name, "drop"].estimate.mean == pytest.approx(np.mean(drops))
        assert cells[name, "drop"].estimate.count == len(drops) == 18
    pairs = [
        (one["metrics"]["drop"], other["metrics"]["drop"])
        for one, other in zip(explained(two / "gradcam"), explained(two / "layercam"), strict=True)
    ]
    assert cells["layercam", "drop"].difference.difference == pytest.approx(np.mean([b - a for a, b in pairs]))
    assert cells["gradcam", "drop"].difference is None
    assert cells["layercam", "deletion"].estimate.mean is None
    assert cells["layercam", "deletion"].difference.p_value is None
    p_values = [cell.difference.p_value for cell in table.cells if cell.difference is not None]
    known = [p for p in p_values if p is not None]
    least = min(known)
    assert min(cell.corrected_p for cell in table.cells if cell.corrected_p is not None) == pytest.approx(
        min(1.0, least * len(known))
    )


def test_values_of_two_protocols_never_meet(two, images_of_two):
    run_here(
        images_of_two,
        two / "black",
        target="top-2",
        explainer="occlusion",
        parameters={"window": 8, "stride": 8, "baseline": "black"},
    )
    table = compare(outputs(two / "gradcam", two / "black"))
    drops = [column for column in table.columns if column.metric == "drop"]
    assert len({column.protocol for column in drops}) == 2
    for cell in table.cells:
        if cell.column in drops and names_of(table)[cell.method] == "occlusion":
            assert cell.difference.difference is None


def spied(monkeypatch, name):
    """The numbers of values that are in memory at once, per metric."""
    seen, original = [], getattr(compare_module, name)
    noted = lambda blocks, *given: (seen.append(sum(map(len, blocks.values()))), original(blocks, *given))[1]  # noqa: E731
    monkeypatch.setattr(compare_module, name, noted)
    return seen


def test_the_table_does_not_depend_on_how_it_was_summed(two, monkeypatch):
    """Of all values at once, of a unit's, and of shares of the images where outputs are cut in different ways."""
    compared = outputs(two / "gradcam", two / "layercam")
    at_once = spied(monkeypatch, "_sums")
    by_units = rows_of_table(compare(compared))
    assert len(set(map(stored_values._cut, compared))) == 1
    monkeypatch.setattr(stored_values, "RECORDS_AT_ONCE", 1)
    most = max(at_once)
    at_once.clear()
    by_unit = rows_of_table(compare(compared))
    assert max(at_once) < most
    monkeypatch.setattr(stored_values, "_cut", lambda output: output.name)
    all_at_once = rows_of_table(compare(compared))
    monkeypatch.setattr(stored_values, "MAX_VALUES_IN_MEMORY", 40)
    by_images = rows_of_table(compare(compared))
    for rows in (by_units, by_unit, by_images):
        for one, other in zip(all_at_once, rows, strict=True):
            for name, value in one.items():
                assert other[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)


def test_outputs_that_are_cut_in_different_ways_are_compared_image_by_image(two, images_of_two, monkeypatch):
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 10.0)
    run_here(images_of_two, two / "uncut", target="top-2", explainer="layercam")
    cut, uncut = outputs(two / "gradcam", two / "uncut")
    assert len(cut.plan.units) > len(uncut.plan.units)
    rows = rows_of_table(compare([cut, uncut]))
    alike = rows_of_table(compare(outputs(two / "gradcam", two / "layercam")))
    wanted = [row for row in alike if row["metric"] in ("drop", "increase")]
    found = [row for row in rows if row["metric"] in ("drop", "increase")]
    for one, other in zip(found, wanted, strict=True):
        for name in ("mean", "low", "high", "count", "difference", "p_value", "paired_count"):
            assert one[name] == (
                pytest.approx(other[name], rel=1e-9) if isinstance(other[name], float) else other[name]
            )


def test_two_outputs_of_one_method_keep_their_names_apart(two, images_of_two):
    run_here(images_of_two, two / "again", target="top-2", explainer="gradcam")
    table = compare(outputs(two / "gradcam", two / "again"))
    assert len(set(names_of(table))) == len(table.methods)
    same = compare(outputs(two / "gradcam", two / "gradcam"))
    assert len(set(names_of(same))) == len(same.methods) == 5
    own = [cell for cell in table.cells if cell.method == 1 and cell.column.metric == "drop"]
    assert own[0].difference.difference == 0
    assert own[0].difference.p_value == 1


def test_the_commands(two, images_of_two):
    code, printed = called("compare", two / "gradcam", two / "layercam", "--store", two / "t.parquet")
    assert code == 0, printed
    for word in ("gradcam", "layercam", "random", "drop", "lower is better", "entropy"):
        assert word in printed
    stored = pq.read_table(two / "t.parquet").to_pylist()
    assert {row["metric"] for row in stored} <= set(METRICS)
    assert len(stored) == 5 * 4
    code, printed = called(
        *("evaluate", two / "gradcam", "--model", model_of(two / "gradcam")),
        *("--metrics", "gini", "--runner", "local"),
    )
    assert code == 0, printed
    assert "18 of this run" in printed
    code, printed = called("evaluate", images_of_two, "--runner", "local")
    assert code == 2
    assert "no blocksight output" in printed
    code, printed = called("compare", images_of_two)
    assert code == 2
