"""The catalogue of explainers, metrics and models: names, parameters, needs and costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from blocksight.engine.catalog.parameters import (
    AdaSiseParameters,
    AFmiParameters,
    BeeParameters,
    DaamParameters,
    ExtremalParameters,
    FeatureCamParameters,
    FovExParameters,
    IntegratedGradientsParameters,
    LeGradParameters,
    LibraParameters,
    NoParameters,
    OcclusionParameters,
    ReciproCamParameters,
    RiseParameters,
    ScoreCamParameters,
    SelectionMetric,
    SiseParameters,
    SmoothGradParameters,
    UcagParameters,
)
from blocksight.engine.catalog.sources import backbone_of, source_of

Fidelity = Literal["preview", "balanced", "full", "auto"]

BALANCED_BUDGET = 0.1
"""Share of an image's masks that a balanced map scores."""
POOR_MAP_ERROR = 0.5
"""`auto`: above this predicted relative error of a block map, the image's other masks are scored too."""

FIDELITIES: Mapping[Fidelity, Mapping[str, Any]] = {
    "preview": {"budget": 0},
    "balanced": {"budget": BALANCED_BUDGET},
    "full": {},
    "auto": {"budget": BALANCED_BUDGET, "complete_above": POOR_MAP_ERROR},
}
"""SISE's parameters by level; `auto`: for records that need no full map from the start."""


@dataclass(frozen=True)
class ExplainerEntry:
    """One line of `blocksight list explainers`."""

    parameters: type
    """A frozen dataclass with a default for every field."""
    needs: str
    """What the model must have."""
    cost: str
    """Forward (F) and backward (B) passes per image."""
    source: str
    """Where the method is published."""
    blocks: Literal["all", "last", "none"]
    """The blocks of the network that it reads."""
    num_forwards: Callable[[Any, int], float] | None = None
    """Cost per image in forward passes, by parameters and number of targets; None: it depends on the model."""
    fast: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that the preset `fast` sets; the defaults are the preset `paper`."""
    wraps: str | None = None
    """The method that a wrapper wraps by default; None: it is no wrapper."""
    num_views: Callable[[Any], float] | None = None
    """A wrapper's cost as a multiple of its base's, by its parameters."""
    num_learning_images: Callable[[Any], int] = lambda _: 0
    """Number of images that its first pass reads, by its parameters."""

    @property
    def is_reconstruction(self) -> bool:
        """True if it was written from an abstract alone."""
        return any(own.name == "origin" and own.default == "reconstruction" for own in fields(self.parameters))


@dataclass(frozen=True)
class MetricEntry:
    """One line of `blocksight list metrics`."""

    meaning: str
    better: Literal["lower", "higher"]
    unit: str
    cost: str
    forwards: int = 0
    """Forward passes per map, as `cost` says; those of the metrics of one `evaluation` are made once."""
    explanations: int = 0
    """Maps that are made anew for each map."""
    evaluation: str | None = None
    """The name of the passes that the metric shares with others; None: it shares none."""
    is_share: bool = False
    """True if a map has the lowest or the highest value and none between, so that a mean is a share of maps."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lowest and the highest value; None if there is no highest."""
        return {"%": (0.0, 100.0), "0 to 1": (0.0, 1.0), "0 to 90": (0.0, 90.0)}.get(self.unit)


@dataclass(frozen=True)
class ModelEntry:
    """One line of `blocksight list models`."""

    meaning: str
    needs: str
    forwards_by_mu: tuple[tuple[float, int], ...] = ()
    """SISE's mu, ascending, with the masked forwards per image measured on photographs."""
    example: str = ""
    """Options that name a model of this source."""


BACKWARD = 2
"""Cost of a backward pass in forward passes."""

FORWARDS_TO_SELECT: Mapping[SelectionMetric, int] = {
    "average_drop_100": 1,
    "average_increase_100": 1,
    "insertion": 29,
    "deletion": 29,
    "pos": 10,
    "neg": 10,
}
"""Forward passes per map that a metric judges."""


def _backward_per_target(_: Any, targets: int) -> float:
    """Cost of one forward pass, and one backward pass per target."""
    return 1 + BACKWARD * targets


_GLOBAL = "a vision transformer whose attentions span all patches (no windows)"


def _cam(source: str) -> ExplainerEntry:
    return ExplainerEntry(
        NoParameters,
        needs="a CNN or a vision transformer: the last block's feature maps, gradients",
        cost="1 F + 1 B per target",
        source=source,
        blocks="last",
        num_forwards=_backward_per_target,
    )


def _sise(parameters: type, source: str, cost: str) -> ExplainerEntry:
    return ExplainerEntry(
        parameters, needs="a CNN: feature maps at several sizes, gradients", cost=cost, source=source, blocks="all"
    )


def _control(meaning: str) -> ExplainerEntry:
    return ExplainerEntry(
        NoParameters, "nothing: a control", "none", meaning, blocks="none", num_forwards=lambda *_: 2.0
    )


EXPLAINERS: Mapping[str, ExplainerEntry] = {
    "sise": _sise(
        SiseParameters,
        "Sattarzadeh et al., AAAI 2021 (arXiv 2010.00672)",
        "1 F + 1 B per target, and 1 F per kept feature map (EfficientNet-Lite0: about 900 of 2432 at mu 0)",
    ),
    "ada-sise": _sise(
        AdaSiseParameters,
        "Sudhakar et al., ICASSP 2021 (arXiv 2102.07799)",
        "as sise, with about a quarter of the maps (EfficientNet-Lite0: 230 of 2432)",
    ),
    "gradcam": _cam("Selvaraju et al., ICCV 2017 (arXiv 1610.02391)"),
    "gradcam++": _cam("Chattopadhay et al., WACV 2018 (arXiv 1710.11063)"),
    "xgradcam": _cam("Fu et al., BMVC 2020 (arXiv 2008.02312)"),
    "layercam": _cam("Jiang et al., IEEE TIP 2021"),
    "hirescam": _cam("Draelos and Carin (arXiv 2011.08891)"),
    "scorecam": ExplainerEntry(
        ScoreCamParameters,
        needs="a CNN or a vision transformer: the last block's feature maps",
        cost="1 F per feature map of the last block (EfficientNet-Lite0: 1280, ResNet-50: 2048)",
        source="Wang et al., CVPR Workshops 2020 (arXiv 1910.01279)",
        blocks="last",
    ),
    "ablationcam": ExplainerEntry(
        NoParameters,
        needs="a CNN or a vision transformer: the last block's feature maps, and the network behind it",
        cost="1 F, and 1 pass of the network behind the last block per feature map",
        source="Desai and Ramaswamy, WACV 2020",
        blocks="last",
    ),
    "reciprocam": ExplainerEntry(
        ReciproCamParameters,
        needs="a CNN or a vision transformer: the last block's feature maps, and the network behind it",
        cost="1 F, and 1 pass of the network behind the last block per place (ViT-B/16: 196, ResNet-50: 49)",
        source="Byun and Lee (arXiv 2209.14074; tokens: arXiv 2310.02588)",
        blocks="last",
    ),
    "rise": ExplainerEntry(
        RiseParameters,
        needs="any classifier; random",
        cost="1 F per mask (4000), shared by all targets",
        source="Petsiuk et al., BMVC 2018 (arXiv 1806.07421)",
        blocks="none",
        num_forwards=lambda parameters, _: parameters.num_masks,
    ),
    "occlusion": ExplainerEntry(
        OcclusionParameters,
        needs="any classifier",
        cost="1 F per window (169 at 224 pixels), shared by all targets",
        source="Zeiler and Fergus, ECCV 2014 (arXiv 1311.2901)",
        blocks="none",
        num_forwards=lambda parameters, _: (192 / parameters.stride + 1) ** 2,
    ),
    "integrated_gradients": ExplainerEntry(
        IntegratedGradientsParameters,
        needs="any classifier; gradients",
        cost="50 F, and 50 B per target",
        source="Sundararajan et al., ICML 2017 (arXiv 1703.01365)",
        blocks="none",
        num_forwards=lambda parameters, targets: parameters.steps * (1 + BACKWARD * targets),
    ),
    "smoothgrad": ExplainerEntry(
        SmoothGradParameters,
        needs="what its base needs; random",
        cost="25 times its base",
        source="Smilkov et al. (arXiv 1706.03825)",
        blocks="last",
        wraps="gradient",
        num_views=lambda parameters: parameters.samples,
    ),
    "fullgrad": ExplainerEntry(
        NoParameters,
        needs="a CNN whose layers have biases or batch norms, and whose terms sum to the logit; gradients",
        cost="1 F + 1 B per target",
        source="Srinivas and Fleuret, NeurIPS 2019 (arXiv 1905.00780)",
        blocks="none",
        num_forwards=_backward_per_target,
    ),
    "extremal_perturbation": ExplainerEntry(
        ExtremalParameters,
        needs="any classifier; gradients",
        cost="800 F + 800 B per area (4) and target",
        source="Fong et al., ICCV 2019 (arXiv 1910.08485)",
        blocks="none",
        num_forwards=lambda parameters, targets: (
            parameters.iterations * len(parameters.areas) * targets * (1 + BACKWARD)
        ),
    ),
    "gradient": ExplainerEntry(
        NoParameters,
        needs="any classifier; gradients",
        cost="1 F + 1 B per target",
        source="Simonyan et al. (arXiv 1312.6034)",
        blocks="none",
        num_forwards=_backward_per_target,
    ),
    "ucag": ExplainerEntry(
        UcagParameters,
        needs="what its base needs; at paper's size, a network that takes larger inputs",
        cost="36 times its base, at 2.1 times the pixels; fast: 9 times its base",
        source="Hong et al., Unfold and Conquer Attribution Guidance, AAAI 2023",
        blocks="all",
        fast={"crops": 3, "enlarge": "native"},
        wraps="gradcam",
        num_views=lambda own: own.crops**2 * (1.0 if own.enlarge == "native" else (own.side * own.enlarge / 224) ** 2),
    ),
    "libra": ExplainerEntry(
        LibraParameters,
        needs="what its base needs, which must take gradients; operations of torch's own",
        cost="its base",
        source="Mehri et al., LibraGrad (arXiv 2411.16760), from the paper alone",
        blocks="none",
        wraps="chefer",
        num_views=lambda _: 1.0,
    ),
    "feature-cam": ExplainerEntry(
        FeatureCamParameters,
        needs="what its base needs; for edges by HED, its weights",
        cost="its base (3 times with recompute), and 1 pass of HED (VGG16's layers); fast: HED at half the side",
        source="Clement et al. (arXiv 2403.05658), a RECONSTRUCTION from the abstract; edges: Xie and Tu, ICCV 2015",
        blocks="all",
        fast={"edge_scale": 0.5},
        wraps="gradcam",
        num_views=lambda own: 3.0 if own.recompute else 1.0,
    ),
    "a-fmi": ExplainerEntry(
        AFmiParameters,
        needs="a CNN or a vision transformer: the last block's feature maps, and the network behind it",
        cost="2 F, and 1 F per reference, where the head is pooling and one linear layer; else also 1 pass of the "
        "network behind the last block per reference and feature map (fast: of the 256 that differ most)",
        source="A-FMI (arXiv 2104.05527), a RECONSTRUCTION from the abstract",
        blocks="last",
        fast={"channels": 256},
    ),
    "fovex": ExplainerEntry(
        FovExParameters,
        needs="any classifier; gradients; random",
        cost="200 F + 200 B per target; fast: 50 F + 50 B",
        source="Panda et al., FovEx, IJCV 2025 (arXiv 2408.02123)",
        blocks="none",
        num_forwards=lambda own, targets: own.fixations * own.steps * targets * (1 + BACKWARD),
        fast={"fixations": 5, "steps": 10},
    ),
    "daam": ExplainerEntry(
        DaamParameters,
        needs="a vision transformer with tokens for the picture's patches; gradients",
        cost="1 F + 1 B per target, in both presets",
        source="Liao et al., Pattern Recognition 2025 (arXiv 2503.14640)",
        blocks="none",
        num_forwards=lambda _, targets: 2 + BACKWARD * targets,
    ),
    "legrad": ExplainerEntry(
        LeGradParameters,
        needs=f"{_GLOBAL}, in blocks that nothing bypasses; gradients",
        cost="1 F + 1 B per target, each through one block at a time",
        source="Bousselham et al., ICCV 2025 (arXiv 2404.03214)",
        blocks="none",
        num_forwards=_backward_per_target,
    ),
    "chefer": ExplainerEntry(
        NoParameters,
        needs=f"{_GLOBAL}; gradients",
        cost="1 F + 1 B per target",
        source="Chefer et al., ICCV 2021 (arXiv 2103.15679), gradient-weighted attention rollout",
        blocks="none",
        num_forwards=_backward_per_target,
    ),
    "bee": ExplainerEntry(
        BeeParameters,
        needs="a CNN or a vision transformer: the last block's feature maps, gradients; random",
        cost="100 draws, each 5 F, and 5 B per target, of the network behind the last block (4 of noise), and per "
        "target 1 F (average drop), 10 F (pos) or 29 F (insertion); fast: 8 draws; before, a first pass over 5000 "
        "images (fast: 128), each 2 F, 1 draw and its metric",
        source="Barkan et al., AAAI 2025",
        blocks="last",
        num_forwards=lambda own, targets: 2 + own.draws * targets * FORWARDS_TO_SELECT[own.metric],
        fast={"draws": 8, "images": 128, "pool": 16},
        num_learning_images=lambda own: own.num_images,
    ),
    "random": _control("uniform noise"),
    "gaussian": _control("a bell in the middle of the picture"),
    "edges": _control("Sobel's edge detector"),
}

_TOP: Any = {"cost": "1 F, shared", "forwards": 1, "evaluation": "top"}
_LEVELS: Any = {"cost": "3 F, shared", "forwards": 3, "evaluation": "levels"}
_DENSITY: Any = {"cost": "2 F, shared", "forwards": 2, "evaluation": "density"}
_CURVE: Any = {"cost": "29 F", "forwards": 29}
_AGREE: Any = {"cost": "10 F", "forwards": 10}
_ROAD: Any = {"cost": "7 F and 7 imputations", "forwards": 7}


def _level_metric(share: int, better: Literal["lower", "higher"]) -> MetricEntry:
    meaning = "score lost" if better == "lower" else "share of maps whose score grows"
    text = f"{meaning} when the {share} % most salient pixels stay, dimmed by the map"
    return MetricEntry(text, better, "%", **_LEVELS, is_share=better == "higher")


METRICS: Mapping[str, MetricEntry] = {
    "drop": MetricEntry(
        "score lost when only the top 15 % of pixels are kept, relative to the score", "lower", "%", **_TOP
    ),
    "increase": MetricEntry(
        "share of records whose score grows when only the top 15 % of pixels are kept",
        "higher",
        "%",
        **_TOP,
        is_share=True,
    ),
    "insertion": MetricEntry(
        "mean score while pixels return to a blurred picture, salient first", "higher", "0 to 1", **_CURVE
    ),
    "deletion": MetricEntry("mean score while pixels are removed, salient first", "lower", "0 to 1", **_CURVE),
    "average_drop_100": _level_metric(100, "lower"),
    "average_increase_100": _level_metric(100, "higher"),
    "average_drop_50": _level_metric(50, "lower"),
    "average_increase_50": _level_metric(50, "higher"),
    "average_drop_15": _level_metric(15, "lower"),
    "average_increase_15": _level_metric(15, "higher"),
    "pos": MetricEntry("how long the prediction stays while salient pixels are removed", "lower", "0 to 90", **_AGREE),
    "neg": MetricEntry("how long the prediction stays while other pixels are removed", "higher", "0 to 90", **_AGREE),
    "road_morf": MetricEntry("as pos, with removed pixels imputed (ROAD)", "lower", "%", **_ROAD),
    "road_lerf": MetricEntry("as neg, with removed pixels imputed (ROAD)", "higher", "%", **_ROAD),
    "positive_density": MetricEntry("score under the map per share of the picture", "higher", "from 0", **_DENSITY),
    "negative_density": MetricEntry("the same under the inverted map", "lower", "from 0", **_DENSITY),
    "ebpg": MetricEntry("share of the map's energy inside the object (needs --truth)", "higher", "%", "none"),
    "miou": MetricEntry("overlap of the top 20 % of pixels with the object (needs --truth)", "higher", "%", "none"),
    "bbox": MetricEntry("share of the object's area hit by as many top pixels (needs --truth)", "higher", "%", "none"),
    "pointing": MetricEntry(
        "whether the greatest value hits the object (needs --truth)", "higher", "%", "none", is_share=True
    ),
    "entropy": MetricEntry("of the map, relative to an even map", "lower", "0 to 1", "none"),
    "gini": MetricEntry("Gini index of the map", "higher", "0 to 1", "none"),
    "effective_area": MetricEntry("share of the picture that the map covers", "lower", "%", "none"),
    "sanity": MetricEntry(
        "size of the rank correlation with the map under random weights; only when asked",
        "lower",
        "0 to 1",
        "4 explanations",
        explanations=4,
    ),
}


def metrics_biased_by(selected_by: str | None) -> frozenset[str]:
    """Metrics that are biased for maps selected by this one: itself, and those of the same scores."""
    if selected_by is None:
        return frozenset()
    kind, _, level = selected_by.rpartition("_")
    if kind in ("average_drop", "average_increase"):
        same = {"positive_density"} if level == "100" else set()  # the score under the whole map, over its area
        return frozenset({f"average_drop_{level}", f"average_increase_{level}", *same})
    return frozenset({selected_by})


CONTROLS = ("random", "gaussian", "edges")
"""Explainers that do not use the model."""

MODELS: Mapping[str, ModelEntry] = {
    "efficientnet_lite0": ModelEntry(
        "EfficientNet-Lite0, ImageNet, 224 x 224; the default",
        needs="the demo extra",
        forwards_by_mu=((0.0, 919), (0.1, 502), (0.3, 197), (0.5, 67), (1.0, 5)),
        example="--model efficientnet_lite0",
    ),
    "torchvision:NAME": ModelEntry(
        "any classifier of torchvision",
        "--weights: a state dict, a weight name, or random",
        example="--model torchvision:resnet50 --weights IMAGENET1K_V2",
    ),
    "timm:NAME": ModelEntry(
        "any model of timm, fed as its own configuration says",
        "--weights: a state dict, or random",
        example="--model timm:vit_small_patch16_224.augreg_in1k --weights vit.safetensors",
    ),
    "hf:FOLDER": ModelEntry(
        "a Hugging Face folder or s3:// prefix: image classifiers, models of features, CLIP and SigLIP",
        "config.json, preprocessor_config.json and safetensors in it",
        example="--model hf:models/dinov2-base",
    ),
    "open_clip:ARCH": ModelEntry(
        "any model of OpenCLIP; ARCH/TAG is fed as the weights of that tag; ./FOLDER is one as it saves for a hub",
        "--weights: a state dict, or random",
        example="--model open_clip:ViT-B-32/laion2b_s34b_b79k --weights clip.safetensors",
    ),
    "onnx:FILE": ModelEntry(
        "an ONNX file, on the CPU, for methods without gradients and blocks, such as rise and occlusion",
        "the file; no custom operators",
        example="--model onnx:models/classifier.onnx --explainer rise",
    ),
    "package.module:factory": ModelEntry(
        "a function of yours that returns a module or a ModelAdapter",
        "your package",
        example="--model mine.models:classifier",
    ),
    "knn(NAME)": ModelEntry(
        "any of these without its head: the nearest labelled features vote",
        "--weights: what `bank` wrote",
        example="--model 'knn(timm:resnet50)' --weights bank.safetensors",
    ),
}


def factory_of(name: str) -> str | None:
    """The `package.module:factory` that a model of this name imports; None: it imports no user code."""
    backbone = backbone_of(name)
    if backbone is not None:
        return factory_of(backbone)
    return name if ":" in name and source_of(name) is None else None


RECONSTRUCTED = "a reconstruction from the abstract: no code was available, and the authors' choices may differ"
"""The note on methods that the list marks."""

CATALOGUE: Mapping[str, Mapping[str, Any]] = {"explainers": EXPLAINERS, "metrics": METRICS, "models": MODELS}
"""What `blocksight list` prints."""
