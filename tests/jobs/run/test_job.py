"""Whole jobs in one process: three layouts, bad input, resuming, drift, and one row for each record and target."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.sizing import size_for
from blocksight.engine.catalog.composition import parse_method
from blocksight.engine.catalog.entries import EXPLAINERS
from blocksight.engine.errors import ModelError
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.ledger.reconcile import MANIFEST_KEY, check
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.plan import MODEL_KEY, PLAN_KEY, DriftError, load_plan, make_plan
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.run.workers import device_of, let_import_modules, workers_text, workforce_of
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import StoreError
from tests.engine.nets import TRANSFORMERS_ONLY
from tests.jobs.jobs_of import blocksight, config_of, fragments_in, rows_in, run_here
from tests.jobs.tiny import CLASSES, MODEL, VIT, folder_of_images, folder_of_tables, folder_of_tars, picture
from tests.storage.loopback import Bucket, served

SHARD_FAULTS = {"tar": {"label_missing": 1, "shard_truncated": 1}, "tables": {"missing_image": 1, "not_an_image": 1}}


def faults(output):
    store = LocalStore(output)
    return [fault for _, found in check(store, load_plan(store)) for fault in found]


def test_loose_images_good_and_bad(tmp_path):
    outcome = run_here(folder_of_images(tmp_path / "in"), tmp_path / "out")
    rows = rows_in(LocalStore(tmp_path / "out"))
    assert len(rows) == 10
    bad = {row["key"].split("bad-")[1][:-4]: row for row in rows if row["status"] == "rejected"}
    assert {code: row["reject_code"] for code, row in bad.items()} == {code: code for code in bad}
    assert set(bad) == {"empty_file", "not_an_image", "truncated"}
    for row in rows:
        if row["status"] == "ok":
            check_explained(row)
        else:
            assert row["map"] is None
            assert row["error"]
            assert row["reject_stage"] == "decode"
    assert outcome.manifest["num_records"] == outcome.manifest["num_ok"] + outcome.manifest["num_rejected"] == 10
    assert outcome.manifest["rejects"] == dict.fromkeys(sorted(bad), 1)
    assert faults(tmp_path / "out") == []


@pytest.mark.parametrize("name", [name for name in EXPLAINERS if name != "sise"])
def test_every_other_explainer_leaves_sound_rows_too(tmp_path, name):
    data = folder_of_images(tmp_path / "in")
    small = {
        "occlusion": {"window": 8, "stride": 8},
        "extremal_perturbation": {"areas": [0.2], "iterations": 20},
        "rise": {"num_masks": 400},
    }
    model = VIT if name in TRANSFORMERS_ONLY else MODEL
    asked = {"explainer": name, "target": "top-2", "parameters": small.get(name, {}), "model": model}
    outcome = run_here(data, tmp_path / "out", **asked)
    assert outcome.manifest["num_ok"] == 7
    assert run_here(data, tmp_path / "out", **asked).ran.seconds == 0  # a second run has nothing to do
    rows = [row for row in rows_in(LocalStore(tmp_path / "out")) if row["status"] == "ok"]
    assert {row["explainer"] for row in rows} == {str(parse_method(name))}
    assert len(rows) == 14
    for row in rows:
        assert map_of(row).shape == (32, 32)
        assert 0 <= row["metrics"]["drop"] <= 100
    assert faults(tmp_path / "out") == []
    with pytest.raises(DriftError, match=r'explainer: "sise" in the output|explainer: .* asked for'):
        run_here(data, tmp_path / "out", target="top-2")


def check_explained(row):
    saliency = map_of(row)
    assert saliency.shape == (row["map_height"], row["map_width"]) == (32, 32)
    assert saliency.max() == 1
    assert row["map_low"] < row["map_high"]
    assert (row["width"], row["height"], row["format"]) == (40, 30, "PNG")
    assert row["label"] == CLASSES.index(row["label_name"])
    assert row["target_name"] == CLASSES[row["target_index"]]
    assert row["target_rank"] == 1
    assert 0.2 < row["score"] <= 1
    assert row["num_forwards"] <= sum(block["kept"] for block in row["blocks"]) <= 14
    assert 0 <= row["metrics"]["drop"] <= 100
    assert len(row["sha256"]) == 64


@pytest.mark.parametrize(("kind", "make"), [("tar", folder_of_tars), ("tables", folder_of_tables)])
def test_shards(tmp_path, kind, make):
    outcome = run_here(make(tmp_path / "in"), tmp_path / "out", target="label")
    rows = rows_in(LocalStore(tmp_path / "out"))
    assert outcome.manifest["rejects"] == SHARD_FAULTS[kind]
    explained = [row for row in rows if row["status"] == "ok"]
    assert len(explained) == 6
    for row in explained:
        assert row["target_index"] == row["label"]
        assert row["target_rank"] == row["label_rank"] >= 1
        assert row["target_source"] == "label"
    assert faults(tmp_path / "out") == []


def test_the_same_records_have_the_same_maps_in_any_layout_and_unit(tmp_path):
    maps = {}
    for kind, make in (("images", folder_of_images), ("tar", folder_of_tars), ("tables", folder_of_tables)):
        run_here(make(tmp_path / kind), tmp_path / f"out-{kind}")
        rows = [row for row in rows_in(LocalStore(tmp_path / f"out-{kind}")) if row["status"] == "ok"]
        maps[kind] = {row["sha256"]: (row["map"], row["score"], row["metrics"]["drop"]) for row in rows}
    shared = maps["images"].keys() & maps["tar"].keys() & maps["tables"].keys()
    assert len(shared) == 6
    for sha256 in shared:
        assert maps["images"][sha256] == maps["tar"][sha256] == maps["tables"][sha256]


def test_an_input_without_records_is_complete(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "in" / "none.parquet")
    outcome = run_here(tmp_path / "in", tmp_path / "out")
    assert outcome.manifest["num_records"] == 0
    assert faults(tmp_path / "out") == []


def test_top_targets_are_rows_in_order(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 2, bad=False), tmp_path / "out", target="top-3")
    rows = rows_in(LocalStore(tmp_path / "out"))
    assert [row["target_rank"] for row in rows] == [1, 2, 3, 1, 2, 3]
    assert np.all(np.diff([row["score"] for row in rows[:3]]) <= 0)
    assert faults(tmp_path / "out") == []


def test_given_targets_and_unknown_labels(tmp_path):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    (data / "unicorn").mkdir()
    (data / "unicorn" / "x.png").write_bytes(picture(50))
    run_here(data, tmp_path / "given", target="4,0")
    assert [row["target_index"] for row in rows_in(LocalStore(tmp_path / "given"))] == [4, 0] * 3
    run_here(data, tmp_path / "label", target="label")
    codes = {row["key"]: row["reject_code"] for row in rows_in(LocalStore(tmp_path / "label"))}
    assert codes == {"ant/000.png": None, "bee/001.png": None, "unicorn/x.png": "label_missing"}


@pytest.mark.parametrize("make", [folder_of_images, folder_of_tars, folder_of_tables])
def test_a_limit_takes_the_first_records(tmp_path, make):
    outcome = run_here(make(tmp_path / "in"), tmp_path / "out", limit=5)
    assert outcome.manifest["num_records"] == 5
    assert faults(tmp_path / "out") == []


def test_a_finished_job_is_left_alone(tmp_path):
    data = folder_of_images(tmp_path / "in")
    run_here(data, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = run_here(data, tmp_path / "out")
    assert again.ran.seconds == 0
    assert again.manifest["num_records"] == 10
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after == before


def test_a_half_finished_job_goes_on_and_receipts_are_rebuilt(tmp_path):
    data = folder_of_images(tmp_path / "in")
    run_here(data, tmp_path / "whole")
    run_here(data, tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    for key in [key for key in fragments_in(store)][::2]:
        store.delete(key)
    for info in list(store.list("_job/receipts/")):
        store.delete(info.key)
    store.delete(MANIFEST_KEY)
    outcome = run_here(data, tmp_path / "out")
    assert fragments_in(store) == fragments_in(LocalStore(tmp_path / "whole"))
    assert outcome.manifest == json.loads(LocalStore(tmp_path / "whole").read(MANIFEST_KEY))
    assert faults(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": "top-2"}, 'target: "predicted" in the output, "top-2" asked for'),
        ({"parameters": {"mu": 0.2}}, r'parameters: .*"mu": 0.0.* in the output, .*"mu": 0.2'),
        ({"model": "tests.jobs.tiny:make_other"}, "model: .*tiny:make"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(tmp_path, change, sentence):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    run_here(data, tmp_path / "out")
    with pytest.raises(DriftError, match=sentence):
        run_here(data, tmp_path / "out", **change)


def test_other_weights_under_the_same_name_are_refused(tmp_path, monkeypatch):
    from tests.jobs import tiny

    data = folder_of_images(tmp_path / "in", 2, bad=False)
    run_here(data, tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    store.delete(next(iter(fragments_in(store))))
    made = tiny.make(seed=1)
    monkeypatch.setattr(tiny, "make", lambda: made)
    with pytest.raises(DriftError, match="weights_sha256"):
        run_here(data, tmp_path / "out")


def test_a_wrong_model_block_or_target_writes_nothing(tmp_path):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    for options, error in (
        ({"model": "torchvision:resnet50"}, ModelError),
        ({"blocks": ("nowhere",)}, ModelError),
        ({"target": "5"}, ConfigError),
        ({"target": "top-6"}, ConfigError),
    ):
        with pytest.raises(error):
            run_here(data, tmp_path / "out", **options)
    assert list(LocalStore(tmp_path / "out").list()) == []


def test_places_that_are_refused(tmp_path):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    with pytest.raises(ConfigError, match="contain each other"):
        run_here(data, data / "out")
    with pytest.raises(ConfigError, match="whole bucket"):
        run_here(data, "s3://bucket")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"not ours, such as 'thesis\.doc'"):
        run_here(data, tmp_path / "full")
    with pytest.raises(StoreError, match="nothing is there"):
        run_here(tmp_path / "nowhere", tmp_path / "out")


def test_input_that_changes_after_the_plan_is_a_reason(tmp_path):
    data = folder_of_images(tmp_path / "in", 3, bad=False)
    run_here(data, tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    for key in (*fragments_in(store), MANIFEST_KEY):
        store.delete(key)
    (data / "ant" / "000.png").write_bytes(picture(77))
    (data / "bee" / "001.png").unlink()
    outcome = run_here(data, tmp_path / "out")
    assert [row["reject_code"] for row in rows_in(store)] == ["input_changed", "input_missing", None]
    # receipts of the fragments that were deleted are there still, and the present fragments count
    assert outcome.manifest is not None
    assert outcome.manifest["rejects"] == {"input_changed": 1, "input_missing": 1}


def test_the_plan_covers_every_record_once(tmp_path):
    data = folder_of_images(tmp_path / "in", 23)
    for workers in (1, 4):
        config = config_of(data, tmp_path / "out")
        plan = make_plan(config, weights_sha256=None, workforce=Workforce(workers, on_gpu=workers > 1))
        keys = [info.key for unit in plan.units for info in unit.objects]
        assert keys == sorted(keys)
        assert len(keys) == len(set(keys)) == plan.num_records == 26
    assert len({unit.unit_id for unit in plan.units}) == len(plan.units)


def test_data_and_output_may_lie_in_two_stores(tmp_path):
    """Both buckets have one name here: a prefix says which is meant."""
    images = folder_of_images(tmp_path / "in", 2, bad=False)
    with served() as (source, _), Bucket() as target:
        source.objects = {f"photos/{path.relative_to(images)}": path.read_bytes() for path in images.glob("*/*")}
        endpoints = f"{target.url},s3://b/photos={source.url}"
        run_here("s3://b/photos", "s3://b/maps", endpoint_url=endpoints)
        assert {asked.method for asked in source.asked} == {"GET", "HEAD"}
        assert any(key.startswith("maps/data/") for key in target.objects)
        assert blocksight("verify", "s3://b/maps", "--endpoint-url", endpoints).returncode == 0


@pytest.mark.parametrize("gpus", [0, 16])
def test_units_are_cut_for_the_cluster_that_is_joined(tmp_path, monkeypatch, gpus):
    """16 workers on CPUs are planned as such: an address does not mean GPUs, whose units are longer by far."""
    joined = size_for([{"CPU": 17, "GPU": gpus}])
    monkeypatch.setattr("blocksight.jobs.run.workers.session_of", lambda _execution: nullcontext(joined))
    assert workforce_of(Execution(address="auto")) == Workforce(16, on_gpu=gpus > 0)
    said = blocksight("plan", "--data", folder_of_images(tmp_path / "in"), "--output", "out", "--address", "auto")
    assert f"on 16 {'GPUs' if gpus else 'CPU cores'}" in said.stdout


def test_a_cluster_that_is_still_coming_is_planned_for(tmp_path, monkeypatch):
    assert workforce_of(Execution(address="auto", wait="5m", workers=8)) == Workforce(8, on_gpu=False)
    assert workforce_of(Execution(address="auto", wait="5m", min_workers=2, device="gpu")) == Workforce(2, on_gpu=True)


def test_a_job_that_is_complete_asks_for_no_worker(tmp_path):
    """So a machine that retries it in vain costs seconds; nothing answers at the address."""
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    run_here(data, tmp_path / "out")
    job = ("--data", data, "--output", tmp_path / "out", "--model", MODEL)
    ran = blocksight("explain", *job, "--address", "127.0.0.1:9", "--wait", "20m")
    assert ran.returncode == 0, ran.stderr
    assert "nothing to do: the job is complete" in ran.stdout


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([{"CPU": 8, "GPU": 2}, {"GPU": 4}], "; 4 GPUs without work, as the nodes have too few CPUs"),
        ([{"CPU": 8, "GPU": 2}], "a GPU each"),
    ],
)
def test_gpus_that_stay_idle_are_said(nodes, said):
    assert workers_text(Execution(), size_for(nodes)).endswith(said)


def test_a_pool_that_grows_is_said():
    sizing = replace(size_for([{"CPU": 3}]), most_actors=8)
    assert workers_text(Execution(address="auto", workers=8, wait="5m", device="cpu"), sizing) == (
        "2 explain actors, a CPU core each; up to 8 as nodes join"
    )


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ClusterError, match="--py-modules: 'nowhere' is no folder"):
        let_import_modules(Execution(address="auto", py_modules=("nowhere",)))


@pytest.mark.parametrize("listed", [0, 1])  # by the driver, which this torch may not fit
def test_a_gpu_that_was_asked_for_and_is_not_there_is_an_error_before_any_work(tmp_path, monkeypatch, listed):
    monkeypatch.setattr("blocksight.jobs.run.workers.usable_gpus", lambda: listed)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    data = folder_of_images(tmp_path / "in", 1, bad=False)
    job = ("--data", data, "--output", tmp_path / "out", "--model", MODEL, "--device", "gpu")
    for command in (("explain", *job), ("explain", *job, "--runner", "local"), ("plan", *job)):
        ran = blocksight(*command)
        assert ran.returncode == 2
        assert "--device gpu: this machine shows no NVIDIA GPU" in ran.stderr + ran.stdout
    assert not (tmp_path / "out").exists()
    assert blocksight("evaluate", tmp_path / "out", "--device", "gpu").returncode == 2


def test_a_run_in_this_process_uses_the_gpu_unless_the_user_says_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_of(Execution(runner="local"), None) == "cuda"
    assert device_of(Execution(runner="local", device="cpu"), None) == "cpu"
    assert device_of(Execution(), size_for([{"CPU": 17, "GPU": 4}])) == "cuda"
    assert device_of(Execution(), size_for([{"CPU": 17}])) == "cpu"
    assert (
        workers_text(Execution(), size_for([{"CPU": 3}]))
        == "2 explain actors, a CPU core each; the Ray session has no GPU"
    )
    assert workers_text(Execution(runner="local"), None) == "this process, on a GPU"


@pytest.mark.parametrize(("gpus", "wanted"), [(0, Workforce(3, False)), (2, Workforce(2, True))])
def test_units_are_cut_for_the_part_of_this_machine_that_may_be_used(monkeypatch, gpus, wanted):
    monkeypatch.setattr("blocksight.jobs.run.workers.usable_cores", lambda: 3)
    monkeypatch.setattr("blocksight.jobs.run.workers.usable_gpus", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    assert workforce_of(Execution()) == wanted
    in_process = Workforce(3, False) if gpus == 0 else Workforce(1, True)
    assert workforce_of(Execution(runner="local", address="auto")) == in_process
    assert workforce_of(Execution(device="cpu")) == Workforce(3, False)
    assert workforce_of(Execution(workers=1)).num_workers == 1


def test_a_gpu_that_torch_cannot_use_cuts_no_units_in_this_process_and_is_not_probed(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.run.workers.usable_gpus", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not workforce_of(Execution(runner="local")).on_gpu
    data = folder_of_images(tmp_path / "in", 1, bad=False)
    ran = blocksight("plan", "--data", data, "--output", tmp_path / "out", "--model", MODEL, "--probe")
    assert ran.returncode == 2
    assert "torch can use no GPU, and the job's workers have GPUs" in ran.stderr


def test_the_plan_names_columns_that_are_left_unread(tmp_path):
    metadata = {"ARROW:extension:name": "other.objects", "ARROW:extension:metadata": ""}
    labels = pa.map_(pa.int8(), pa.int8())
    schema = pa.schema([("image", pa.binary()), pa.field("extra", pa.binary(), metadata=metadata), ("label", labels)])
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        rows = [{"image": picture(number), "extra": b"x", "label": [(1, 1)]} for number in range(3)]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "in" / f"{name}.parquet")
    plan = make_plan(config_of(tmp_path / "in", tmp_path / "out"), weights_sha256=None, workforce=Workforce(1, False))
    assert plan.num_records == 6
    assert plan.ignored == {
        "with an unread column extra (other.objects)": 2,
        "with an unread column label (map<int8, int8 ('label')>)": 2,
    }


def test_plan_and_model_are_written_once(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 2, bad=False), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    plan = json.loads(store.read(PLAN_KEY))
    assert plan["configuration"]["parameters"]["mu"] == 0.0
    assert plan["configuration"]["decoding"]["alpha"] == "composited on white"
    assert [block["channels"] for block in json.loads(store.read(MODEL_KEY))["blocks"]] == [6, 8]
