"""Borrowing a network and giving it back."""

import pytest
import torch
from torch import nn

from engine.models import ModelAdapter
from engine.taps import frozen, gradients, module_outputs
from tests.engine.nets import Plain, Residual, Untraceable, seeded


def state(net):
    return (
        [module.training for module in net.modules()],
        [module.inplace for module in net.modules() if hasattr(module, "inplace")],
        [parameter.requires_grad for parameter in net.parameters()],
        [len(module._forward_hooks) for module in net.modules()],
    )


def test_frozen_gives_the_module_back_even_half_way():
    net = seeded(Plain).train()
    net.features[0].eval()
    net.head.bias.requires_grad_(False)
    before = state(net)
    with frozen(net):
        modes, in_place, needs, _ = state(net)
        assert not any([*modes, *in_place, *needs])
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert state(net) == before
    with pytest.raises(RuntimeError), frozen(net):
        net(torch.rand(1, 7, 32, 32))
    assert state(net) == before


def test_no_hook_stays_when_the_forward_fails():
    net = seeded(Untraceable)
    before = state(net)
    with pytest.raises(RuntimeError), module_outputs(net, ["first", "second"]):
        net(torch.rand(1, 7, 24, 24))
    assert state(net) == before


@pytest.mark.parametrize("make", [Plain, Residual, Untraceable])
def test_taps_see_what_the_network_computes_and_its_gradients(make):
    size = 32 if make is Plain else 24
    net = seeded(make)
    adapter = ModelAdapter(net, input_size=(size, size))
    inputs = torch.randn(2, 3, size, size)
    with adapter.borrowed():
        blocks = adapter.network.blocks()
        logits, activations = adapter.network.taps(blocks)(inputs)
        found = gradients(logits, torch.eye(5)[[0, 3]], activations)
    assert torch.allclose(logits, net(inputs), atol=1e-6)
    for block, maps, gradient in zip(blocks, activations, found, strict=True):
        assert maps.shape[1:] == (block.channels, *block.grid)
        assert gradient.shape == maps.shape
        assert (maps >= 0).all()  # after the activation, and not overwritten
    step = 1e-3
    with adapter.borrowed():
        moved = tail(net, make, activations[-1].detach() + step)
        still = tail(net, make, activations[-1].detach())
    change = (moved - still)[[0, 1], [0, 3]].detach()
    assert torch.allclose(found[-1].sum((1, 2, 3)) * step, change, rtol=1e-2, atol=1e-6)


def tail(net: nn.Module, make, maps):
    """The network from its last block on."""
    if make is Plain:
        return net.head(nn.functional.max_pool2d(maps, 2).flatten(1))
    return net.head(maps.mean((2, 3)))


def test_explaining_leaves_the_weights_alone():
    from engine.catalog import SiseParameters
    from engine.explainers.sise import Sise
    from engine.targets import ClassProbability

    net = seeded(Plain).train()
    adapter = ModelAdapter(net, input_size=(32, 32))
    before, mode = adapter.fingerprint, state(net)
    del adapter.fingerprint
    Sise(adapter, SiseParameters(mu=0.5)).explain(torch.randn(1, 3, 32, 32), ClassProbability(torch.tensor([[1]])))
    assert adapter.fingerprint == before
    assert state(net) == mode
