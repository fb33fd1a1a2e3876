"""The explainers against captum, grad-cam and torchcam: the same network, images and classes, by their code.

Maps are compared after a min-max, as grad-cam scales its own. A peer gets a deep copy of the network and the
name of its layer; ours finds the last block itself, unless a test names it. If a peer departs from the paper,
the test uses a case in which both agree, and a comment names the departure.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product

import captum.attr
import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import DenseNet, SwinTransformer, VisionTransformer, get_model

from blocksight.engine.catalog.parameters import (
    AFmiParameters,
    IntegratedGradientsParameters,
    OcclusionParameters,
    ScoreCamParameters,
    SmoothGradParameters,
)
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.adapter import IMAGENET_MEAN, IMAGENET_STD, ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from tests.engine.nets import Depthwise, Plain, seeded, smooth

TOLERANCE = 1e-4
CLASSES = [[0, 3], [1, 4], [4, 2]]
"""Two classes of each of three images; every network here knows at least five."""

GRAD_CAM = {
    "gradcam": pytorch_grad_cam.GradCAM,
    "gradcam++": pytorch_grad_cam.GradCAMPlusPlus,
    "xgradcam": pytorch_grad_cam.XGradCAM,
    "layercam": pytorch_grad_cam.LayerCAM,
    "hirescam": pytorch_grad_cam.HiResCAM,
}
TORCHCAM = {
    "gradcam": torchcam.methods.GradCAM,
    "xgradcam": torchcam.methods.XGradCAM,
    "layercam": torchcam.methods.LayerCAM,
}

Maps = np.ndarray
"""[images, classes, H, W]."""


# ---------------------------------------------------------------- networks


class Pooling(nn.Module):
    """A stage at the picture's size, a second one after a pooling by `stride`, and a linear layer on the means."""

    def __init__(self, stride: int, channels: int = 9) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(stride)
        self.last = nn.Sequential(nn.Conv2d(6, channels, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.pool(self.first(x))).mean((2, 3)))


class Amplified(nn.Module):
    """A network whose logits are multiplied by a number."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor


class Monochrome(nn.Module):
    """Every layer has one channel; the first one weights the three of the picture equally."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.second = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.first.weight.copy_(self.first.weight.mean(1, keepdim=True).expand(-1, 3, -1, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = functional.adaptive_avg_pool2d(functional.leaky_relu(self.second(x), 0.3), 4)
        return self.head(x.flatten(1))


def vision_transformer() -> nn.Module:
    net = VisionTransformer(
        image_size=64, patch_size=8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7
    )
    nn.init.normal_(net.heads.head.weight)  # torchvision starts it at zero
    return net


def swin() -> nn.Module:
    net = SwinTransformer([4, 4], 12, [2, 2, 2], [2, 2, 4], [4, 4], num_classes=7)
    nn.init.normal_(net.head.weight)
    return net


def zoo(architecture: str) -> nn.Module:
    """A random torchvision network whose batch norms know the statistics of pictures, as trained ones do.

    Otherwise activations hardly vary over the picture, and a min-max shows the rounding of float32.
    """
    net = seeded(lambda: get_model(architecture, num_classes=7))
    if architecture.startswith("vgg"):
        net.classifier = seeded(lambda: nn.Linear(net.classifier[0].in_features, 7))  # its own has 10^8 weights
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.train()
            norm.momentum = 1.0
    with torch.no_grad():
        net(smooth(8, 96, 96, seed=2))
    return net.eval()


@dataclass(frozen=True)
class Case:
    """A network, the side of its pictures, and the layer whose output is its last block."""

    make: Callable[[], nn.Module]
    side: int
    layer: str


CNNS = {
    "plain": Case(lambda: seeded(Plain), 32, "features.7"),
    "depthwise": Case(lambda: seeded(Depthwise), 32, "last"),
    "resnet18": Case(lambda: zoo("resnet18"), 64, "layer4"),
    "vgg11_bn": Case(lambda: zoo("vgg11_bn"), 64, "features.27"),
    "mobilenet_v3_small": Case(lambda: zoo("mobilenet_v3_small"), 112, "features.12"),
    "squeezenet1_1": Case(lambda: zoo("squeezenet1_1"), 64, "classifier.2"),
    "shufflenet_v2_x0_5": Case(lambda: zoo("shufflenet_v2_x0_5"), 96, "conv5"),
    "efficientnet_b0": Case(lambda: zoo("efficientnet_b0"), 64, "features.8"),
    "regnet_x_400mf": Case(lambda: zoo("regnet_x_400mf"), 64, "trunk_output"),
}
TRANSFORMERS = {
    "vit": Case(lambda: seeded(vision_transformer), 64, "encoder.layers.encoder_layer_1"),
    "swin": Case(lambda: seeded(swin), 64, "norm"),
    "swin_t": Case(lambda: zoo("swin_t"), 112, "features.5"),
}
ILL_CONDITIONED = {("mobilenet_v3_small", "gradcam++"), ("efficientnet_b0", "gradcam++")}
"""Maps of both signs, whose sums may cancel in alpha's denominator. There the formula itself differs between float32
and float64, by 1e-4 and by 1e-2."""

made = cache(lambda name: (CNNS | TRANSFORMERS)[name].make())
"""One of the networks by name, made once."""


# ---------------------------------------------------------------- ours, the peers, and how they are compared


@cache
def adapter_of(net: nn.Module, size: tuple[int, int]) -> ModelAdapter:
    return ModelAdapter(deepcopy(net), input_size=size)


def ours(net: nn.Module, inputs: Tensor, name: str, parameters=None, classes=CLASSES, **options) -> Maps:
    adapter = adapter_of(net, tuple(inputs.shape[2:]))
    target = ClassProbability(torch.tensor(classes[: len(inputs)]))
    found = make_explainer(name, adapter, parameters, **options).explain(inputs, target)
    return np.stack([np.stack([one.saliency_hw for one in own]) for own in found])


def by_class(inputs: Tensor, explain: Callable[[list[int]], np.ndarray | Tensor], classes=CLASSES) -> Maps:
    """A peer's maps: `explain` gives [N, H, W] for one class of each image."""
    found = [explain(list(own)) for own in zip(*classes[: len(inputs)], strict=True)]
    return np.stack([torch.as_tensor(one).detach().double().numpy() for one in found], 1)


def by_grad_cam(make: Callable, net: nn.Module, layer: str, inputs: Tensor, reshape=None, classes=CLASSES) -> Maps:
    twin = deepcopy(net)
    cam = make(twin, [twin.get_submodule(layer)], reshape_transform=reshape)
    return by_class(inputs, lambda own: cam(inputs, [ClassifierOutputTarget(one) for one in own]), classes)


def by_torchcam(make: Callable, net: nn.Module, layer: str, inputs: Tensor, **options) -> Maps:
    twin = deepcopy(net)

    def explain(own: list[int]) -> Tensor:
        (native,) = cam(own, twin(inputs), normalized=False)
        return enlarged(native, inputs)

    with make(twin, layer, **options) as cam:
        return by_class(inputs, explain)


def enlarged(maps_nhw: Tensor, inputs: Tensor) -> Tensor:
    size = inputs.shape[2:]
    return functional.interpolate(maps_nhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def scaled(maps: Maps) -> Maps:
    """Each map from 0 to 1; a constant one is 0."""
    low, high = maps.min((2, 3), keepdims=True), maps.max((2, 3), keepdims=True)
    return np.where(high > low, (maps - low) / np.where(high > low, high - low, 1), 0)


def differences(found: Maps, wanted: Maps) -> np.ndarray:
    """The largest difference of each image and class."""
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    assert np.isfinite(wanted).all()
    return np.abs(scaled(found) - scaled(wanted)).max((2, 3))


def assert_same(found: Maps, wanted: Maps) -> None:
    worst = differences(found, wanted).max()
    print(f"largest difference {worst:.1e}")
    assert worst <= TOLERANCE
    varied = found.max((2, 3)) > found.min((2, 3))
    assert varied.mean() >= 0.5, "too few maps that say anything"


# ---------------------------------------------------------------- class activation maps


@cache
def amplified(name: str) -> Amplified:
    """grad-cam adds 1e-6 to Grad-CAM++'s denominator and 1e-7 to XGrad-CAM's: with large logits it is negligible."""
    return Amplified(made(name), 1e4)


@pytest.mark.parametrize(("case", "name"), [pair for pair in product(CNNS, GRAD_CAM) if pair not in ILL_CONDITIONED])
def test_cams_equal_grad_cam(case, name):
    inputs = smooth(3, CNNS[case].side, CNNS[case].side)
    net = amplified(case)
    assert_same(ours(net, inputs, name), by_grad_cam(GRAD_CAM[name], net, f"net.{CNNS[case].layer}", inputs))


@pytest.mark.parametrize("name", TORCHCAM)
@pytest.mark.parametrize("case", CNNS)
def test_cams_equal_torchcam(case, name):
    inputs = smooth(3, CNNS[case].side, CNNS[case].side)
    net = made(case)
    assert_same(ours(net, inputs, name), by_torchcam(TORCHCAM[name], net, CNNS[case].layer, inputs))


@pytest.mark.parametrize("case", CNNS)
def test_gradcam_equals_captum(case):
    net, inputs = made(case), smooth(3, CNNS[case].side, CNNS[case].side)
    twin = deepcopy(net)
    peer = captum.attr.LayerGradCam(twin, twin.get_submodule(CNNS[case].layer))

    def explain(own: list[int]) -> Tensor:
        native = peer.attribute(inputs, torch.tensor(own), relu_attributions=True)
        return captum.attr.LayerAttribution.interpolate(native, tuple(inputs.shape[2:]), "bilinear")[:, 0]

    assert_same(ours(net, inputs, "gradcam"), by_class(inputs, explain))


def without_class_token(tokens: Tensor) -> Tensor:
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def channels_first(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


RESHAPES = {"vit": without_class_token, "swin": channels_first, "swin_t": channels_first}


@pytest.mark.parametrize("name", ["gradcam", "layercam", "hirescam"])
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_cams_of_transformers_equal_grad_cam_and_torchcam(case, name):
    net, layer = made(case), TRANSFORMERS[case].layer
    inputs = smooth(2, TRANSFORMERS[case].side, TRANSFORMERS[case].side)
    found = ours(net, inputs, name, blocks=[layer])
    assert_same(found, by_grad_cam(GRAD_CAM[name], net, layer, inputs, RESHAPES[case]))
    if name in TORCHCAM:
        assert_same(found, by_torchcam(TORCHCAM[name], net, layer, inputs, reshape_transform=RESHAPES[case]))


# ---------------------------------------------------------------- feature maps as masks, and feature maps removed


def test_scorecam_equals_grad_cam():
    # its masks are upsampled with aligned corners: on the picture's own grid there is nothing to upsample
    net, inputs = seeded(lambda: Pooling(1)), smooth(3, 24, 24)
    peer = by_grad_cam(pytorch_grad_cam.ScoreCAM, net, "last", inputs)
    assert_same(ours(net, inputs, "scorecam", ScoreCamParameters()), peer)


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_scorecam_equals_torchcam(stride):
    # it scales a map before the upsampling, the paper after it: both agree if each of its places is a pixel's
    # centre, which is so for an odd factor of upsampling
    net, inputs = Amplified(seeded(lambda: Pooling(stride)), 10.0), smooth(3, 30, 30)
    peer = by_torchcam(_scorecam, net, "net.last", inputs)
    assert_same(ours(net, inputs, "scorecam", ScoreCamParameters()), peer)


def _scorecam(net: nn.Module, layer: str) -> torchcam.methods.ScoreCAM:
    return torchcam.methods.ScoreCAM(net, layer)


@pytest.mark.parametrize("case", ["plain", "depthwise", "squeezenet1_1"])
def test_ablationcam_equals_captums_feature_ablation(case):
    net, inputs = made(case), smooth(2, CNNS[case].side, CNNS[case].side)
    twin = deepcopy(net)
    layer = twin.get_submodule(CNNS[case].layer)
    peer, maps = captum.attr.LayerFeatureAblation(twin, layer), captum.attr.LayerActivation(twin, layer)

    def one_map(image: Tensor, target: int) -> Tensor:
        native = maps.attribute(image)
        channels = torch.arange(native.shape[1])[None, :, None, None]
        losses = peer.attribute(image, 0, target, layer_mask=channels, perturbations_per_eval=16)
        return enlarged((losses * native).sum(1).relu(), inputs)

    def explain(own: list[int]) -> Tensor:
        return torch.cat([one_map(image, target) for image, target in zip(inputs.split(1), own, strict=True)])

    assert_same(ours(net, inputs, "ablationcam"), by_class(inputs, explain))


@pytest.mark.parametrize("tail", ["auto", "passes"])
@pytest.mark.parametrize("case", ["plain", "depthwise", "squeezenet1_1"])
def test_a_feature_maps_importance_equals_captums_feature_ablation(case, tail):
    """One feature per channel of the last block, and the black picture's maps as the baseline."""
    net, inputs = made(case), smooth(2, CNNS[case].side, CNNS[case].side)
    twin = deepcopy(net)
    layer = twin.get_submodule(CNNS[case].layer)
    peer, maps = captum.attr.LayerFeatureAblation(twin, layer), captum.attr.LayerActivation(twin, layer)
    others = maps.attribute(_black().expand_as(inputs[:1]).contiguous()).detach()
    channels = torch.arange(others.shape[1])[None, :, None, None]
    adapter, classes = adapter_of(net, tuple(inputs.shape[2:])), CLASSES[: len(inputs)]
    found = make_explainer("a-fmi", adapter, AFmiParameters(tail=tail)).explain(
        inputs, ClassProbability(torch.tensor(classes))
    )
    for image, own in enumerate(found):
        for target, one in zip(classes[image], own, strict=True):
            options = {"layer_mask": channels, "perturbations_per_eval": 16}
            wanted = peer.attribute(inputs[image : image + 1], others, target, **options)[0, :, 0, 0].detach().numpy()
            assert np.abs(wanted).max() > 1e-4
            assert np.abs(one.products.channel_importance - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())


class Shifted(nn.Module):
    """A network whose logits are larger by a number."""

    def __init__(self, net: nn.Module, number: float) -> None:
        super().__init__()
        self.net, self.number = net, number

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.number


@pytest.mark.parametrize("case", ["plain", "squeezenet1_1"])
def test_ablationcam_equals_grad_cam_behind_a_relu_and_where_logits_are_positive(case):
    # it replaces a map by 0 only if the least value of all maps is 0 (else by -1e7), and divides by the logit
    inputs = smooth(2, CNNS[case].side, CNNS[case].side)
    net = Shifted(made(case), 2.0)
    assert (net(inputs) > 0).all()
    peer = by_grad_cam(pytorch_grad_cam.AblationCAM, net, f"net.{CNNS[case].layer}", inputs)
    assert_same(ours(net, inputs, "ablationcam"), peer)


# ---------------------------------------------------------------- gradients by the input


def same_kernels(net: nn.Module) -> nn.Module:
    """A copy in our adapter's memory format.

    Input gradients of a deep random network are badly conditioned: captum's own maps of a ResNet-18 in float32 and
    float64 differ by 1e-3, and other kernels round otherwise.
    """
    return deepcopy(net).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("baseline", ["zero", "black"])
@pytest.mark.parametrize("case", ["plain", "depthwise", "resnet18", "vit"])
def test_integrated_gradients_equal_captum(case, baseline):
    net, side = made(case), (CNNS | TRANSFORMERS)[case].side
    inputs, peer = smooth(2, side, side), captum.attr.IntegratedGradients(same_kernels(net))
    start = torch.zeros(1, 3, 1, 1) if baseline == "zero" else _black()

    def explain(own: list[int]) -> Tensor:
        options = {"n_steps": 20, "method": "gausslegendre", "internal_batch_size": 8}
        return peer.attribute(inputs, start.expand_as(inputs), torch.tensor(own), **options).sum(1).relu()

    parameters = IntegratedGradientsParameters(steps=20, baseline=baseline)
    assert_same(ours(net, inputs, "integrated_gradients", parameters), by_class(inputs, explain))


def _black() -> Tensor:
    return (-torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)).view(1, 3, 1, 1)


def noisy_copies(image: Tensor, samples: int, noise: float) -> Tensor:
    """The copies that ours draws for seed 0; captum's NoiseTunnel takes no generator."""
    own = torch.Generator().manual_seed(0)
    draws = torch.stack([torch.randn(image.shape, generator=own) for _ in range(samples)])
    return image + noise * (image.max() - image.min()) * draws


@pytest.mark.parametrize("case", ["plain", "depthwise", "resnet18", "vit", "swin"])
def test_smoothgrad_equals_the_mean_of_captums_saliencies(case):
    net, side = made(case), (CNNS | TRANSFORMERS)[case].side
    inputs, peer = smooth(2, side, side), captum.attr.Saliency(same_kernels(net))

    def explain(own: list[int]) -> Tensor:
        return torch.stack(
            [
                peer.attribute(noisy_copies(image, 6, 0.2).requires_grad_(), target, abs=False).mean(0).abs().amax(0)
                for image, target in zip(inputs, own, strict=True)
            ]
        )

    parameters = SmoothGradParameters(samples=6, noise=0.2)
    assert_same(ours(net, inputs, "smoothgrad", parameters), by_class(inputs, explain))


@pytest.mark.parametrize("case", ["plain", "resnet18"])
def test_smoothed_gradcam_equals_the_mean_of_captums(case):
    net, inputs = made(case), smooth(2, CNNS[case].side, CNNS[case].side)
    twin = deepcopy(net)
    peer = captum.attr.LayerGradCam(twin, twin.get_submodule(CNNS[case].layer))

    def explain(own: list[int]) -> Tensor:
        signed = [
            peer.attribute(noisy_copies(image, 6, 0.2), target).mean(0)
            for image, target in zip(inputs, own, strict=True)
        ]
        return enlarged(torch.cat(signed).relu(), inputs)

    parameters = SmoothGradParameters(samples=6, noise=0.2)
    assert_same(ours(net, inputs, "smoothgrad(gradcam)", parameters), by_class(inputs, explain))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("case", "window", "stride"), [("plain", 8, 4), ("plain", 7, 5), ("plain", 6, 6), ("mobilenet_v3_small", 32, 16)]
)
def test_occlusion_equals_captum(case, window, stride):
    net, inputs = Amplified(made(case), 3.0), smooth(2, CNNS[case].side, CNNS[case].side)
    twin = deepcopy(net)
    peer = captum.attr.Occlusion(lambda x: twin(x).double().softmax(1))

    def explain(own: list[int]) -> Tensor:
        found = peer.attribute(inputs, (3, window, window), (3, stride, stride), baselines=0, target=torch.tensor(own))
        assert torch.equal(found[:, 0], found[:, 2])
        return found[:, 0].relu()

    parameters = OcclusionParameters(window=window, stride=stride)
    assert_same(ours(net, inputs, "occlusion", parameters), by_class(inputs, explain))


# ---------------------------------------------------------------- FullGrad


def test_fullgrad_equals_grad_cam_where_a_layer_has_one_channel():
    # it scales each channel alone; the authors' code (idiap/fullgrad-saliency) and ours scale each layer
    net, inputs = seeded(Monochrome), smooth(3, 32, 32).mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    assert_same(ours(net, inputs, "fullgrad"), by_grad_cam(_fullgrad, net, "first", inputs))


def _fullgrad(net: nn.Module, _: list[nn.Module], reshape_transform: None) -> pytorch_grad_cam.FullGrad:
    return pytorch_grad_cam.FullGrad(net, [])


class ScaledByLayer(pytorch_grad_cam.FullGrad):
    """grad-cam's input gradient, biases and their gradients, joined as in the authors' code."""

    def __init__(self, net: nn.Module, _: list[nn.Module], reshape_transform: None) -> None:
        super().__init__(net, [])

    def compute_cam_per_layer(self, input_tensor: Tensor, *_) -> list[np.ndarray]:
        terms = [input_tensor.grad * input_tensor.detach()] + [
            slope * torch.from_numpy(bias)[:, None, None]
            for bias, slope in zip(self.bias_data, self.activations_and_grads.gradients, strict=True)
        ]
        return [enlarged(self.psi(term), input_tensor)[:, None].numpy() for term in terms]

    @staticmethod
    def psi(term: Tensor) -> Tensor:
        size = term.abs()
        size = size - size.amin((1, 2, 3), keepdim=True)
        return (size / size.amax((1, 2, 3), keepdim=True).clamp(min=1e-30)).sum(1)

    def aggregate_multi_layers(self, cam_per_target_layer: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(cam_per_target_layer, 1).sum(1)


@pytest.mark.parametrize("case", ["plain", "resnet18", "vgg11_bn"])
def test_fullgrad_has_the_terms_of_grad_cam(case):
    net, inputs = made(case), smooth(2, CNNS[case].side, CNNS[case].side)
    assert_same(ours(net, inputs, "fullgrad"), by_grad_cam(ScaledByLayer, net, CNNS[case].layer, inputs))


# ---------------------------------------------------------------- errors of the peers that ours does not have


def small_densenet() -> nn.Module:
    """Its forward overwrites the output of `features` by an in-place ReLU."""
    return DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=7)


@pytest.mark.parametrize(
    ("by", "make"),
    [(by_grad_cam, GRAD_CAM["gradcam"]), (by_torchcam, TORCHCAM["gradcam"])],
    ids=["grad-cam", "torchcam"],
)
def test_a_layer_is_read_before_it_is_overwritten_in_place(by, make):
    """Both peers keep a reference to the layer's output, and so read it after a later operation changed it."""
    net, inputs = seeded(small_densenet), smooth(3, 64, 64)
    found = ours(net, inputs, "gradcam", blocks=["features.norm5"])
    assert differences(found, by(make, net, "features.norm5", inputs)).max() > 0.05
    assert_same(found, by(_shielded(make), net, "features.norm5", inputs))


def _shielded(make: Callable) -> Callable:
    """The peer on a network that continues with a copy of the tensor that the peer keeps."""

    def shielded(net: nn.Module, layers: object, **options):
        peer = make(net, layers, **options)
        net.features.norm5.register_forward_hook(lambda _module, _inputs, output: output.clone())
        return peer

    return shielded


def grad_cam_plus_plus_of_means(net: Pooling, inputs: Tensor, factor: float) -> Maps:
    """Behind a mean and a linear layer G is W / (h w) everywhere, so that equation 19 can be written out."""
    maps = net.last(net.pool(net.first(inputs))).detach().double()
    places = maps[0, 0].numel()

    def explain(own: list[int]) -> Tensor:
        slopes = factor * net.head.weight[own].detach().double() / places
        weights = places * slopes.relu() / (2 + maps.sum((2, 3)) * slopes)
        return enlarged(torch.einsum("nk,nkhw->nhw", weights, maps), inputs)

    return by_class(inputs, explain)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_gradcam_plus_plus_holds_for_logits_of_any_size(factor):
    """grad-cam's 1e-6 outweighs the squares of small gradients; torchcam divides a copy, without effect."""
    net, inputs = seeded(lambda: Pooling(3)), smooth(3, 30, 30)
    loud = Amplified(net, factor)
    found, wanted = ours(loud, inputs, "gradcam++"), grad_cam_plus_plus_of_means(net, inputs, factor)
    assert_same(found, wanted)
    grad_cam = by_grad_cam(GRAD_CAM["gradcam++"], loud, "net.last", inputs)
    assert (differences(grad_cam, wanted).max() <= TOLERANCE) == (factor == 1e3)
    undivided = by_torchcam(torchcam.methods.GradCAMpp, loud, "net.last", inputs)
    assert differences(undivided, wanted).max() > 0.01


def test_ablationcam_is_not_inverted_by_a_negative_logit():
    """The paper's division by a negative logit, which grad-cam has, hides evidence for a class and shows the rest."""
    inputs = smooth(2, 32, 32)
    above, below = Shifted(made("plain"), 2.0), Shifted(made("plain"), -2.0)
    assert_same(ours(above, inputs, "ablationcam"), ours(below, inputs, "ablationcam"))
    turned = by_grad_cam(pytorch_grad_cam.AblationCAM, below, "net.features.7", inputs)
    assert differences(ours(below, inputs, "ablationcam"), turned).max() > 0.5
