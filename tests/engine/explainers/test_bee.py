"""BEE: its baselines, the path from one, the selection of a map, and the state of its first pass."""

from dataclasses import replace
from itertools import pairwise

import captum.attr
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from blocksight.engine.catalog.composition import num_learning_images, parse_method
from blocksight.engine.catalog.entries import FORWARDS_TO_SELECT, METRICS
from blocksight.engine.catalog.parameters import BeeParameters, SmoothGradParameters
from blocksight.engine.catalog.side_products import GridMap
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.baselines import FAMILIES, SIGNAL_SHARE
from blocksight.engine.explainers.bee import SELECTION_METRICS
from blocksight.engine.metrics.faithfulness import WholeDrop
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassLogit, ClassProbability
from tests.engine import oracles
from tests.engine import slow_explainers as slow
from tests.engine.explainers.test_explainers import TAILS, small_vit
from tests.engine.nets import Depthwise, InPlace, Plain, Residual, Untraceable, seeded, smooth

SIDE = 24
FREE = ("normal", "uniform", "blur", "const")
"""The families that need no other image."""


def seed(number):
    return torch.Generator().manual_seed(number)


def bee(net, parameters, *, side=SIDE, **options):
    return EXPLAINERS["bee"](ModelAdapter(net, input_size=(side, side)), parameters, **options)


def learned(explainer, inputs, target, seeds):
    """The state of a first pass over the images."""
    learner = explainer.learner()
    learner.see(inputs, target, seeds)
    return learner.state()


def even(draws=4, families=FREE, **options):
    return BeeParameters(draws=draws, families=families, choice="even", **options)


def classes(*numbers):
    return ClassProbability(torch.tensor(numbers)[:, None])


def family_of(explanation) -> tuple[GridMap, ...]:
    found = explanation.products.map_family
    assert found is not None
    return found


# ---------------------------------------------------------------- baselines


@pytest.fixture
def maps():
    """Feature maps of a wide range, the last channel constant."""
    values = torch.randn(6, 40, 48, generator=seed(0)) * torch.arange(1.0, 7)[:, None, None] / 6 + 2
    values[5] = 3.0
    return values


def moments(values):
    """Mean, and the fourth moment of standardised values: 3 for a Gaussian, 1.8 for a uniform distribution."""
    values = values.double()
    return float(values.mean()), float((((values - values.mean()) / values.std()) ** 4).mean())


@pytest.mark.parametrize(("family", "fourth"), [("normal", 3.0), ("uniform", 1.8)])
def test_noise_lies_in_each_channels_range_and_hardly_correlates_with_it(maps, family, fourth):
    assert pytest.approx(0.00629, abs=5e-6) == SIGNAL_SHARE
    found = FAMILIES[family](maps, seed(1), [])
    assert found.shape == maps.shape
    for own, wanted in zip(found[:5], maps[:5], strict=True):
        assert float(own.min()) == pytest.approx(float(wanted.min()), abs=1e-4)
        assert float(own.max()) == pytest.approx(float(wanted.max()), abs=1e-4)
        share = (own - own.min()) / (own.max() - own.min())
        middle, kurtosis = moments(share)
        assert middle == pytest.approx(0.5, abs=0.1)
        assert kurtosis == pytest.approx(fourth, abs=0.4)
    assert torch.equal(found[5], maps[5])
    near = [np.corrcoef(own.ravel(), one.ravel())[0, 1] for own, one in zip(found[:5], maps[:5], strict=True)]
    assert max(np.abs(near)) < 0.35
    assert not torch.equal(found, FAMILIES[family](maps, seed(2), []))


def test_blur_is_scipys_with_a_whole_deviation_from_3_to_50(maps):
    for number in range(4):
        sigma = int(torch.randint(3, 51, (), generator=seed(number)))
        found = FAMILIES["blur"](maps, seed(number), [])
        wanted = gaussian_filter(maps.double().numpy(), (0, sigma, sigma), mode="reflect", truncate=4)
        assert np.abs(found.numpy() - wanted).max() < 1e-4
    small = torch.arange(9.0).view(1, 3, 3)
    drawn = {round(float(FAMILIES["blur"](small, seed(number), [])[0, 0, 0]), 4) for number in range(400)}
    wanted = {round(float(gaussian_filter(small[0].numpy(), one, mode="reflect")[0, 0]), 4) for one in range(3, 51)}
    assert max(drawn) - max(wanted) == pytest.approx(0, abs=2e-4)
    assert min(drawn) - min(wanted) == pytest.approx(0, abs=2e-4)


def test_a_constant_is_one_value_per_channel_from_its_range_over_both_axes():
    many = torch.arange(8.0).expand(4000, 5, 8)
    found = FAMILIES["const"](many, seed(0), [])
    assert (found == found[:, :1, :1]).all()
    values = found[:, 0, 0].numpy()
    assert np.histogram(values, 7, (0, 7))[0] / 4000 == pytest.approx([1 / 7] * 7, abs=0.03)
    upright = FAMILIES["const"](many.transpose(1, 2), seed(0), [])
    assert torch.equal(upright[:, 0, 0], found[:, 0, 0])


def test_train_draws_any_image_of_the_pool(maps):
    pool = [maps + one for one in range(3)]
    found = [FAMILIES["train"](maps, seed(number), pool) for number in range(30)]
    counts = [sum(torch.equal(own, one) for own in found) for one in pool]
    assert sum(counts) == 30
    assert min(counts) > 3
    assert torch.equal(FAMILIES["train"](maps, seed(0), []), maps)


# ---------------------------------------------------------------- the path


class Tailed(nn.Module):
    """One block of feature maps, then a linear layer, or one over a function of all places."""

    def __init__(self, bend=None) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.head = nn.Linear(4 * 36, 5)
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.features(x))
        return self.tail(x)

    def tail(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x if self.bend is None else self.bend(x))


def signed(net, image, baseline_seed, parameters, target=1):
    """The signed map of the only draw, and its baseline, in float64."""
    one = bee(net, parameters)
    found = one.explain(image, classes(target), [baseline_seed])[0][0]
    (own,) = family_of(found)
    with one.adapter.borrowed():
        maps = one.taps(image)[1][0][0].detach()
    return own, maps, FAMILIES[own.name](maps, seed(baseline_seed), [])


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("family", FREE)
def test_behind_a_linear_tail_a_map_sums_to_the_logits_difference(family, steps):
    net = seeded(Tailed)
    own, maps, baseline = signed(net, smooth(1, SIDE, SIDE), 3, even(1, (family,), steps=steps, noise_steps=steps))
    with torch.no_grad():
        upper, lower = net.tail(torch.stack([maps, baseline]))[:, 1].tolist()
    assert abs(upper - lower) > 1e-3
    assert own.values_hw.sum() == pytest.approx(upper - lower, abs=1e-4 * abs(upper - lower))


def test_behind_a_smooth_tail_the_error_falls_with_the_steps():
    net, errors = seeded(lambda: Tailed(torch.tanh)), []
    for steps in (8, 16, 32, 64):
        own, maps, baseline = signed(net, smooth(1, SIDE, SIDE), 3, even(1, ("const",), steps=steps))
        with torch.no_grad():
            upper, lower = net.tail(torch.stack([maps, baseline]))[:, 1].tolist()
        errors.append(abs(float(own.values_hw.sum()) - (upper - lower)))
    ratios = [before / after for before, after in pairwise(errors)]
    assert errors[0] > 1e-4
    assert ratios == pytest.approx([2.0] * 3, abs=0.35)


def test_a_baseline_that_is_the_picture_gives_zeros_and_no_value():
    """The pool holds only the image, which is no baseline of itself."""
    net, parameters = seeded(Tailed), even(2, ("train",), pool=1)
    inputs = smooth(1, SIDE, SIDE)
    state = learned(bee(net, parameters), inputs, classes(1), [7])
    assert state["pool.seeds"].tolist() == [7]
    found = bee(net, parameters, state=state).explain(inputs, classes(1), [7])[0][0]
    assert not found.saliency_hw.any()
    assert [own.value for own in family_of(found)] == [None, None]
    assert not any(own.values_hw.any() for own in family_of(found))
    other = bee(net, parameters, state=state).explain(inputs, classes(1), [8])[0][0]
    assert np.abs(family_of(other)[0].values_hw).max() < 1e-2  # the same picture at half precision


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("make", [Residual, lambda: Tailed(torch.tanh)])
def test_a_map_is_captums_integrated_gradients_of_the_tail(make, steps):
    """Captum's trapezoid rule has the same points; it halves the first and the last, and divides by n + 1 too."""
    net, image = seeded(make), smooth(1, SIDE, SIDE)
    own, maps, baseline = signed(net, image, 3, even(1, ("const",), steps=steps))
    one = bee(net, even())
    with one.adapter.borrowed():

        def tail(values):
            return one.tail(image.expand(len(values), -1, -1, -1), values)

        whole = captum.attr.IntegratedGradients(tail).attribute(
            maps[None], baseline[None], target=1, n_steps=steps + 1, method="riemann_trapezoid"
        )
        ends = [
            captum.attr.Saliency(tail).attribute(at[None].clone().requires_grad_(True), 1, abs=False)
            for at in (baseline, maps)
        ]
    wanted = whole + sum(ends) / 2 * (maps - baseline) / (steps + 1)
    wanted = wanted[0].sum(0).numpy()
    assert np.abs(own.values_hw - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("integrand", ["path", "relu_grad_act"])
@pytest.mark.parametrize("make", [Plain, Residual, Depthwise, InPlace, Untraceable])
def test_the_maps_and_the_selection_equal_their_twin(make, integrand):
    """A network cut behind the block, one with in-place operations, and one that cannot be traced."""
    net, image, target = seeded(make), smooth(2, 32, 32)[1:], 3
    families = ("normal", "uniform", "const") if make is Plain else FREE  # a blur brings its max pooling near ties
    parameters = even(6, families, steps=4, noise_steps=3, integrand=integrand)
    one = bee(net, parameters, side=32)
    found = one.explain(image, classes(target), [5])[0][0]
    with one.adapter.borrowed():
        maps = one.taps(image)[1][0][0].detach()
    generator, double = seed(5), oracles.double_copy(net)
    wanted, drops = [], []
    for number in range(6):
        family = families[number % len(families)]
        noisy = family in ("normal", "uniform")
        kind = "path" if integrand == "path" else "plain" if noisy else "rectified"
        baseline = FAMILIES[family](maps, generator, []).double()
        wanted.append(
            slow.bee_map(double, TAILS[make], maps.double(), baseline, target, steps=3 if noisy else 4, integrand=kind)
        )
        large = slow.bicubic(wanted[-1], (32, 32))
        drops.append(slow.average_drop(double, image[0].double(), target, large) if large.any() else None)
    assert [own.name for own in family_of(found)] == [*families, *families][:6]
    for own, twin, drop in zip(family_of(found), wanted, drops, strict=True):
        assert np.abs(own.values_hw - twin.numpy()).max() <= 1e-3 * float(twin.abs().max())
        assert own.value == (None if drop is None else pytest.approx(drop, abs=1e-2))
    values = [own.value for own in family_of(found)]
    best = values.index(min(value for value in values if value is not None))
    large = slow.bicubic(wanted[best], (32, 32)).numpy()
    assert np.abs(found.saliency_hw - large).max() <= 1e-3 * large.max()


def test_the_selected_map_of_a_transformer():
    """Its class token is kept; the points are the picture's tokens alone."""
    net, inputs = seeded(small_vit), smooth(2, 32, 32)
    found = bee(net, even(3, ("normal", "blur", "const")), side=32).explain(inputs, classes(0, 3), [1, 2])
    for own in found:
        assert own[0].saliency_hw.shape == (32, 32)
        assert own[0].saliency_hw.max() > 0
        assert all(one.values_hw.shape == (4, 4) for one in family_of(own[0]))


@pytest.mark.parametrize("make", [Plain, InPlace, Untraceable, small_vit])
def test_a_tail_has_gradients_by_the_maps_and_does_not_change_them(make):
    adapter = ModelAdapter(seeded(make), input_size=(32, 32))
    taps = adapter.network.taps(adapter.network.blocks()[-1:])
    with adapter.borrowed():
        logits, (maps,) = taps(smooth(2, 32, 32))
        own = maps.detach().clone().requires_grad_(True)
        again = taps.tail()(smooth(2, 32, 32), own)
        assert torch.equal(own, maps)
        assert torch.allclose(again, logits, atol=1e-6)
        (slopes,) = torch.autograd.grad(again[:, 1].sum(), own)
        (wanted,) = torch.autograd.grad(logits[:, 1].sum(), maps)
    assert slopes.abs().max() > 0
    assert torch.allclose(slopes, wanted, atol=1e-6)


# ---------------------------------------------------------------- the selection


@pytest.mark.parametrize("metric", ["average_drop_100", "average_increase_100", "insertion", "deletion", "pos", "neg"])
def test_more_draws_never_make_the_best_worse(metric):
    """The first draws are kept, and the map is the first one with the best value."""
    net, inputs = seeded(Depthwise), smooth(1, SIDE, SIDE)
    target = int(net(inputs).argmax())
    few, many = (bee(net, even(draws, metric=metric)).explain(inputs, classes(target), [5])[0][0] for draws in (3, 9))
    for own, same in zip(family_of(few), family_of(many), strict=False):
        assert own.name == same.name
        assert own.value == pytest.approx(same.value)
        assert np.allclose(own.values_hw, same.values_hw, atol=1e-6)
    sign = 1 if METRICS[metric].better == "higher" else -1
    merits = [[sign * own.value for own in family_of(one)] for one in (few, many)]
    assert max(merits[1]) >= max(merits[0]) - 1e-9
    for one, own in zip((few, many), merits, strict=True):
        picked = family_of(one)[own.index(max(own))].values_hw
        assert np.abs(one.saliency_hw - slow.bicubic(torch.tensor(picked).double(), (SIDE, SIDE)).numpy()).max() < 1e-6
        assert one.products.selected_by == metric


def test_a_map_without_a_value_loses_to_any_other():
    net, inputs, parameters = seeded(Residual), smooth(1, SIDE, SIDE), even(4, ("train", "blur"), pool=1)
    state = learned(bee(net, parameters), inputs, classes(1), [7])
    found = bee(net, parameters, state=state).explain(inputs, classes(1), [7])[0][0]
    assert [own.name for own in family_of(found)] == ["train", "blur"] * 2
    assert [own.value is None for own in family_of(found)] == [True, False] * 2
    assert found.saliency_hw.any()


def test_if_no_map_has_a_value_the_first_is_kept():
    net, inputs = seeded(Residual), smooth(1, SIDE, SIDE)
    other = int(net(inputs).argmin())
    found = bee(net, even(3, metric="pos")).explain(inputs, classes(other), [7])[0][0]
    assert [own.value for own in family_of(found)] == [None] * 3
    first = torch.tensor(family_of(found)[0].values_hw).double()
    assert np.abs(found.saliency_hw - slow.bicubic(first, (SIDE, SIDE)).numpy()).max() < 1e-6


def test_the_mean_of_all_maps_is_one_more_candidate():
    net, inputs = seeded(Residual), smooth(2, SIDE, SIDE)
    found = bee(net, even(5, with_mean=True)).explain(inputs, ClassProbability(torch.tensor([[0, 1], [2, 3]])), [5, 6])
    for one in (one for own in found for one in own):
        *drawn, mean = family_of(one)
        assert [own.name for own in family_of(one)] == [*FREE, "normal", "mean"]
        assert np.allclose(mean.values_hw, np.mean([own.values_hw for own in drawn], 0), atol=1e-7)


def test_a_metric_measures_the_probability_for_every_target():
    net, inputs = seeded(Residual), smooth(1, SIDE, SIDE)
    one, other = (
        bee(net, even(3)).explain(inputs, kind(torch.tensor([[1]])), [5])[0][0]
        for kind in (ClassProbability, ClassLogit)
    )
    assert [own.value for own in family_of(one)] == [own.value for own in family_of(other)]
    assert one.score != other.score


class OfNoClass:
    """The sum of all logits."""

    num_targets = 1

    def of(self, images):
        return self

    def score(self, logits, images):
        return logits.double().sum(1, keepdim=True)

    def direction(self, logits, index):
        return torch.ones_like(logits)

    @property
    def raw(self):
        return self


def test_a_target_of_no_class_is_refused():
    with pytest.raises(ModelError, match="probability of a class, and the target is of no single class"):
        bee(seeded(Residual), even()).explain(smooth(1, SIDE, SIDE), OfNoClass(), [5])


@pytest.mark.parametrize(("metric", "masks"), [("average_drop_100", 1), ("insertion", 29), ("neg", 10)])
def test_num_forwards_counts_the_passes_that_are_run(metric, masks):
    net, inputs = seeded(Residual), smooth(1, SIDE, SIDE)
    target, rows = int(net(inputs).argmax()), {"tail": 0, "module": 0}
    one = bee(net, even(4, metric=metric, steps=5, noise_steps=2), batch_size=1, images_per_pass=1)
    plain = one.tail

    def counted(images, values):
        rows["tail"] += len(values)
        return plain(images, values)

    one.tail = counted
    handle = net.register_forward_pre_hook(lambda _, given: rows.update(module=rows["module"] + len(given[0])))
    found = one.explain(inputs, classes(target), [5])[0][0]
    handle.remove()
    assert rows == {"tail": 2 * 3 + 2 * 6, "module": 1 + 4 * masks}  # and 1 for the score of the unmasked picture
    assert found.num_forwards == 18 + 4 * masks


# ---------------------------------------------------------------- the first pass

LEARNING = BeeParameters(draws=4, images=6, pool=3)
SEEDS = [50, 40, 30, 20, 10, 60]


@pytest.fixture(scope="module")
def net():
    return seeded(Residual)


@pytest.fixture(scope="module")
def state(net):
    return learned(bee(net, LEARNING), smooth(6, SIDE, SIDE), classes(0, 1, 2, 3, 4, 0), SEEDS)


def test_the_number_of_images_of_the_first_pass():
    asked = (BeeParameters(families=FREE), LEARNING, even(), even(families=("train", "blur"), pool=9))
    assert [num_learning_images(parse_method("bee"), own) for own in asked] == [5000, 6, 0, 9]
    assert num_learning_images(parse_method("bee"), BeeParameters(families=("blur",))) == 0
    wrapped = SmoothGradParameters(base=LEARNING)
    assert num_learning_images(parse_method("smoothgrad(bee)"), wrapped) == 6


def test_the_state_can_be_stored_and_read_back(net, state):
    again = load(save(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], own) and own.device.type == "cpu" for name, own in state.items())
    assert int(state["bandit.counts"].sum()) == 6
    assert (state["bandit.precisions"] >= 1).all()
    assert state["pool.maps"].dtype == torch.float16
    inputs, targets = smooth(2, SIDE, SIDE, seed=4), classes(0, 3)
    one, other = (bee(net, LEARNING, state=own).explain(inputs, targets, [1, 2]) for own in (state, again))
    for own, same in zip(one, other, strict=True):
        assert np.array_equal(own[0].saliency_hw, same[0].saliency_hw)


def test_the_pool_holds_the_first_images(net, state):
    assert state["pool.seeds"].tolist() == SEEDS[:3]
    _, (maps,) = bee(net, LEARNING).taps(smooth(6, SIDE, SIDE))
    assert torch.allclose(state["pool.maps"].float(), maps[:3].detach(), atol=1e-2)


def test_the_state_does_not_depend_on_how_images_arrive(net, state):
    learner, inputs = bee(net, LEARNING).learner(), smooth(6, SIDE, SIDE)
    for start, stop in ((0, 1), (1, 5), (5, 6)):
        learner.see(inputs[start:stop], classes(*[0, 1, 2, 3, 4, 0][start:stop]), SEEDS[start:stop])
    again = learner.state()
    assert all(torch.allclose(again[name].double(), own.double(), atol=1e-5) for name, own in state.items())


@pytest.mark.parametrize(("size", "images"), [(1, 1), (3, 2), (64, 32)])
def test_the_state_does_not_depend_on_batches(net, state, size, images):
    one = bee(net, LEARNING, batch_size=size, images_per_pass=images)
    again = learned(one, smooth(6, SIDE, SIDE), classes(0, 1, 2, 3, 4, 0), SEEDS)
    assert all(torch.equal(again[name], own) for name, own in state.items())


def test_each_image_is_used_once_with_its_first_target(net, state):
    targets = ClassProbability(torch.tensor([[0, 4], [1, 4], [2, 1], [3, 1], [4, 1], [0, 1]]))
    again = learned(bee(net, LEARNING), smooth(6, SIDE, SIDE), targets, SEEDS)
    assert all(torch.equal(again[name], own) for name, own in state.items())


def test_an_image_is_no_baseline_of_itself(net):
    """With the maps of others as baselines, its map is not empty."""
    parameters = even(8, ("train",), pool=3)
    inputs, targets = smooth(3, SIDE, SIDE), classes(0, 1, 2)
    known = learned(bee(net, parameters), inputs, targets, [1, 2, 3])
    found = bee(net, parameters, state=known).explain(inputs, targets, [1, 2, 3])
    for own in found:
        assert all(np.abs(one.values_hw).max() > 1e-3 for one in family_of(own[0]))
        assert len({one.values_hw.tobytes() for one in family_of(own[0])}) == 2


def test_the_main_pass_draws_what_the_posterior_prefers(net, state):
    """An arm that is known to be good is always drawn; otherwise the image's seed alone decides."""
    sure = {**state, "bandit.means": torch.zeros(5, 100), "bandit.precisions": torch.full((5, 100), 1e6)}
    with_images = bee(net, LEARNING, state=state)
    inputs, targets = smooth(2, SIDE, SIDE, seed=4), classes(0, 3)
    with with_images.adapter.borrowed():
        maps = with_images.taps(inputs)[1][0].detach()
    assert with_images.learned.bandit is not None
    context = with_images.learned.bandit.context(maps[0].double().mean((1, 2)))
    sure["bandit.means"][3] = context.float() * 100
    found = bee(net, LEARNING, state=sure).explain(inputs, targets, [1, 2])
    assert [own.name for own in family_of(found[0][0])] == ["const"] * 4
    free = bee(net, replace(LEARNING, draws=40), state=state).explain(inputs, targets, [1, 2])
    assert len({own.name for own in family_of(free[0][0])}) == 5


def test_without_a_state_it_learns_but_does_not_explain(net):
    with pytest.raises(ModelError, match="needs the state of its first pass"):
        bee(net, LEARNING).explain(smooth(1, SIDE, SIDE), classes(1), [1])


@pytest.mark.parametrize(
    ("other", "sides"),
    [
        ({"metric": "insertion"}, "metric average_drop_100, wanted insertion"),
        ({"families": ("blur", "train")}, r"families \['normal', .*\], wanted \['blur', 'train'\]"),
        ({"choice": "even"}, "choice bandit, wanted even"),
    ],
)
def test_a_state_of_other_parameters_is_refused(net, state, other, sides):
    with pytest.raises(ModelError, match=sides):
        bee(net, replace(LEARNING, **other), state=state)


def test_a_state_of_another_network_is_refused(state):
    with pytest.raises(ModelError, match=r"block .*, wanted .*; channels 12, wanted 16"):
        bee(seeded(Depthwise), LEARNING, state=state)
    with pytest.raises(ModelError, match=r"grid \[12, 12\], wanted \[16, 16\]"):
        bee(seeded(Residual), LEARNING, side=32, state=state)
    with pytest.raises(ModelError, match="no state of bee's first pass: it holds weight"):
        bee(seeded(Residual), LEARNING, state={"weight": torch.zeros(1)})


def test_a_non_finite_image_is_not_learned_from(net):
    inputs, targets = smooth(6, SIDE, SIDE), classes(0, 1, 2, 3, 4, 0)
    inputs[3] = float("nan")
    found = learned(bee(net, LEARNING), inputs, targets, SEEDS)
    assert found["pool.seeds"].tolist() == SEEDS[:3]
    assert int(found["bandit.counts"].sum()) == 5
    assert all(own.isfinite().all() for own in found.values())
    with pytest.raises(ModelError, match="finite feature maps in none of the images"):
        learned(bee(net, LEARNING), torch.full_like(inputs, float("nan")), targets, SEEDS)
    with pytest.raises(ModelError, match="finite feature maps in none of the images"):
        learned(bee(net, replace(LEARNING, families=FREE)), torch.full_like(inputs, float("nan")), targets, SEEDS)


def test_a_wrapper_passes_the_state_to_its_base(net):
    adapter = ModelAdapter(net, input_size=(SIDE, SIDE))
    parameters = SmoothGradParameters(samples=2, base=LEARNING)
    make = EXPLAINERS["smoothgrad"].func
    inputs, targets = smooth(6, SIDE, SIDE), classes(0, 1, 2, 3, 4, 0)
    one = make("smoothgrad(bee)", adapter, parameters)
    known = learned(one, inputs, targets, SEEDS)
    found = make("smoothgrad(bee)", adapter, parameters, state=known).explain(inputs[:2], classes(0, 1), [1, 2])
    assert all(own[0].saliency_hw.any() for own in found)
    assert found[0][0].products.selected_by == "average_drop_100"


def test_a_metric_costs_what_the_catalogue_states():
    masks = {
        name: len(kind.levels if issubclass(kind, WholeDrop) else kind.shares)
        for name, kind in SELECTION_METRICS.items()
    }
    assert masks == FORWARDS_TO_SELECT
