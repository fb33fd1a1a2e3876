"""The first pass of a method that learns: which images it reads, and where its state is stored."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
from rich.console import Console

from blocksight.jobs.evaluate.evaluation import evaluation_folders, value_tables
from blocksight.jobs.explain.first_pass import learn
from blocksight.jobs.explain.learned import LEARNED_KEY, num_learning_images, stored_state
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.run.job import check_model, context_of
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, config_of, fragments_in, model_of, rows_in, run_here
from tests.jobs.tiny import folder_of_images, folder_of_tables, folder_of_tars, red

BEE = {"explainer": "bee", "parameters": {"draws": 3, "images": 6, "pool": 3, "steps": 2, "noise_steps": 2}}


METRICS = "average_drop_100,average_drop_50,average_increase_100"


def learned_in(output):
    return safetensors.torch.load((output / LEARNED_KEY).read_bytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("learning") / "in", 9)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished job of a method that learns."""
    output = tmp_path_factory.mktemp("done") / "out"
    run_here(data, output, **BEE)
    return output


def test_the_learned_state_is_stored_beside_the_plan(done):
    state = learned_in(done)
    assert int(state["bandit.counts"].sum()) == 6
    assert len(state["pool.seeds"]) == 3
    rows = [row for row in rows_in(LocalStore(done)) if row["status"] == "ok"]
    assert len(rows) == 9
    for row in rows:
        assert row["selected_by"] == "average_drop_100"
        assert len(row["map_family"]) == 3


def test_the_learned_state_depends_on_no_units_and_no_order(data, done):
    job = config_of(data, done, **BEE)
    plan = load_plan(LocalStore(done))
    _, facts = check_model(job, None, Console(quiet=True))
    context = context_of(job, plan, facts, None, Execution(runner="local"))
    (unit,) = plan.units
    cut = [replace(unit, objects=unit.objects[start : start + 4], stop=4) for start in (8, 4, 0)]
    *_, file = learn(context, cut, None)
    assert file == (done / LEARNED_KEY).read_bytes()


@pytest.mark.parametrize("make", [folder_of_tars, folder_of_tables])
def test_shards_are_learned_from(make, tmp_path):
    run_here(make(tmp_path / "in"), tmp_path / "out", **BEE)
    assert len(learned_in(tmp_path / "out")["pool.seeds"]) == 3


def test_a_resumed_run_keeps_the_learned_state(data, tmp_path):
    run_here(data, tmp_path / "out", **BEE)
    store = LocalStore(tmp_path / "out")
    before, fragments = store.read(LEARNED_KEY), fragments_in(store)
    gone = sorted(fragments)[0]
    (tmp_path / "out" / gone).unlink()
    for name in ("receipts", "final"):
        for info in list(store.list(f"_job/{name}/")):
            (tmp_path / "out" / info.key).unlink()
    run_here(data, tmp_path / "out", **BEE)
    assert store.read(LEARNED_KEY) == before
    assert fragments_in(store) == fragments


def test_another_posterior_is_another_method(data, done, tmp_path):
    """The digest in the column `parameters` differs."""
    run_here(data, tmp_path / "out", **{**BEE, "seed": 1})
    digests = {row["parameters"] for place in (done, tmp_path / "out") for row in rows_in(LocalStore(place))}
    assert len(digests - {None}) == 2


def test_nothing_is_explained_without_the_learned_state(data, tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.run.job.num_learning_images", lambda _: 0)  # as if the file had been lost
    outcome = run_here(data, tmp_path / "out", **BEE)
    assert rows_in(LocalStore(tmp_path / "out")) == []
    assert outcome.ran.failures
    assert all(LEARNED_KEY in failure.error for failure in outcome.ran.failures)


def test_of_data_without_one_sound_image_every_record_has_its_reason(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    run_here(tmp_path / "in", tmp_path / "out", **BEE)
    assert [row["reject_code"] for row in rows_in(LocalStore(tmp_path / "out"))] == ["not_an_image"]
    assert not (tmp_path / "out" / LEARNED_KEY).exists()


def test_an_image_on_which_the_model_fails_teaches_nothing(tmp_path):
    data = folder_of_images(tmp_path / "in", 4, bad=False)
    (data / "cat" / "red.png").write_bytes(red())
    run_here(data, tmp_path / "out", **BEE, model="tests.jobs.tiny:make_raising")
    assert int(learned_in(tmp_path / "out")["bandit.counts"].sum()) == 4
    codes = {row["key"]: row["reject_code"] for row in rows_in(LocalStore(tmp_path / "out"))}
    assert codes["cat/red.png"] == "model_failed"
    assert list(codes.values()).count(None) == 4


def test_the_metric_that_picked_the_maps_is_not_measured(done):
    command = blocksight("evaluate", done, "--model", model_of(done), "--metrics", METRICS, "--runner", "local")
    assert command.returncode == 0, command.stderr
    store = LocalStore(done)
    values = [
        row
        for folder in evaluation_folders(store)
        for table in value_tables(store, folder)
        for row in table.to_pylist()
    ]
    own = [row for row in values if row["explainer"] == "bee"]
    flattered = [row for row in own if row["metric"] != "average_drop_50"]
    assert flattered
    assert all(row["value"] is None and "average_drop_100 picked this map" in row["reason"] for row in flattered)
    assert all(row["value"] is not None for row in own if row["metric"] == "average_drop_50")
    others = [row for row in values if row["explainer"] != "bee" and row["metric"] == "average_drop_100"]
    assert all(row["value"] is not None for row in others)


def test_plan_says_how_many_images_are_learned_from(data, tmp_path):
    command = blocksight(
        "plan", "--data", data, "--output", tmp_path / "out", "--explainer", "ucag(bee)", "--preset", "paper"
    )
    assert "learns from 12 images" in command.stdout.replace("\n", " ")


def test_methods_that_learn_nothing_leave_nothing(data, tmp_path):
    run_here(data, tmp_path / "out", explainer="gradcam")
    assert not (tmp_path / "out" / LEARNED_KEY).exists()
    job = config_of(data, tmp_path / "out", explainer="gradcam")
    assert num_learning_images(job) == 0
    assert stored_state(LocalStore(tmp_path / "out"), job) is None


def test_the_plan_holds_the_parameters_of_all_that_is_wrapped(data, tmp_path):
    run_here(data, tmp_path / "out", explainer="feature-cam(smoothgrad(grad-cam))", parameters={"base": {"samples": 2}})
    identity = json.loads((tmp_path / "out" / "_job/plan/plan.json").read_bytes())["configuration"]
    assert identity["explainer"] == "feature-cam(smoothgrad(gradcam))"
    assert identity["parameters"]["base"] == {"samples": 2, "noise": 0.15, "base": {}}
    assert identity["parameters"]["edges"] in ("hed", "scharr")  # one value, so that all workers use the same
    assert identity["parameters"]["origin"] == "reconstruction"
    assert {row["edge_detector"] for row in rows_in(LocalStore(tmp_path / "out")) if row["status"] == "ok"} == {
        identity["parameters"]["edges"]
    }
    assert blocksight("verify", tmp_path / "out").returncode == 0
    assert (
        run_here(
            data, tmp_path / "out", explainer="feature-cam(smoothgrad(gradcam))", parameters={"base": {"samples": 2}}
        ).ran.seconds
        == 0
    )
