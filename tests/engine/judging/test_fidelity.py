"""The fidelity curve: maps from known scores must equal those that the methods make themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.explainers.sise import Sise
from blocksight.engine.judging import fidelity
from blocksight.engine.judging.fidelity import FULL, METHODS, SIMILARITIES, FidelityBench, rounded, similarities
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from tests.engine.nets import Depthwise, seeded, smooth

CLASSES = [0, 1, 2]


@pytest.fixture(scope="module")
def adapter():
    return ModelAdapter(seeded(Depthwise), input_size=(32, 32))


@pytest.fixture(scope="module")
def bench(adapter):
    return FidelityBench(adapter, batch_size=8, images_per_pass=3)


@pytest.fixture(scope="module")
def readings(bench):
    region = np.zeros((32, 32), bool)
    region[:16] = True
    return bench.readings(smooth(3, 32, 32), CLASSES, [0, 1, 2], [5, 6, 7], [region, None, "not annotated"])


def of(readings, method):
    return {one.image: one for one in readings if one.method == method}


def made(bench, method):
    """The maps of one method, from known scores."""
    inputs = smooth(3, 32, 32)
    with bench.adapter.borrowed():
        images = bench._scored(inputs, ClassProbability(torch.tensor(CLASSES)[:, None]), [5, 6, 7], [None] * 3)
        return bench.runs[method](images, [0, 1, 2])


def directly(adapter, parameters):
    sise = Sise(adapter, parameters, batch_size=8, images_per_pass=3)
    explained = sise.explain(smooth(3, 32, 32), ClassProbability(torch.tensor(CLASSES)[:, None]))
    return [one for (one,) in explained]


SISE = {method.name: method.setting for method in METHODS if method.kind == "selection"}
SISE |= {method.name: SiseParameters(budget=method.setting) for method in METHODS if method.kind == "budget"}


@pytest.mark.parametrize("name", [FULL, *SISE])
def test_a_map_from_known_scores_equals_the_methods_map(bench, adapter, name):
    for found, wanted in zip(made(bench, name), directly(adapter, SISE.get(name, SiseParameters())), strict=True):
        assert found.num_forwards == wanted.num_forwards
        assert [block.kept for block in found.blocks] == [block.kept for block in wanted.blocks]
        for own, other in zip(found.blocks, wanted.blocks, strict=True):
            assert np.abs(own.saliency_hw - other.saliency_hw).max() <= 1e-4


def test_full_sise_is_its_own_reference(readings):
    for one in of(readings, FULL).values():
        assert [one.values[name] for name in SIMILARITIES] == pytest.approx([1.0] * len(SIMILARITIES))
        assert one.num_forwards > 0


def test_every_method_explains_every_image_or_every_nth(readings):
    for method in METHODS:
        assert sorted(of(readings, method.name)) == [number for number in (0, 1, 2) if number % method.every == 0]


def test_a_budget_is_nearer_than_a_control(readings):
    worst = min(one.values["ssim"] for one in of(readings, "budget 0.4").values())
    assert worst > max(one.values["ssim"] for one in of(readings, "control: random").values())


def test_energy_is_measured_for_annotated_images(readings):
    assert "ebpg" in of(readings, FULL)[0].values
    assert "ebpg" not in of(readings, FULL)[1].values
    assert "ebpg" not in of(readings, FULL)[2].values


def test_only_a_budget_has_a_predicted_error(readings):
    assert of(readings, "budget 0.1")[0].values["map_error"] > 0
    assert "map_error" not in of(readings, FULL)[0].values


def test_readings_do_not_depend_on_other_images(bench, readings):
    (alone,) = of(bench.readings(smooth(3, 32, 32)[1:2], [1], [1], [6], [None]), "Ada-SISE").values()
    together = of(readings, "Ada-SISE")[1]
    assert alone.num_forwards == together.num_forwards
    assert alone.values["block_correlation"] == pytest.approx(together.values["block_correlation"], abs=1e-4)


def test_a_random_subset_scores_its_share_and_drops_the_rest(bench):
    (full, *_), (some, *_) = made(bench, FULL), made(bench, "random 30% of the masks")
    sizes = [len(block.kept) for block in full.blocks]
    assert some.num_forwards == sum(-(-3 * size // 10) for size in sizes) < full.num_forwards
    assert np.abs(some.saliency_hw - full.saliency_hw).max() > 0.01


def test_an_image_without_a_finite_map_has_no_reading(adapter):
    inputs = smooth(2, 32, 32)
    inputs[1] = torch.nan
    bench = FidelityBench(adapter, batch_size=8, images_per_pass=2)
    found = bench.readings(inputs, [0, 1], [0, 1], [5, 6], [None, None])
    assert {one.image for one in found} == {0}


def test_a_block_without_a_map_counts_as_correlation_zero(adapter):
    (full, *_) = directly(adapter, SiseParameters())
    blind = replace(full, blocks=(replace(full.blocks[0], saliency_hw=None), *full.blocks[1:]))
    found = similarities(blind, full)
    assert found["worst_block_correlation"] == 0
    assert found["block_correlation"] == pytest.approx(1 - 1 / len(full.blocks))


@pytest.mark.parametrize(("precision", "step"), [("float16", 2**-10), ("bfloat16", 2**-7)])
def test_rounding_errors_match_the_precisions_step(adapter, precision, step):
    inputs = smooth(3, 32, 32)
    with adapter.borrowed(), torch.inference_mode():
        wanted, found = adapter.logits(inputs), rounded(adapter, precision)(inputs)
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert step / 16 < error < 8 * step
    assert not any(child._forward_hooks for child in adapter.module.modules())


def test_the_curves_of_a_bench_have_half_the_steps():
    assert len(fidelity._Insertion.shares) == len(fidelity._Deletion.shares) == 15
    assert fidelity._Insertion.shares[0] == fidelity._Deletion.shares[-1] == 1
    assert fidelity._Insertion.shares[-1] == fidelity._Deletion.shares[0] == 0
