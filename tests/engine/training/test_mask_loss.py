"""The loss, against the authors' sum over all images x all labels of a batch, and on masks worked out by hand."""

import pytest
import torch
from torch.nn import functional

from blocksight.engine.training.mask_loss import LABELS, LossWeights, area, mask_loss, other_labels, variation

WEIGHTS = LossWeights()


def slow_loss(logits, masks_bbhw, labels):
    """The authors' loss of B images: `masks_bbhw[i, j]` is image i's mask of image j's label."""
    size = len(labels)
    flat = masks_bbhw.flatten(0, 1)
    rim = torch.zeros(flat.shape[-2:])
    rim[0], rim[-1], rim[:, 0], rim[:, -1] = 1, 1, 1, 1
    down, across = flat[:, 1:] - flat[:, :-1], flat[:, :, 1:] - flat[:, :, :-1]
    smooth = ((down**2).sum() + (across**2).sum() + 0.3 * (flat**2 * rim).sum()) / (2 * size)
    covered = ((flat + 0.0005) ** 0.3).mean()
    return 1.5 * functional.cross_entropy(logits, labels) + 2 * covered + 0.01 * smooth


def drawn_batch(num_classes=40):
    drawn = torch.Generator().manual_seed(5)
    labels = torch.randint(num_classes, (LABELS,), generator=drawn)
    masks = torch.rand(LABELS, num_classes, 7, 9, generator=drawn)
    return torch.randn(LABELS, num_classes, generator=drawn), masks, labels


@pytest.mark.parametrize("size", [1, 4, 32])
def test_the_loss_equals_the_authors_for_any_size_of_a_shard(size):
    logits, masks, labels = drawn_batch()
    rows = torch.arange(LABELS)
    wanted = slow_loss(logits, masks[:, labels], labels)
    total = []
    for first in range(0, LABELS, size):
        own = rows[first : first + size]
        others, counts = other_labels(labels, first, size, keeps_own=True)
        terms = mask_loss(
            logits[own],
            masks[own, labels[own]],
            masks[own[:, None], others],
            labels[own],
            counts,
            WEIGHTS,
        )
        total.append(terms.total)
    torch.testing.assert_close(torch.cat(total).mean(), wanted, rtol=1e-6, atol=1e-6)


def test_a_constant_mask_has_variation_at_its_rim_alone():
    mask = torch.full((5, 6), 0.4)
    torch.testing.assert_close(variation(mask), torch.tensor(0.3 * 18 * 0.16))
    torch.testing.assert_close(area(mask, 0.3), torch.tensor(0.4005**0.3))
    spot = torch.zeros(5, 6)
    spot[2, 3] = 1.0
    torch.testing.assert_close(variation(spot), torch.tensor(4.0))


def test_maps_of_an_images_own_class_may_be_left_out():
    labels = torch.tensor([0, 1] * (LABELS // 2))
    others, counts = other_labels(labels, 4, 2, keeps_own=False)
    assert others.shape == counts.shape == (2, LABELS - 1)
    assert counts[0].sum() == LABELS // 2
    assert bool((others[counts.bool()].view(2, -1) == torch.tensor([[1], [0]])).all())
    _, every = other_labels(labels, 4, 2, keeps_own=True)
    assert bool((every == 1).all())


def test_an_image_whose_others_are_all_left_out_has_no_such_term():
    labels = torch.zeros(LABELS, dtype=torch.int64)
    others, counts = other_labels(labels, 0, 1, keeps_own=False)
    masks = torch.rand(1, LABELS - 1, 4, 4)
    terms = mask_loss(torch.zeros(1, 3), torch.full((1, 4, 4), 0.5), masks, labels[:1], counts, WEIGHTS)
    torch.testing.assert_close(terms.area, torch.tensor([2 / 32 * 0.5005**0.3]))
    assert others.shape == (1, LABELS - 1)
