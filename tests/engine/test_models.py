"""Loading models: names, weights from strangers, and errors that show both sides."""

import io
import pickle
import sys

import pytest
import safetensors.torch
import torch

from engine.errors import ModelError
from engine.models import ModelAdapter, load_model, read_state
from tests.engine.nets import Plain, seeded


def saved(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_in_the_weights_does_not_run(tmp_path):
    trap = tmp_path / "ran"
    for body in (saved({"weight": Evil(str(trap))}), pickle.dumps(Evil(str(trap)))):
        with pytest.raises(ModelError, match="neither safetensors nor a torch state dict"):
            read_state(body)
    assert not trap.exists()


def test_code_in_the_weights_is_refused():
    buffer = io.BytesIO()
    program = torch.export.export(seeded(Plain), (torch.rand(1, 3, 32, 32),))
    torch.export.save(program, buffer)
    with pytest.raises(ModelError, match="holds code"):
        read_state(buffer.getvalue())


def test_state_dicts_in_their_usual_wrappings():
    state = {"a": torch.arange(3.0)}
    for body in (
        saved(state),
        saved({"state_dict": state, "epoch": 3}),
        saved({"module.a": state["a"]}),
        safetensors.torch.save(state),
    ):
        assert torch.equal(read_state(body)["a"], state["a"])
    with pytest.raises(ModelError, match=r"holds more than tensors \(epoch\)"):
        read_state(saved({**state, "epoch": 3}))


def test_torchvision_takes_the_class_count_from_the_weights():
    import torchvision

    net = torchvision.models.squeezenet1_1(num_classes=7)
    adapter = load_model("torchvision:squeezenet1_1", state=saved(net.state_dict()))
    assert adapter.num_classes == 7
    assert adapter.class_name(3) == "class 3"
    assert adapter.fingerprint == ModelAdapter(net).fingerprint


def test_weights_that_do_not_fit_show_both_sides():
    import torchvision

    body = saved(torchvision.models.squeezenet1_1(num_classes=7).state_dict())
    with pytest.raises(ModelError, match=r"do not fit the model in \d+ tensors: .*wanted.*given"):
        load_model("torchvision:resnet18", state=body)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet50", {}, "unknown model 'resnet50'; known: efficientnet_lite0, torchvision:NAME"),
        ("torchvision:resnet5o", {"weights": "random"}, "no classifier 'resnet5o'; nearest: .*resnet50"),
        ("torchvision:resnet18", {}, "needs --weights: .*IMAGENET1K_V1.*random"),
        ("nowhere.at_all:make", {}, "cannot be imported: .*package.module:factory"),
        ("math:nothing", {}, "cannot be imported"),
        ("math:factorial", {}, "failed.*factorial"),
    ],
)
def test_what_is_wrong_is_one_sentence(name, options, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_model(name, **options)


def test_random_weights_are_seeded():
    one, same, other = (load_model("torchvision:squeezenet1_1", weights="random", seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_a_factory_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\nfrom tests.engine.nets import Plain\nfrom engine.models import ModelAdapter\n"
        "def make():\n    return ModelAdapter(Plain(), input_size=(32, 32), class_names=list('abcde'))\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    adapter = load_model("my_models:make")
    assert (adapter.name, adapter.num_classes, adapter.class_name(1)) == ("my_models:make", 5, "b")
    with pytest.raises(ModelError, match="returned a int"):
        load_model("my_models:number")
    sys.modules.pop("my_models")


def test_an_output_that_is_no_logits_is_refused():
    with pytest.raises(ModelError, match=r"must return logits \[N, classes\]; for 2 images it returned \(2, 3, 8, 8\)"):
        _ = ModelAdapter(torch.nn.Identity(), input_size=(8, 8)).num_classes


def test_the_fingerprint_is_that_of_the_weights():
    one, two = ModelAdapter(seeded(Plain)), ModelAdapter(seeded(Plain))
    assert one.fingerprint == two.fingerprint
    changed = seeded(Plain)
    with torch.no_grad():
        changed.head.bias[0] += 1e-6
    assert ModelAdapter(changed).fingerprint != one.fingerprint


def test_normalisation_is_the_usual_formula():
    adapter = ModelAdapter(torch.nn.Identity(), mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    inputs = adapter.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert inputs[0, :, 0, 0].tolist() == [1.0, 0.75, 0.5]
