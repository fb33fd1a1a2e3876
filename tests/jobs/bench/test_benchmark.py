"""The benchmark: its figures agree, `plan` uses them, and a curve that was cut off is resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from blocksight.cluster.errors import ClusterError
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.judging import fidelity
from blocksight.engine.judging.fidelity import FULL
from blocksight.jobs.bench import curve
from blocksight.jobs.bench.charts import curve_chart
from blocksight.jobs.bench.curve import CurveRequest, measure_curve, summarise
from blocksight.jobs.bench.quick import probe_cost
from blocksight.jobs.cli.main import app
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.estimate import estimate
from blocksight.jobs.plan.machine_rates import MeasuredCost, recall, remember
from blocksight.jobs.plan.plan import make_plan
from blocksight.jobs.plan.units import Workforce
from tests.jobs.jobs_of import config_of
from tests.jobs.tiny import MODEL, folder_of_images, picture

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """A temporary cache, so that no measurement of the user is read or overwritten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("bench") / "data", count=5)


@pytest.fixture
def few_methods(monkeypatch):
    """Reduces the curve to four points."""
    some = (FULL, "Ada-SISE", "budget 0.1", "control: edges")
    chosen = tuple(method for method in fidelity.METHODS if method.name in some)
    monkeypatch.setattr(fidelity, "METHODS", chosen)
    monkeypatch.setattr(curve, "METHODS", chosen)
    return list(some)


def typed(*arguments):
    """Runs the command line in this process; its errors are raised."""
    ran = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran


def asked(data, **options):
    return CurveRequest(config_of(data, "unused", **options), "cpu", 8, None, ())


# ---------------------------------------------------------------- efficiency and cost


def test_bench_prints_figures_that_follow_from_one_another(data, monkeypatch):
    monkeypatch.setattr("blocksight.engine.judging.efficiency.CPU_SIZES", (1, 4))
    monkeypatch.setattr("blocksight.engine.judging.efficiency.BARE_SECONDS", 0.05)
    ran = typed("bench", "--model", MODEL, "--data", data, "--device", "cpu", "--workers", 4, "--price", 0.5, "--json")
    found = json.loads(ran.stdout)
    own, cost = found["efficiency"], found["cost"]
    assert list(own["bare_rates"]) == ["1", "4"]
    assert own["efficiency"] > 0
    assert found["forwards_per_second"] == pytest.approx(own["forwards_per_image"] / own["seconds_per_image"])
    assert cost["records"] == 8
    assert cost["worker_hours"] == pytest.approx(8 * own["seconds_per_image"] / 3600)
    assert cost["hours"] == pytest.approx(cost["worker_hours"] / 4)
    assert cost["money"] == pytest.approx(0.5 * cost["worker_hours"])
    assert cost["num_bytes"] == 8 * (found["bytes_per_map"] + 1300)
    assert found["probed"][0]["setting"] == found["setting"]
    assert found["probed"][0]["score_error"] <= 1e-4

    planned = typed("plan", "--model", MODEL, "--data", data, "--output", data.parent / "maps")
    assert "measured here on" in planned.stdout
    other = typed("plan", "--model", MODEL, "--data", data, "--output", data.parent / "maps", "-p", "mu=0.3")
    assert "not measured" in other.stdout


def test_peers_are_raced_beside_the_figures(data, monkeypatch):
    monkeypatch.setattr("blocksight.engine.judging.efficiency.CPU_SIZES", (4,))
    monkeypatch.setattr("blocksight.engine.judging.efficiency.BARE_SECONDS", 0.05)
    monkeypatch.setattr("blocksight.jobs.bench.peers.CPU_BATCH_SIZES", (4,))
    monkeypatch.setattr("blocksight.jobs.bench.benchmark.REPEATS", 1)
    ran = typed("bench", "--model", MODEL, "--data", data, "--device", "cpu", "--peers")
    for name in ("pytorch-grad-cam", "torch-cam", "captum", "blocksight", "as shipped", "helped"):
        assert name in ran.stdout


def test_a_measurement_is_recalled_for_the_same_work_alone(data):
    job, cost = config_of(data, "unused"), MeasuredCost(2.0, 900.0, 7000, "2026-01-01")
    remember(job, "cpu", cost)
    assert recall(job, "cpu") == cost
    assert recall(job.model_copy(update={"limit": 3, "data": "/elsewhere"}), "cpu") == cost
    assert recall(job, "cuda") is None
    for change in ({"model": "other:model"}, {"preset": "paper"}, {"parameters": {"mu": 0.3}}, {"target": "top-3"}):
        assert recall(job.model_copy(update=change), "cpu") is None
    file = remember(job, "cpu", replace(cost, day="2026-01-02"))
    assert recall(job, "cpu") == replace(cost, day="2026-01-02")
    file.write_text("{")
    assert recall(job, "cpu") is None


def test_without_a_gpu_one_that_is_asked_for_is_refused(data, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ClusterError, match="--device gpu: this machine shows no NVIDIA GPU"):
        typed("bench", "--model", MODEL, "--data", data, "--device", "gpu")


def test_figures_that_cannot_be_kept_are_shown_all_the_same(data, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ran = typed("bench", "--model", MODEL, "--data", data, "--device", "cpu", "--json")
    assert "the measurement cannot be kept" in ran.stderr
    assert json.loads(ran.stdout)["device"] == "cpu"


# ---------------------------------------------------------------- the fidelity curve


def test_a_curve_that_was_cut_off_resumes_and_is_the_same(data, tmp_path, monkeypatch, few_methods):
    whole = measure_curve(asked(data), tmp_path / "whole", QUIET)
    assert [line["image"] for line in whole] == [0, 1, 2, 6, 7]  # three bad images are between them
    measure_curve(asked(data, limit=2), tmp_path / "cut", QUIET)
    file = tmp_path / "cut" / curve.READINGS
    file.write_text(file.read_text() + '{"image": 2, "key": "cut off in the mid')
    lines = measure_curve(asked(data), tmp_path / "cut", QUIET)
    assert [line["key"] for line in lines] == [line["key"] for line in whole]
    for one, other in zip(lines, whole, strict=True):
        assert one["methods"].keys() == other["methods"].keys()
        assert one["methods"][FULL]["forwards"] == other["methods"][FULL]["forwards"]
        assert one["methods"]["Ada-SISE"]["block_correlation"] == pytest.approx(
            other["methods"]["Ada-SISE"]["block_correlation"], abs=1e-4
        )
    assert [line["image"] for line in measure_curve(asked(data, limit=2), tmp_path / "cut", QUIET)] == [0, 1]
    monkeypatch.setattr(curve, "FidelityBench", None)  # nothing is left to measure
    assert measure_curve(asked(data), tmp_path / "cut", QUIET) == lines


def test_a_folder_with_another_curve_is_refused(data, tmp_path, few_methods):
    measure_curve(asked(data, limit=1), tmp_path, QUIET)
    with pytest.raises(ConfigError, match="another model, data set or version"):
        measure_curve(asked(data, seed=1), tmp_path, QUIET)


def test_a_data_set_that_changed_is_measured_where_it_did(tmp_path, few_methods):
    data = folder_of_images(tmp_path / "data", count=2, bad=False)
    before = measure_curve(asked(data), tmp_path / "curve", QUIET)
    (data / "ant" / "000.png").write_bytes(picture(50))
    after = measure_curve(asked(data), tmp_path / "curve", QUIET)
    assert [line["key"] for line in after] == [line["key"] for line in before]
    assert after[0]["methods"] != before[0]["methods"]
    assert after[1] == before[1]


@pytest.mark.parametrize("torn", ["", '{"curve": 1'])
def test_a_file_without_a_whole_head_is_started_anew(data, tmp_path, torn, few_methods):
    (tmp_path / curve.READINGS).write_text(torn)
    assert len(measure_curve(asked(data, limit=1), tmp_path, QUIET)) == 1


def test_a_file_that_is_no_curve_is_refused(data, tmp_path):
    (tmp_path / curve.READINGS).write_text("something else\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        measure_curve(asked(data), tmp_path, QUIET)


@pytest.mark.parametrize("idle", [["--explainer", "gradcam"], ["--peers"], ["--price", "2"], ["-p", "mu=0.1"]])
def test_options_that_a_curve_would_ignore_are_refused(data, tmp_path, idle):
    with pytest.raises(ConfigError, match="measures all methods alike"):
        typed("bench", "--fidelity", data, "--model", MODEL, "--output", tmp_path, *idle)


def test_a_data_set_without_an_image_is_refused(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="can be decoded"):
        measure_curve(asked(tmp_path), tmp_path / "curve", QUIET)


def line(number, **methods):
    return {"image": number, "key": f"{number}.png", "methods": methods}


def values(forwards, drop, insertion, deletion):
    return {"forwards": forwards, "drop": drop, "insertion": insertion, "deletion": deletion, "ssim": 0.5}


def test_the_summary_by_hand():
    """A budget with differences of 0.002 and 0.1 points loses nothing over enough images; Ada with 0.1 does."""
    own = np.random.default_rng(0)
    lines = []
    for number in range(curve.MIN_IMAGES):
        noise = own.normal(size=2)
        methods = {
            FULL: values(100, 20.0, 0.6, 0.2),
            "budget 0.1": values(10, 20.1 + noise[0], 0.6 + 0.002 + 0.01 * noise[1], 0.2),
            "Ada-SISE": values(30 + number % 2, 20.0, 0.5, 0.2),
        }
        lines.append(line(number, **methods))
    lines.append(line(999))  # an image without a finite map
    rows = {row["method"]: row for row in summarise(lines)}
    assert list(rows) == [FULL, "Ada-SISE", "budget 0.1"]
    assert rows[FULL]["images"] == curve.MIN_IMAGES
    assert rows[FULL][curve.AREA][0] == pytest.approx(0.4)
    assert "loses_nothing" not in rows[FULL]
    assert rows["Ada-SISE"]["forwards"] == 30.5
    assert rows["Ada-SISE"][f"{curve.AREA}_difference"] == pytest.approx([-0.1, -0.1, -0.1])
    assert not rows["Ada-SISE"]["loses_nothing"]
    mean, low, high = rows["budget 0.1"]["drop_difference"]
    assert low < mean < high
    assert mean == pytest.approx(0.1, abs=0.25)
    assert rows["budget 0.1"]["loses_nothing"]
    few = {row["method"]: row for row in summarise(lines[:50])}
    assert not few["budget 0.1"]["loses_nothing"]


def test_the_command_leaves_figures_and_a_picture(data, tmp_path, few_methods):
    ran = typed("bench", "--fidelity", data, "--model", MODEL, "--limit", 2, "--output", tmp_path, "--device", "cpu")
    assert "full SISE" in ran.stdout
    rows = json.loads((tmp_path / "curve.json").read_text())
    assert [row["method"] for row in rows] == few_methods
    assert rows[0]["images"] == 2
    with Image.open(tmp_path / "curve.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_a_chart_of_one_image_has_no_arms(tmp_path):
    rows = summarise([line(0, **{FULL: values(100, 1.0, 0.5, 0.2), "budget 0.1": values(10, 2.0, 0.5, 0.2)})])
    curve_chart(rows, "one image", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_a_method_that_learns_is_measured_after_its_first_pass(data):
    found = json.loads(typed("bench", "--data", data, "--model", MODEL, "--explainer", "bee", "--json").stdout)
    assert found["explainer"] == "bee"
    assert found["parameters"]["draws"] == 8


def test_the_probe_times_the_plans_own_targets(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("blocksight.jobs.bench.quick.PROBE_SECONDS", 0.0)
    explain = Explainer.explain

    def noted(self, inputs_nchw, target, seeds=None):
        seen.append((target.num_targets, target.is_class))
        return explain(self, inputs_nchw, target, seeds)

    monkeypatch.setattr(Explainer, "explain", noted)
    config = config_of(data, tmp_path / "out", target="ant-bee,predicted,feature:1", explainer="layercam", signed=True)
    plan = make_plan(config, weights_sha256=None, workforce=Workforce(1, on_gpu=False))
    found = probe_cost(config, plan, "cpu", QUIET)
    assert seen[-1] == (6, (False, True, False) + 3 * (False,))
    assert found.forwards_per_record == 0
    alone = config.model_copy(update={"signed": False})
    assert estimate(config, 10, on_gpu=False).num_bytes == 2 * estimate(alone, 10, on_gpu=False).num_bytes
    assert recall(alone, "cpu") is None
