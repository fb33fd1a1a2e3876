"""Weighted sums of classes: values, exact directions for every readout, and several targets side by side."""

import pytest
import torch

from blocksight.engine.catalog.entries import EXPLAINERS as ENTRIES
from blocksight.engine.catalog.parameters import BeeParameters, IntegratedGradientsParameters, OcclusionParameters
from blocksight.engine.catalog.target_expressions import parse_formula
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.explainers.gradients import IntegratedGradients, input_gradients
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.expressions import JoinedTargets, target_of
from blocksight.engine.model.targets import ClassProbability
from tests.engine import planted
from tests.engine.nets import Residual, seeded, smooth

SUMS = ("0-1", "0.5*0+0.5*2", "-1", "0*1", "logit(2)", "logprob(0)", "logprob(0-1)", "logprob(0.3*0+2)")
PARAMETERS = {
    "integrated_gradients": IntegratedGradientsParameters(steps=8),
    "occlusion": OcclusionParameters(window=12, stride=8),
}
LOGITS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -5.0]], dtype=torch.float64)
OUTPUTS = {
    "softmax": LOGITS,
    "sigmoid": LOGITS,
    "identity": LOGITS,
    "probabilities": (LOGITS / 4).softmax(1),
}


def made(*texts, readout="softmax", images=2):
    return target_of([[parse_formula(text) for text in texts]] * images, readout, "cpu")


def kinds():
    return [
        (readout, text) for readout in OUTPUTS for text in SUMS if not (readout == "identity" and "logprob" in text)
    ]


@pytest.mark.parametrize(("readout", "text"), kinds())
def test_the_direction_is_the_finite_difference(readout, text):
    target, output = made(text, readout=readout), OUTPUTS[readout]
    images = torch.arange(len(output))
    found = target.direction(output, 0)
    for place in range(output.shape[1]):
        step = torch.zeros_like(output)
        step[:, place] = 1e-6
        slope = (target.score(output + step, images) - target.score(output - step, images))[:, 0] / 2e-6
        assert found[:, place].tolist() == pytest.approx(slope.tolist(), rel=1e-7, abs=1e-8)


def test_values_by_hand():
    found = made("0-1", "0.5*0+0.5*2", "logprob(0-1)", "logit(2)", "0").score(LOGITS, torch.tensor([0, 1]))
    chances = LOGITS.softmax(1)[:, 0].tolist()
    wanted = [[3.0, 0.75, 3.0, 0.5, chances[0]], [3.0, -1.0, 3.0, -5.0, chances[1]]]
    assert found.tolist() == [pytest.approx(own, rel=1e-12) for own in wanted]  # softmax has one normaliser for both


def test_a_saturated_softmax_leaves_the_direction_of_a_log_probability():
    logits = torch.tensor([[80.0, 0.0, -3.0]], dtype=torch.float64)
    found = made("logprob(0)", images=1).direction(logits, 0)[0]
    rest = torch.exp(torch.tensor([-80.0, -83.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([float(rest.sum()), -float(rest[0]), -float(rest[1])], rel=1e-12)


def test_classes_beside_sums_keep_their_own_numbers():
    alone, joined = (
        ClassProbability(torch.tensor([[1], [2]])),
        target_of(
            [[parse_formula("0-2"), parse_formula("1")], [parse_formula("1-2"), parse_formula("2")]], "softmax", "cpu"
        ),
    )
    assert isinstance(joined, JoinedTargets)
    every = torch.tensor([0, 1])
    assert torch.equal(joined.score(LOGITS, every)[:, 1:], alone.score(LOGITS, every))
    assert torch.equal(joined.direction(LOGITS, 1), alone.direction(LOGITS, 0))
    assert torch.equal(joined.raw.direction(LOGITS, 1), alone.raw.direction(LOGITS, 0))
    assert (joined.is_class, joined.leading.tolist()) == ((False, True), [[0, 1], [1, 2]])
    assert torch.equal(
        joined.of(torch.tensor([1])).score(LOGITS[1:], torch.tensor([0])), joined.score(LOGITS, every)[1:]
    )
    assert isinstance(target_of([[parse_formula("1")], [parse_formula("2")]], "softmax", "cpu"), ClassProbability)


def test_a_sum_of_fewer_classes_is_filled_up():
    both = target_of([[parse_formula("0*1")], [parse_formula("0-2")]], "softmax", "cpu")
    assert both.score(LOGITS, torch.tensor([0, 1])).tolist() == [[0.0], [8.0]]
    assert both.direction(LOGITS, 0).tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]


def test_log_probabilities_of_no_probability_are_refused():
    with pytest.raises(ModelError, match="with readout identity the output is none"):
        made("logprob(0)", readout="identity")


def test_a_path_sums_to_the_change_of_a_log_probability():
    adapter = ModelAdapter(seeded(Residual), input_size=(16, 16))
    method = IntegratedGradients(adapter, IntegratedGradientsParameters(steps=128))
    own = method.balance(smooth(1, 16, 16), made("logprob(0)", images=1))
    assert own.found == pytest.approx(own.wanted, rel=1e-2)


@pytest.fixture(scope="module")
def two_objects():
    """Pictures with two objects, their classes [N, 2] and boxes [N, 2, 4], and a CNN that knows them."""
    return planted.trained_cnn(), *planted.pairs(6, 5)


@pytest.mark.parametrize("name", ["gradcam", "layercam", "integrated_gradients", "occlusion", "sise"])
def test_a_difference_finds_its_own_object_and_the_opposite_the_other(two_objects, name):
    """A - B must lie in A's box, and B - A in B's, also where the map of A alone holds some of B."""
    adapter, pixels, classes, boxes = two_objects
    texts = [[f"{a}-{b}", f"{b}-{a}"] for a, b in classes.tolist()]
    target = target_of([[parse_formula(text) for text in own] for own in texts], "softmax", "cpu")
    parameters = PARAMETERS.get(name) or ENTRIES[name].parameters()
    explainer = make_explainer(name, adapter, parameters, batch_size=32)
    found = explainer.explain(adapter.normalise(pixels), target)
    energies = [
        [planted.energy_inside(torch.from_numpy(one.saliency_hw), box) for box in order]
        for own, both in zip(found, boxes, strict=True)
        for one, order in zip(own, (both, both.flip(0)), strict=True)
    ]
    mine, other = zip(*energies, strict=True)
    assert sum(mine) > 2 * sum(other)
    assert all(one > another for one, another in energies)


@pytest.mark.parametrize("text", ["logit(3)", "3"])
def test_a_gradient_of_a_difference_is_the_difference_of_the_gradients(two_objects, text):
    adapter, pixels, _, _ = two_objects
    inputs = adapter.normalise(pixels[:1])
    target = target_of([[parse_formula(own) for own in (text, "logit(4)", "3-4")]], "softmax", "cpu")
    _, (one, other, both) = input_gradients(adapter, inputs, target)
    assert torch.allclose(one - other, both, rtol=0, atol=1e-6)


def test_what_cannot_be_of_a_sum_is_refused(two_objects):
    adapter, pixels, _, _ = two_objects
    with pytest.raises(ModelError, match="bee picks a map by the probability of a class"):
        make_explainer("bee", adapter, BeeParameters(choice="even", families=("normal",))).explain(
            adapter.normalise(pixels[:1]), made("0-1", images=1)
        )
