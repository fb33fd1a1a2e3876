"""FovEx: its slow twin, the fovea and the view by hand, a model of texture alone, and paths that always repeat."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.parameters import FovExParameters
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.fovex import fovea, foveated
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassLogit, ClassProbability
from blocksight.engine.scoring.perturb import blurred
from tests.engine import oracles
from tests.engine import slow_explainers as slow
from tests.engine.nets import Depthwise, Residual, seeded, smooth


def explained(net, inputs, classes, parameters, seeds, *, target=ClassProbability, **options):
    adapter = ModelAdapter(net, input_size=tuple(inputs.shape[2:]))
    return EXPLAINERS["fovex"](adapter, parameters, **options).explain(inputs, target(torch.tensor(classes)), seeds)


def path_of(explanation):
    return [(one.row, one.column, one.loss) for one in explanation.products.scan_path]


# ---------------------------------------------------------------- the slow twin


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"best": "official"},
        {"restarts": False},
        {"restarts": False, "best": "official", "memory": 0.6, "decay": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [Residual, Depthwise])
def test_fovex_equals_its_twin(make, options):
    """In float64 on both sides, where rounding changes no step; two images that are not square, two classes each."""
    net, inputs, shape = oracles.double_copy(seeded(make)), smooth(2, 24, 30).double(), {"fixations": 3, "steps": 9}
    classes = [[0, 3], [4, 1]]
    found = explained(net, inputs, classes, FovExParameters(**shape, **options), [5, 6])
    for image, own in enumerate(found):
        for target, one in zip(classes[image], own, strict=True):
            path, wanted = slow.fovex(net, inputs[image], target, 5 + image, **shape, **options)
            assert np.abs(np.array(path_of(one)) - np.array(path)).max() <= 1e-9
            assert np.abs(one.saliency_hw - wanted.numpy()).max() <= 1e-9
            assert one.num_forwards == 2 * 3 * 9


def test_the_options_are_different_paths():
    net, inputs = seeded(Residual), smooth(1, 24, 24)
    paths = [
        path_of(explained(net, inputs, [[0]], FovExParameters(fixations=3, steps=9, **options), [5])[0][0])
        for options in ({}, {"best": "official"}, {"restarts": False})
    ]
    assert all(one != other for one, other in pairwise([*paths, paths[0]]))


def test_both_targets_follow_the_cross_entropy():
    """The path is the same for the probability and for the logit of a class."""
    net, inputs = seeded(Residual), smooth(1, 24, 24)
    own, other = (
        explained(net, inputs, [[1]], FovExParameters(2, 6), [5], target=target)[0][0]
        for target in (ClassProbability, ClassLogit)
    )
    assert path_of(own) == path_of(other)
    assert own.score != other.score


# ---------------------------------------------------------------- the parts by hand


def test_the_fovea_is_1_at_its_place_and_a_half_36_pixels_away():
    places = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [0.5, -0.25]]).double()
    found = fovea(places, 0.15, (9, 17))
    for own, (row, column) in zip(found, ((4, 8), (0, 16), (6, 6)), strict=True):
        assert own[row, column] == 1
        assert own.max() == 1
    (large,) = fovea(torch.zeros(1, 2).double(), 0.15, (224, 224))
    assert float(large[112, 112 + 36]) == pytest.approx(0.5, abs=0.02)
    for own, place in zip(found, places, strict=True):
        assert torch.allclose(own, slow.bell(place, 0.15, (9, 17)), atol=1e-12)


def test_the_first_coordinate_is_the_row():
    (found,) = fovea(torch.tensor([[-1.0, 0.0]]), 0.15, (5, 5))
    assert found[0].sum() > found[:, 0].sum()


def test_a_view_is_the_image_under_a_fovea_and_the_blur_elsewhere():
    sharp, blurry = torch.rand(2, 1, 3, 41, 41, generator=torch.Generator().manual_seed(0))
    nothing, current = torch.zeros(1, 41, 41), fovea(torch.tensor([[-1.0, -1.0]]), 0.02, (41, 41))
    assert torch.allclose(foveated(sharp, blurry, 5 + nothing, current), sharp, atol=1e-6)
    view = foveated(sharp, blurry, nothing, current)
    assert torch.equal(view[:, :, 20:, 20:], blurry[:, :, 20:, 20:])
    assert torch.allclose(view[:, :, 0, 0], sharp[:, :, 0, 0])
    half = foveated(sharp, blurry, nothing + 0.25, nothing)
    assert torch.allclose(half, 0.25 * sharp + 0.75 * blurry, atol=1e-6)


@pytest.mark.parametrize(("sigma", "reach"), [(1.5, 3), (10.0, 6)])
def test_the_blur_mirrors_the_border(sigma, reach):
    image = smooth(1, 9, 7)[0].double()
    wanted = slow.mirror_blurred(image.numpy(), sigma, reach)
    assert np.abs(blurred(image, sigma, reach=reach, rim="reflect").numpy() - wanted).max() <= 1e-12
    assert np.abs(blurred(image, sigma, reach=reach).numpy() - wanted).max() > 1e-3


def test_a_picture_smaller_than_the_blur_has_a_path():
    (own,) = explained(seeded(Residual), smooth(1, 8, 6), [[0]], FovExParameters(2, 3), [5])
    assert np.isfinite(path_of(own[0])).all()


def test_a_constant_picture_has_the_same_loss_everywhere():
    """Every loss is that of the image, and the first place, the middle, is kept."""
    net, inputs = seeded(Residual), torch.full((1, 3, 24, 24), 0.5)
    with torch.no_grad():
        wanted = float(functional.cross_entropy(net(inputs).double(), torch.tensor([2])))
    for row, column, loss in path_of(explained(net, inputs, [[2]], FovExParameters(1, 6), [5])[0][0]):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert (row, column) == (0, 0) or loss < wanted


# ---------------------------------------------------------------- evidence that a blur hides

SIDE, BOX = 64, 16


class Texture(nn.Module):
    """The logit of class 0 is the energy of Laplace's operator in one box; that of class 1 is constant."""

    def __init__(self, top: int, left: int) -> None:
        super().__init__()
        self.top, self.left = top, left
        self.register_buffer("kernel", torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None])

    def forward(self, x: Tensor) -> Tensor:
        energy = functional.conv2d(x.mean(1, keepdim=True), self.kernel, padding=1).square()
        inside = energy[..., self.top : self.top + BOX, self.left : self.left + BOX].mean((1, 2, 3))
        return torch.stack([inside, torch.full_like(inside, 5.0)], 1)


BOXES = [(4, 4), (4, 44), (44, 4), (40, 40), (24, 24)]


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 1.2


@pytest.mark.parametrize("box", BOXES)
def test_the_first_fixation_is_at_the_texture(noise, box):
    """One picture; the model's box moves, and the first fixation follows it."""
    net = Texture(*box)
    ((own,),) = explained(net, noise, [[0]], FovExParameters(fixations=4), [5])
    middle = [2 * (first + (BOX - 1) / 2) / (SIDE - 1) - 1 for first in box]
    first = own.products.scan_path[0]
    assert np.hypot(first.row - middle[0], first.column - middle[1]) <= 0.3
    inside = own.saliency_hw[box[0] : box[0] + BOX, box[1] : box[1] + BOX].sum()
    assert inside / own.saliency_hw.sum() > 2 * BOX**2 / SIDE**2
    blurry = torch.from_numpy(slow.mirror_blurred(noise[0].double().numpy(), 10.0, 20)).float()
    unseen = float(functional.cross_entropy(net(blurry[None]), torch.tensor([0])))
    assert all(loss < unseen for _, _, loss in path_of(own))


@pytest.mark.parametrize("steps", [1, 20])
def test_a_step_costs_one_forward_and_one_gradient(noise, steps, monkeypatch):
    net, counts, plain = Texture(24, 24), {"forwards": 0, "gradients": 0}, torch.autograd.grad

    def counted(*given, **options):
        counts["gradients"] += 1
        return plain(*given, **options)

    net.register_forward_hook(lambda *_: counts.update(forwards=counts["forwards"] + 1))
    monkeypatch.setattr(torch.autograd, "grad", counted)
    ((own,),) = explained(net, noise, [[0]], FovExParameters(fixations=3, steps=steps), [5])
    assert counts == {"forwards": 3 * steps + 1, "gradients": 3 * steps}  # and one for the score
    assert own.num_forwards == 3 * steps


# ---------------------------------------------------------------- paths that always repeat


def test_a_path_depends_on_its_image_alone_bit_for_bit():
    """For every batch size, images per pass, other images and place among them."""
    net, inputs, seeds = seeded(Residual), smooth(5, 24, 24), [5, 6, 7, 8, 9]
    parameters, classes = FovExParameters(3, 12), [[image] for image in range(5)]
    found = explained(net, inputs, classes, parameters, seeds)
    wanted = [path_of(own[0]) for own in found]
    assert len({str(path) for path in wanted}) == 5
    for options in (
        {"batch_size": 1},
        {"batch_size": 3, "images_per_pass": 2},
        {"images_per_pass": 1},
        {"batch_size": 64, "images_per_pass": 8},
    ):
        again = explained(net, inputs, classes, parameters, seeds, **options)
        assert [path_of(own[0]) for own in again] == wanted
    order = [3, 0, 4, 2, 1]
    turned = explained(net, inputs[order], [classes[i] for i in order], parameters, [seeds[i] for i in order])
    assert [path_of(own[0]) for own in turned] == [wanted[i] for i in order]
    both = explained(net, inputs, [[(image + 1) % 5, image] for image in range(5)], parameters, seeds)
    assert [path_of(own[1]) for own in both] == wanted
