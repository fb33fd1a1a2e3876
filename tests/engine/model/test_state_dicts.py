"""Weight files load as their own library would load them: wrappings, old names, heads; what does not fit says why."""

import gzip
import io
import re
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.state_dicts import flattened, load_state, read_state
from tests.engine.nets import seeded


class Small(nn.Module):
    """A convolution, batch norm and a head, as most networks have them."""

    def __init__(self, head=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc = head or nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def saved(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture
def trained():
    """The state of a network whose statistics are not those of a new one."""
    net = seeded(Small, seed=7)
    net.body[1].running_mean.uniform_(1, 2)
    return net.state_dict()


def loaded(state, net=None):
    """A network with the state of a file, and what was assumed."""
    net = net or seeded(Small)
    return net, load_state(net, read_state(state if isinstance(state, bytes) else saved(state)))


def assert_holds(net, state):
    own = net.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# ---------------------------------------------------------------- wrappings

WRAPPINGS = {
    "plain": lambda state: state,
    "safetensors": safetensors.torch.save,
    "safetensors, module.": lambda state: safetensors.torch.save(under("module.", state)),
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model, module.": lambda state: {"model": under("module.", state), "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda state: {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "compiled": lambda state: under("_orig_mod.", state),
    "compiled and parallel": lambda state: under("module._orig_mod.", state),
    "compiled in the middle": lambda state: {name.replace("body.", "body._orig_mod."): t for name, t in state.items()},
    "lightning": lambda state: {"state_dict": under("model.", state), "pytorch-lightning_version": "2.5"},
    "lightning, compiled": lambda state: {"state_dict": under("model._orig_mod.", state)},
    "a name of its own": lambda state: {"network": {"inner": under("net.", state)}},
    "exponential average": lambda state: {"ema": under("module.", state), "updates": 9},
    "averaged model": lambda state: {"n_averaged": torch.tensor(3), **under("module.", state)},
    "beside numbers": lambda state: {**state, "epoch": 3},
    "equal copies": lambda state: {"model": state, "best": dict(state)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_come_off(trained, wrapping):
    net, _ = loaded(WRAPPINGS[wrapping](trained))
    assert_holds(net, trained)


def test_a_prefix_that_only_the_module_has_is_added(trained):
    net = nn.Sequential(OrderedDict(model=Small()))
    _, notes = loaded(trained, net)
    assert_holds(net.model, trained)
    assert notes == ("the file's names were read as those of the model's part 'model'",)


def test_a_module_that_is_named_like_a_wrapper_keeps_its_names(trained):
    net = nn.Sequential(OrderedDict(module=Small(), model=nn.Linear(5, 2)))
    state = seeded(lambda: nn.Sequential(OrderedDict(module=Small(), model=nn.Linear(5, 2))), seed=3).state_dict()
    loaded(state, net)
    assert_holds(net, state)


def test_the_place_in_the_file_is_said(trained):
    _, notes = loaded({"state_dict": under("model.", trained)})
    assert notes == ("the weights are those under 'state_dict.model' of the file",)


def test_two_sets_of_weights_are_asked_for(trained):
    other = {name: tensor + 1 for name, tensor in trained.items()}
    with pytest.raises(
        ModelError, match="holds 2 different sets of weights that fit the model, under 'student' and 'te"
    ):
        loaded({"student": trained, "teacher": other})


def test_averaged_weights_beside_plain_ones_are_said(trained):
    other = {name: tensor + 1 for name, tensor in trained.items()}
    net, notes = loaded({"model_ema": other, "model": trained})
    assert_holds(net, trained)
    assert "averaged weights as well, under 'model_ema': they are NOT used" in notes[-1]


def test_what_lies_beside_the_weights_is_said(trained):
    state = {"state_dict": {**under("model.", trained), "criterion.weight": torch.ones(5)}}
    net, notes = loaded(state)
    assert_holds(net, trained)
    assert (
        "left out of the file, because the model has no such names: 1 tensors ('state_dict.criterion.weight')" in notes
    )


# ---------------------------------------------------------------- versions, heads, types


def test_files_from_before_batch_norm_counted_its_steps(trained):
    old = {name: tensor for name, tensor in trained.items() if "num_batches" not in name}
    net, _ = loaded(old)
    assert torch.equal(net.body[1].running_mean, trained["body.1.running_mean"])
    of_now = OrderedDict(old)
    of_now._metadata = trained._metadata  # says that the counter should be there
    loaded(of_now)


class Renamed(nn.Module):
    """A layer whose second version has another name for its weight, as torchvision's transformers."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.new = nn.Parameter(torch.zeros(3))
        self.versions = []

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self.versions.append(local_metadata.get("version"))
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}new"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_modules_own_hooks_see_the_files_version(prefix):
    old = OrderedDict({f"{prefix}layer.old": torch.ones(3), f"{prefix}gain": torch.ones(1)})
    old._metadata = OrderedDict({f"{prefix}layer": {"version": 1}})
    net = nn.Sequential(OrderedDict(layer=Renamed()))
    net.register_buffer("gain", torch.zeros(1))
    load_state(net, read_state(saved({"state_dict": old})))
    assert net.layer.new.tolist() == [1, 1, 1]
    assert net.layer.versions == [1]


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(4, 5)), nn.Sequential(nn.Dropout(), nn.Linear(4, 5))])
def test_a_head_in_a_sequential_is_the_same_head(head):
    state = seeded(lambda: Small(head)).state_dict()
    net, notes = loaded(state)
    assert torch.equal(net.fc.weight, head[-1].weight)
    assert "it was read as the same layer" in notes[-1]
    again, _ = loaded(net.state_dict(), Small(nn.Sequential(nn.Dropout(), nn.Linear(4, 5))))
    assert torch.equal(again.fc[1].weight, head[-1].weight)


@pytest.mark.parametrize("name", ["classifier", "head", "fc.0.1", "heads.head", "model.fc.2"])
def test_a_head_of_another_name_is_the_head_and_it_is_said(trained, name):
    state = {one.replace("fc.", f"{name}."): tensor for one, tensor in trained.items()}
    net, notes = loaded(state)
    assert_holds(net, trained)
    assert f"the layer 'fc' '{name}': it was read as the same layer" in notes[-1] or "lies beside" in notes[-1]


@pytest.mark.parametrize("name", ["head", "classifier.1"])
def test_a_head_beside_its_backbone_is_found_and_said(trained, name):
    body = {one: tensor for one, tensor in trained.items() if not one.startswith("fc.")}
    head = {f"{name}.{leaf}": trained[f"fc.{leaf}"] for leaf in ("weight", "bias")}
    net, notes = loaded({"state_dict": {**under("backbone.", body), **head, "loss.weight": torch.ones(5)}})
    assert_holds(net, trained)
    assert f"the file's layer 'state_dict.{name}', which lies beside the others, was read as the model's 'fc'" in notes
    assert any("1 tensors ('state_dict.loss.weight')" in note for note in notes)


def test_of_two_heads_beside_a_backbone_none_is_guessed(trained):
    body = {one: tensor for one, tensor in trained.items() if not one.startswith("fc.")}
    heads = {f"{name}.{leaf}": trained[f"fc.{leaf}"] for name in ("head", "logits") for leaf in ("weight", "bias")}
    with pytest.raises(ModelError, match="only a part of the network"):
        loaded({**under("backbone.", body), **heads})


def test_a_projection_is_no_head(trained):
    state = {one.replace("fc.", "projector."): tensor for one, tensor in trained.items()}
    with pytest.raises(ModelError, match="do not fit the model in 4 tensors"):
        loaded(state)


@pytest.mark.parametrize("place", ["optimizer", "optim", "exp_avg"])
def test_an_optimizers_state_under_the_weights_names_is_no_second_set(trained, place):
    state = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    net, notes = loaded({place: {"state": state}, "model": trained})
    assert_holds(net, trained)
    assert notes == ("the weights are those under 'model' of the file",)


def test_names_of_torchvisions_densenet_files():
    """`norm.1` and `conv.1` in the file, `norm1` and `conv1` in the network, and only within dense layers."""
    net = nn.ModuleDict({"denselayer1": nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(2, 2, 1)})})
    net["last"] = nn.Sequential(nn.Identity(), nn.BatchNorm2d(2))
    state = {name: tensor + 1 for name, tensor in net.state_dict().items() if "num_batches" not in name}
    net, notes = loaded({re.sub(r"(r1\.\w+)([12])", r"\1.\2", name): tensor for name, tensor in state.items()}, net)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    assert notes == ()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_converted_and_said(trained, kind):
    state = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in trained.items()}
    net, notes = loaded(state)
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, state["fc.weight"].float())
    assert notes == (f"the file's {str(kind)[6:]} was converted to float32",)


def test_quantised_weights_are_refused(trained):
    with pytest.raises(ModelError, match=r"fc.weight holds int8, and the model computes in float32; a quantised file"):
        loaded({**trained, "fc.weight": torch.ones(5, 4, dtype=torch.int8)})


def test_auxiliary_heads_of_a_file_are_left_out(trained):
    net, notes = loaded({**trained, "aux1.fc.weight": torch.ones(2, 2)})
    assert_holds(net, trained)
    assert "auxiliary heads were left out" in notes[0]


def test_a_tensor_that_a_file_holds_once_for_two_names():
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    loaded({"a.weight": torch.ones(2, 2)}, net)
    assert net["b"].weight.tolist() == [[1, 1], [1, 1]]


# ---------------------------------------------------------------- what does not fit

CAUSES = {
    "another architecture": lambda state: under("features.", {str(i): t for i, t in enumerate(state.values())}),
    "another number of classes; the file has 9, the model 5": lambda state: {
        **state,
        "fc.weight": torch.ones(9, 4),
        "fc.bias": torch.ones(9),
    },
    "another width": lambda state: {**state, "body.0.weight": torch.ones(8, 3, 3, 3)},
    "a head of other layers (fc.0, fc.3)": lambda state: {
        **{name: tensor for name, tensor in state.items() if not name.startswith("fc")},
        **{f"fc.{index}.{leaf}": torch.ones(5) for index in (0, 3) for leaf in ("weight", "bias")},
    },
    "a larger network": lambda state: {**state, "body.2.weight": torch.ones(4)},
    "a part of the network": lambda state: {name: t for name, t in state.items() if not name.startswith("fc")},
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_likely_cause_is_named(trained, cause):
    with pytest.raises(ModelError, match=re.escape(cause)) as caught:
        loaded(CAUSES[cause](trained))
    assert re.search(r"in \d+ tensors: .* wanted, .* given", str(caught.value))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda _: b"", "it is empty"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (lambda _: b"\n<!DOCTYPE html>", "a web page"),
        (gzip.compress, "compressed by gzip"),
        (lambda _: b"\x89HDF\r\n\x1a\n", "as Keras writes it"),
        (lambda body: body[:-100], "its end is missing"),
        (lambda _: safetensors.torch.save({"a": torch.ones(9)})[:-4], "safetensors whose end is missing"),
    ],
)
def test_a_file_that_holds_no_weights_says_what_it_is(trained, change, sentence):
    with pytest.raises(ModelError, match=sentence):
        read_state(change(saved(trained)))


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ([torch.ones(2)], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({1: 2}, r"no tensor that has a name \(1\)"),
        ({1: torch.ones(2)}, "no tensor that has a name"),
        ({"epoch": 3, "lr": 0.1}, r"no tensor that has a name \(epoch, lr\)"),
        ({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}, "two tensors of the name 'a.b'"),
        ({}, r"no tensor that has a name \(nothing\)"),
    ],
)
def test_what_is_no_state_dict_is_one_sentence(state, sentence):
    with pytest.raises(ModelError, match=sentence):
        read_state(saved(state))


def test_a_dict_in_itself_and_a_tree_of_dicts_end():
    cycle = {"weight": torch.ones(1)}
    cycle["again"] = cycle
    assert list(flattened(cycle).tensors) == ["weight"]
    tree = {"weight": torch.ones(1)}
    for _ in range(30):
        tree = {"left": tree, "right": tree, "third": tree}
    with pytest.raises(ModelError, match="no tensor that has a name"):
        flattened(tree)


def test_versions_from_a_stranger_break_nothing(trained):
    odd = OrderedDict(trained)
    odd._metadata = {"body.1": 3, 7: {"version": 1}, "fc": {"version": "x"}}
    net, _ = loaded(odd)
    assert_holds(net, trained)
