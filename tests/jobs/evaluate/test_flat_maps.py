"""Flat maps: a metric that needs an order or mass has no value of them, in every table, and says why."""

import pytest

from blocksight.jobs.evaluate.compare import compare
from blocksight.jobs.evaluate.evaluation import evaluation_folders, value_tables
from blocksight.jobs.ledger.receipts import metric_means, receipt_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import existing_plan
from blocksight.jobs.worker.rows import Output
from blocksight.storage.stores.opening import open_store
from tests.jobs.jobs_of import called, rows_in, run_here
from tests.jobs.tiny import folder_of_images

AGAINST = "tests.jobs.tiny:make_against"


def opened(folder):
    store = open_store(str(folder))
    return Output(folder.name, store, existing_plan(store))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Ant explained by Grad-CAM, whose maps are all flat, and by its gradient, whose are not."""
    root = tmp_path_factory.mktemp("flat")
    data = folder_of_images(root / "data", 3, bad=False)
    options = {"model": AGAINST, "target": "0"}
    run_here(data, root / "flat", explainer="gradcam", **options)
    run_here(data, root / "sound", explainer="gradient", **options)
    return root / "flat", root / "sound"


def test_flat_maps_have_no_drop_and_no_increase(outputs):
    flat, sound = (rows_in(open_store(str(folder))) for folder in outputs)
    assert [row["is_flat"] for row in flat] == [True] * 3
    assert [(row["metrics"]["drop"], row["metrics"]["increase"]) for row in flat] == [(None, None)] * 3
    assert None not in [row["metrics"]["drop"] for row in sound]


def test_means_of_receipts_leave_flat_maps_out(outputs):
    found = []
    for folder in outputs:
        output = opened(folder)
        receipts = [receipt_of(unit, output.store.read(unit.fragment_key)) for unit in output.plan.units]
        found.append({name.split("@")[0]: own["count"] for name, own in metric_means(receipts).items()})
    assert found == [{}, {"drop": 3, "increase": 3}]


def test_a_comparison_names_the_method_without_a_value(outputs):
    table = compare([opened(folder) for folder in reversed(outputs)])
    assert [method.explainer for method in table.methods] == ["gradient", "gradcam"]
    absent = {(own.method, own.column.metric, own.reason) for own in table.absences}
    assert absent == {(1, "drop", "the map is flat"), (1, "increase", "the map is flat")}


def test_a_comparison_of_flat_maps_alone_is_refused(outputs):
    with pytest.raises(ConfigError, match=r"no value of any metric.*the map is flat"):
        compare([opened(outputs[0])])


def test_tables_of_single_maps_say_flat_and_other_commands_go_on(outputs, tmp_path):
    flat, sound = map(str, outputs)
    assert "flat" in called("show", flat, "ant/000.png", "--picture", tmp_path / "map.png")[1]
    assert "the map is flat" in called("sql", flat, 'SELECT DISTINCT "value", reason FROM "values"')[1]
    for words in (("versus", sound, flat, "--output", tmp_path / "difference"), ("status", flat), ("report", flat)):
        code, text = called(*words)
        assert (code, "Traceback" in text) == (0, False), text


def test_an_evaluation_gives_the_reason(outputs):
    words = ("--metrics", "insertion,gini,drop", "--model", AGAINST, "--runner", "local")
    code, text = called("evaluate", outputs[0], *words)
    assert code == 0, text
    store = open_store(str(outputs[0]))
    rows = [
        row for folder in evaluation_folders(store) for own in value_tables(store, folder) for row in own.to_pylist()
    ]
    assert {(row["metric"], row["value"], row["reason"]) for row in rows} == {
        ("insertion", None, "the map is flat"),
        ("gini", None, "the map is flat"),
    }
