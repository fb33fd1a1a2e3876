"""The scorer: packing in numbers, scores one at a time, and the layer map of V4 through its parts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import upsampling
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.saliency import minmax
from blocksight.engine.scoring.forward import BufferedForward, make_forward
from blocksight.engine.scoring.perturb import BASELINES, Perturbation, perturbation
from blocksight.engine.scoring.scorer import MaskSet, Scorer, pack
from tests.engine import oracles
from tests.engine.nets import Plain, seeded, smooth

# ---------------------------------------------------------------- packing


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 16))
def test_packing_loses_nothing_and_fills_every_batch_but_the_last(counts, size):
    batches = pack(counts, size)
    flat = [(piece.which, mask) for batch in batches for piece in batch for mask in range(piece.start, piece.stop)]
    assert flat == [(which, mask) for which, count in enumerate(counts) for mask in range(count)]
    fill = [sum(piece.stop - piece.start for piece in batch) for batch in batches]
    assert all(own == size for own in fill[:-1])
    assert all(0 < own <= size for own in fill[-1:])


@pytest.mark.parametrize(
    ("counts", "size", "batches"),
    [
        ([3, 0, 4], 5, [[(0, 0, 3), (2, 0, 2)], [(2, 2, 4)]]),
        ([4], 4, [[(0, 0, 4)]]),
        ([5], 2, [[(0, 0, 2)], [(0, 2, 4)], [(0, 4, 5)]]),
        ([0, 0], 4, []),
        ([], 4, []),
    ],
)
def test_packing_by_hand(counts, size, batches):
    assert [[(one.which, one.start, one.stop) for one in batch] for batch in pack(counts, size)] == batches


# ---------------------------------------------------------------- scores


def mixed_sets(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, (3, 4, 4)), (0, (5, 8, 8)), (0, (0, 2, 2)), (0, (1, 32, 32)), (1, (4, 7, 5))]
    return [MaskSet(image, torch.rand(*shape, generator=generator, dtype=torch.float64)) for image, shape in shapes]


@pytest.mark.parametrize("baseline", ["zero", "black"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_are_those_of_one_mask_at_a_time(batch_size, baseline):
    adapter, inputs = ModelAdapter(seeded(Plain), input_size=(32, 32)), smooth(2, 32, 32)
    target = ClassProbability(torch.tensor([[0, 4], [2, 1]]))
    sets = mixed_sets()
    with adapter.borrowed():
        found = Scorer(adapter, perturbation(adapter, baseline), batch_size).scores(inputs, target, sets)
    removed = 0.0 if baseline == "zero" else BASELINES["black"](adapter).double()
    twin = oracles.double_copy(adapter.module)
    for own, masks in zip(found, sets, strict=True):
        assert own.shape == (len(masks.values_khw), 2)
        assert own.dtype == torch.float64
        for scores, mask in zip(own, masks.values_khw, strict=True):
            full = oracles.upsample(mask[None], (32, 32))[0]
            with torch.no_grad():
                logits = twin(full * inputs[masks.image][None].double() + (1 - full) * removed)[0]
            wanted = [float(oracles.probability(logits, int(one))) for one in target.classes[masks.image]]
            assert scores.tolist() == pytest.approx(wanted, rel=1e-5)


class Counting(nn.Module):
    """Remembers the shapes it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shapes = Plain(), []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.net(x)


def test_every_forward_has_the_same_shape_and_none_is_wasted():
    net = seeded(Counting)
    adapter, inputs = ModelAdapter(net, input_size=(32, 32)), smooth(2, 32, 32)
    with adapter.borrowed():
        Scorer(adapter, perturbation(adapter, "zero"), 4).scores(
            inputs, ClassProbability(torch.zeros(2, 1).long()), mixed_sets()
        )
    assert net.shapes == [(4, 3, 32, 32)] * 4  # 13 masks


@pytest.mark.parametrize("baseline", ["zero", "black"])
def test_batches_are_written_into_one_buffer_whose_empty_slots_hold_zeros(baseline):
    adapter, inputs, sets = ModelAdapter(seeded(Plain), input_size=(32, 32)), smooth(2, 32, 32), mixed_sets()
    seen, places = [], set()

    def forward(batch):
        seen.append(batch.clone())
        places.add(batch.data_ptr())
        return adapter.logits(batch)

    removed, target = perturbation(adapter, baseline), ClassProbability(torch.zeros(2, 1).long())
    Scorer(adapter, removed, 5, forward).scores(inputs.to(memory_format=torch.channels_last), target, sets)
    one_by_one = [
        removed(inputs[own.image][None], own.masks(k, k + 1, inputs[0])[:, None])
        for own in sets
        for k in range(len(own))
    ]
    wanted = torch.cat([*one_by_one, torch.zeros(2, 3, 32, 32)])
    assert torch.allclose(torch.cat(seen), wanted, atol=1e-6)
    assert torch.equal(torch.cat(seen)[-2:], wanted[-2:])
    assert len(seen) == 3
    assert len(places) == 1


@pytest.mark.parametrize("baseline", ["zero", "black"])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_masked_inputs_are_written_into_the_forwards_own_buffer_with_the_same_scores(is_autocast, baseline):
    adapter, inputs, sets = ModelAdapter(seeded(Plain), input_size=(32, 32)), smooth(2, 32, 32), mixed_sets()
    target, removed, given = ClassProbability(torch.tensor([[0], [2]])), perturbation(adapter, baseline), []
    with adapter.borrowed():
        own = make_forward(adapter, ForwardSetting("eager", "bfloat16", 5, is_autocast))

        class Noted(BufferedForward):
            def __call__(self, inputs_nchw):
                given.append(inputs_nchw)
                return super().__call__(inputs_nchw)

        found = Scorer(adapter, removed, 5, Noted(own.buffer_nchw, own.run)).scores(inputs, target, sets)
        copied = Scorer(adapter, removed, 5, lambda batch: own(batch)).scores(inputs, target, sets)
    assert len(given) == 3
    assert all(batch is own.buffer_nchw for batch in given)
    assert own.buffer_nchw.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(one, other) for one, other in zip(found, copied, strict=True))


def test_a_buffered_forward_takes_batches_of_its_own_shape_alone():
    own = BufferedForward(torch.zeros(2, 3, 4, 4), lambda batch: batch.sum((1, 2, 3))[:, None])
    assert own(torch.ones(2, 3, 4, 4)).flatten().tolist() == [48, 48]
    with pytest.raises(ValueError, match=r"a batch is \(2, 3, 4, 4\), and this one \(1, 3, 4, 4\)"):
        own(torch.ones(1, 3, 4, 4))


def test_no_masks_are_no_forward():
    net = seeded(Counting)
    adapter = ModelAdapter(net, input_size=(32, 32))
    target = ClassProbability(torch.zeros(1, 3).long())
    (none,) = Scorer(adapter, perturbation(adapter, "zero"), 4).scores(
        smooth(1, 32, 32), target, [MaskSet(0, torch.empty(0, 4, 4))]
    )
    assert none.shape == (0, 3)
    assert net.shapes == []


# ---------------------------------------------------------------- V4


class Sum(nn.Module):
    """One logit: the sum of the first channel."""

    def forward(self, x):
        return x[:, 0].sum((1, 2))[:, None]


class Table:
    """A target whose score is looked up: a masked picture of ones sums to the mask's mass."""

    num_targets = 1

    def score(self, logits, images):
        return torch.tensor([[{1: 0.8, 4: 0.9, 2: 0.6}[round(own)]] for own in logits.flatten().tolist()]).double()


def test_hand_vector_v4():
    """Scores from the scorer, the mass and the weighted sum at the native grid; then the wrong way, for contrast."""
    masks = torch.tensor([[[1.0, 0], [0, 0]], [[1, 1], [1, 1]], [[0.5, 1], [0, 0.5]]], dtype=torch.float64)
    adapter = ModelAdapter(Sum(), input_size=(2, 2))
    with adapter.borrowed():
        (scores,) = Scorer(adapter, perturbation(adapter, "zero"), 3).scores(
            torch.ones(1, 3, 2, 2), Table(), [MaskSet(0, masks)]
        )
    assert scores.flatten().tolist() == pytest.approx([0.8, 0.9, 0.6])
    mass = upsampling((2, 2), (2, 2), masks.device).mass(masks)
    assert mass.tolist() == [1, 4, 2]
    mean = torch.einsum("k,khw->hw", scores[:, 0] / mass, masks) / 3
    assert mean.flatten().tolist() == pytest.approx([0.391667, 0.175, 0.075, 0.125], abs=1e-6)
    assert minmax(mean.numpy()).ravel() == pytest.approx([1, 0.315789, 0, 0.157895], abs=1e-6)
    assert mean.numpy() == pytest.approx(oracles.layer_map(list(masks.numpy()), scores[:, 0].tolist()), abs=1e-15)
    wrong = torch.einsum("k,khw->hw", scores[:, 0], masks) / 3
    assert wrong.flatten().tolist() == pytest.approx([0.666667, 0.5, 0.3, 0.4], abs=1e-6)


# ---------------------------------------------------------------- baselines


def test_baselines():
    adapter = ModelAdapter(seeded(Plain), mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    assert not BASELINES["zero"](adapter).any()
    assert BASELINES["black"](adapter).flatten().tolist() == [-1, -0.25, 0]


def test_a_mask_mixes_the_picture_and_the_baseline():
    inputs, masks = torch.full((1, 3, 1, 3), 3.0), torch.tensor([[[[1.0, 0.25, 0.0]]]])
    assert Perturbation(torch.tensor(-1.0))(inputs, masks)[0, 0].tolist() == [[3.0, 0.0, -1.0]]
    assert Perturbation(torch.tensor(0.0))(inputs, masks)[0, 2].tolist() == [[3.0, 0.75, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("baseline", [0.0, -1.0])
def test_masked_inputs_are_the_same_numbers_in_a_place_that_is_given(baseline, dtype):
    removed, place = Perturbation(torch.tensor(baseline)), torch.full((2, 3, 8, 8), torch.nan, dtype=dtype)
    inputs, masks = torch.randn(1, 3, 8, 8), torch.rand(2, 1, 8, 8)
    removed(inputs, masks, place)
    assert torch.equal(place, removed(inputs, masks).to(dtype))


def test_black_is_the_black_pixel_of_the_picture():
    """Masking with black equals masking the picture's own pixels."""
    adapter = ModelAdapter(seeded(Plain), input_size=(32, 32))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    found = perturbation(adapter, "black")(adapter.normalise(pixels), mask)
    assert torch.allclose(found, adapter.normalise((pixels * mask).to(torch.uint8)), atol=1e-6)
