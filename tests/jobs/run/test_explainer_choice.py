"""`--explainer auto`: by architecture, said aloud, and stored as the name that it chose."""

import pytest
from torch import Tensor, nn

from blocksight import explain
from blocksight.engine.explainers import make_explainer
from blocksight.engine.judging.method_choice import CHOICES, chosen_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import DriftError, load_plan
from blocksight.storage.stores.local import LocalStore
from tests.engine.libraries import GLOBAL, WINDOWED, made
from tests.engine.nets import Depthwise, Plain, Residual, Transformer, seeded
from tests.jobs.jobs_of import called, config_of, run_here
from tests.jobs.tiny import MODEL, VIT, folder_of_images


@pytest.mark.parametrize("make", [Plain, Residual, Depthwise])
def test_a_cnn_gets_sise(make):
    assert chosen_explainer(ModelAdapter(seeded(make), input_size=(32, 32))).explainer == "sise"


@pytest.mark.parametrize("name", ["torchvision", "timm, attention pooler", "transformers, SigLIP", "timm, Swin"])
def test_a_transformer_gets_what_won_on_one(name):
    net = made({**GLOBAL, **WINDOWED}[name])
    assert chosen_explainer(ModelAdapter(net, input_size=(32, 32))).explainer == "libra(integrated_gradients)"


class Unseen(Transformer):
    """An activation that balanced gradients do not reach."""

    def tokens(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(super().tokens(x))


class Still(Plain):
    """A forward without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class StillOfAnySize(Residual):
    """The same, for pictures that are larger than occlusion's window."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("make", "side", "wanted", "why"),
    [
        (Unseen, 32, "rise", "has attention, and libra"),
        (Still, 32, "rise", "no gradient reaches"),
        (StillOfAnySize, 48, "occlusion", "no gradient reaches"),
    ],
)
def test_others_get_what_any_classifier_takes(make, side, wanted, why):
    adapter = ModelAdapter(seeded(make), input_size=(side, side))
    choice = chosen_explainer(adapter)
    make_explainer(choice.explainer, adapter)  # which would refuse a window as large as the picture
    assert choice.explainer == wanted
    assert why in str(choice)


@pytest.mark.parametrize(("model", "wanted"), [(MODEL, "sise"), (VIT, "libra(integrated_gradients)")])
def test_the_plan_holds_the_name_that_auto_chose(tmp_path, model, wanted):
    """A second run has nothing to do, and the explainer's own name means the same job."""
    data, output = folder_of_images(tmp_path / "in"), tmp_path / "out"
    outcome = run_here(data, output, explainer="auto", model=model)
    assert outcome.manifest["num_ok"] == 7
    plan = load_plan(LocalStore(output))
    assert plan.identity["explainer"] == wanted
    assert wanted in CHOICES
    for same in ("auto", wanted):
        assert run_here(data, output, explainer=same, model=model).ran.seconds == 0
    named = run_here(data, tmp_path / "named", explainer=wanted, model=model)
    assert named.job_state.plan.fingerprint == outcome.job_state.plan.fingerprint


def test_an_output_of_another_explainer_is_no_output_of_auto(tmp_path):
    data = folder_of_images(tmp_path / "in")
    run_here(data, tmp_path / "out", explainer="gradcam")
    with pytest.raises(DriftError, match=r'explainer: "gradcam" in the output, "sise" asked for'):
        run_here(data, tmp_path / "out", explainer="auto")


@pytest.mark.parametrize("asked", [{"parameters": {"mu": 0.3}}, {"fidelity": "balanced"}])
def test_auto_takes_no_parameters(tmp_path, asked):
    with pytest.raises(ConfigError, match="explainer auto takes its choice's own defaults"):
        config_of(tmp_path, tmp_path / "out", explainer="auto", **asked)


def test_the_plan_says_which_and_why(tmp_path):
    data = folder_of_images(tmp_path / "in")
    _, text = called(
        "plan", "--data", str(data), "--output", str(tmp_path / "out"), "--model", VIT, "--explainer", "auto"
    )
    assert (
        "explainer: libra(integrated_gradients), for tests.jobs.tiny:make_vit has attention, and is no CNN"
        in " ".join(text.split())
    )


def test_one_picture_gets_the_same(tmp_path):
    from tests.jobs.tiny import make

    data = folder_of_images(tmp_path / "in")
    picture = next(path for path in sorted(data.rglob("*.png")) if path.stat().st_size > 500)
    assert explain(make(), picture, explainer="auto").explainer == "sise"
