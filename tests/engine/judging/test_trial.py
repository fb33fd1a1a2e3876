"""The trial of methods that run the network's tail once per feature map: short, and it refuses what it refused."""

import pytest
import torch
from torch import nn

from blocksight.engine.catalog.composition import parameters_of, parse_method
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.judging.preflight import run_tails_once, scored_once, try_explainer
from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.nets import seeded

CHANNELS = 64
METHODS = {"ablationcam": {}, "a-fmi": {"tail": "passes"}, "smoothgrad(ablationcam)": {}}


class Net(nn.Module):
    """One layer of 64 feature maps and a head; with `is_fragile` a map of zeros makes the output NaN."""

    def __init__(self, *, is_fragile=False):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, CHANNELS, 3, 4, 1), nn.Linear(CHANNELS, 3)
        self.is_fragile = is_fragile

    def forward(self, x):
        pooled = self.first(x).mean((2, 3))
        if self.is_fragile:
            pooled = pooled / pooled
        return self.head(pooled)


def tried(method, *, is_short, is_fragile=False):
    """How often the head runs in a trial."""
    module = seeded(lambda: Net(is_fragile=is_fragile), 1)
    adapter, chosen = ModelAdapter(module, input_size=(32, 32)), parse_method(method)
    parameters = parameters_of(chosen, METHODS[method])
    explainer = make_explainer(method, adapter, parameters, forward=scored_once(adapter), images_per_pass=1)
    if is_short:
        run_tails_once(explainer)
    passes = []
    inputs = adapter.normalise(torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(1)))
    with module.head.register_forward_pre_hook(lambda *_: passes.append(1)):
        assert try_explainer(explainer, chosen, (), inputs, adapter.target(torch.tensor([[1]]))) == ()
    return len(passes)


@pytest.mark.parametrize("method", METHODS)
def test_the_tail_runs_once_in_a_trial(method):
    whole, short = (tried(method, is_short=is_short) for is_short in (False, True))
    assert whole > CHANNELS // 8
    assert short <= whole - CHANNELS // 8


@pytest.mark.parametrize("is_short", [False, True])
def test_a_tail_that_fails_without_a_map_is_refused(is_short):
    with pytest.raises(ModelError, match="ablationcam gives NaN or infinity"):
        tried("ablationcam", is_short=is_short, is_fragile=True)
