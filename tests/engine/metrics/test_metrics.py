"""The metrics: cases done by hand, slow twins, edges (flat maps, no region, ties), and protocols told apart."""

import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr
from torch import nn

from blocksight.engine.catalog import entries
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.parameters import NoParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.judging.sanity import (
    STAGES,
    Sanity,
    layers_by_execution,
    random_pictures,
    randomised,
    rank_correlation,
    tells_apart,
)
from blocksight.engine.metrics import MASKED, OF_MAPS
from blocksight.engine.metrics.complexity import Complexity, effective_area, entropy, gini
from blocksight.engine.metrics.faithfulness import (
    Deletion,
    Density,
    Insertion,
    KeepTop,
    LevelDrop,
    Negative,
    Positive,
    drop,
    trapezoid,
)
from blocksight.engine.metrics.localisation import Localisation, hits, iou_of_top, share_of_top
from blocksight.engine.metrics.metric import Maps, first_pixels, ranks_of
from blocksight.engine.metrics.road import LeastRelevantFirst, MostRelevantFirst, imputed, solved_together
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.scoring.perturb import BASELINES, blurred, perturbation
from blocksight.engine.scoring.scorer import Scorer
from tests.engine import oracles
from tests.engine.nets import Plain, Residual, seeded, smooth

SETTING = ForwardSetting()

RANDOM = np.random.default_rng(0)


def maps_of(adapter, inputs, classes, saliency, *, regions=None, seeds=None):
    """What the metrics see, with scores and ranks as the model gives them."""
    with adapter.borrowed(), torch.no_grad():
        logits = adapter.logits(inputs)
    chances = logits.double().softmax(1)
    return Maps(
        inputs,
        ClassProbability(torch.tensor(classes)),
        saliency,
        [[float(chances[image, index]) for index in own] for image, own in enumerate(classes)],
        [[1 + int((logits[image] > logits[image, index]).sum()) for index in own] for image, own in enumerate(classes)],
        regions or [[None] * len(own) for own in classes],
        seeds or [0] * len(inputs),
        [0] * len(inputs),
    )


def of_one_map(metric, saliency, region=None):
    return metric.of(np.asarray(saliency, float), None if region is None else np.asarray(region, bool))


def plain(values):
    return {name: own.value for name, own in values.items()}


# ---------------------------------------------------------------- V7, by hand


SCORES, KEPT = [0.8, 0.5, 0.9, 0.5], [0.6, 0.75, 0.9, 0.1]


def test_hand_vector_v7():
    assert [drop(score, kept) for score, kept in zip(SCORES, KEPT, strict=True)] == pytest.approx([25, 0, 0, 80])
    metric = KeepTop(None, "zero")
    values = [metric.values(score, [kept], None) for score, kept in zip(SCORES, KEPT, strict=True)]
    assert [own["increase"].value for own in values] == [0, 100, 0, 0]  # the tie does not count
    assert np.mean([own["drop"].value for own in values]) == pytest.approx(26.25)
    assert oracles.drop_and_increase(SCORES, KEPT) == pytest.approx((26.25, 25))


def test_hand_vector_v7_of_the_localisation_metrics():
    saliency = np.array([[10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1]])
    truth = np.array([[0, 1, 1, 1, 0, 0, 0, 0, 0, 1]], bool)
    values = plain(of_one_map(Localisation({}), saliency, truth))
    assert values["ebpg"] == pytest.approx(100 * 25 / 55) == 100 * oracles.energy(saliency, truth)
    assert values["miou"] == pytest.approx(100 / 5)
    assert values["bbox"] == pytest.approx(75)
    assert values["pointing"] == 0  # at a side of 1 pixel the tolerance is less than a pixel


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(1e-9, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_drops_add_up_to_the_slow_twins(pairs):
    wanted, _ = oracles.drop_and_increase(*zip(*pairs, strict=True))
    assert np.mean([drop(*pair) for pair in pairs]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("score", "kept", "wanted"),
    [(0.0, 0.0, 0), (0.0, 0.3, 0), (1e-300, 0.0, 100), (1e-7, 5e-8, 50), (0.7, 0.0, 100), (0.5, 0.6, 0)],
)
def test_edges_of_drop(score, kept, wanted):
    assert drop(score, kept) == pytest.approx(wanted)


@pytest.mark.parametrize(("score", "kept"), [(0.5, np.nan), (np.nan, 0.5), (np.nan, np.nan)])
def test_a_score_that_is_no_number_is_no_perfect_drop(score, kept):
    assert np.isnan(drop(score, kept))


# ---------------------------------------------------------------- order and ties


def test_ties_by_hand():
    assert ranks_of(np.array([[0.5, 1, 0.2], [0.4, 0, 0.9]])).tolist() == [[2, 0, 4], [3, 5, 1]]
    hashes = [oracles.splitmix64(17 + place) for place in range(6)]
    assert ranks_of(np.zeros((2, 3))).ravel().tolist() == [sorted(hashes).index(own) for own in hashes] != [*range(6)]


def test_no_part_of_the_picture_is_taken_for_the_pixels_without_a_value():
    """A gate leaves 1 % of the picture. In row-major order the rest of the top 15 % would be the upper rows."""
    values = np.zeros((200, 200))
    values[150:170, 100:120] = 1
    top = ranks_of(values) < 6000
    assert top[values > 0].all()
    assert [top[:100].sum(), top[:, :100].sum()] == pytest.approx([2800, 2800], rel=0.05)
    below = np.zeros((200, 200), bool)
    below[100:] = True  # 20,000 pixels: the 400, and half of a fair rest
    assert share_of_top(values, below) == pytest.approx((400 + 19600 * (19600 / 39600)) / 20000, abs=0.01)
    assert share_of_top(values[::-1], below[::-1]) == pytest.approx(share_of_top(values, below), abs=0.01)


def test_the_greatest_of_equal_values_is_not_the_first():
    values = np.ones((30, 30))
    values[0, 0] = 0
    place = np.unravel_index(min(range(1, 900), key=lambda own: oracles.splitmix64(17 + own)), (30, 30))
    truth = np.zeros((30, 30), bool)
    truth[place] = True
    assert place[0] > 2  # not where argmax looks
    assert hits(values, truth, 0)
    assert not hits(values, ~truth & (np.arange(900).reshape(30, 30) < 60), 0)


@settings(max_examples=60)
@given(arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 0.5, 1])))
def test_ranks_equal_the_slow_twins(values):
    for count in range(values.size + 1):
        top = oracles.top_pixels(values, count)
        assert np.array_equal(ranks_of(values) < count, top)
        assert count == 0 or np.array_equal(first_pixels(values, count), top)


# ---------------------------------------------------------------- localisation


@settings(max_examples=60)
@given(arrays(np.float64, (6, 7), elements=st.floats(0, 1)), arrays(np.bool_, (6, 7)))
def test_localisation_equals_the_slow_twins(saliency, truth):
    values = of_one_map(Localisation({}), saliency, truth)
    if not truth.any():
        assert {own.reason for own in values.values()} == {"no ground truth for the target"}
    elif saliency.max() == saliency.min():
        assert {own.reason for own in values.values()} == {"the map is flat"}
    else:
        assert values["ebpg"].value == pytest.approx(100 * oracles.energy(saliency, truth))
        assert values["miou"].value == pytest.approx(100 * oracles.overlap(saliency, truth))
        assert values["bbox"].value == pytest.approx(100 * oracles.box(saliency, truth))


def test_a_flat_map_and_an_empty_region_have_no_value():
    """What peers get wrong: the first place of a flat map lies in the corner, where an object may be."""
    corner = np.zeros((8, 8), bool)
    corner[0, 0] = True
    for flat in (np.zeros((8, 8)), np.full((8, 8), 0.5)):
        values = of_one_map(Localisation({}), flat, corner)
        assert {(own.value, own.reason) for own in values.values()} == {(None, "the map is flat")}
    for missing in (None, np.zeros((8, 8), bool)):
        values = of_one_map(Localisation({}), RANDOM.random((8, 8)), missing)
        assert plain(values) == dict.fromkeys(Localisation.names)


def test_the_pointing_game_by_hand():
    saliency, truth = np.zeros((224, 224)), np.zeros((224, 224), bool)
    saliency[100, 100] = 1
    truth[100, 116:] = True
    assert not hits(saliency, truth, 15)
    truth[100, 115] = True
    assert hits(saliency, truth, 15)
    assert plain(of_one_map(Localisation({}), saliency, truth))["pointing"] == 100
    truth[:] = False
    truth[112, 109] = True  # 12 down and 9 to the right are 15 away
    assert hits(saliency, truth, 15)


def test_a_map_that_is_the_region_is_perfect():
    truth = np.zeros((10, 10), bool)
    truth[2:6, 3:8] = True
    values = plain(of_one_map(Localisation({}), truth.astype(float), truth))
    assert values == {"ebpg": 100, "miou": 100, "bbox": 100, "pointing": 100}
    assert (iou_of_top(truth * 1.0, ~truth, 0.2), share_of_top(truth * 1.0, ~truth)) == (0, pytest.approx(60 / 80))


# ---------------------------------------------------------------- complexity


def test_complexity_by_hand():
    one, even = np.eye(1, 8).reshape(2, 4), np.full((2, 4), 0.5)
    assert (entropy(one), gini(one), effective_area(one)) == pytest.approx((0, 7 / 8, 1 / 8))
    assert (entropy(even), gini(even), effective_area(even)) == pytest.approx((1, 0, 1))
    half = np.array([[1.0, 1, 0, 0]])
    assert (entropy(half), gini(half), effective_area(half)) == pytest.approx((0.5, 0.5, 0.5))
    assert gini(np.array([[1.0, 3]])) == pytest.approx(0.25)
    assert {own.reason for own in of_one_map(Complexity(), even).values()} == {"the map is flat"}


def slow_gini(values):
    flat = values.ravel()
    return sum(abs(a - b) for a in flat for b in flat) / (2 * flat.size**2 * flat.mean())


@settings(max_examples=40)
@given(arrays(np.float64, (4, 5), elements=st.floats(0.01, 1)))
def test_gini_is_half_the_relative_mean_difference(values):
    assert gini(values) == pytest.approx(slow_gini(values), abs=1e-9)


# ---------------------------------------------------------------- with a model, against slow twins


def twin_of(adapter):
    net = oracles.double_copy(adapter.module)

    def probability(picture, index):
        with torch.no_grad():
            return float(net(picture[None].double())[0].softmax(0)[index])

    def top(picture):
        with torch.no_grad():
            return int(net(picture[None].double())[0].argmax())

    return probability, top


@pytest.fixture
def case():
    adapter, inputs = ModelAdapter(seeded(Residual), input_size=(16, 16)), smooth(3, 16, 16)
    saliency = RANDOM.random((3, 2, 16, 16))
    with adapter.borrowed(), torch.no_grad():
        best = adapter.logits(inputs).argmax(1).tolist()
    return adapter, maps_of(adapter, inputs, [[own, (own + 1) % 5] for own in best], saliency)


def metric(make, adapter, baseline="zero", batch_size=4):
    return make(Scorer(adapter, perturbation(adapter, baseline), batch_size), baseline)


def each(maps):
    for image, own in enumerate(maps.target.classes.tolist()):
        for index, target in enumerate(own):
            yield image, index, target, maps.inputs_nchw[image].double(), maps.saliency[image][index]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("baseline", ["zero", "black"])
def test_keeping_the_top_equals_one_image_at_a_time(case, baseline, batch_size):
    adapter, maps = case
    probability, _ = twin_of(adapter)
    removed = BASELINES[baseline](adapter)[0].double()
    found = metric(KeepTop, adapter, baseline, batch_size).evaluate(maps)
    for image, index, target, picture, saliency in each(maps):
        mask = torch.from_numpy(oracles.top_pixels(saliency, 38)).double()
        pair = [maps.scores[image][index]], [probability(picture * mask + (1 - mask) * removed, target)]
        lost, grown = oracles.drop_and_increase(*pair)
        assert plain(found[image][index]) == {"drop": pytest.approx(lost, abs=1e-3), "increase": grown}


def test_levels_equal_one_image_at_a_time(case):
    adapter, maps = case
    probability, _ = twin_of(adapter)
    found = metric(LevelDrop, adapter).evaluate(maps)
    for image, index, target, picture, saliency in each(maps):
        for level, count in ((100, 256), (50, 128), (15, 38)):
            mask = saliency * oracles.top_pixels(saliency, count)
            kept = probability(picture * torch.from_numpy(mask), target)
            lost, grown = oracles.drop_and_increase([maps.scores[image][index]], [kept])
            assert found[image][index][f"average_drop_{level}"].value == pytest.approx(lost, abs=1e-3)
            assert found[image][index][f"average_increase_{level}"].value == grown


@pytest.mark.parametrize("make", [Deletion, Insertion])
def test_curves_equal_one_image_at_a_time(case, make):
    adapter, maps = case
    probability, _ = twin_of(adapter)
    found = metric(make, adapter).evaluate(maps)
    for image, index, target, picture, saliency in each(maps):
        blur = blurred(picture, 50 / 224 * 16, reach=2)
        curve = []
        for step in range(29):
            count = round(step / 28 * 256) if make is Deletion else 256 - round((1 - step / 28) * 256)
            top = torch.from_numpy(oracles.top_pixels(saliency, count)).double()
            shown = picture * (1 - top) if make is Deletion else picture * top + blur * (1 - top)
            curve.append(probability(shown, target))
        value = found[image][index][make.names[0]]
        assert value.curve == pytest.approx(curve, abs=1e-5)
        assert value.value == pytest.approx((sum(curve) - curve[0] / 2 - curve[-1] / 2) / 28, abs=1e-5)
    end = value.curve[0] if make is Deletion else value.curve[-1]
    assert end == pytest.approx(maps.scores[2][1], abs=1e-5)


@pytest.mark.parametrize(("make", "removed"), [(Positive, "top"), (Negative, "bottom")])
def test_pos_and_neg_equal_one_image_at_a_time(case, make, removed):
    adapter, maps = case
    _, top = twin_of(adapter)
    found = metric(make, adapter).evaluate(maps)
    for image, index, target, picture, saliency in each(maps):
        value = found[image][index][make.names[0]]
        if index == 1:
            assert (value.value, value.reason) == (None, "the target is not the prediction")
            continue
        order = saliency if removed == "top" else oracles_reversed(saliency)
        curve = [
            float(top(picture * torch.from_numpy(~oracles.top_pixels(order, round(share * 25.6)))) == target)
            for share in range(10)
        ]
        assert list(value.curve) == curve
        assert value.value == pytest.approx(100 * float(np.trapezoid(curve, dx=0.1)))


def oracles_reversed(saliency):
    return -saliency


def test_density_by_hand(case):
    adapter, maps = case
    probability, _ = twin_of(adapter)
    found = metric(Density, adapter).evaluate(maps)
    for image, index, target, picture, saliency in each(maps):
        pair = [torch.from_numpy(own) for own in (saliency, 1 - saliency)]
        wanted = [probability(picture * own, target) * 256 / float(own.sum()) for own in pair]
        assert list(plain(found[image][index]).values()) == pytest.approx(wanted, rel=1e-4)


def test_the_trapezoid_by_hand():
    assert trapezoid([1.0, 0.5, 0.0]) == 1.0
    assert Deletion(None, "zero").area([1.0, 0.5, 0.0]) == 0.5


@pytest.mark.parametrize("name", MASKED)
def test_a_flat_map_has_no_order_and_company_does_not_show(name, case):
    adapter, maps = case
    flat = [[np.zeros((16, 16)), own[1]] for own in maps.saliency]
    together = metric(MASKED[name], adapter).evaluate(maps)
    mixed = metric(MASKED[name], adapter).evaluate(Maps(**{**vars(maps), "saliency": flat}))
    for image in range(3):
        for own in mixed[image][0].values():
            assert (own.value, own.reason) == (None, "the map is flat")
        for one, other in zip(mixed[image][1].values(), together[image][1].values(), strict=True):
            assert one.reason == other.reason
            if one.value is not None:
                assert one.value == pytest.approx(other.value, abs=1e-4)


# ---------------------------------------------------------------- ROAD


def slowly_imputed(picture, kept):
    """One equation per missing pixel, solved as a dense system."""
    height, width = kept.shape
    missing = [tuple(place) for place in np.argwhere(~kept)]
    number = {place: row for row, place in enumerate(missing)}
    matrix, wanted = np.zeros((len(missing), len(missing))), np.zeros((len(missing), len(picture)))
    for row, (y, x) in enumerate(missing):
        for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]:
            if not (0 <= near[0] < height and 0 <= near[1] < width):
                continue
            weight = 1 / 6 if y == near[0] or x == near[1] else 1 / 12
            matrix[row, row] += weight
            if near in number:
                matrix[row, number[near]] -= weight
            else:
                wanted[row] += weight * picture[:, near[0], near[1]]
    filled = picture.copy()
    filled[:, ~kept] = np.linalg.solve(matrix, wanted).T
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_equals_a_direct_solver(share):
    picture = smooth(1, 14, 17)[0]
    kept = RANDOM.random((14, 17)) >= share
    kept[:6, :6] = False
    found = imputed(picture, torch.from_numpy(kept))
    assert np.abs(found.numpy() - slowly_imputed(picture.double().numpy(), kept)).max() < 1e-3
    assert torch.equal(found[:, kept], picture[:, kept])


def test_imputation_by_hand():
    """One missing pixel is the mean of its neighbours, six times as heavy beside it as 1/12 in the corners."""
    picture = torch.arange(9.0).view(1, 3, 3)
    kept = torch.ones(3, 3, dtype=torch.bool)
    kept[1, 1] = False
    assert float(imputed(picture * 2, kept)[0, 1, 1]) == pytest.approx(8)
    kept[0, 0] = False
    assert torch.isfinite(imputed(picture, kept)).all()
    assert torch.equal(imputed(picture, torch.zeros(3, 3, dtype=torch.bool)), torch.zeros(1, 3, 3))
    flat = torch.full((2, 8, 8), 3.0)
    few = torch.zeros(8, 8, dtype=torch.bool)
    few[0, 0] = True
    assert imputed(flat, few) == pytest.approx(3.0, abs=1e-3)


@pytest.mark.parametrize("iterations_per_test", [1, 5, 16])
def test_pictures_that_are_imputed_together_are_those_imputed_alone_to_the_bit(iterations_per_test):
    pictures = smooth(5, 14, 17)
    shares = torch.tensor([0.0, 0.05, 0.4, 0.9, 1.0])
    kept = torch.from_numpy(RANDOM.random((5, 14, 17))) >= shares[:, None, None]
    alone = torch.stack([imputed(*pair) for pair in zip(pictures, kept, strict=True)])
    assert torch.equal(solved_together(pictures, kept, iterations_per_test), alone)
    assert torch.equal(alone[0], pictures[0])
    assert not alone[4].any()


@pytest.mark.parametrize("make", [MostRelevantFirst, LeastRelevantFirst])
def test_road_is_drawn_from_the_seed_and_has_fixed_ends(make, case):
    adapter, maps = case
    own = metric(make, adapter)
    one, again = own.evaluate(maps), own.evaluate(maps)
    assert one == again
    for image in range(3):
        value = one[image][0][make.names[0]]
        points = [(0, 1.0), *zip((0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), value.curve, strict=True), (1, 0.0)]
        places, heights = zip(*points, strict=True)
        assert value.value == pytest.approx(100 * float(np.trapezoid(heights, places)))


# ---------------------------------------------------------------- sanity


@settings(max_examples=40)
@given(arrays(np.float64, (4, 4), elements=st.sampled_from([0, 0.25, 0.5, 1])), st.integers(0, 9))
def test_rank_correlation_is_spearmans(values, seed):
    other = np.random.default_rng(seed).random((4, 4))
    found = rank_correlation(values, other)
    wanted = np.nan if values.max() == values.min() else spearmanr(values.ravel(), other.ravel()).statistic
    assert found == pytest.approx(wanted, nan_ok=True)


def test_weights_become_random_from_the_output_down():
    net = seeded(Plain)
    names = [name for name, layer in net.named_modules() if list(layer.parameters(recurse=False))]
    for share in STAGES:
        fresh = randomised(net, share, 3, smooth(2, 32, 32))
        changed = [not torch.equal(net.get_submodule(name).weight, fresh.get_submodule(name).weight) for name in names]
        assert sum(changed) == -(-share * len(names) // 1)
        assert changed == sorted(changed)
    first, second = (randomised(net, 1.0, 3, smooth(2, 32, 32)) for _ in range(2))
    assert torch.equal(first.head.weight, second.head.weight)


class HeadFirst(nn.Module):
    """Registered in another order than executed; the attention's own projection is never called."""

    def __init__(self):
        super().__init__()
        self.head, self.mixed = nn.Linear(8, 5), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.stem = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        tokens = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.mixed(tokens, tokens, tokens)[0].mean(1))


def test_layers_come_in_the_order_in_which_they_are_executed():
    net = HeadFirst().eval()
    order = [net.stem, net.norm, net.mixed, net.mixed.out_proj, net.head]
    assert layers_by_execution(net, smooth(1, 8, 8)) == order
    fresh = randomised(net, 0.2, 0, smooth(2, 8, 8))
    assert torch.equal(fresh.stem.weight, net.stem.weight)
    assert not torch.equal(fresh.head.weight, net.head.weight)


def traced(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, smooth(1, 8, 8))


def quantised(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces its successor
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def deep(*, has_norms):
    layers = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(24):
        layers += [*([nn.BatchNorm2d(8)] if has_norms else []), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_a_random_network_still_tells_pictures_apart():
    """With batch norms at mean 0 and variance 1 the logits of two pictures differ by less than 1e-6."""
    net, pictures = deep(has_norms=True).eval(), random_pictures(ModelAdapter(nn.Identity(), input_size=(32, 32)), 0)
    others = smooth(2, 32, 32)
    fresh = randomised(net, 1.0, 0, pictures)
    dead = deepcopy(fresh)
    for layer in dead.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    with torch.no_grad():
        assert not tells_apart(dead(others))
        assert tells_apart(fresh(others))
        assert float(fresh(others).std(0).max()) > 0.01
    assert not any(layer.training for layer in fresh.modules())


def test_statistics_in_front_of_the_random_layers_stay():
    net = seeded(Residual)
    fresh = randomised(net, 0.2, 0, smooth(4, 32, 32))
    assert torch.equal(fresh.norm.running_var, net.norm.running_var)
    assert fresh.norm.momentum == net.norm.momentum
    assert not torch.equal(randomised(net, 1.0, 0, smooth(4, 32, 32)).norm.running_var, net.norm.running_var)


class Untouched(nn.Linear):
    """Its method to begin anew forgets a weight."""

    def __init__(self):
        super().__init__(8, 5)
        nn.init.normal_(self.weight)

    def reset_parameters(self):
        nn.init.normal_(self.bias)


@pytest.mark.parametrize(
    "layer",
    [
        Untouched(),
        torch.nn.utils.spectral_norm(nn.Linear(8, 5)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5)),
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
        torch.nn.utils.parametrizations.orthogonal(nn.Linear(8, 5)),
    ],
)
def test_weights_that_a_layer_does_not_reset_are_random_too(layer):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer).eval()
    fresh = randomised(net, 0.5, 0, smooth(4, 16, 16))
    pairs = zip(net[4].named_parameters(), fresh[4].parameters(), strict=True)
    assert [name for (name, own), other in pairs if torch.equal(own, other)] == []


def test_a_weight_that_a_hook_computes_can_be_copied():
    net = nn.Sequential(Hooked(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    fresh = randomised(net, 1.0, 0, smooth(4, 16, 16))
    assert not torch.equal(net[0].direction, fresh[0].direction)


class Hooked(nn.Conv2d):
    """As under torch's older `weight_norm`: the weight is no parameter, and is computed before each call."""

    def __init__(self):
        super().__init__(3, 8, 3)
        self.direction = nn.Parameter(self.weight.detach().clone())
        del self.weight
        self.weight = 2 * self.direction
        self.register_forward_pre_hook(lambda own, _: setattr(own, "weight", 2 * own.direction))


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (traced, "TorchScript cannot be reached"),
        (quantised, "is quantised"),
    ],
)
def test_weights_that_cannot_be_reached_are_refused(made, what):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    with pytest.raises(ModelError, match=what):
        Sanity(ModelAdapter(made(net), input_size=(8, 8)), edges, 0)


def test_a_dead_random_network_gives_no_value():
    torch.manual_seed(0)
    adapter, inputs = ModelAdapter(deep(has_norms=False).eval(), input_size=(32, 32)), smooth(1, 32, 32)
    maps = maps_of(adapter, inputs, [[0]], [[RANDOM.random((32, 32))]])
    own = Sanity(adapter, edges, 0).evaluate(maps)[0][0]["sanity"]
    assert (own.value, own.reason) == (None, "with random weights the model's output hardly depends on the image")


def edges(adapter):
    return EXPLAINERS["edges"](adapter, NoParameters())


def test_a_map_that_ignores_the_model_fails_the_sanity_check():
    adapter, inputs = ModelAdapter(seeded(Residual), input_size=(32, 32)), smooth(2, 32, 32)
    correlations = {}
    for name in ("edges", "gradcam"):

        def make(adapter, name=name):
            return EXPLAINERS[name](adapter, NoParameters())

        own = make(adapter).explain(inputs, ClassProbability(torch.tensor([[0], [1]])), [0, 0])
        saliency = [[one.saliency_hw / one.saliency_hw.max() for one in row] for row in own]
        values = Sanity(adapter, make, 0).evaluate(maps_of(adapter, inputs, [[0], [1]], saliency))
        correlations[name] = [abs(row[0]["sanity"].value) for row in values]
        assert len(values[0][0]["sanity"].curve) == len(STAGES)
    assert correlations["edges"] == pytest.approx([1, 1])
    assert np.mean(correlations["gradcam"]) < 0.95


# ---------------------------------------------------------------- protocols and the catalogue


def test_the_protocol_hash_tells_protocols_apart():
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    digests = [
        metric(make, adapter, baseline).digest(SETTING) for make in MASKED.values() for baseline in ("zero", "black")
    ]
    digests += [make().digest(SETTING) for make in OF_MAPS.values()]
    digests += [Localisation(truth).digest(SETTING) for truth in ({"truth": "a"}, {"truth": "b"})]
    own_baseline = 3  # insertion and both ROADs replace pixels by something of their own
    assert len(set(digests)) == len(digests) - own_baseline
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)
    assert metric(Deletion, adapter).digest(SETTING) == metric(Deletion, adapter, batch_size=9).digest(SETTING)


@pytest.mark.parametrize("make", [*MASKED.values(), *OF_MAPS.values()])
def test_values_of_two_backends_or_precisions_never_share_a_protocol(make):
    own = metric(make, ModelAdapter(seeded(Plain), input_size=(32, 32))) if make in MASKED.values() else make()
    settings = [SETTING, ForwardSetting("openvino"), ForwardSetting("eager", "bfloat16")]
    assert len({own.digest(setting) for setting in settings}) == 3
    assert own.digest(SETTING) == own.digest(ForwardSetting(batch_size=64))


def test_every_value_is_in_the_catalogue_and_the_other_way_round():
    made = {name for make in (*MASKED.values(), *OF_MAPS.values(), Localisation, Sanity) for name in make.names}
    assert made == set(entries.METRICS)


def test_the_catalogue_knows_the_forward_passes_of_every_metric():
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    maps = maps_of(adapter, smooth(1, 32, 32), [[0]], RANDOM.random((1, 1, 32, 32)))
    passes = {name: own for own in (metric(make, adapter) for make in MASKED.values()) for name in own.names}
    for name, entry in entries.METRICS.items():
        assert entry.forwards == (len(passes[name].sources(maps, [(0, 0)])[0]) if name in passes else 0)
        assert entry.cost.startswith(f"{entry.forwards} F") or not entry.forwards
        together = {other for other, own in entries.METRICS.items() if own.evaluation == entry.evaluation}
        assert entry.evaluation is None or together == set(passes[name].names)


def test_the_catalogue_knows_the_maps_that_sanity_makes():
    assert {name: own.explanations for name, own in entries.METRICS.items() if own.explanations} == {
        "sanity": len(STAGES)
    }


def test_evaluating_gives_the_model_back():
    adapter = ModelAdapter(seeded(Plain).train(), input_size=(32, 32))
    maps = maps_of(adapter, smooth(1, 32, 32), [[0]], np.ones((1, 1, 32, 32)))
    metric(KeepTop, adapter).evaluate(maps)
    assert adapter.module.training
    assert all(parameter.requires_grad for parameter in adapter.module.parameters())


class Even(nn.Module):
    """Says the same of every picture."""

    def forward(self, x):
        return torch.zeros(len(x), 4) + torch.tensor([0.3, 0.0, 0.0, 0.0])


def test_a_model_that_never_changes_its_mind():
    adapter = ModelAdapter(Even(), input_size=(16, 16))
    maps = maps_of(adapter, smooth(1, 16, 16), [[0]], RANDOM.random((1, 1, 16, 16)))
    score = maps.scores[0][0]
    assert plain(metric(Positive, adapter).evaluate(maps)[0][0]) == {"pos": pytest.approx(90)}
    assert plain(metric(Deletion, adapter).evaluate(maps)[0][0]) == {"deletion": pytest.approx(score)}
    assert plain(metric(KeepTop, adapter).evaluate(maps)[0][0]) == {"drop": pytest.approx(0, abs=1e-5), "increase": 0}
    assert plain(metric(MostRelevantFirst, adapter).evaluate(maps)[0][0]) == {"road_morf": pytest.approx(95)}
