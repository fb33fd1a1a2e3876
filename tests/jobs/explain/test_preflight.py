"""The preflight of a job: what would fail every record fails before the first, and what is odd is stored and shown."""

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from blocksight.engine.catalog.entries import EXPLAINERS
from blocksight.engine.catalog.readouts import READOUTS, ReadoutName
from blocksight.engine.errors import ModelError
from blocksight.jobs.explain import preflight
from blocksight.jobs.explain.step import load, model_facts
from blocksight.jobs.ledger.attempt_markers import FOLDER
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.plan import source_of
from blocksight.jobs.plan.preflight import PREFLIGHT_KEY, UNEXAMINED, Preflight, stored_preflight
from blocksight.jobs.run.job import plan_job, run_job
from blocksight.storage.stores.opening import open_store
from tests.engine.nets import TRANSFORMERS_ONLY
from tests.jobs.jobs_of import called, config_of, rows_in, run_here
from tests.jobs.tiny import folder_of_images, make, make_vit

MODELS = """
import torch
from torch import nn
from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.nets import seeded
from tests.jobs.tiny import Tiny

class Soft(Tiny):
    def forward(self, x):
        return (4 * super().forward(x)).softmax(1)

class Frozen(Tiny):
    def forward(self, x):
        assert bool(x.isfinite().all())  # a trace would leave the next line out
        with torch.no_grad():
            maps = self.second(self.first(x))
        return self.head(maps.mean((2, 3)))

class Cut(Tiny):
    def forward(self, x):
        assert bool(x.isfinite().all())
        maps = self.second(self.first(x))
        return self.head(maps.detach().mean((2, 3)) + x.mean((1, 2, 3))[:, None])

class Straight(Tiny):
    def forward(self, x):
        logits = super().forward(x)
        return logits / 50 + logits.detach()

class Failing(Tiny):
    def forward(self, x):
        if torch.is_grad_enabled():
            raise ZeroDivisionError("no gradients here")
        return super().forward(x)

class Picky(Tiny):
    def forward(self, x):
        assert bool(x.isfinite().all())
        if torch.is_grad_enabled() and bool((x[:, 0, 0, 0] == 0).any()):
            raise ZeroDivisionError("no black corner")
        return super().forward(x)

class Unlisted(Tiny):
    def state_dict(self, *_, **__):
        raise KeyError("weights")

class Restarted(Tiny):
    def forward(self, x):
        return self.head(self.second(self.first(x)).detach().requires_grad_(True).mean((2, 3)))

class Labels(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.stem.weight.data.zero_()
        self.stem.bias.data.zero_()
        for channel in range(3):
            self.stem.weight.data[channel, channel, 1, 1] = 1
    def forward(self, x):
        return 160 * self.relu(self.stem(x) - 0.5).mean((2, 3)) - 4

def of(kind):
    def make():
        return ModelAdapter(seeded(kind), input_size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    return make

kinds = (Soft, Frozen, Cut, Failing, Picky, Unlisted, Labels, Straight, Restarted)
soft, frozen, cut, failing, picky, unlisted, labels, straight, restarted = map(of, kinds)
"""


@pytest.fixture
def my_models(tmp_path, monkeypatch):
    (tmp_path / "odd_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("odd_models", None)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The tiny model's usual pictures."""
    return folder_of_images(tmp_path_factory.mktemp("shapes"), bad=False)


@pytest.fixture
def red_and_green(tmp_path):
    """Two pictures with a red and a green square."""
    for number in range(2):
        pixels = np.full((32, 32, 3), 10 * number, np.uint8)
        pixels[2:14, 2:14, 0] = 255
        pixels[18:30, 18:30, 1] = 255
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("model", "explainer", "sentence"),
    [
        ("frozen", "gradcam", "gradcam needs gradients, and none reaches the output of odd_models:frozen"),
        ("frozen", "sise", "sise needs gradients, and none reaches the output"),
        ("frozen", "smoothgrad(gradcam)", "needs gradients, and none reaches the output"),
        ("frozen", "gradient", "gradient needs gradients, and none reaches the output"),
        ("restarted", "sise", "none reaches block '.*' of odd_models:restarted: the forward detaches what follows"),
        ("restarted", "gradient", "none reaches the input of odd_models:restarted"),
        ("failing", "fullgrad", "no gradients here"),
        ("daam", "daam", "daam needs self-attention"),
    ],
)
def test_what_would_fail_every_record_fails_before_the_first(
    my_models, red_and_green, tmp_path, model, explainer, sentence
):
    name = "tests.jobs.tiny:make" if model == "daam" else f"odd_models:{model}"
    with pytest.raises(ModelError, match=sentence):
        run_here(red_and_green, tmp_path / "out", model=name, explainer=explainer)
    assert not (tmp_path / "out" / "_job" / "plan").exists()


def test_integrated_gradients_that_do_not_add_up_are_told_before_any_unit(my_models, red_and_green, tmp_path):
    options = {"model": "odd_models:straight", "parameters": {"steps": 4}}
    with pytest.raises(ModelError, match=r"integrated_gradients sums to .* in 4 steps, .* take more steps"):
        run_here(red_and_green, tmp_path / "out", explainer="integrated_gradients", **options)
    assert run_here(red_and_green, tmp_path / "plain", explainer="gradient", model="odd_models:straight")


def test_a_block_that_is_cut_off_and_passed_by_is_named(my_models, red_and_green, tmp_path):
    with pytest.raises(ModelError, match="'second' is no block: the output still depends on the picture"):
        run_here(red_and_green, tmp_path / "out", model="odd_models:cut", explainer="layercam", blocks=["second"])


def test_an_explainer_that_fails_on_one_image_is_tried_on_the_next(my_models, red_and_green, tmp_path):
    outcome = run_here(red_and_green, tmp_path / "out", model="odd_models:picky", explainer="gradcam")
    assert (outcome.job_state.total("num_ok"), outcome.job_state.total("num_rejected")) == (1, 1)


def test_any_exception_of_a_model_is_a_sentence(my_models, red_and_green, tmp_path):
    code, text = called(
        *("explain", "--data", red_and_green, "--output", tmp_path / "out", "--runner", "local"),
        *("--model", "odd_models:unlisted", "--explainer", "gradcam"),
    )
    assert code == 2
    assert "cannot be used: KeyError while it was examined" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("explainer", sorted(EXPLAINERS))
def test_every_explainer_is_tried_in_a_few_passes(explainer, tmp_path, shapes):
    adapter = (make_vit if explainer in TRANSFORMERS_ONLY else make)()
    model = f"tests.jobs.tiny:{'make_vit' if explainer in TRANSFORMERS_ONLY else 'make'}"
    parameters = {"window": 8, "stride": 8} if explainer == "occlusion" else {}
    config = config_of(shapes, tmp_path / "out", model=model, explainer=explainer, parameters=parameters)
    facts = model_facts(adapter, config)
    passes = []
    with adapter.module.register_forward_pre_hook(lambda _, given: passes.append(len(given[0]))):
        found = preflight.examined_on(adapter, config, facts, [])
    assert found.findings == ()
    assert sum(passes) < 90


def test_ablationcam_is_tried_without_a_pass_for_each_map(tmp_path, shapes, monkeypatch):
    config = config_of(shapes, tmp_path / "out", model="tests.jobs.tiny:make", explainer="ablationcam")

    def passes():
        adapter, calls = make(), []
        facts = model_facts(adapter, config)
        with adapter.module.head.register_forward_pre_hook(lambda *_: calls.append(1)):
            preflight.examined_on(adapter, config, facts, [])
        return len(calls)

    short = passes()
    monkeypatch.setattr(preflight, "run_tails_once", lambda _: None)
    assert short < passes()


# ---------------------------------------------------------------- the readout


def scores_of(output):
    rows = rows_in(open_store(str(output)))
    return [row["score"] for row in rows], [row["metrics"] for row in rows]


def test_probabilities_are_recognised_stored_and_shown(my_models, red_and_green, tmp_path):
    code, text = called(
        *("explain", "--data", red_and_green, "--output", tmp_path / "out", "--runner", "local"),
        *("--model", "odd_models:soft", "--explainer", "gradcam"),
    )
    assert code == 0
    assert "WARNING the outputs are probabilities already" in " ".join(text.split())
    store = open_store(str(tmp_path / "out"))
    stored = stored_preflight(store)
    assert stored.readout == "probabilities"
    assert stored.images == "2 images of the data set"
    adapter = load(config_of(red_and_green, tmp_path / "out", model="odd_models:soft"), None, "cpu", ".")
    best = [row["score"] for row in rows_in(store)]
    pixels = np.stack([np.array(Image.open(red_and_green / f"{number}.png")) for number in range(2)])
    with adapter.borrowed(), torch.no_grad():
        wanted = adapter.logits(adapter.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))).amax(1)
    assert best == pytest.approx(wanted.tolist(), rel=1e-5)
    for command in ("status", "plan"):
        given = [tmp_path / "out"] if command == "status" else ["--data", red_and_green, "--output", tmp_path / "out"]
        rest = [] if command == "status" else ["--model", "odd_models:soft", "--explainer", "gradcam"]
        shown = " ".join(called(command, *given, *rest)[1].split())
        assert "model check" in shown
        assert "the outputs are probabilities already" in shown


def test_independent_labels_are_scored_by_their_own_sigmoid(my_models, red_and_green, tmp_path):
    run_here(red_and_green, tmp_path / "out", model="odd_models:labels", explainer="gradcam", target="0")
    run_here(
        red_and_green, tmp_path / "soft", model="odd_models:labels", explainer="gradcam", target="0", readout="softmax"
    )
    (one, _), (metrics, _) = scores_of(tmp_path / "out")
    assert one == pytest.approx(torch.tensor(logit_of_red()).sigmoid().item(), rel=1e-5)
    assert not metrics["increase"]
    (softmax, _), (old, _) = scores_of(tmp_path / "soft")
    assert softmax < 0.6 < one
    assert old["protocol"] != metrics["protocol"]  # never averaged with the others


def logit_of_red():
    return 160 * 0.5 * (12 * 12) / (32 * 32) - 4


def test_a_readout_belongs_to_the_configuration_and_a_sound_one_changes_nothing(shapes, tmp_path):
    auto, said = (config_of(shapes, tmp_path / "out", readout=readout) for readout in ("auto", "sigmoid"))
    assert "readout" not in auto.identity(None)
    assert said.identity(None)["readout"] == "sigmoid"
    run_here(shapes, tmp_path / "out", explainer="gradcam")
    store = open_store(str(tmp_path / "out"))
    assert stored_preflight(store).readout == "softmax"
    with pytest.raises(ConfigError, match="readout"):
        run_here(shapes, tmp_path / "out", explainer="gradcam", readout="sigmoid")
    with pytest.raises(ConfigError, match="readout"):
        config_of(shapes, tmp_path / "out", readout="logits")


def test_an_output_of_an_earlier_version_keeps_its_softmax(my_models, red_and_green, tmp_path):
    run_here(red_and_green, tmp_path / "out", model="odd_models:soft", explainer="gradcam", readout="softmax")
    store = open_store(str(tmp_path / "out"))
    store.delete(PREFLIGHT_KEY)
    assert stored_preflight(store) == UNEXAMINED
    assert stored_preflight(open_store(str(tmp_path / "none"))) is None


def test_evaluate_reads_scores_as_the_job_did(my_models, red_and_green, tmp_path):
    run_here(red_and_green, tmp_path / "out", model="odd_models:soft", explainer="gradcam")
    code, text = called(
        *("evaluate", tmp_path / "out", "--model", "odd_models:soft", "--metrics", "drop,increase,insertion"),
        *("--runner", "local"),
    )
    assert code == 0, text
    scores = {row["key"]: row["score"] for row in rows_in(open_store(str(tmp_path / "out")))}
    (values,) = (tmp_path / "out" / "evaluations").rglob("*.parquet")
    curves = {row["key"]: row["curve"] for row in pq.read_table(values).to_pylist() if row["metric"] == "insertion"}
    assert {key: curve[-1] for key, curve in curves.items()} == pytest.approx(scores, rel=1e-5)


# ---------------------------------------------------------------- the images of the data set


def test_a_process_that_died_in_the_preflight_is_not_tried_on_the_data_again(shapes, tmp_path):
    store = open_store(str(tmp_path / "out"))
    store.put(f"{FOLDER}{preflight.STEP}-0.json", b"{}")
    run_here(shapes, tmp_path / "out", explainer="gradcam")
    assert stored_preflight(store).images == "random pictures"
    assert not list(store.list(FOLDER))


def dies(*_, **__):
    os.abort()


def test_an_image_that_kills_its_decoder_does_not_end_a_careful_driver(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.explain.preflight.decoded", dies)
    config = config_of(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "out")
    _, plan = plan_job(config, Execution(runner="local"))
    assert list(preflight._sample(plan, config, (32, 32), source_of(plan, None), careful=True)) == []


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_the_driver_of_ray_is_careful(tmp_path, monkeypatch, runner):
    def stop(*_, careful):
        raise ModelError(f"careful: {careful}")

    monkeypatch.setattr(preflight, "examined_for", stop)
    config = config_of(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "out")
    with pytest.raises(ModelError, match=f"careful: {runner == 'ray'}"):
        run_job(config, Execution(runner=runner), Console(quiet=True))


@pytest.mark.parametrize("readout", READOUTS)
def test_what_a_score_is_reads_as_a_sentence(readout: ReadoutName) -> None:
    said = str(Preflight(readout, "4 images", ()))
    assert said.startswith("examined on 4 images, nothing odd; a score is the ")
    assert "the the" not in said


def test_raw_outputs_are_called_no_probability_and_are_compared_with_none(tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "in")
    run_here(data, tmp_path / "soft", explainer="gradcam")
    run_here(data, tmp_path / "raw", explainer="gradcam", readout="identity")
    row = next(row for row in rows_in(open_store(str(tmp_path / "raw"))) if row["status"] == "ok")
    _, printed = called("show", tmp_path / "raw", row["key"], "--picture", tmp_path / "one.png")
    assert f"{row['score']:.4g}" in printed
    assert "score" in printed
    assert f"{100 * row['score']:.1f} %" not in printed
    assert "probability:" not in printed
    assert called("report", tmp_path / "raw")[0] == 0
    page = (tmp_path / "raw/report/index.html").read_text()
    assert f"{row['score']:.4g} <bdi>" in page
    assert "the model&#39;s output itself, rank 1" in page
    for words in (("versus", tmp_path / "soft", tmp_path / "raw", "--output", tmp_path / "difference"),
                  ("compare", tmp_path / "soft", tmp_path / "raw")):  # fmt: skip
        _, printed = called(*words)
        assert "scores are read in different ways" in " ".join(printed.split())
    assert "different ways" not in called("compare", tmp_path / "soft", tmp_path / "soft")[1]
    _, printed = called("audit", tmp_path / "raw", "--no-try")
    assert "scores are the model's outputs themselves" in " ".join(printed.split())
    assert "themselves" not in called("audit", tmp_path / "soft", "--no-try")[1]
