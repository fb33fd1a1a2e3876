"""Signed maps of methods that mask: the covariance of masks and scores by plain loops, and what speaks against."""

import numpy as np
import pytest
import torch

from blocksight.engine.catalog.composition import OF_COVARIANCE, OF_LOSSES, SIGNED, has_sign, parse_method
from blocksight.engine.catalog.entries import EXPLAINERS
from blocksight.engine.catalog.parameters import OcclusionParameters, RiseParameters, ScoreCamParameters, SiseParameters
from blocksight.engine.catalog.target_expressions import parse_formula
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.expressions import target_of, with_opposite
from tests.engine import oracles, planted
from tests.engine import slow_explainers as slow
from tests.engine.nets import Plain, seeded, smooth

SIZE = (32, 32)
RISE = {"num_masks": 40, "grid": 4, "keep": 0.4}


def both_maps(name, parameters, text="1", inputs=None, adapter=None, **options):
    """Per image the map of a target and that of its negative."""
    adapter = adapter or ModelAdapter(seeded(Plain), input_size=SIZE)
    inputs = smooth(1, *SIZE) if inputs is None else inputs
    explainer = make_explainer(name, adapter, parameters, batch_size=16, is_signed=True, **options)
    target = with_opposite(target_of([[parse_formula(text)]] * len(inputs), "softmax", "cpu"))
    return [[one.saliency_hw for one in own] for own in explainer.explain(inputs, target)]


def covariance(masks, scores):
    """`mean_k (m_k - mean m)(s_k - mean s)`, pixel by pixel."""
    mask_mean, score_mean = sum(masks) / len(masks), sum(scores) / len(scores)
    total = sum((mask - mask_mean) * (score - score_mean) for mask, score in zip(masks, scores, strict=True))
    return np.asarray(total / len(masks))


def twin_and_image():
    return oracles.double_copy(seeded(Plain).eval()), smooth(1, *SIZE)[0].double()


@torch.no_grad()
def scored(twin, image, masks):
    return [float(oracles.probability(twin((mask * image)[None])[0], 1)) for mask in masks]


def test_rise_is_the_covariance():
    twin, image = twin_and_image()
    masks = list(slow.rise_masks(SIZE, 0, **RISE))
    wanted = covariance([mask.numpy() for mask in masks], scored(twin, image, masks))
    ((own, against),) = both_maps("rise", RiseParameters(**RISE))
    assert own == pytest.approx(np.maximum(wanted, 0), abs=1e-8)
    assert against == pytest.approx(np.maximum(-wanted, 0), abs=1e-8)
    assert own.any()
    assert against.any()


def masks_of(maps):
    return [oracles.minmax(oracles.upsample(one[None], SIZE)[0]) for one in maps if one.max() > one.min()]


def test_scorecam_is_the_covariance():
    twin, image = twin_and_image()
    masks = masks_of(slow.last_maps(twin, image))
    wanted = covariance([mask.numpy() for mask in masks], scored(twin, image, masks))
    ((own, against),) = both_maps("scorecam", ScoreCamParameters(weights="probability"))
    assert own == pytest.approx(np.maximum(wanted, 0), abs=1e-7)
    assert against == pytest.approx(np.maximum(-wanted, 0), abs=1e-7)


def test_a_block_of_sise_is_the_covariance_of_the_masks_it_keeps():
    twin, image = twin_and_image()
    adapter = ModelAdapter(seeded(Plain), input_size=SIZE)
    block = adapter.network.blocks(())[-1].name
    explainer = make_explainer("sise", adapter, SiseParameters(), blocks=[block], batch_size=16, is_signed=True)
    target = with_opposite(target_of([[parse_formula("1")]], "softmax", "cpu"))
    (found,) = explainer.explain(smooth(1, *SIZE), target)
    for explanation, sign in zip(found, (1, -1), strict=True):
        kept = [slow.last_maps(twin, image)[k] for k in explanation.blocks[0].kept]
        masks = masks_of(kept)
        assert len(masks) > 1
        wanted = covariance([mask.numpy() for mask in masks], [sign * own for own in scored(twin, image, masks)])
        assert explanation.saliency_hw == pytest.approx(np.maximum(wanted, 0) / np.abs(wanted).max(), abs=1e-5)


def test_one_mask_has_no_covariance():
    adapter = ModelAdapter(seeded(Plain), input_size=SIZE)
    block = adapter.network.blocks(())[-1].name
    options = {"blocks": [block], "adapter": adapter}
    for own in both_maps("sise", SiseParameters(mu=0.999), **options)[0]:
        assert not own.any()


def test_occlusion_tells_what_is_lost_from_what_is_won():
    twin, image = twin_and_image()
    parameters = OcclusionParameters(window=8, stride=8)
    ((own, against),) = both_maps("occlusion", parameters)
    plain = make_explainer("occlusion", ModelAdapter(seeded(Plain), input_size=SIZE), parameters, batch_size=16)
    ((usual,),) = plain.explain(smooth(1, *SIZE), target_of([[parse_formula("1")]], "softmax", "cpu"))
    assert np.array_equal(own, usual.saliency_hw)
    whole = scored(twin, image, [torch.ones(SIZE)])[0]
    for top in range(0, 32, 8):
        for left in range(0, 32, 8):
            mask = torch.ones(SIZE, dtype=torch.float64)
            mask[top : top + 8, left : left + 8] = 0
            lost = whole - scored(twin, image, [mask])[0]
            assert own[top, left] - against[top, left] == pytest.approx(lost, abs=1e-7)


@pytest.mark.parametrize("name", ["rise", "scorecam", "occlusion", "ablationcam", "reciprocam", "feature-cam"])
def test_the_opposite_difference_swaps_the_parts(name):
    parameters = {"rise": RiseParameters(**RISE), "occlusion": OcclusionParameters(window=8, stride=8)}.get(name)
    ((own, against),), ((other, opposite),) = (both_maps(name, parameters, text) for text in ("1-2", "2-1"))
    assert own == pytest.approx(opposite, abs=1e-12)
    assert against == pytest.approx(other, abs=1e-12)
    assert own.any()
    assert against.any()
    if name not in ("feature-cam", "ablationcam", "reciprocam"):  # of which parts meet where a place is enlarged
        assert not (np.minimum(own, against) > 1e-12).any()


def test_feature_cam_keeps_one_scale():
    ((own, against),) = both_maps("gradcam", None, "1-2")
    ((sharp, dull),) = both_maps("feature-cam", None, "1-2")
    small, large = (sharp, dull) if own.max() < against.max() else (dull, sharp)
    assert small.max() < 0.9 * large.max()


@pytest.mark.parametrize("name", ["rise", "sise", "scorecam", "occlusion", "reciprocam"])
def test_what_speaks_against_a_difference_lies_on_the_other_object(name):
    adapter, (pixels, classes, boxes) = planted.trained_cnn(), planted.pairs(4, 5)
    parameters = {
        "rise": RiseParameters(num_masks=400, grid=6, keep=0.5),
        "occlusion": OcclusionParameters(window=12, stride=8),
    }.get(name)
    for picture, (a, b), places in zip(pixels, classes.tolist(), boxes, strict=True):
        ((own, against),) = both_maps(name, parameters, f"{a}-{b}", adapter.normalise(picture[None]), adapter)
        energies = [[planted.energy_inside(torch.from_numpy(one), box) for box in places] for one in (own, against)]
        assert energies[0][0] > energies[0][1]
        assert energies[1][1] > energies[1][0]


UNSIGNED = ("gradient", "fullgrad", "ucag", "smoothgrad", "smoothgrad(rise)", "feature-cam(sise)", "bee", "edges")


@pytest.mark.parametrize("name", UNSIGNED)
def test_a_sign_that_is_not_defined_is_none(name):
    assert not has_sign(parse_method(name))


def test_the_lists_hold_methods_of_the_catalogue():
    assert {*SIGNED, *OF_LOSSES, *OF_COVARIANCE} <= EXPLAINERS.keys()
