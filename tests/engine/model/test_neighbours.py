"""The classifier by nearest neighbours: votes and agreements by hand, and its weights file as a model."""

import json
import math

import pytest
import safetensors.torch
import torch
from torch import fx, nn

from blocksight.engine.catalog.parameters import NoParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.loading import load_model
from blocksight.engine.model.neighbours import NeighbourClassifier, from_state
from blocksight.engine.model.targets import ClassLogit, ClassProbability
from tests.engine.nets import Plain, Transformer, seeded, smooth


def unit(*values):
    length = math.sqrt(sum(value**2 for value in values))
    return [value / length for value in values]


ROWS = [[2.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0], [-1.0, 2.0, 0.0]]
LABELS = [0, 1, 1, 2, 0]
NAMES = ["ant", "bee", "cat"]
QUERY = unit(2.4, 1.0, 0.5)


def classifier(rows=ROWS, labels=LABELS, names=NAMES, dtype=torch.float64, **options):
    features = torch.tensor(rows, dtype=dtype)
    return NeighbourClassifier(nn.Identity(), features, torch.tensor(labels), names, **options)


def cosine(one, other):
    return sum(a * b for a, b in zip(unit(*one), unit(*other), strict=True))


# ---------------------------------------------------------------- votes


def test_the_softmax_is_the_normalised_vote():
    """Of the three nearest: one ant, two bees."""
    net = classifier(num_neighbours=3, temperature=0.5)
    near = sorted(((cosine(QUERY, row), label) for row, label in zip(ROWS, LABELS, strict=True)), reverse=True)[:3]
    assert sorted(label for _, label in near) == [0, 1, 1]
    votes = [sum(math.exp(one / 0.5) for one, label in near if label == c) for c in range(3)]
    found = net(torch.tensor([QUERY], dtype=torch.float64) * 7).softmax(1)[0].tolist()
    assert found == pytest.approx([vote / sum(votes) for vote in votes], abs=2e-6)
    assert 0 < found[2] < 1e-6


def test_a_logit_is_the_logarithm_of_its_votes():
    net = classifier(num_neighbours=1, temperature=0.25)
    (logits,) = net(torch.tensor([QUERY], dtype=torch.float64))
    assert float(logits[0]) == pytest.approx(cosine(QUERY, ROWS[0]) / 0.25, rel=1e-5)
    centre = [(a + b) / 2 for a, b in zip(unit(*ROWS[1]), unit(*ROWS[2]), strict=True)]
    height = sum(q * c for q, c in zip(QUERY, centre, strict=True))
    assert float(logits[1]) == pytest.approx(math.log(1e-6) + height / 0.25, rel=1e-9)


def test_every_class_has_a_finite_logit_and_a_gradient():
    """Also one that no neighbour has, at the temperature of the papers, in float32."""
    net = classifier(dtype=torch.float32, num_neighbours=1)
    query = torch.tensor([QUERY], requires_grad=True)
    logits = net(query)
    assert logits.isfinite().all()
    for index in range(3):
        (slope,) = torch.autograd.grad(logits[0, index], query, retain_graph=True)
        assert slope.isfinite().all()
        assert slope.abs().max() > 1e-3


def test_more_neighbours_than_rows_are_all_rows():
    few, many = (classifier(num_neighbours=number)(torch.tensor([QUERY], dtype=torch.float64)) for number in (5, 99))
    assert torch.equal(few, many)


@pytest.mark.parametrize("copies", [1, 3])
def test_an_image_of_the_bank_is_not_its_own_neighbour(copies):
    """However often it lies there, and whatever it is called there; alone it leaves no vote but finite logits."""
    lying = classifier(ROWS + [QUERY] * copies, LABELS + [2] * copies, num_neighbours=3, temperature=0.5)
    query = torch.tensor([QUERY], dtype=torch.float64) * 3
    wanted = classifier(num_neighbours=3, temperature=0.5)(query)
    assert torch.allclose(lying(query).softmax(1), wanted.softmax(1), atol=3e-6)
    near = torch.tensor([unit(2.4, 1.0, 0.51)], dtype=torch.float64)  # a neighbour that is not the image
    assert float(lying(near).softmax(1)[0, 2]) > 0.2
    only = classifier([QUERY, QUERY], [0, 1])
    assert only(query).isfinite().all()


def test_a_class_that_is_the_image_alone_has_no_vote():
    """Its mean feature is the image; in the cold a millionth of that would be more than neighbours have."""
    net = classifier([*ROWS, QUERY], [*LABELS, 3], [*NAMES, "dog"], temperature=0.001)
    found = net(torch.tensor([QUERY], dtype=torch.float64)).softmax(1)
    assert float(found[0, 3]) < 2e-6


def test_a_sick_feature_is_sick_alone():
    features = torch.tensor([QUERY, [float("nan")] * 3], dtype=torch.float64)
    logits = classifier()(features)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()
    assert torch.equal(logits[0], classifier()(features[:1].repeat(2, 1))[0])


# ---------------------------------------------------------------- agreement


def scaled(product):
    low, high = min(product), max(product)
    return [(value - low) / (high - low) for value in product]


def test_the_agreement_with_neighbours_of_the_class():
    """Two of the three nearest are bees."""
    net = classifier(num_neighbours=3)
    mean = [(a + b) / 2 for a, b in zip(unit(*ROWS[1]), unit(*ROWS[2]), strict=True)]
    wanted = scaled([q * z for q, z in zip(QUERY, mean, strict=True)])
    (found,) = net.bank.agreement(torch.tensor([QUERY], dtype=torch.float64) * 5, torch.tensor([1]))
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_the_agreement_with_a_class_that_no_neighbour_has():
    """As many nearest of the class: here the only cat."""
    net = classifier(num_neighbours=2)
    found = net.bank.agreement(torch.tensor([QUERY, QUERY], dtype=torch.float64), torch.tensor([2, 0]))
    assert found[0].tolist() == pytest.approx([0, 0, 1], abs=1e-12)
    assert found[1].tolist() == pytest.approx([1, 0, 0], abs=1e-12)  # the near ant is a neighbour, the far one is not


def test_an_image_does_not_agree_with_itself():
    net = classifier([*ROWS, QUERY], [*LABELS, 1], num_neighbours=3)
    query = torch.tensor([QUERY], dtype=torch.float64)
    wanted = classifier(num_neighbours=3).bank.agreement(query, torch.tensor([1]))
    assert torch.allclose(net.bank.agreement(query, torch.tensor([1])), wanted, atol=1e-12)
    alone = classifier([*ROWS[:3], QUERY], [0, 1, 1, 2])
    assert not alone.bank.agreement(query, torch.tensor([2])).any()


# ---------------------------------------------------------------- as a model

FACTORY = "tests.engine.model.test_neighbours:make_backbone"


def make_backbone():
    """A transformer's features, without a head."""
    net = seeded(Transformer, 3)
    net.head = nn.Identity()
    return ModelAdapter(net, input_size=(16, 16))


def make_classifier():
    """The same with a head."""
    return ModelAdapter(seeded(Transformer, 3), input_size=(16, 16), class_names="vwxyz")


def banked(seed=8):
    """The backbone with a bank of twelve pictures of three classes."""
    adapter = make_backbone()
    with torch.no_grad():
        features = adapter.module(smooth(12, 16, 16, seed=seed))
    return NeighbourClassifier(adapter.module, features, torch.arange(12) % 3, ["ant", "bée", "cat"]).eval()


def file_of(net, **changed):
    tensors = {name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}
    return safetensors.torch.save({**tensors, **changed})


def test_the_state_dict_is_a_whole_model():
    net, inputs = banked(), smooth(3, 16, 16)
    assert {"bank.features", "bank.labels", "bank.names"} <= net.state_dict().keys()
    adapter = load_model(f"knn({FACTORY})", state=file_of(net))
    assert adapter.name == f"knn({FACTORY})"
    assert adapter.class_names == ["ant", "bée", "cat"]
    assert adapter.num_classes == 3
    assert adapter.input_size == (16, 16)
    with torch.no_grad():
        assert torch.allclose(adapter.module(inputs), net(inputs), atol=1e-6)
    assert adapter.fingerprint != load_model(f"knn({FACTORY})", state=file_of(banked(9))).fingerprint


def test_of_a_classifier_the_head_goes():
    adapter = load_model("knn(tests.engine.model.test_neighbours:make_classifier)", state=file_of(banked()))
    assert adapter.class_names == ["ant", "bée", "cat"]
    assert "backbone.head.weight" not in adapter.module.state_dict()


def test_torchvisions_models_need_no_weights_of_their_own():
    adapter = load_model("torchvision:shufflenet_v2_x0_5", weights="random", seed=1)
    adapter.module.fc = nn.Identity()
    features = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))
    net = NeighbourClassifier(adapter.module, features, torch.tensor([0, 1, 0, 1]), ["a", "b"])
    loaded = load_model("knn(torchvision:shufflenet_v2_x0_5)", state=file_of(net))
    assert loaded.num_classes == 2
    assert torch.equal(loaded.module.backbone.conv1[0].weight, adapter.module.conv1[0].weight)
    with pytest.raises(ModelError, match="no linear layer over one vector per image gives its logits"):
        load_model("knn(torchvision:squeezenet1_1)", state=file_of(net))


def test_it_is_traced_as_other_networks_are():
    net, inputs = banked(), smooth(2, 16, 16)
    graph = fx.symbolic_trace(net)
    assert torch.allclose(graph(inputs), net(inputs), atol=1e-6)
    adapter = load_model(f"knn({FACTORY})", state=file_of(net))
    assert adapter.network.graph is not None


@pytest.mark.parametrize("name", ["gradcam", "gradient", "ablationcam"])
def test_other_methods_take_it_as_a_classifier(name):
    adapter = load_model(f"knn({FACTORY})", state=file_of(banked()))
    target, inputs = ClassProbability(torch.tensor([[0, 1], [2, 1]])), smooth(2, 16, 16)
    for own in EXPLAINERS[name](adapter, NoParameters()).explain(inputs, target):
        for one in own:
            assert one.saliency_hw.shape == (16, 16)
            assert one.saliency_hw.max() > 0
    with torch.no_grad():
        wanted = adapter.module(inputs).softmax(1)
    assert own[1].score == pytest.approx(float(wanted[1, 1]), rel=1e-5)


def test_half_precision_keeps_the_vote():
    net, inputs = banked(), smooth(2, 16, 16)
    features = net.backbone(inputs).detach()
    wanted = net.bank(features).softmax(1)
    found = net.bank.half()(features.half())
    assert found.dtype == torch.float32
    assert torch.allclose(found.softmax(1), wanted, atol=0.02)


def test_without_a_bank_it_says_what_makes_one():
    with pytest.raises(ModelError, match=rf"needs --weights: a memory bank, as `blocksight bank --model {FACTORY}`"):
        load_model(f"knn({FACTORY})")
    with pytest.raises(ModelError, match=r"needs --weights: a memory bank"):
        load_model(f"knn({FACTORY})", weights="random")
    with pytest.raises(ModelError, match="holds no memory bank"):
        load_model(f"knn({FACTORY})", state=file_of(make_backbone().module))
    with pytest.raises(ModelError, match="unknown model 'nothing'"):
        load_model("knn(nothing)", state=file_of(banked()))


DAMAGES = {
    "bank.labels": [torch.arange(11), torch.full((12,), 3), torch.full((12,), -1), torch.zeros(12)],
    "bank.features": [torch.zeros(12), torch.zeros(0, 12), torch.zeros(12, 12, dtype=torch.int64)],
    "bank.names": [
        torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8) for value in ({}, [1, 2, 3], ["a"])
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGES.items() for value in values])
def test_a_damaged_bank_is_refused(name, value):
    with pytest.raises(ModelError, match="the memory bank is damaged"):
        load_model(f"knn({FACTORY})", state=file_of(banked(), **{name: value}))


def test_names_that_are_no_text_are_refused():
    tensors = {**banked().state_dict(), "bank.names": torch.tensor([123, 200, 1], dtype=torch.uint8)}
    with pytest.raises(ModelError, match="class names cannot be read"):
        from_state(make_backbone().module, tensors)


def test_another_backbones_weights_are_refused():
    net = NeighbourClassifier(seeded(Plain), torch.randn(3, 5), torch.tensor([0, 1, 1]), ["a", "b"])
    with pytest.raises(ModelError, match="the weights do not fit the model"):
        load_model(f"knn({FACTORY})", state=file_of(net))


def test_logits_are_targets_as_any_others():
    net = banked()
    target = ClassLogit(torch.tensor([[1]]))
    logits = net(smooth(1, 16, 16))
    assert float(target.score(logits.detach(), torch.tensor([0]))[0, 0]) == pytest.approx(float(logits[0, 1].detach()))
