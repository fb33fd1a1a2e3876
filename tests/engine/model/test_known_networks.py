"""A module that is alive and the same is not proved twice; one that changed is proved anew."""

import gc
import weakref

import pytest
import torch
from torch import nn

from blocksight.engine.model import known_networks
from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.nets import seeded


class Net(nn.Module):
    """Two convolutions; `scale` is no weight. `is_dynamic`: it cannot be traced."""

    def __init__(self, *, is_dynamic=False):
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1)
        self.head = nn.Linear(6, 3)
        self.scale, self.is_dynamic = 1.0, is_dynamic

    def forward(self, x):
        if self.is_dynamic and float(x.detach().sum()) > 1e30:
            return x
        return self.head(self.act(self.second(self.act(self.first(x)))).mean((2, 3))) * self.scale


@pytest.fixture
def proofs(monkeypatch):
    """Counts how often a network is proved."""
    calls = []
    usual = known_networks.trace_network
    monkeypatch.setattr(known_networks, "trace_network", lambda *given: calls.append(1) or usual(*given))
    return calls


def network(module, side=32, **fed):
    return ModelAdapter(module, input_size=(side, side), **fed).network


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_the_same_module_is_proved_once(proofs, is_dynamic):
    module = seeded(lambda: Net(is_dynamic=is_dynamic), 1)
    one, other = network(module), network(module)
    assert len(proofs) == 1
    assert (one.graph is None) == (other.graph is None) == is_dynamic
    assert one.places == other.places
    assert one.blocks() == other.blocks()


def change_a_weight(module):
    module.second.weight.data[0] += 1  # does not count as a new version of the weight


def add_a_buffer(module):
    module.register_buffer("unused", torch.ones(1))


def change_a_layer(module):
    module.act = nn.ReLU6()  # of the same numbers here


def change_the_code(module):
    module.scale = 2.0


@pytest.mark.parametrize("change", [change_a_weight, add_a_buffer, change_a_layer, change_the_code])
def test_what_changed_is_proved_anew(proofs, change):
    module = seeded(Net, 1)
    network(module)
    change(module)
    network(module)
    assert len(proofs) == 2


@pytest.mark.parametrize("fed", [{"side": 48}, {"mean": (0.5,) * 3}])
def test_another_input_is_proved_anew(proofs, fed):
    module = seeded(Net, 1)
    module.head.weight.data.zero_()  # the outputs are the same for all inputs
    network(module)
    network(module, **fed)
    assert len(proofs) == 2


def test_another_module_of_the_same_weights_is_proved_by_itself(proofs):
    network(seeded(Net, 1))
    network(seeded(Net, 1))
    assert len(proofs) == 2


def test_a_known_module_is_let_go():
    module = seeded(Net, 1)
    network(module)
    network(module)
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None
