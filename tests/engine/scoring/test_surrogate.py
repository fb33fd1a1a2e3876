"""The surrogate: its kernel, design, predictions and errors against slow twins in plain numpy, and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from blocksight.engine.model.resample import pooled, upsampling
from blocksight.engine.scoring import surrogate
from blocksight.engine.scoring.surrogate import (
    Known,
    distances,
    matern,
    median_distance,
    padded,
    shares_by_block,
    signed_root,
)


def points(count, dimensions=5, seed=0):
    return torch.rand(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def impute(rows, anchors, scores, guess):
    (found,) = surrogate.impute([Known(rows, anchors, scores, guess)])
    return found


def spread(rows, weights, count, scale):
    return surrogate.design_order(distances(rows, rows)[None], weights[None], count, torch.tensor([scale]))[0]


def slow_matern(one, other, scale):
    far = math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True))) * math.sqrt(5) / scale
    return (1 + far + far**2 / 3) * math.exp(-far)


def slow_kernel(rows, scale):
    return np.array([[slow_matern(one, other, scale) for other in rows] for one in rows])


def test_the_kernel_equals_its_formula():
    rows = points(7)
    assert np.abs(matern(distances(rows, rows), 0.8).numpy() - slow_kernel(rows.tolist(), 0.8)).max() <= 1e-12


# ---------------------------------------------------------------- shares


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 250))
def test_shares_add_up_and_never_fall(sizes, count):
    given_now, given_next = shares_by_block(sizes, count), shares_by_block(sizes, count + 1)
    assert sum(given_now) == min(count, sum(sizes))
    assert all(0 <= own <= size for own, size in zip(given_now, sizes, strict=True))
    assert all(one <= other for one, other in zip(given_now, given_next, strict=True)) or count + 1 < 5 * len(sizes)


def test_shares_by_hand():
    assert shares_by_block([100, 400], 30) == [10, 20]
    assert shares_by_block([2, 400], 30) == [2, 28]
    assert shares_by_block([1, 100, 100], 6) == [1, 3, 2]
    assert shares_by_block([0, 9], 4) == [0, 4]


# ---------------------------------------------------------------- design


def slow_design(rows, weights, count, scale):
    """Each step conditions on all that was chosen before, with a dense solve."""
    kernel = slow_kernel(rows, scale)
    chosen = []
    for _ in range(count):
        left = []
        for row in range(len(rows)):
            known = kernel[np.ix_(chosen, chosen)]
            cross = kernel[chosen, row]
            variance = kernel[row, row] - (cross @ np.linalg.solve(known, cross) if chosen else 0.0)
            left.append(-1.0 if row in chosen else variance * weights[row])
        chosen.append(int(np.argmax(left)))
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_the_design_takes_what_is_least_known(seed):
    rows = points(14, seed=seed)
    weights = 0.5 + points(14, 1, seed=seed + 9)[:, 0]
    assert spread(rows, weights, 8, 0.6).tolist() == slow_design(rows.tolist(), weights.tolist(), 8, 0.6)


def test_a_longer_design_begins_with_the_shorter_one():
    rows, weights = points(20), torch.ones(20, dtype=torch.float64)
    assert spread(rows, weights, 12, 0.6)[:5].tolist() == spread(rows, weights, 5, 0.6).tolist()


def test_a_design_of_everything_has_every_row_once_and_copies_come_last():
    rows = points(6).repeat(2, 1)
    order = spread(rows, torch.ones(12, dtype=torch.float64), 12, 0.6).tolist()
    assert sorted(order) == list(range(12))
    assert sorted(row % 6 for row in order[:6]) == list(range(6))


def test_designs_of_several_images_are_those_of_each():
    rows = [points(size, seed=size) for size in (14, 9, 20)]
    weights = [0.5 + points(len(own), 1, seed=1)[:, 0] for own in rows]
    scales = torch.tensor([0.6, 0.8, 0.5])
    together = torch.zeros(3, 20, 20, dtype=torch.float64)
    for place, own in enumerate(rows):
        together[place, : len(own), : len(own)] = distances(own, own)
    found = surrogate.design_order(together, padded(weights, value=-1), 9, scales)
    for own, weight, scale, order in zip(rows, weights, scales.tolist(), found, strict=True):
        assert order.tolist() == spread(own, weight, 9, scale).tolist()


# ---------------------------------------------------------------- predictions


def slow_impute(rows, anchors, scores, guess):
    """Leave-one-out by leaving each out, over all scales and noises; then the process's mean, entry by entry."""
    rows = np.asarray(rows)
    middle = float(median_distance(torch.tensor(rows)))
    centred = np.sqrt(guess) - np.sqrt(guess).mean()
    trend = 0.3 * np.stack([np.ones(len(rows)), centred / (centred.std() + 1e-9)], 1)
    mean, known = np.sqrt(guess), np.sqrt(scores)
    best = None
    for scale in surrogate.SCALES:
        kernel = slow_kernel(rows.tolist(), scale * middle) + trend @ trend.T
        for noise in surrogate.NOISES:
            missed = []
            for place, anchor in enumerate(anchors):
                others = [one for one in anchors if one != anchor]
                residual = np.delete(known, place) - mean[others]
                solved = np.linalg.solve(kernel[np.ix_(others, others)] + noise * np.eye(len(others)), residual)
                missed.append((known[place] - mean[anchor] - kernel[anchor, others] @ solved) ** 2)
            if best is None or np.mean(missed) < best[0]:
                best = (np.mean(missed), kernel, noise)
    missed, kernel, noise = best
    inverse = np.linalg.inv(kernel[np.ix_(anchors, anchors)] + noise * np.eye(len(anchors)))
    residual = known - mean[anchors]
    found = mean + kernel[:, anchors] @ inverse @ residual
    found = np.maximum(np.sign(found) * found**2, 0)
    found[anchors] = scores
    variance = residual @ inverse @ residual / len(anchors)
    posterior = kernel - kernel[:, anchors] @ inverse @ kernel[anchors] + noise * np.eye(len(rows))
    posterior[anchors] = posterior[:, anchors] = 0  # what was run is known
    squared_errors = {}
    for place, anchor in enumerate(anchors):
        others = [one for one in anchors if one != anchor]
        own = np.linalg.inv(kernel[np.ix_(others, others)] + noise * np.eye(len(others)))
        missing = residual[place] - kernel[anchor, others] @ own @ np.delete(residual, place)
        foreseen = kernel[anchor, anchor] + noise - kernel[anchor, others] @ own @ kernel[others, anchor]
        squared_errors[anchor] = missing**2 / (variance * foreseen)
    return found, 1 - missed / known.var(), variance * posterior, squared_errors


def example(seed=0, count=24, run=9):
    rows = points(count, 3, seed)
    truth = (rows @ torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64) / 2).square()
    guess = (truth * 0.7 + 0.05 * points(count, 1, seed + 1)[:, 0]).clamp(0, 1)
    return rows, spread(rows, torch.ones(count, dtype=torch.float64), run, 0.8), truth, guess


def of_block(anchors, block):
    return ((anchors >= block.start) & (anchors < block.stop)).nonzero().flatten()


@pytest.mark.parametrize("seed", range(3))
def test_predictions_equal_their_twin(seed):
    rows, anchors, truth, guess = example(seed)
    found = impute(rows, anchors, truth[anchors], guess)
    wanted, r2, *_ = slow_impute(rows.numpy(), anchors.tolist(), truth[anchors].numpy(), guess.numpy())
    assert np.abs(found.scores.numpy() - wanted).max() <= 1e-6
    assert found.r2.item() == pytest.approx(r2, abs=1e-6)


def test_predictions_for_several_images_are_those_for_each():
    examples = [example(seed, count, run) for seed, count, run in ((0, 24, 9), (1, 30, 5), (2, 12, 12))]
    known = [Known(rows, anchors, truth[anchors], guess) for rows, anchors, truth, guess in examples]
    known[1] = Known(known[1].rows, known[1].anchors, known[1].scores, None)
    for one, found in zip(known, surrogate.impute(known), strict=True):
        alone = impute(one.rows, one.anchors, one.scores, one.guess)
        assert torch.allclose(found.scores, alone.scores, rtol=0, atol=1e-12)
        assert found.r2.item() == pytest.approx(alone.r2.item(), abs=1e-9)
        assert found.cross.shape == alone.cross.shape
        block, maps = slice(2, 11), points(9, 6)
        apart = distances(one.rows[block], one.rows[block])
        wanted = alone.map_error(block, of_block(one.anchors, block), maps, apart).item()
        measured = of_block(one.anchors, block)
        assert found.map_error(block, measured, maps, apart).item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("guessed", [False, True])
def test_what_was_run_stays_and_the_rest_is_near(guessed):
    rows, anchors, truth, guess = example(count=60, run=20)
    found = impute(rows, anchors, truth[anchors], guess if guessed else None)
    assert torch.equal(found.scores[anchors], truth[anchors])
    assert (found.scores - truth).abs().max() < 0.02
    assert found.r2 > 0.95


def test_a_score_below_zero_keeps_its_sign():
    rows, anchors, truth, _ = example(count=40, run=15)
    found = impute(rows, anchors, (truth - 0.5)[anchors], None)
    assert (found.scores - (truth - 0.5)).abs().max() < 0.1
    assert signed_root(torch.tensor([-4.0, 0.0, 9.0])).tolist() == [-2.0, 0.0, 3.0]


def test_scores_of_nothing_but_noise_say_so():
    rows, anchors, _, _ = example(count=80, run=40)
    noise = points(80, 1, seed=3)[:, 0]
    assert impute(rows, anchors, noise[anchors], None).r2 < 0.3


# ---------------------------------------------------------------- errors of a map


def test_the_maps_error_equals_its_twin():
    rows, anchors, truth, guess = example(count=24, run=8)
    maps = points(24, 6, seed=5)
    found = impute(rows, anchors, truth[anchors], guess)
    scores, _, posterior, squared_errors = slow_impute(
        rows.numpy(), anchors.tolist(), truth[anchors].numpy(), guess.numpy()
    )
    block = slice(4, 20)
    whole = scores[block] @ maps.numpy()[block]
    shape = whole - whole.mean()
    unit = shape / np.linalg.norm(shape)
    project = np.eye(6) - np.ones((6, 6)) / 6 - np.outer(unit, unit)
    slopes = 2 * np.sqrt(scores[block])[:, None] * maps.numpy()[block] @ project
    covariance = slopes.T @ posterior[block, block] @ slopes
    own = [missed for anchor, missed in squared_errors.items() if 4 <= anchor < 20]
    missed = (sum(own) + surrogate.PRIOR_WEIGHT) / (len(own) + surrogate.PRIOR_WEIGHT)
    wanted = math.sqrt(missed * np.trace(covariance)) / np.linalg.norm(shape)
    apart = distances(rows[block], rows[block])
    assert found.map_error(block, of_block(anchors, block), maps[block], apart).item() == pytest.approx(
        wanted, rel=1e-4
    )


def test_what_was_run_has_no_error():
    rows, anchors, truth, _ = example(count=30, run=30)
    found = impute(rows, anchors, truth[anchors], None)
    assert found.map_error(slice(0, 30), slice(0, 30), points(30, 6), distances(rows, rows)).item() == 0


# ---------------------------------------------------------------- pooling


@pytest.mark.parametrize(("native", "full", "cells"), [((7, 5), (28, 30), (4, 3)), ((2, 2), (9, 9), (14, 14))])
def test_pooled_maps_are_the_means_of_the_upsampled_ones(native, full, cells):
    maps = torch.rand(3, *native, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upsampled = upsampling(native, full, maps.device)(maps)
    wanted = functional.adaptive_avg_pool2d(upsampled[None], cells)[0]
    assert torch.allclose(pooled(maps, full, cells), wanted, atol=1e-12)
