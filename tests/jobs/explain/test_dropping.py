"""The baseline `drop` in jobs: refused before any work, one forward setting, and evaluations of their own."""

import json

import numpy as np
import pytest

from blocksight.jobs.evaluate.evaluation import evaluation_folders, value_tables
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.run.one_picture import explain
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, rows_in
from tests.jobs.tiny import MODEL, VIT, folder_of_images, make_vit

NEEDS = "the baseline drop needs"
RISE = ("--explainer", "rise", "-p", "num_masks=16", "-p", "grid=4", "--runner", "local", "--device", "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("images"), 2, bad=False)


@pytest.fixture(scope="module")
def dropped(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("outputs") / "dropped"
    code, said = called("explain", "--data", images, "--output", output, "--model", VIT, *RISE, "-p", "baseline=drop")
    assert code == 0, said
    return output


def plain(text):
    return " ".join(text.split())


def test_a_job_leaves_tokens_out_in_eager_float32(dropped, images):
    forward = json.loads((dropped / "_job/plan/forward.json").read_text())
    assert (forward["setting"]["backend"], forward["setting"]["precision"]) == ("eager", "float32")
    parameters = {"num_masks": 16, "grid": 4, "baseline": "drop"}
    for row in rows_in(LocalStore(dropped)):
        one = explain(make_vit(), images / row["key"], explainer="rise", key=row["key"], parameters=parameters)
        assert np.array_equal(one.map, map_of(row))


def test_what_cannot_do_without_tokens_is_refused_before_any_work(images, tmp_path):
    output = tmp_path / "refused"
    code, said = called("explain", "--data", images, "--output", output, "--model", MODEL, *RISE, "-p", "baseline=drop")
    assert code != 0
    assert NEEDS in plain(said)
    assert not (output / "data").exists()
    assert not (output / "_job/plan/plan.json").exists()


def test_another_precision_is_refused(images, tmp_path):
    output, chosen = tmp_path / "half", ("-p", "baseline=drop", "--precision", "bfloat16")
    code, said = called("explain", "--data", images, "--output", output, "--model", VIT, *RISE, *chosen)
    assert code != 0
    assert "baseline drop runs the model itself in float32, and precision bfloat16 is asked for" in plain(said)


def values_of(output):
    """The rows of an output's evaluations, by their baseline."""
    store = LocalStore(output)
    return {
        json.loads(store.read(f"{folder}evaluation.json"))["baseline"]: [
            row for table in value_tables(store, folder) for row in table.to_pylist()
        ]
        for folder in evaluation_folders(store)
    }


def test_metrics_leave_tokens_out_and_are_another_evaluation(dropped):
    for baseline in ("zero", "drop"):
        asked = ("--metrics", "deletion,road_morf", "--baseline", baseline, "--runner", "local", "--device", "cpu")
        code, said = called("evaluate", dropped, "--model", VIT, *asked)
        assert code == 0, said
    found = values_of(dropped)
    assert set(found) == {"zero", "drop"}
    names = [{row["metric"]: row["value"] for row in rows} for rows in (found["zero"], found["drop"])]
    assert names[0]["deletion"] != names[1]["deletion"]
    assert names[0]["road_morf"] == names[1]["road_morf"]


def test_an_evaluation_that_is_refused_leaves_nothing(images, tmp_path):
    output = tmp_path / "grey"
    code, said = called("explain", "--data", images, "--output", output, "--model", MODEL, *RISE)
    assert code == 0, said
    code, said = called("evaluate", output, "--baseline", "drop", "--model", MODEL, "--runner", "local")
    assert code != 0
    assert NEEDS in plain(said)
    assert values_of(output) == {}
