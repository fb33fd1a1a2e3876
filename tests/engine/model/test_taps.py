"""Borrowing a network and giving it back, and what taps record of it."""

import pytest
import torch
from torch import nn

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.taps import Recorder, frozen, gradients, hook_outputs
from tests.engine import oracles
from tests.engine.comparing import written_out
from tests.engine.nets import Depthwise, InPlace, Plain, Residual, Untraceable, seeded, smooth


def state(net):
    return (
        [module.training for module in net.modules()],
        [module.inplace for module in net.modules() if hasattr(module, "inplace")],
        [parameter.requires_grad for parameter in net.parameters()],
        [len(module._forward_hooks) for module in net.modules()],
    )


def mixed():
    """A network in a state of its own: some modules train, some do not."""
    net = seeded(Plain).train()
    net.features[0].eval()
    net.features[4].inplace = False
    net.head.bias.requires_grad_(False)
    return net


# ---------------------------------------------------------------- frozen


def test_frozen_is_a_fixed_function_and_gives_back():
    net = mixed()
    before = state(net)
    with frozen(net):
        modes, in_place, needs, _ = state(net)
        assert not any([*modes, *in_place, *needs])
        assert not net(torch.rand(1, 3, 32, 32)).requires_grad
    assert state(net) == before


def test_frozen_gives_back_when_the_body_fails_half_way():
    net = mixed()
    before = state(net)
    with pytest.raises(RuntimeError, match="channels"), frozen(net):
        net(torch.rand(1, 7, 32, 32))
    assert state(net) == before


def test_frozen_within_frozen():
    net = mixed()
    before = state(net)
    with frozen(net):
        inside = state(net)
        with frozen(net):
            pass
        assert state(net) == inside
    assert state(net) == before


def test_frozen_batch_statistics_and_dropout_do_not_move():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))
    inputs = torch.rand(4, 3, 8, 8)
    net(inputs)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with frozen(net):
        assert torch.equal(net(inputs), net(inputs))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


# ---------------------------------------------------------------- hooks


def test_no_hook_stays_when_the_forward_fails():
    net = seeded(Untraceable)
    before = state(net)
    with pytest.raises(RuntimeError, match="channels"), hook_outputs(net, ["first", "second"], Recorder()):
        net(torch.rand(1, 7, 24, 24))
    assert state(net) == before


def test_no_hook_stays_when_a_name_is_unknown():
    net = seeded(Untraceable)
    before = state(net)
    with pytest.raises(AttributeError, match="third"), hook_outputs(net, ["first", "third"], Recorder()):
        pass
    assert state(net) == before


def test_taps_leave_nothing_behind_when_the_forward_fails():
    net = seeded(Untraceable)
    adapter = ModelAdapter(net, input_size=(24, 24))
    taps = adapter.network.taps(adapter.network.blocks())
    before = state(net)
    with pytest.raises(RuntimeError, match="channels"), adapter.borrowed():
        taps(torch.rand(1, 7, 24, 24))
    assert state(net) == before


class Twice(nn.Module):
    """Calls one module two times."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.again(self.again(x))


def test_the_last_call_of_a_module_wins():
    net, inputs = seeded(Twice), torch.rand(1, 3, 4, 4)
    recorder = Recorder()
    with hook_outputs(net, ["again"], recorder):
        result = net(inputs)
    assert torch.equal(recorder.recorded["again"], result)


def test_a_number_means_one_call_of_a_module():
    net, inputs = seeded(Twice), torch.rand(1, 3, 4, 4)
    recorder = Recorder()
    with hook_outputs(net, ["again#1"], recorder):
        net(inputs)
    assert torch.equal(recorder.recorded["again#1"], net.again(inputs))


# ---------------------------------------------------------------- what is recorded


SIZES = {Plain: (32, 32), Residual: (24, 40), Depthwise: (32, 32), InPlace: (28, 20), Untraceable: (24, 24)}


@pytest.mark.parametrize("make", SIZES)
def test_taps_see_what_the_network_computes_and_its_gradients(make):
    net, inputs = seeded(make), smooth(2, *SIZES[make])
    adapter = ModelAdapter(net, input_size=SIZES[make])
    direction = torch.eye(5)[[0, 3]]
    with adapter.borrowed():
        logits, maps = adapter.network.taps(adapter.network.blocks())(inputs)
        found = gradients(logits, direction, maps)
    twin = oracles.double_copy(net)
    wanted_logits, wanted = written_out(twin, inputs.double().requires_grad_(True))
    wanted_gradients = torch.autograd.grad(wanted_logits, wanted, direction.double())
    assert torch.allclose(logits.double(), wanted_logits, atol=1e-5)
    for mine, theirs in zip([*maps, *found], [*wanted, *wanted_gradients], strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_gradients_serve_several_targets_and_leave_the_parameters_alone():
    net, inputs = seeded(Plain), smooth(2, 32, 32)
    adapter = ModelAdapter(net, input_size=(32, 32))
    with adapter.borrowed():
        logits, maps = adapter.network.taps(adapter.network.blocks())(inputs)
        first, second = (gradients(logits, torch.eye(5)[[own, own]], maps) for own in (0, 1))
        both = gradients(logits, torch.eye(5)[[0, 0]] + torch.eye(5)[[1, 1]], maps)
    for one, other, total in zip(first, second, both, strict=True):
        assert torch.allclose(one + other, total, atol=1e-6)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_place_that_the_output_does_not_need_has_a_gradient_of_zero():
    inputs = torch.rand(1, 3, 4, 4, requires_grad=True)
    used, unused = inputs * 2, inputs * 3
    (_, zero) = gradients(used.sum((2, 3)), torch.ones(1, 3), [used, unused])
    assert zero.shape == unused.shape
    assert not zero.any()


def test_the_callers_input_is_left_alone():
    adapter, inputs = ModelAdapter(seeded(Plain), input_size=(32, 32)), smooth(1, 32, 32)
    with adapter.borrowed(), torch.no_grad():
        logits, _ = adapter.network.taps(adapter.network.blocks())(inputs)
    assert logits.requires_grad
    assert not inputs.requires_grad
