"""The protocols of the metrics: stored values of two protocols are never averaged, so no protocol changes unseen."""

import torch
from torch import nn

from engine.metrics.localisation import Localisation
from engine.metrics.sanity import Sanity, randomised
from engine.models import ModelAdapter
from tests.engine.nets import Plain, seeded
from tests.engine.test_metrics import MASKED, OF_MAPS, metric

DIGESTS = {
    "drop/increase": "212a9e0190262f56",
    "average_drop_100/average_increase_100/average_drop_50/average_increase_50/average_drop_15/average_increase_15": (
        "5974710c8f773fa1"
    ),
    "insertion": "f8ccb2283b40d1ba",
    "deletion": "690dd4203d69c07c",
    "pos": "b1a8f5a513756bdb",
    "neg": "abf5bb67692045df",
    "road_morf": "09c589425658d712",
    "road_lerf": "18e46ed78199714b",
    "positive_density/negative_density": "994527ed0549f1ac",
    "entropy/gini/effective_area": "f5fa580b8ab99501",
    "ebpg/miou/bbox/pointing": "be27d6edfb5b8af4",
    "sanity": "610d4aac12f1b06b",
}
"""Change one only together with what the metric computes, or says that it computes."""


def test_no_protocol_changes_unseen():
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    every = [metric(make, adapter, "zero") for make in MASKED.values()]
    every += [make() for make in OF_MAPS.values()]
    every += [Localisation({"truth": "a"}), Sanity(adapter, lambda _: None, 3)]
    assert {"/".join(own.names): own.digest for own in every} == DIGESTS


class Scales(nn.Module):
    """A layer with weights of its own that cannot begin anew."""

    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.arange(24.0).view(4, 6))


def test_a_layer_that_cannot_begin_anew_gets_its_weights_in_a_random_order():
    model = nn.Sequential(nn.Linear(3, 2), Scales())
    fresh = randomised(model, 0.5, seed=0)
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert fresh[1].scales.shape == (4, 6)
    assert not torch.equal(fresh[1].scales, model[1].scales)
    assert sorted(fresh[1].scales.flatten().tolist()) == list(range(24))
    assert torch.equal(randomised(model, 0.5, seed=0)[1].scales, fresh[1].scales)
    assert not torch.equal(randomised(model, 0.5, seed=1)[1].scales, fresh[1].scales)


def test_a_layer_begins_anew_by_its_own_hidden_method():
    attention = nn.MultiheadAttention(4, 2)
    fresh = randomised(attention, 1.0, seed=0)
    assert sorted(fresh.in_proj_weight.flatten().tolist()) != sorted(attention.in_proj_weight.flatten().tolist())
