"""The contextual bandit with known rewards."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from blocksight.engine.explainers.bandit import CONTEXT_LENGTH, Bandit, History

PULLS = 250


def taught(chance, num_arms, num_features, pulls=PULLS):
    """A bandit after pulls that are good with `chance(arm, features)`, the arms it pulled, and a generator."""
    own = torch.Generator().manual_seed(3)
    images = 2 * torch.randn(pulls, num_features, generator=own) + 3
    bandit, pulled = Bandit.untrained(images, num_arms), []
    for features in images:
        arm = bandit.choice(bandit.context(features), own)
        bandit.update(arm, features, float(torch.rand((), generator=own)) < chance(arm, features))
        pulled.append(arm)
    return bandit, pulled, own


def test_the_best_arm_is_learned():
    """One arm is good nine times of ten, four others three times."""
    bandit, pulled, own = taught(lambda arm, _: 0.9 if arm == 3 else 0.3, 5, 30)
    assert pulled[-100:].count(3) > 90
    assert (
        sum(bandit.choice(bandit.context(2 * torch.randn(30, generator=own) + 3), own) == 3 for _ in range(200)) > 180
    )
    assert bandit.counts.tolist() == [pulled.count(arm) for arm in range(5)]


def test_an_arm_that_depends_on_the_image_is_learned():
    """One arm is good where the first feature is above its mean, the other where it is below."""

    def chance(arm, features):
        return 0.95 if (arm == 0) == bool(features[0] > 3) else 0.05

    bandit, pulled, own = taught(chance, 2, 4)
    others = [2 * torch.randn(4, generator=own) + 3 for _ in range(200)]
    right = [bandit.choice(bandit.context(one), own) == int(one[0] <= 3) for one in others if abs(one[0] - 3) > 0.5]
    assert np.mean(right) > 0.85
    assert 0.3 < np.mean(pulled) < 0.7


def test_precisions_begin_at_one_and_never_fall():
    bandit = Bandit.untrained(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), 2)
    own = torch.Generator().manual_seed(1)
    assert (bandit.precisions == 1).all()
    assert not bandit.means.any()
    for number in range(20):
        before = bandit.precisions.clone()
        bandit.update(number % 2, torch.randn(8, generator=own), number % 3 == 0)
        assert (bandit.precisions >= before).all()
        assert torch.equal(bandit.precisions[1 - number % 2], before[1 - number % 2])
        assert (bandit.precisions > before).any()


@pytest.mark.parametrize("is_good", [True, False])
def test_an_update_is_the_minimum_that_scipy_finds(is_good):
    """The minimum over the weights, for the updated layer; then `q + u^2 p (1 - p)`."""
    images = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    bandit = Bandit.untrained(images, 2)
    bandit.means[1] += 0.1
    bandit.precisions[1] += torch.arange(CONTEXT_LENGTH) / 50
    mean, precision = bandit.means[1].numpy().copy(), bandit.precisions[1].numpy().copy()
    bandit.update(1, images[4], is_good)
    context, sign = bandit.context(images[4]).numpy(), 1 if is_good else -1

    def loss(weights):
        return (precision * (weights - mean) ** 2).sum() / 2 + np.logaddexp(0, -sign * weights @ context)

    best = minimize(loss, mean, tol=1e-10).x
    moved = np.abs(best - mean).max()
    assert moved > 5e-3
    assert np.abs(bandit.means[1].numpy() - best).max() < 0.1 * moved
    chance = 1 / (1 + np.exp(-bandit.means[1].numpy() @ context))
    assert np.abs(bandit.precisions[1].numpy() - (precision + context**2 * chance * (1 - chance))).max() < 1e-12


def test_the_layer_that_makes_contexts_learns_too():
    bandit = Bandit.untrained(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), 2)
    bandit.means[0] += 0.1
    before, features = bandit.weight.clone(), torch.ones(8)
    odds = bandit.means[0] @ bandit.context(features)
    held = bandit.means[0].clone()
    bandit.update(0, features, True)
    assert not torch.equal(bandit.weight, before)
    assert held @ bandit.context(features) > odds


def test_a_constant_feature_is_not_divided_by_zero():
    images = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    images[:, 1] = 7
    bandit = Bandit.untrained(images, 2)
    assert bandit.context(images[0]).isfinite().all()
    assert bandit.centre[1] == 7


def test_a_bandit_equals_the_one_of_its_state():
    bandit, _, own = taught(lambda arm, _: 0.9 if arm else 0.1, 2, 4, pulls=10)
    again, features = Bandit.of_state(bandit.state()), torch.randn(4, generator=own)
    assert torch.allclose(again.context(features), bandit.context(features), atol=1e-6)
    assert all(tensor.is_contiguous() for tensor in bandit.state().values())
    states = [own.get_state()] * 2
    choices = [
        one.choice(one.context(features), torch.Generator().set_state(state))
        for one, state in zip((bandit, again), states, strict=True)
    ]
    assert choices[0] == choices[1]


def test_rewards_are_ranks_among_earlier_values():
    higher, lower = History(True), History(False)
    values = [5.0, 7.0, 6.0, 1.0, 6.0, None, 9.0]
    assert [higher.reward(value) for value in values] == [0.5, 1.0, 0.5, 0.0, 2.5 / 4, 0.0, 1.0]
    assert [lower.reward(value) for value in values] == [0.5, 0.0, 0.5, 1.0, 1.5 / 4, 0.0, 0.0]
    assert [History(True, counts_rises=True).reward(value) for value in (100.0, 0.0, None)] == [1.0, 0.0, 0.0]
