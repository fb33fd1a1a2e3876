"""The command `check`: facts, proved blocks, costs and a picture of one model, and refusals."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from blocksight.engine.errors import ModelError
from blocksight.jobs.bench import model_check
from blocksight.jobs.cli.main import app
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.preflight import Preflight

MODEL = "tests.jobs.cli.test_check:plain"


def plain():
    from blocksight import ModelAdapter
    from tests.engine.nets import Plain, seeded

    return ModelAdapter(seeded(Plain), input_size=(32, 32), class_names=list("abcde"))


def cut_later():
    """What follows its first layer sees a part of the picture."""
    from blocksight import ModelAdapter
    from tests.engine.model.test_proofs import Fed, cut
    from tests.engine.nets import seeded

    return ModelAdapter(seeded(lambda: Fed(cut, 1)), input_size=(64, 64))


def without_maps():
    from torch import nn

    from blocksight import ModelAdapter
    from tests.engine.nets import seeded

    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))
    return ModelAdapter(net, input_size=(32, 32))


def without_gradients():
    """As an exported network is: no gradient reaches its output."""
    from torch import nn

    from blocksight import ModelAdapter
    from tests.engine.nets import Plain, seeded

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = seeded(Plain)

        def forward(self, inputs):
            return self.inside(inputs).detach()

    return ModelAdapter(Fixed(), input_size=(32, 32))


def of_brightness():
    """One channel, and two outputs."""
    from torch import nn

    from tests.engine.nets import seeded

    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, inputs):
            maps = self.first(inputs).relu()
            return {"scores": self.last(maps.mean((2, 3))), "maps": maps}

    return seeded(Grey)


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3)).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("no picture")
    return tmp_path


def checked(*arguments):
    return CliRunner().invoke(app, ["check", "--weights", "random", *arguments])


def test_it_tells_how_a_model_is_fed_read_and_cut(folder):
    picture = folder / "map.png"
    ran = checked("--model", MODEL, "--data", str(folder), "--output", str(picture), "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert (found["input_size"], found["num_classes"], found["class_names"]) == ([32, 32], 5, list("abcde"))
    assert [(one["name"], one["channels"], one["height"]) for one in found["blocks"]] == [
        ("features_1", 6, 32),
        ("features_4", 8, 16),
        ("features_7", 10, 8),
    ]
    assert {one["proof"] for one in found["blocks"]} == {"cells follow changed patches; no way around"}
    costs = {one["explainer"]: one for one in found["costs"]}
    assert costs["sise"]["forwards"] == 3 + 6 + 8 + 10
    assert costs["sise"]["is_most"]
    assert costs["reciprocam"]["forwards"] == 1 + 8 * 8
    assert costs["fovex"]["forwards"] == 5 * 10 * 3  # with the preset of a job, fast
    assert costs["smoothgrad(gradient)"]["forwards"] == 25 * 3
    assert (found["auto"], found["device"]) == ("sise", "cpu")
    assert costs["gradcam"]["seconds"] == pytest.approx(3 * found["forward_seconds"])
    assert "attention" in costs["daam"]["fault"]
    with Image.open(picture) as drawn:
        assert drawn.size == (48, 40)


def test_the_tables_say_the_same(folder):
    ran = checked("--model", MODEL, "--data", str(folder / "b.png"), "--output", str(folder / "map.png"))
    assert ran.exit_code == 0, ran.output
    for said in ("32 x 32 pixels", "5 (a; b; c; d; e)", "features_7", "channels first", "not for this model", "traced"):
        assert said in ran.output


def test_a_deeper_tensor_that_is_no_block_is_named(folder):
    model = "tests.jobs.cli.test_check:cut_later"
    ran = checked("--model", model, "--data", str(folder), "--output", str(folder / "map.png"), "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert [block["height"] for block in found["blocks"]] == [32]
    assert "the picture lies elsewhere in it" in found["beyond"]
    ran = checked("--model", model, "--data", str(folder), "--output", str(folder / "map.png"))
    assert "the deeper" in ran.output


def test_without_blocks_it_says_why_and_draws_the_gradient(folder):
    model = "tests.jobs.cli.test_check:without_maps"
    ran = checked("--model", model, "--data", str(folder), "--output", str(folder / "map.png"), "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert (found["blocks"], found["explainer"]) == ([], "gradient")
    assert "no block was found" in found["refusal"]
    assert {one["fault"] for one in found["costs"] if one["explainer"] == "sise"} == {"it needs blocks"}
    ran = checked("--model", model, "--data", str(folder), "--blocks", "0")
    assert isinstance(ran.exception, ModelError)


def test_without_gradients_it_says_so_and_hides_parts(folder):
    model = "tests.jobs.cli.test_check:without_gradients"
    ran = checked("--model", model, "--data", str(folder), "--output", str(folder / "map.png"), "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    faults = {one["explainer"]: one["fault"] for one in found["costs"]}
    assert (found["explainer"], faults["rise"], faults["scorecam"]) == ("rise", "", "")
    assert "a window of 32 pixels hides all" in faults["occlusion"]
    assert "none reaches the output" in faults["gradient"]
    assert "none reaches the output" in faults["gradcam"]


def test_it_takes_the_options_that_say_what_the_model_is(folder):
    model, picture = "tests.jobs.cli.test_check:of_brightness", str(folder / "map.png")
    given = ("--model", model, "--data", str(folder), "--output", picture, "--json", "--input-size", "40")
    ran = checked(*given, "--output-key", "scores")
    assert isinstance(ran.exception, ModelError)
    assert "say --channels 1" in str(ran.exception)
    ran = checked(*given, "--output-key", "scores", "--channels", "1", "--mean", "0.5", "--std", "0.2", "--target", "2")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert (found["num_classes"], found["target"]) == (3, "class 2")
    ran = checked("--model", model, "--data", str(folder), "--target", "label")
    assert isinstance(ran.exception, ConfigError)
    assert "has no label" in str(ran.exception)


def test_a_folder_without_pictures_is_refused(tmp_path):
    ran = checked("--model", MODEL, "--data", str(tmp_path))
    assert isinstance(ran.exception, ConfigError)
    assert "holds no picture" in str(ran.exception)


def test_a_picture_that_cannot_be_written_is_refused_before_any_work(folder):
    for name, told in (("map.jpg", "name it .png"), ("missing/map.png", "there is no folder")):
        ran = checked("--model", "nowhere:model", "--data", str(folder), "--output", str(folder / name))
        assert isinstance(ran.exception, ConfigError)
        assert told in str(ran.exception)


def test_without_the_demo_a_picture_is_drawn(monkeypatch):
    def missing():
        raise ConfigError("not installed")

    monkeypatch.setattr(model_check, "photographs", missing)
    drawn = model_check._picture(None)
    assert drawn.shape == (3, 256, 256)
    assert drawn.unique().numel() > 100


def test_an_older_preflight_names_no_blocks():
    old = {key: value for key, value in asdict(Preflight("softmax", "4 images", ())).items() if key != "blocks"}
    assert Preflight(**old).blocks == ()
