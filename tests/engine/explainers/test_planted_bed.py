"""The planted-evidence bed: its boxes, its two networks, and that it leaves global random numbers alone."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from blocksight.engine.model.adapter import ModelAdapter
from tests.engine import planted

MODELS = {"cnn": planted.trained_cnn, "vit": planted.trained_vit}
"""With the weights that are stored."""
BRIEF = {"cnn": planted.train_cnn, "vit": planted.train_vit}
HELD_OUT = 1_000_000
"""A seed far from those of training, which begin at seed 0."""


def logits(adapter: ModelAdapter, pixels_nchw: Tensor) -> Tensor:
    with adapter.borrowed(), torch.no_grad():
        return adapter.logits(adapter.normalise(pixels_nchw))


def alone(pixels_nchw: Tensor, boxes_n4: Tensor) -> Tensor:
    """The contents of the boxes, with constant grey around them."""
    kept = torch.full_like(pixels_nchw, planted.MIDDLE)
    for image, source, (left, top, right, bottom) in zip(kept, pixels_nchw, boxes_n4.tolist(), strict=True):
        image[:, top:bottom, left:right] = source[:, top:bottom, left:right]
    return kept


# ---------------------------------------------------------------- pictures


def test_objects_differ_in_shape_alone():
    assert torch.equal(planted.patterns().abs(), torch.ones(5, 20, 20))
    assert planted.patterns().sum((1, 2)).tolist() == [0] * planted.NUM_CLASSES
    flat = planted.patterns().flatten(1)
    likeness = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert likeness.abs().max() < 0.5


@pytest.mark.parametrize("per_image", [1, 2])
def test_outside_the_boxes_is_the_background_alone(per_image):
    _, classes, boxes = planted.batch(40, 5) if per_image == 1 else planted.pairs(40, 5)
    classes, boxes = classes.view(40, per_image), boxes.view(40, per_image, 4)
    pixels = planted.draw(classes, boxes[..., :2], planted.generator(6))
    background = planted.draw(classes[:, :0], boxes[:, :0, :2], planted.generator(6))
    outside = torch.ones(40, planted.SIDE, planted.SIDE, dtype=torch.bool)
    for image, image_boxes in zip(outside, boxes.tolist(), strict=True):
        for left, top, right, bottom in image_boxes:
            image[top:bottom, left:right] = False
    assert ((~outside).sum((1, 2)) == per_image * planted.OBJECT_SIDE**2).all()  # no two boxes overlap
    changed = pixels.int() - background.int()
    assert (changed.abs() == planted.CONTRAST * ~outside[:, None]).all()


def test_a_box_holds_the_object_of_its_class():
    single, double = planted.batch(100, 7), planted.pairs(100, 8)
    assert (double[1][:, 0] != double[1][:, 1]).all()
    found = [(*single, "single"), *((double[0], double[1][:, k], double[2][:, k], f"object {k}") for k in (0, 1))]
    for pixels, classes, boxes, what in found:
        assert sorted(set(classes.tolist())) == list(range(planted.NUM_CLASSES)), what
        assert (boxes[:, 2:] - boxes[:, :2] == planted.OBJECT_SIDE).all(), what
        assert boxes.min() >= 0, what
        assert boxes.max() <= planted.SIDE, what
        for image, index, (left, top, right, bottom) in zip(pixels, classes, boxes.tolist(), strict=True):
            tones = image[:, top:bottom, left:right].float().mean(0) - planted.MIDDLE
            likeness = (planted.patterns() * tones).mean((1, 2)).abs()
            assert likeness.argmax() == index, what
            assert likeness.max() == pytest.approx(planted.CONTRAST, abs=5), what


def test_a_seed_gives_the_same_images_and_another_gives_others():
    for make in (planted.batch, planted.pairs):
        assert all(torch.equal(a, b) for a, b in zip(make(6, 3), make(6, 3), strict=True))
        assert not torch.equal(make(6, 3)[0], make(6, 4)[0])


def test_energy_inside_a_box():
    saliency = torch.zeros(4, 6)
    box = torch.tensor([1, 0, 3, 2])  # columns 1 and 2 of rows 0 and 1
    assert planted.energy_inside(saliency, box) == 0
    saliency[1, 2], saliency[2, 2], saliency[1, 3] = 3, 4, 5
    assert planted.energy_inside(saliency, box) == pytest.approx(3 / 12)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(("name", "wanted"), [("cnn", 0.95), ("vit", 0.9)])
def test_held_out_accuracy(name, wanted):
    pixels, classes, _ = planted.batch(500, HELD_OUT)
    predicted = logits(MODELS[name](), pixels).argmax(1)
    assert (predicted == classes).float().mean() >= wanted


@pytest.mark.parametrize("name", MODELS)
def test_both_objects_of_a_pair_are_the_top_two(name):
    pixels, classes, _ = planted.pairs(500, HELD_OUT)
    top = logits(MODELS[name](), pixels).topk(2).indices
    assert (top.sort(1).values == classes.sort(1).values).all(1).float().mean() >= 0.95


@pytest.mark.parametrize("name", MODELS)
def test_the_evidence_lies_in_the_box(name):
    """One box of a pair makes its class the prediction; without its object the class falls below chance."""
    adapter = MODELS[name]()
    pixels, classes, boxes = planted.pairs(200, HELD_OUT)
    with_first = logits(adapter, alone(pixels, boxes[:, 0]))
    assert (with_first.argmax(1) == classes[:, 0]).float().mean() >= 0.95
    other = planted.draw(classes[:, 1:], boxes[:, 1:, :2], planted.generator(9))
    without_first = logits(adapter, other).softmax(1).gather(1, classes[:, :1])
    assert without_first.mean() < 1 / planted.NUM_CLASSES


def test_the_cnn_has_three_blocks():
    assert [place.grid for place in planted.trained_cnn().network.blocks()] == [(32, 32), (16, 16), (8, 8)]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "wanted"), [("cnn", 0.95), ("vit", 0.9)])
def test_a_network_that_is_trained_anew_is_as_good_as_the_stored_one(name, wanted):
    pixels, classes, _ = planted.batch(500, HELD_OUT)
    trained = planted.FULLY[name]()
    assert (logits(trained, pixels).argmax(1) == classes).float().mean() >= wanted
    stored = MODELS[name]().module.state_dict()
    assert {key: value.shape for key, value in trained.module.state_dict().items()} == {
        key: value.shape for key, value in stored.items()
    }


@pytest.mark.parametrize("name", BRIEF)
def test_the_same_seed_trains_the_same_weights(name):
    first = BRIEF[name](num_steps=3).fingerprint
    torch.rand(5)
    assert BRIEF[name](num_steps=3).fingerprint == first
    assert BRIEF[name](num_steps=3, seed=1).fingerprint != first


def test_no_global_random_numbers_are_used_and_threads_are_given_back():
    def state() -> tuple[object, ...]:
        legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what must not move
        return torch.get_rng_state().tolist(), str(legacy), random.getstate(), torch.get_num_threads()

    before = state()
    planted.batch(3, 0)
    planted.pairs(3, 0)
    planted.train_cnn(num_steps=1)
    planted.train_vit(num_steps=1)
    assert state() == before
