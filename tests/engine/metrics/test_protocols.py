"""The protocols of the metrics: stored values of two protocols are never averaged, so no protocol changes unseen."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.judging.sanity import Sanity, randomised
from blocksight.engine.metrics.localisation import Localisation
from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.metrics.test_metrics import MASKED, OF_MAPS, metric
from tests.engine.nets import Plain, seeded

DIGESTS = {
    "drop/increase": "16f394a6a7959fb5",
    "average_drop_100/average_increase_100/average_drop_50/average_increase_50/average_drop_15/average_increase_15": (
        "d38daa311848f9c8"
    ),
    "insertion": "3c368924c9d50bc5",
    "deletion": "a4ab51839e7cf7bb",
    "pos": "5aaecfa9e8f49f2d",
    "neg": "3c0046487cdda32c",
    "road_morf": "ea0fcbfab5743395",
    "road_lerf": "20f2403042679709",
    "positive_density/negative_density": "b6a9d9eab5deaf68",
    "entropy/gini/effective_area": "bd0a4220bc5e1698",
    "ebpg/miou/bbox/pointing": "5f82456392f33989",
    "sanity": "297a7624720c313d",
}
"""Change one only together with what the metric computes, or says that it computes."""


def test_no_protocol_changes_unseen():
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    every = [metric(make, adapter, "zero") for make in MASKED.values()]
    every += [make() for make in OF_MAPS.values()]
    every += [Localisation({"truth": "a"}), Sanity(adapter, lambda _: None, 3)]
    assert {"/".join(own.names): own.digest(ForwardSetting()) for own in every} == DIGESTS


class Scales(nn.Module):
    """A layer with weights of its own that cannot begin anew."""

    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.arange(24.0).view(4, 6))

    def forward(self, x):
        return x @ self.scales[:2]


def test_a_layer_that_cannot_begin_anew_gets_its_weights_in_a_random_order():
    model, inputs = nn.Sequential(nn.Linear(3, 2), Scales()), torch.randn(4, 3)
    fresh = randomised(model, 0.5, 0, inputs)
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert fresh[1].scales.shape == (4, 6)
    assert not torch.equal(fresh[1].scales, model[1].scales)
    assert sorted(fresh[1].scales.flatten().tolist()) == list(range(24))
    assert torch.equal(randomised(model, 0.5, 0, inputs)[1].scales, fresh[1].scales)
    assert not torch.equal(randomised(model, 0.5, 1, inputs)[1].scales, fresh[1].scales)


def test_a_layer_begins_anew_by_its_own_hidden_method():
    class Attending(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    attention = Attending(4, 2)
    fresh = randomised(attention, 1.0, 0, torch.randn(3, 4))
    assert sorted(fresh.in_proj_weight.flatten().tolist()) != sorted(attention.in_proj_weight.flatten().tolist())


def test_a_metric_of_maps_is_of_each_map_and_its_own_region():
    saliency = [[np.eye(4), np.ones((4, 4))], [np.eye(4)[::-1]]]
    regions = [[np.eye(4, dtype=bool), None], [np.eye(4, dtype=bool)]]
    maps = SimpleNamespace(saliency=saliency, regions=regions)
    found = Localisation({}).evaluate(maps)
    assert [[own["ebpg"].value for own in row] for row in found] == [[100.0, None], [0.0]]
