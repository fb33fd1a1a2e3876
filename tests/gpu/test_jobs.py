"""Whole jobs whose workers believe in a GPU: the CPU job's bytes, and every step that holds a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from blocksight import explain
from blocksight.engine.catalog.composition import parameters_of, parse_method
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.judging import fidelity
from blocksight.engine.judging.fidelity import FULL
from blocksight.engine.judging.preflight import quick, scored_once, try_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.examination import examine
from blocksight.engine.scoring import setting_choice
from blocksight.engine.scoring.setting_choice import ForwardRequest, choose, drawn_pictures
from blocksight.jobs.audit.trial import Pictures, Trial
from blocksight.jobs.bench.benchmark import run_benchmark, run_curve
from blocksight.jobs.explain.forward_pass import choose_forward
from blocksight.jobs.explain.replay import Replay, replay_error
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.plan import existing_plan
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.run import evaluation, job
from blocksight.jobs.run.evaluation import EvaluationRequest, run_evaluation
from blocksight.storage.stores.local import LocalStore
from tests.gpu.cases import QUICK_BEE, adapter_of, pixels
from tests.gpu.pretended import Counts, pretended_gpu
from tests.jobs.jobs_of import config_of, fragments_in, rows_in, run_here
from tests.jobs.tiny import folder_of_images, make

KEEN, VIT = "tests.jobs.tiny:make_keen", "tests.jobs.tiny:make_vit"
JOBS: Mapping[str, Mapping[str, Any]] = {
    "sise": {},
    "auto": {"model": KEEN, "fidelity": "auto"},
    "learns": {"explainer": "bee", "parameters": {**QUICK_BEE, "draws": 3, "images": 6, "pool": 3}},
    "attention": {"model": VIT, "explainer": "daam"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images, and three files that are none."""
    return folder_of_images(tmp_path_factory.mktemp("data"), 9)


@contextmanager
def workers_on_gpu(**changes: Any) -> Iterator[Counts]:
    """Jobs run in this process, and their contexts say `cuda`. A pass has as many images as on the CPU."""

    def on_gpu(real: Callable[..., JobContext], *args: Any, **kwargs: Any) -> JobContext:
        return replace(real(*args, **kwargs), device="cuda", **changes)

    with (
        mock.patch.object(job, "context_of", partial(on_gpu, job.context_of)),
        mock.patch.object(evaluation, "context_of", partial(on_gpu, evaluation.context_of)),
        mock.patch("blocksight.jobs.explain.step.GPU_IMAGES_PER_PASS", 4),
        pretended_gpu() as counts,
    ):
        yield counts


@contextmanager
def stubbed_compilers() -> Iterator[None]:
    """The compilers return the module itself; few batch sizes are tried, for a short time."""
    with (
        mock.patch("torch.compile", lambda module, **_: module),
        mock.patch.object(setting_choice, "GPU_BATCH_SIZES", (8, 16)),
        mock.patch("blocksight.engine.judging.efficiency.GPU_SIZES", (8, 16)),
        mock.patch("blocksight.engine.judging.efficiency.BARE_SECONDS", 0.01),
        mock.patch("blocksight.jobs.explain.step.GPU_IMAGES_PER_PASS", 4),
    ):
        yield


@pytest.fixture(scope="module", params=JOBS)
def both(data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The outputs of one job: of a CPU, and of the pretended GPU."""
    on_cpu, on_gpu = (tmp_path_factory.mktemp(where) for where in ("cpu", "gpu"))
    run_here(data, on_cpu, **JOBS[request.param])
    with workers_on_gpu() as counts:
        ran = run_here(data, on_gpu, **JOBS[request.param])
    assert counts.launches.total() > 0
    assert not ran.ran.failures
    return on_cpu, on_gpu


def test_a_jobs_fragments_are_those_of_the_cpu(both: tuple[Path, Path]):
    wanted, found = (fragments_in(LocalStore(output)) for output in both)
    assert found == wanted
    assert len(found) > 0


@pytest.mark.parametrize("both", ["sise"], indirect=True)
def test_an_evaluations_values_are_those_of_the_cpu(both: tuple[Path, Path]):
    wanted = values_of(both[0])
    with workers_on_gpu() as counts:
        found = values_of(both[1])
    assert counts.launches.total() > 0
    assert len(found) > 0
    assert found == wanted


def values_of(output: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation, with control maps and maps of random weights."""
    model = existing_plan(LocalStore(output)).identity["model"]
    asked = EvaluationRequest(str(output), "drop,average_drop_50,sanity", share=0.3, controls=True, model=model)
    done = run_evaluation(asked, Execution(runner="local"), Console(quiet=True))
    assert (done.num_open, done.failures) == (0, [])
    files = sorted((output / done.folder / "data").rglob("*.parquet"), key=lambda file: file.name)
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_a_record_of_a_gpu_is_replayed_on_a_cpu(both: tuple[Path, Path], data: Path):
    store = LocalStore(both[1])
    named = NamedModel(existing_plan(store).identity["model"], None, None)
    replay = Replay(store, existing_plan(store), named, Console(quiet=True))
    row = next(row for row in rows_in(store) if row["status"] == "ok")
    upright = np.asarray(Image.open(data / row["key"]).convert("RGB"))
    [made] = replay.explanations(replay.config_of_row(row), [row], upright)
    assert replay_error(made, row) is None


@pytest.mark.parametrize("tune", [False, True])
def test_a_gpu_chooses_among_its_settings_and_stores_its_rate(data: Path, tmp_path: Path, tune: bool):
    with workers_on_gpu(), stubbed_compilers(), mock.patch.object(job, "device_of", return_value="cuda"):
        ran = job.run_job(config_of(data, tmp_path), Execution(runner="local", tune=tune), Console(quiet=True))
    assert not ran.ran.failures
    assert ran.forward is not None
    assert (ran.forward.forwards_per_second or 0) > 0
    assert (ran.forward.hardware, ran.forward.compute_capability) == ("a pretended GPU", "9.0")
    if not tune:
        assert str(ran.forward.setting) == "eager float16, 256 per pass"
        return
    assert {(own["setting"]["backend"], own["setting"]["precision"]) for own in ran.forward.probe} >= {
        ("eager", "float32"),
        ("graphed", "float16"),
    }
    assert all(own["refused"] is None for own in ran.forward.probe)


class WithConstant(nn.Module):
    """Its forward adds a tensor that stays on the CPU, wherever the module is moved."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.kept = net, [torch.zeros(1, 3, 1, 1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + self.kept[0])


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_model_that_runs_on_the_cpu_alone_is_refused_before_any_unit(precision: Any):
    adapter = ModelAdapter(WithConstant(make().module), name="mine", input_size=(32, 32))
    request = ForwardRequest(None if precision == "auto" else precision)
    with pretended_gpu(), pytest.raises(ModelError, match=r"mine.*got tensors on cuda:0, and on the CPU"):
        choose_forward(adapter.to("cuda"), request)


@pytest.mark.parametrize("device", [None, "cuda:0", "cuda"])
def test_one_picture_has_the_cpus_map_on_a_gpu(device: str | None):
    picture = pixels(1)[0]
    wanted = explain(make(), picture, explainer="gradcam", console=Console(quiet=True))
    with pretended_gpu():
        adapter = make()
        if device is None:
            adapter.module.to("cuda")
        found = explain(adapter, picture, explainer="gradcam", device=device, console=Console(quiet=True))
    assert np.array_equal(found.map, wanted.map)


# ---------------------------------------------------------------- steps that hold a model elsewhere


@pytest.mark.parametrize("net", ["cnn", "vit"])
def test_the_probe_times_each_setting(net: str):
    with pretended_gpu(), stubbed_compilers():
        forward, found = choose(adapter_of(net).to("cuda"), ForwardRequest(is_timed=True))
        inputs = torch.zeros(found[0].setting.batch_size, 3, 32, 32, device="cuda")
        assert forward(inputs).device.type == "cuda"
    assert all(one.refused is None and one.forwards_per_second for one in found), found


@pytest.mark.parametrize(("net", "explainer"), [("cnn", "sise"), ("cnn", "rise"), ("vit", "daam")])
def test_a_trial_finds_what_it_finds_on_a_cpu(net: str, explainer: str):
    wanted = tried(net, explainer, "cpu")
    with pretended_gpu():
        assert tried(net, explainer, "cuda") == wanted


def tried(net: str, explainer: str, device: str) -> tuple[Any, tuple[str, ...]]:
    """The findings of the model's examination, and of a short trial of the explainer."""
    adapter, method = adapter_of(net).to(device), parse_method(explainer)
    found = examine(adapter, drawn_pictures(adapter)[:2], None)
    made = make_explainer(
        explainer, adapter, quick(method, parameters_of(method, {})), forward=scored_once(adapter), images_per_pass=4
    )
    classes = torch.tensor([[0]], device=device)
    return found, try_explainer(made, method, (), adapter.normalise(pixels(1)), adapter.target(classes))


def test_a_region_is_tried_with_the_cpus_effects():
    wanted = effects("cpu")
    with pretended_gpu():
        assert effects("cuda") == wanted


def effects(device: str) -> tuple[Any, ...]:
    """What removing and pasting a region does to three images each."""
    drawn = np.random.default_rng(0)
    members, others = (
        Pictures([f"{name}{number}" for number in range(3)], drawn.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
        for name in ("member", "other")
    )
    found = Trial(make().to(device), 0).try_region(1, (2, 2, 10, 10), members, others)
    return found.blanked, found.pasted, found.recurrence


def test_bench_measures(data: Path, tmp_path: Path):
    config = config_of(data, tmp_path, model=KEEN, parameters={"budget": 0.3})
    options = {"has_data": True, "batch_size": None, "workers": 1, "price": None, "with_peers": False}
    with pretended_gpu(), stubbed_compilers(), mock.patch("blocksight.jobs.bench.benchmark.remember"):
        found = run_benchmark(config, device="cuda", console=Console(quiet=True), **options)
    assert found.hardware == "a pretended GPU"
    assert all(one.refused is None for one in found.probed)
    assert found.efficiency.efficiency is not None


def test_a_fidelity_curve_is_that_of_the_cpu(data: Path, tmp_path: Path):
    wanted = curve(data, tmp_path / "cpu", "cpu")
    with pretended_gpu():
        found = curve(data, tmp_path / "gpu", "cuda")
    assert [own["method"] for own in found] == [own["method"] for own in wanted]
    assert [own["drop"] for own in found] == [pytest.approx(own["drop"], abs=1e-9) for own in wanted]


def curve(data: Path, folder: Path, device: str) -> list[dict[str, Any]]:
    """The rows of the fidelity curve of two images and a few methods."""
    some = (FULL, "Ada-SISE", "budget 0.1", "control: edges", "float16 scores")
    chosen = tuple(method for method in fidelity.METHODS if method.name in some)
    with mock.patch.object(fidelity, "METHODS", chosen), mock.patch("blocksight.jobs.bench.curve.METHODS", chosen):
        config = config_of(data, folder, model=KEEN, limit=2)
        return run_curve(config, folder, device, 8, None, None, Console(quiet=True))
