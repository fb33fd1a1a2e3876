"""SISE with a budget: which masks are measured, what is predicted for the rest, and invariances."""

import numpy as np
import pytest
import torch
from torch import nn

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.budget import Candidates, sample
from blocksight.engine.explainers.sise import Sise
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.head import cheap_head
from blocksight.engine.model.resample import upsampling
from blocksight.engine.model.targets import ClassProbability
from tests.engine.comparing import assert_close, assert_same_bits, explained
from tests.engine.nets import Depthwise, Plain, Residual, from_zoo, seeded, smooth
from tests.engine.planted import SIDE, small_vit

CLASSES = [[0], [1], [2], [3]]


def adapter_of(net):
    return ModelAdapter(seeded(net), input_size=(32, 32))


def budgeted(budget, classes=None, net=Depthwise, images=4, **options):
    classes = classes or CLASSES[:images]
    return explained(adapter_of(net), smooth(images, 32, 32), classes, SiseParameters(budget=budget), **options)


# ---------------------------------------------------------------- the head


class Pooled(nn.Module):
    """Pooling and a linear layer behind the last block's maps: an affine head, unlike convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    def forward(self, x):
        return self.head(self.stem(x))


class Deep(Pooled):
    """A head that is not a sum over its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


@pytest.mark.parametrize(("net", "is_affine"), [(Pooled, True), (Deep, False)])
def test_the_heads_scores_are_those_of_the_masked_maps(net, is_affine):
    adapter, inputs = adapter_of(net), smooth(2, 32, 32)
    blocks = adapter.network.blocks()
    head = cheap_head(adapter, blocks[-1])
    assert head is not None
    assert head.is_affine == is_affine
    maps = adapter.module.stem(inputs)[1].detach()
    masks = torch.rand(9, *maps.shape[1:], generator=torch.Generator().manual_seed(0))
    target = ClassProbability(torch.tensor([[0, 1], [3, 4]]))
    found = head.scores(maps, masks, target, 1)
    wanted = torch.stack([adapter.module.head((maps * mask)[None])[0].double().softmax(0)[[3, 4]] for mask in masks])
    assert torch.allclose(found, wanted.detach(), atol=1e-6)


def transformer():
    """The head behind its last block is a whole encoder layer."""
    net = seeded(small_vit)
    nn.init.normal_(net.heads.head.weight, generator=torch.Generator().manual_seed(0))  # torchvision begins with zeros
    return ModelAdapter(net, input_size=(SIDE, SIDE))


def test_a_slow_head_is_not_run():
    adapter = transformer()
    assert cheap_head(adapter, adapter.network.blocks()[-1]) is None


def test_without_forwards_and_without_a_head_there_is_no_map():
    adapter = transformer()
    with pytest.raises(ModelError, match="take a budget above 0"):
        Sise(adapter, SiseParameters(budget=0))


# ---------------------------------------------------------------- the number of forwards


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_number_of_masks_is_kept(budget):
    for own in budgeted(budget):
        assert own[0].num_forwards == budget
        assert own[0].quality is not None
        assert own[0].quality.r2 <= 1
        assert own[0].quality.map_error >= 0


def test_a_share_counts_the_images_own_masks():
    for own, full in zip(budgeted(0.4), budgeted(None), strict=True):
        assert own[0].num_forwards == np.ceil(0.4 * full[0].num_forwards)
        assert [block.kept for block in own[0].blocks] == [block.kept for block in full[0].blocks]


def test_a_budget_of_all_masks_equals_sise():
    for own, full in zip(budgeted(10_000), budgeted(None), strict=True):
        assert own[0].num_forwards == full[0].num_forwards
        assert own[0].quality is None
        assert np.array_equal(own[0].saliency_hw, full[0].saliency_hw)


def test_a_budget_of_zero_gives_the_heads_scores():
    adapter, inputs = adapter_of(Pooled), smooth(1, 32, 32)
    ((found,),) = explained(adapter, inputs, [[2]], SiseParameters(budget=0))
    assert found.num_forwards == 0
    assert found.quality is None
    (block,) = found.blocks
    maps = adapter.module.stem(inputs)[0].detach().double()[list(block.kept)]
    upsample = upsampling((16, 16), (32, 32), maps.device)
    masks, varied = upsample.normalise(maps)
    pooled = torch.nn.functional.adaptive_avg_pool2d(upsample(masks), (16, 16)).float()
    features = adapter.module.stem(inputs)[0].detach()
    scores = [adapter.module.head((features * mask)[None])[0].double().softmax(0)[2].item() for mask in pooled]
    total = sum(q * mask / upsample.mass(mask[None]) for q, mask in zip(scores, masks, strict=True))
    saliency = upsample(total)
    wanted = (saliency - saliency.min()) / (saliency.max() - saliency.min())
    assert varied.all()
    assert np.abs(found.saliency_hw - wanted.detach().numpy()).max() <= 1e-5


def test_auto_measures_more_masks_for_a_larger_error(monkeypatch):
    adapter = ModelAdapter(from_zoo("resnet18", 0), input_size=(64, 64))

    def forwards(budget):
        found = explained(adapter, smooth(1, 64, 64), [[1]], SiseParameters(budget=budget))
        return [own[0].num_forwards for own in found]

    monkeypatch.setattr("blocksight.engine.explainers.budget.MAP_ERROR", 1e9)
    easy = forwards("auto")
    monkeypatch.setattr("blocksight.engine.explainers.budget.MAP_ERROR", 0.0)
    hard, full = forwards("auto"), forwards(None)
    assert easy == [max(20, np.ceil(0.03 * every)) for every in full]
    assert hard == [np.ceil(0.5 * every) for every in full]


# ---------------------------------------------------------------- completion


def completed(above, budget=0.4, **options):
    return explained(
        adapter_of(Depthwise),
        smooth(4, 32, 32),
        CLASSES,
        SiseParameters(budget=budget, complete_above=above),
        **options,
    )


@pytest.mark.parametrize("budget", [2, 0.4, "auto"])
def test_a_completed_image_is_sise_bit_for_bit(budget):
    for own, full in zip(completed(0.0, budget), budgeted(None), strict=True):
        assert own[0].was_completed
        assert own[0].quality is None
        assert_same_bits(own[0], full[0])


def test_an_image_below_the_bound_is_not_completed():
    for own, cheap in zip(completed(1e9), budgeted(0.4), strict=True):
        assert not own[0].was_completed
        assert own[0].quality == cheap[0].quality
        assert_same_bits(own[0], cheap[0])


@pytest.mark.parametrize(("batch_size", "images_per_pass"), [(3, 1), (8, 4), (64, 2)])
def test_only_the_images_above_the_bound_are_completed(batch_size, images_per_pass):
    cheap, full = budgeted(0.4), budgeted(None)
    errors = [own[0].quality.map_error for own in cheap]
    bound = sum(sorted(errors)[1:3]) / 2
    found = completed(bound, batch_size=batch_size, images_per_pass=images_per_pass)
    assert [own[0].was_completed for own in found] == [error > bound for error in errors]
    for own, one, other in zip(found, cheap, full, strict=True):
        wanted = other if own[0].was_completed else one
        assert own[0].num_forwards == wanted[0].num_forwards
        assert_close(own[0], wanted[0])


def test_no_mask_is_run_twice():
    adapter, inputs = adapter_of(Depthwise), smooth(1, 32, 32)
    sise = Sise(adapter, SiseParameters(budget=0.4))
    with adapter.borrowed():
        candidates = sise.capture(inputs, ClassProbability(torch.tensor([[0]])))[0].candidates
    rounds = []

    def run(wanted):
        rounds.append(torch.cat([rows for _, _, rows in wanted]).tolist())
        return [rows[:, None].double() % 7 + 1 for _, _, rows in wanted]

    (found,) = sample(run, [candidates], 1, 0.4, complete_above=0.0)
    num_masks = sum(candidates.sizes)
    assert [len(rows) for rows in rounds] == [np.ceil(0.4 * num_masks), num_masks - np.ceil(0.4 * num_masks)]
    assert sorted(rounds[0] + rounds[1]) == list(range(num_masks))
    assert found.scores[:, 0].tolist() == [row % 7 + 1 for row in range(num_masks)]


def test_one_poor_target_completes_the_image_for_all():
    cheap = budgeted(0.4, [[0, 3]], images=1)[0]
    low, high = sorted(one.quality.map_error for one in cheap)
    parameters = SiseParameters(budget=0.4, complete_above=(low + high) / 2)
    ((first, second),) = explained(adapter_of(Depthwise), smooth(1, 32, 32), [[0, 3]], parameters)
    assert first.was_completed
    assert second.was_completed


@pytest.mark.parametrize("budget", [None, 0])
def test_completion_needs_a_budget_above_zero(budget):
    with pytest.raises(ValueError, match=r"complete_above 0.5 needs a budget above 0, got (none|0)"):
        SiseParameters(budget=budget, complete_above=0.5)


@pytest.mark.parametrize("above", [-0.1, float("nan")])
def test_a_bound_is_at_least_zero(above):
    with pytest.raises(ValueError, match="complete_above must be at least 0, got"):
        SiseParameters(budget=0.1, complete_above=above)


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("budget", [9, "auto"])
@pytest.mark.parametrize(("batch_size", "images_per_pass"), [(1, 1), (3, 2), (64, 4)])
def test_a_map_does_not_depend_on_the_packing(budget, batch_size, images_per_pass):
    wanted = budgeted(budget)
    found = budgeted(budget, batch_size=batch_size, images_per_pass=images_per_pass)
    for one, other in zip(found, wanted, strict=True):
        assert one[0].num_forwards == other[0].num_forwards
        assert_close(one[0], other[0])


def test_not_a_single_bit_depends_on_other_images():
    adapter, inputs, parameters = adapter_of(Depthwise), smooth(4, 32, 32), SiseParameters(budget=9)
    together = explained(adapter, inputs, CLASSES, parameters)
    for image, wanted in enumerate(together):
        ((alone,),) = explained(adapter, inputs[image][None], [CLASSES[image]], parameters)
        assert np.array_equal(alone.saliency_hw, wanted[0].saliency_hw)
        assert alone.quality == wanted[0].quality


@pytest.mark.parametrize("budget", [9, 0.4, "auto"])
def test_images_computed_together_as_on_a_gpu_equal_those_computed_alone(budget, monkeypatch):
    wanted = budgeted(budget)
    monkeypatch.setattr("blocksight.engine.explainers.budget._groups", lambda images: [images] if images else [])
    for one, other in zip(budgeted(budget), wanted, strict=True):
        assert one[0].num_forwards == other[0].num_forwards
        assert (one[0].quality is None) == (other[0].quality is None)
        if other[0].quality is not None:
            assert one[0].quality.map_error == pytest.approx(other[0].quality.map_error, rel=1e-6)
        assert_close(one[0], other[0])


def test_several_targets_share_the_measured_masks():
    both = budgeted(9, [[0, 3]] * 2, images=2)
    for first, second in both:
        assert first.num_forwards == second.num_forwards == 9
        assert not np.array_equal(first.saliency_hw, second.saliency_hw)
        assert first.quality != second.quality


@pytest.mark.parametrize("net", [Plain, Residual, Depthwise])
def test_more_forwards_are_closer_to_sise(net):
    full = budgeted(None, net=net)

    def distance(budget):
        found = budgeted(budget, net=net)
        pairs = [pair for own, all_run in zip(found, full, strict=True) for pair in zip(own, all_run, strict=True)]
        maps = [
            (one.saliency_hw, other.saliency_hw)
            for own, all_run in pairs
            for one, other in zip(own.blocks, all_run.blocks, strict=True)
            if other.saliency_hw is not None
        ]
        return np.mean([np.abs(one - other).mean() for one, other in maps])

    assert distance(0.8) < distance(0.3)
    assert distance(0.8) < 0.05


@pytest.mark.parametrize("spoilt", ["image", "weights"])
def test_a_non_finite_value_reaches_the_map(spoilt):
    adapter, inputs = adapter_of(Depthwise), smooth(2, 32, 32)
    if spoilt == "image":
        inputs[1, 0, 3, 3] = torch.nan
    else:
        adapter.module.head.bias.data[0] = torch.inf
    found = explained(adapter, inputs, [[0], [1]], SiseParameters(budget=6))
    assert np.isnan(found[1][0].saliency_hw).all()
    assert np.isfinite(found[0][0].saliency_hw).all() == (spoilt == "image")


def test_an_image_without_masks_has_an_empty_map():
    candidates = Candidates(0, [torch.zeros(0, 4, 4).double()], [torch.zeros(0).double()], torch.zeros(4, 4), (32, 32))
    assert candidates.sizes == [0]
    net = seeded(Depthwise)
    net.head.weight.data.zero_()
    found = explained(ModelAdapter(net, input_size=(32, 32)), smooth(1, 32, 32), [[0]], SiseParameters(budget=6))
    assert found[0][0].num_forwards == 0
    assert not found[0][0].saliency_hw.any()
