"""Real photographs with real weights, if they are available: the fast path against the slow twin."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from blocksight.engine.catalog.parameters import AFmiParameters, FovExParameters, SiseParameters
from blocksight.engine.explainers.afmi import AFmi
from blocksight.engine.explainers.fovex import FovEx
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.loading import load_model
from blocksight.engine.model.targets import ClassProbability
from tests.engine.comparing import assert_equals_slow, by_modules, explained, slowly


@pytest.fixture
def weights(shared_data, monkeypatch):
    """The loaders in the folder of the weights."""
    monkeypatch.syspath_prepend(str(shared_data))
    monkeypatch.delitem(sys.modules, "load_models", raising=False)
    yield importlib.import_module("load_models")
    sys.modules.pop("load_models", None)


def pixels_of(files, size):
    """uint8 [N, 3, H, W] of photographs squashed to a square."""
    pictures = [
        np.array(Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) for file in files
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def assert_photographs_equal_the_slow_twin(adapter, names, inputs, classes, parameters):
    found = explained(adapter, inputs, [[own] for own in classes], parameters)
    for image, target, fast in zip(inputs, classes, found, strict=True):
        slow = slowly(adapter.module, by_modules(names), image, target, parameters)
        assert all(slow.kept)
        assert_equals_slow(fast[0], slow)


def test_cifar_photographs(shared_data, weights):
    adapter = ModelAdapter(weights.cifar_resnet(20), input_size=(32, 32))
    folder = shared_data / "images" / "cifar10_test_1000"
    inputs = adapter.normalise(pixels_of([folder / name / "0003.jpg" for name in ("cat", "ship", "frog")], 32))
    blocks = adapter.network.blocks()
    assert [(block.channels, block.grid) for block in blocks] == [(16, (32, 32)), (32, (16, 16)), (64, (8, 8))]
    names = ["layer1", "layer2", "layer3"]
    assert_photographs_equal_the_slow_twin(adapter, names, inputs, [3, 8, 6], SiseParameters())
    assert_photographs_equal_the_slow_twin(
        adapter, names, inputs, [5, 0, 6], SiseParameters(selection="ada", gate="soft", baseline="black")
    )


@pytest.fixture
def cifar(shared_data, weights):
    """A trained network, and six photographs as its inputs."""
    adapter = ModelAdapter(weights.cifar_resnet(20), input_size=(32, 32))
    files = sorted((shared_data / "images" / "cifar10_test_1000").rglob("*.jpg"))[::150][:6]
    return adapter, adapter.normalise(pixels_of(files, 32))


def test_a_scan_path_depends_on_its_photograph_alone(cifar):
    """Bit for bit, for every batch size, other images, and any place among them."""
    adapter, inputs = cifar
    seeds, parameters = list(range(6)), FovExParameters(fixations=3, steps=6)

    def paths(images, **options):
        target = ClassProbability(torch.tensor([[image] for image in images]))
        found = FovEx(adapter, parameters, **options).explain(inputs[images], target, [seeds[i] for i in images])
        return [own[0].products.scan_path for own in found]

    wanted = paths(range(6))
    assert paths(range(6), batch_size=1) == wanted
    assert paths(range(6), batch_size=3, images_per_pass=3) == wanted
    assert paths([5, 2, 0, 4, 1, 3]) == [wanted[image] for image in (5, 2, 0, 4, 1, 3)]
    assert paths([4]) == wanted[4:5]


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_the_closed_form_of_photographs_equals_passes(cifar, score):
    adapter, inputs = cifar
    target = ClassProbability(adapter.module.eval()(inputs).argmax(1, keepdim=True))
    closed, passes = (
        AFmi(adapter, AFmiParameters(score=score, tail=tail), batch_size=16).explain(inputs, target)
        for tail in ("auto", "passes")
    )
    for (one,), (other,) in zip(closed, passes, strict=True):
        assert (one.num_forwards, other.num_forwards) == (1, 65)
        for own, wanted in (
            (one.saliency_hw, other.saliency_hw),
            (one.products.channel_importance, other.products.channel_importance),
        ):
            assert np.abs(own - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_imagenet_photographs(shared_data, weights):
    adapter = ModelAdapter(weights.tiny_darknet(), input_size=(96, 96), mean=(0, 0, 0), std=(1, 1, 1))
    files = sorted((shared_data / "images" / "imagenet_val_500").rglob("*.jpg"))[:2]
    inputs = adapter.normalise(pixels_of(files, 96))
    classes = adapter.module(inputs).argmax(1).tolist()
    names = ["features.0", "features.2", "features.7", "features.12", "features.18"]
    found = explained(adapter, inputs, [[own] for own in classes], SiseParameters(mu=0.5), blocks=names)
    for image, target, fast in zip(inputs, classes, found, strict=True):
        slow = slowly(adapter.module, by_modules(names), image, target, SiseParameters(mu=0.5))
        assert sum(slow.num_masks) > 20
        assert_equals_slow(fast[0], slow)


STRIDED = [f"_blocks.{number}._depthwise_conv" for number in (1, 3, 5, 11)]
"""EfficientNet-Lite0's strided layers. Its blocks are the inputs of these and of the pooling."""


def entering(model, image):
    """Captures the inputs of the named modules, because there all activations are one shared module."""
    names, kept = [*STRIDED, "_avg_pooling"], {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, given, name=name: kept.update({name: given[0]}))
        for name in names
    ]
    logits = model(image)
    for handle in handles:
        handle.remove()
    return logits, [kept[name] for name in names]


def test_the_packaged_model_on_a_cat():
    """In float64: one activation at ReLU6's corner moves the early gradients of float32 by percents."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the demo extra is not installed")
    data = pytest.importorskip("skimage.data", reason="the demo extra is not installed")
    adapter, parameters = load_model("efficientnet_lite0"), SiseParameters(mu=0.85)
    photograph = Image.fromarray(data.chelsea()).resize((224, 224), Image.Resampling.BILINEAR)
    inputs = adapter.normalise(torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None])
    with adapter.borrowed():
        target = int(adapter.logits(inputs).argmax())
    assert adapter.class_name(target) == "Egyptian cat"
    assert adapter.network.places
    adapter.module.double()
    (own,) = explained(adapter, inputs.double(), [[target]], parameters)
    assert own[0].num_forwards >= 10
    assert_equals_slow(own[0], slowly(adapter.module, entering, inputs[0], target, parameters), tolerance=1e-9)
