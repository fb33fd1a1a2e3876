"""Targets of features: values by hand, exact gradients, and refusals of what has no feature vector."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from blocksight.engine.catalog.target_expressions import Atom, parse_formula
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.gradients import input_gradients
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.examination import examine
from blocksight.engine.model.feature_targets import feature_place, feature_vectors, features_of, with_features
from blocksight.engine.model.neighbours import NeighbourClassifier
from blocksight.engine.model.prompts import Texts
from tests.engine.nets import Residual, seeded, smooth
from tests.jobs.tiny import Tiny

PICTURE, DIRECTION, UNIT = Atom("similar", "a.png"), Atom("direction", "d.npy"), Atom("feature", 1)
FEATURES = (PICTURE, DIRECTION, UNIT)


class TwoNumbers(nn.Module):
    """Its feature is the mean of red and of green, and its classes are their sum and difference."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.eye(3)[:2, :, None, None])
            self.head.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))

    def forward(self, x):
        return self.head(self.maps(x).mean((2, 3)))


def made(module=None, features=FEATURES, vectors=((0.6, 0.8), (0.0, 2.0), (0.0, 1.0)), **options):
    adapter = ModelAdapter(module or TwoNumbers(), input_size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3, **options)
    return with_features(adapter, features, vectors, feature_place(adapter))


def target_of(adapter, *texts, images=1):
    return adapter.target_of([[parse_formula(text) for text in texts]] * images)


def test_values_by_hand():
    adapter = made()
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0], pixels[0, 1] = 0.3, 0.4  # the feature is (0.3, 0.4), of length 0.5
    texts = ('similar:"a.png"', 'direction:"d.npy"', "feature:1", "logit(0)", '2*similar:"a.png"-1', "1")
    outputs = adapter.logits(pixels)
    found = target_of(adapter, *texts).score(outputs, torch.tensor([0]))[0].tolist()
    chance = float(torch.tensor([0.7, -0.1], dtype=torch.float64).softmax(0)[1])
    assert found == pytest.approx([1.0, 0.8, 0.4, 0.7, 2.1, chance], abs=1e-6)
    assert adapter.num_classes == 2
    assert adapter.scores(outputs)[0].tolist() == pytest.approx([1 - chance, chance], abs=1e-6)
    assert feature_vectors(adapter) == tuple(
        tuple(torch.tensor(own).tolist()) for own in ((0.6, 0.8), (0.0, 2.0), (0.0, 1.0))
    )


def slow_value(text, feature, vectors, logits):
    """The targets of the test below, from their definitions."""
    cosine = feature @ vectors[0] / feature.norm() / vectors[0].norm()
    values = {"similar": cosine, "direction": feature @ vectors[1], "feature": feature[1]}
    return values[text.split(":")[0]] - (0.5 * logits[1] if text.endswith("-0.5*1") else 0)


@pytest.mark.parametrize("text", ['similar:"a.png"', 'direction:"d.npy"', "feature:1", 'similar:"a.png"-0.5*1'])
def test_the_input_gradient_is_the_finite_difference(text):
    vectors = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    vectors[0], vectors[2] = functional.normalize(vectors[0], dim=0), torch.eye(12)[1]
    adapter = ModelAdapter(seeded(Residual), input_size=(8, 8))
    adapter = with_features(adapter, FEATURES, vectors.tolist(), feature_place(adapter))
    inputs = smooth(1, 8, 8)
    _, (found,) = input_gradients(adapter, inputs, target_of(adapter, text))
    slow = seeded(Residual).double().eval()

    def value(x):
        with torch.no_grad():
            logits, (_, last) = slow.written_out(x)
        return float(slow_value(text, last.mean((2, 3))[0], vectors.double(), logits[0]))

    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        step = 1e-6 * torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
        wanted = value(inputs.double() + step) - value(inputs.double() - step)
        assert float((found * step).sum() * 2) == pytest.approx(wanted, rel=1e-3)


def test_the_classes_stay_what_they_were():
    plain = ModelAdapter(seeded(Tiny), input_size=(32, 32))
    adapter = with_features(plain, FEATURES, torch.eye(8)[:3].tolist(), feature_place(plain))
    inputs = smooth(3, 32, 32)
    with torch.no_grad():
        wanted, outputs = plain.logits(inputs), adapter.logits(inputs)
    assert torch.equal(adapter.of_classes(outputs), wanted)
    assert torch.equal(adapter.scores(outputs), plain.scores(wanted))
    every = torch.arange(3)
    for texts in (("2", "feature:1"), ("logprob(2)", "feature:1"), ("logprob(1-2)", "feature:1"), ("logit(2)",)):
        formulas = [[parse_formula(text) for text in texts]] * 3
        alone = plain.target_of([own[:1] for own in formulas])
        both = adapter.target_of(formulas)
        assert torch.equal(both.score(outputs, every)[:, :1], alone.score(wanted, every))
        direction = both.direction(outputs, 0)
        assert torch.equal(direction[:, :5], alone.direction(wanted, 0))
        assert not direction[:, 5:].any()
        assert torch.equal(both.raw.direction(outputs, 0)[:, :5], alone.raw.direction(wanted, 0))
    assert examine(adapter, inputs).outputs == examine(plain, inputs).outputs
    assert feature_place(adapter).path == "head.head"


def test_a_sum_with_a_class_that_is_a_probability_is_refused():
    adapter = made()
    adapter.readout = "probabilities"
    with pytest.raises(ModelError, match="a sum of a class and a feature needs a logit"):
        target_of(adapter, "feature:1-0")
    assert target_of(adapter, "feature:1", "0").num_targets == 2


class OfPrompts(nn.Module):
    """Its output is its feature."""

    def forward(self, x):
        return x.mean((2, 3))


def test_prompts_and_features_stand_side_by_side():
    adapter = ModelAdapter(OfPrompts(), input_size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    adapter.texts = Texts(lambda text: torch.eye(3)[int(text)], 10.0, 0.0, are_alone=False)
    prompted = adapter.with_prompts([["0"], ["1"]])
    both = with_features(prompted, [PICTURE], [(0.6, 0.8, 0.0)], feature_place(prompted))
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0] = 0.5
    assert both.logits(pixels)[0].tolist() == pytest.approx([10.0, 0.0, 0.6])
    assert both.prompt_embeddings == prompted.prompt_embeddings
    assert (both.num_classes, both.class_names) == (2, ["0", "1"])


def test_the_feature_of_a_bank_is_that_of_its_votes():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    whole = NeighbourClassifier(nn.Sequential(TwoNumbers().maps, nn.AdaptiveAvgPool2d(1), nn.Flatten()), features,
                                torch.tensor([0, 1, 1]), ["a", "b"], num_neighbours=2)  # fmt: skip
    adapter = ModelAdapter(whole, input_size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3, class_names=["a", "b"])
    place = feature_place(adapter)
    assert place.path == "bank"
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0], pixels[0, 1] = 0.3, 0.4
    assert features_of(adapter, pixels, place).tolist() == [pytest.approx([0.3, 0.4])]
    both = with_features(adapter, [Atom("prototype", 1)], [whole.bank.centres[1].tolist()], place)
    assert both.logits(pixels)[0, 2].item() == pytest.approx(0.8)


class TwoHeads(nn.Module):
    """Averages two heads, so that no vector gives the logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        own = x.mean((2, 3))
        return (self.one(own) + self.other(own)) / 2


class Squashed(TwoNumbers):
    """A softmax stands behind the head."""

    def forward(self, x):
        return super().forward(x).softmax(1)


class Convolved(nn.Module):
    """Logits from a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.maps(x).mean((2, 3))


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        (TwoHeads, {}, "the input of other, and it cannot be read beside the classes"),
        (Squashed, {}, "the input of head, and it cannot be read beside the classes, .* changes the outputs"),
        (Convolved, {"class_names": ["a", "b"]}, "no linear layer over one vector per image gives its logits"),
    ],
)
def test_what_has_no_feature_vector_is_refused(module, options, reason):
    with pytest.raises(ModelError, match=reason):
        made(seeded(module), [UNIT], [(1.0, 0.0, 0.0)[: 3 if module is TwoHeads else 2]], **options)


def test_a_borrowed_module_is_not_changed():
    module = TwoNumbers()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    made(module)
    assert module.state_dict().keys() == before.keys()
    assert isinstance(module.head, nn.Linear)
