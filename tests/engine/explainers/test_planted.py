"""Explainers on planted evidence: the energy must lie in the object, and in the right one of two objects.

The thresholds lie a margin below the measured values; a box is 9.8 % of a picture. Methods that are not listed do
not find the evidence of these networks, as measured on the same pictures:

* RISE's map is the mean mask plus a small difference: its energy can hardly leave the area's share (0.107), and
  reaches 0.19 with its least value subtracted. It always finds the right one of two objects.
* On the ViT CAMs, Ablation-CAM and SISE reach 0.10 to 0.23 after any of its first three layers, perhaps because
  attention has mixed its tokens. Score-CAM reaches 0.33, 0.35 and 0.30: the second layer was chosen for this.
* FullGrad reaches 0.09 on the ViT. Of its biases it reads only the first convolution's.
* SmoothGrad reaches 0.19 on the CNN with its default noise of 0.15, and 0.40 with 0.02, chosen for this; on the
  ViT 0.15 and 0.09.
* A-FMI with a black reference finds nothing on the CNN, which was not trained on black pictures; with the mean colour
  it reaches 0.57.
* UCAG reaches 0.24 with crops enlarged by 1.8, the default at the input's own size, and chooses no better than
  chance: the CNN knows objects of one size. With 1.2 it reaches 0.65, chosen for this. Grad-CAM alone is as good.
* Feature CAM reaches 0.85, for the objects' edges are the picture's; FovEx with a quarter of its steps 0.48, BEE 0.50.
* Extremal perturbation reaches 0.46 on the CNN; the present version was not measured on the ViT.
* Edges lie where objects are (0.38): only the pairs tell this control from a method.
"""

from functools import partial

import numpy as np
import pytest
import torch

from blocksight.engine.catalog import entries
from blocksight.engine.catalog.parameters import (
    AFmiParameters,
    BeeParameters,
    ExtremalParameters,
    FeatureCamParameters,
    FovExParameters,
    IntegratedGradientsParameters,
    OcclusionParameters,
    RiseParameters,
    SmoothGradParameters,
    UcagParameters,
)
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.targets import ClassProbability
from tests.engine import planted

MODELS = {"cnn": planted.trained_cnn, "vit": planted.trained_vit}
HELD_OUT = 1_000_000
AREA = planted.OBJECT_SIDE**2 / planted.SIDE**2
PARAMETERS = {
    "rise": RiseParameters(num_masks=300, grid=8),
    "occlusion": OcclusionParameters(window=12, stride=4),
    "integrated_gradients": IntegratedGradientsParameters(steps=20),
    "smoothgrad": SmoothGradParameters(samples=15, noise=0.02),
    "extremal_perturbation": ExtremalParameters(areas=(0.1,), iterations=60),
    "ucag": UcagParameters(crops=4, side=90, enlarge=1.2),
    "feature-cam": FeatureCamParameters(edges="scharr"),
    "a-fmi": AFmiParameters(references=("mean",)),
    "fovex": FovExParameters(fixations=4, steps=8, blur=4.0),
    "bee": BeeParameters(draws=8, images=32, pool=8),
}
LEARNING = {"bee"}
BLOCKS = {("vit", "scorecam"): ["encoder.layers.encoder_layer_1"]}

ENERGIES = {
    ("cnn", "sise"): 0.75,
    ("cnn", "ada-sise"): 0.75,
    ("cnn", "gradcam"): 0.45,
    ("cnn", "gradcam++"): 0.45,
    ("cnn", "xgradcam"): 0.45,
    ("cnn", "layercam"): 0.45,
    ("cnn", "hirescam"): 0.45,
    ("cnn", "scorecam"): 0.45,
    ("cnn", "ablationcam"): 0.45,
    ("cnn", "occlusion"): 0.65,
    ("cnn", "integrated_gradients"): 0.75,
    ("cnn", "smoothgrad"): 0.3,
    ("cnn", "fullgrad"): 0.22,
    ("cnn", "extremal_perturbation"): 0.35,
    ("cnn", "ucag"): 0.45,
    ("cnn", "feature-cam"): 0.7,
    ("cnn", "a-fmi"): 0.45,
    ("cnn", "fovex"): 0.35,
    ("cnn", "bee"): 0.4,
    ("vit", "scorecam"): 0.25,
    ("vit", "occlusion"): 0.5,
    ("vit", "integrated_gradients"): 0.28,
    ("vit", "daam"): 0.3,
}
"""Least mean energy in the box."""

CHOICES = {
    **{key: 0.95 for key in ENERGIES if key[0] == "cnn" and key[1] != "fullgrad"},  # which sums absolute values
    ("cnn", "smoothgrad"): 0.8,
    ("cnn", "ucag"): 0.8,
    ("cnn", "fovex"): 0.9,
    ("cnn", "rise"): 0.95,
    ("vit", "rise"): 0.9,
    ("vit", "scorecam"): 0.9,
    ("vit", "occlusion"): 0.95,
    ("vit", "integrated_gradients"): 0.8,
    ("vit", "daam"): 0.9,
}
"""Least share of objects in pairs whose box holds more of the map of their class than the other box."""


def maps(model, name, pixels, classes):
    """The maps of each image's classes, [T, H, W]."""
    adapter = MODELS[model]()
    parameters = PARAMETERS.get(name) or entries.EXPLAINERS[name].parameters()
    make = partial(make_explainer, name, adapter, parameters, blocks=BLOCKS.get((model, name), ()), batch_size=32)
    explainer = make(state=learned(make(), adapter)) if name in LEARNING else make()
    found = explainer.explain(adapter.normalise(pixels), ClassProbability(classes), range(len(pixels)))
    return [torch.from_numpy(np.stack([one.saliency_hw for one in own])) for own in found]


def learned(explainer, adapter):
    """The state that the method learns from other pictures."""
    pixels, classes, _ = planted.batch(32, HELD_OUT + 2)
    learner = explainer.learner()
    learner.see(adapter.normalise(pixels), ClassProbability(classes[:, None]), range(1000, 1032))
    return learner.state()


def off_centre(count):
    return planted.off_centre(count, HELD_OUT)


def mean_energy(model, name):
    pixels, classes, boxes = off_centre(16)
    found = maps(model, name, pixels, classes[:, None])
    return np.mean([planted.energy_inside(own[0], box) for own, box in zip(found, boxes, strict=True)])


def share_of_right_choices(model, name):
    pixels, classes, boxes = planted.pairs(12, HELD_OUT + 1)
    right = []
    for own, two in zip(maps(model, name, pixels, classes), boxes, strict=True):
        inside = np.array([[planted.energy_inside(one, box) for box in two] for one in own])
        right += [inside[0, 0] > inside[0, 1], inside[1, 1] > inside[1, 0]]
    return np.mean(right)


def test_every_threshold_is_twice_the_area_or_more():
    assert min(ENERGIES.values()) >= 2 * AREA


# the slowest method is tested on pairs, and here in the long lane
SWEPT = {("cnn", "extremal_perturbation")}


@pytest.mark.parametrize(
    ("model", "name"), [pytest.param(*key, marks=pytest.mark.sweep) if key in SWEPT else key for key in ENERGIES]
)
def test_the_energy_lies_where_the_evidence_is(model, name):
    assert mean_energy(model, name) > ENERGIES[model, name]


@pytest.mark.parametrize(("model", "name"), CHOICES)
def test_the_map_of_a_class_lies_in_its_own_object_of_two(model, name):
    assert share_of_right_choices(model, name) >= CHOICES[model, name]


def test_rise_shows_the_evidence_above_its_least_value():
    pixels, classes, boxes = off_centre(16)
    found = maps("cnn", "rise", pixels, classes[:, None])
    energies = [planted.energy_inside(own[0] - own.min(), box) for own, box in zip(found, boxes, strict=True)]
    assert np.mean(energies) > 1.6 * AREA


@pytest.mark.parametrize("name", ["random", "gaussian"])
def test_a_control_does_not_find_the_evidence(name):
    assert mean_energy("cnn", name) < 1.3 * AREA


@pytest.mark.parametrize("name", ["random", "gaussian", "edges"])
def test_a_control_cannot_tell_two_objects_apart(name):
    """Both its maps are the same, so at most one of them can be right."""
    assert share_of_right_choices("cnn", name) <= 0.5


def test_the_vits_block_is_the_output_of_its_last_layer_but_one():
    network = planted.trained_vit().network
    assert network.blocks() == network.blocks(["encoder.layers.encoder_layer_2"])
    assert network.blocks()[0].layout.kind == "tokens"
