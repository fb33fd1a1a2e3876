"""What the engine offers, readable without torch: names, parameters, needs and costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class SiseParameters:
    """The choices that SISE leaves to the user; the defaults are the paper's."""

    mu: float = field(
        default=0.0,
        metadata={"help": "keep a map whose summed gradient exceeds mu times the block's largest; 0 <= mu < 1"},
    )
    selection: Literal["mu", "ada"] = field(
        default="mu",
        metadata={"help": "mu, or ada: Otsu's threshold on the positive gradients (Ada-SISE; mu is not read)"},
    )
    gate: Literal["hard", "soft"] = field(
        default="hard",
        metadata={
            "help": "Otsu's mask in the fusion: hard as in the paper, or soft as in its authors' laboratory's code"
        },
    )
    baseline: Literal["zero", "black"] = field(
        default="zero",
        metadata={"help": "what stands where a mask removes: zero in model-input space, or a black pixel"},
    )
    budget: int | float | Literal["auto"] | None = field(
        default=None,
        metadata={
            "help": "how many masks are scored, the other scores being predicted: a number, a share such as 0.1, "
            "or auto; 0: none is; not given: all are"
        },
    )
    complete_above: float | None = field(
        default=None,
        metadata={
            "help": "with a budget: where a block map's predicted relative error stays above this, the image's other "
            "masks are scored too; not given: they never are"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu must lie in [0, 1), got {self.mu}: at 1 no map would be kept")
        if isinstance(self.budget, float) and not 0 < self.budget < 1:
            raise ValueError(f"a budget of {self.budget} is no share between 0 and 1; a number of forwards is whole")
        if isinstance(self.budget, int) and self.budget < 0:
            raise ValueError(f"a budget is a number of forwards, got {self.budget}")
        if self.complete_above is not None:
            _check_completion(self.complete_above, self.budget)


def _check_completion(above: float, budget: int | float | str | None) -> None:
    if not above >= 0:
        raise ValueError(f"complete_above is a relative error, got {above}")
    if not budget:
        raise ValueError(
            f"complete_above {above:g} needs a budget above 0, got {'none' if budget is None else budget}: without one "
            "no error is predicted"
        )


@dataclass(frozen=True)
class AdaSiseParameters(SiseParameters):
    """SISE with Otsu's threshold in place of mu."""

    selection: Literal["ada"] = field(default="ada", metadata={"help": "always ada"})


Fidelity = Literal["preview", "balanced", "full", "auto"]

BALANCED_BUDGET = 0.1
"""Share of an image's masks that a balanced map scores."""
POOR_MAP_ERROR = 0.5
"""`auto`: the predicted relative error of a block map above which an image's other masks are scored too."""

FIDELITIES: Mapping[Fidelity, Mapping[str, Any]] = {
    "preview": {"budget": 0},
    "balanced": {"budget": BALANCED_BUDGET},
    "full": {},
    "auto": {"budget": BALANCED_BUDGET, "complete_above": POOR_MAP_ERROR},
}
"""What each level sets of SISE's parameters; `auto`: for the records that nothing speaks against beforehand."""


@dataclass(frozen=True)
class NoParameters:
    """Of an explainer without choices."""


def _baseline() -> Literal["zero", "black"]:
    return field(
        default="zero",
        metadata={"help": "what stands where a mask removes: zero in model-input space, or a black pixel"},
    )


@dataclass(frozen=True)
class ScoreCamParameters:
    """The paper's algorithm puts a softmax over the maps' logits; its authors' code takes the probabilities."""

    weights: Literal["softmax", "probability"] = field(
        default="softmax", metadata={"help": "softmax over the maps' logits, or the plain probabilities"}
    )
    baseline: Literal["zero", "black"] = _baseline()


@dataclass(frozen=True)
class RiseParameters:
    """The paper's masks: 4000 for VGG16, 8000 for ResNet-50."""

    num_masks: int = field(default=4000, metadata={"help": "random masks; forwards per image"})
    grid: int = field(default=7, metadata={"help": "cells along a side"})
    keep: float = field(default=0.5, metadata={"help": "probability that a cell is kept"})
    baseline: Literal["zero", "black"] = _baseline()

    def __post_init__(self) -> None:
        _at_least(1, num_masks=self.num_masks, grid=self.grid)
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, got {self.keep}")


@dataclass(frozen=True)
class OcclusionParameters:
    """Sides in pixels of the model's input."""

    window: int = field(default=32, metadata={"help": "side of the hidden square in pixels"})
    stride: int = field(default=16, metadata={"help": "pixels from one place of it to the next"})
    baseline: Literal["zero", "black"] = _baseline()

    def __post_init__(self) -> None:
        _at_least(1, window=self.window, stride=self.stride)
        if self.stride > self.window:
            raise ValueError(f"a stride of {self.stride} over windows of {self.window} leaves pixels out")


@dataclass(frozen=True)
class IntegratedGradientsParameters:
    """The straight path from a baseline."""

    steps: int = field(default=50, metadata={"help": "points on the path"})
    baseline: Literal["zero", "black"] = _baseline()

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps)


@dataclass(frozen=True)
class SmoothGradParameters:
    """What is smoothed, and with how much noise."""

    base: Literal["gradient", "integrated_gradients", "gradcam"] = field(
        default="gradient", metadata={"help": "the method that is averaged, with its defaults"}
    )
    samples: int = field(default=25, metadata={"help": "noisy copies"})
    noise: float = field(default=0.15, metadata={"help": "deviation of the noise, as a share of the image's range"})

    def __post_init__(self) -> None:
        _at_least(1, samples=self.samples)
        if not 0 < self.noise < 1:
            raise ValueError(f"noise must lie between 0 and 1, got {self.noise}")


@dataclass(frozen=True)
class ExtremalParameters:
    """The authors' benchmark sums the masks of four areas."""

    areas: tuple[float, ...] = field(
        default=(0.025, 0.05, 0.1, 0.2), metadata={"help": "shares of the image that the masks keep"}
    )
    iterations: int = field(default=800, metadata={"help": "gradient steps per area; with fewer the masks stay larger"})

    def __post_init__(self) -> None:
        _at_least(1, iterations=self.iterations)
        if not self.areas or not all(0 < area < 1 for area in self.areas):
            raise ValueError(f"areas must be shares between 0 and 1, got {list(self.areas)}")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ExplainerEntry:
    """One line of `blocksight list explainers`."""

    parameters: type
    """A frozen dataclass with a default for every field."""
    needs: str
    """What it asks of the model."""
    cost: str
    """Forward (F) and backward (B) passes per image."""
    source: str
    """Where the method is published."""
    blocks: Literal["all", "last", "none"]
    """Which of the network's blocks it looks at."""
    num_forwards: Callable[[Any, int], float] | None = None
    """What parameters and a number of targets cost per image, as forward passes; None: it depends on the model."""


@dataclass(frozen=True)
class MetricEntry:
    """One line of `blocksight list metrics`."""

    meaning: str
    better: Literal["lower", "higher"]
    unit: str
    cost: str


@dataclass(frozen=True)
class ModelEntry:
    """One line of `blocksight list models`."""

    meaning: str
    needs: str
    forwards_by_mu: tuple[tuple[float, int], ...] = ()
    """Masked forwards per image that were measured on photographs, by SISE's mu, ascending."""


BACKWARD = 2
"""Forward passes that a backward pass is worth."""


def _cam(source: str) -> ExplainerEntry:
    return ExplainerEntry(
        NoParameters,
        needs="a CNN or a vision transformer: the last block's feature maps, gradients",
        cost="1 F + 1 B per target",
        source=source,
        blocks="last",
        num_forwards=lambda _, targets: 2 + BACKWARD * targets,
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
        num_forwards=lambda parameters, targets: (
            parameters.samples * (50 if parameters.base == "integrated_gradients" else 1) * (1 + BACKWARD * targets)
        ),
    ),
    "fullgrad": ExplainerEntry(
        NoParameters,
        needs="a CNN whose layers have biases or batch norms; gradients",
        cost="1 F + 1 B per target",
        source="Srinivas and Fleuret, NeurIPS 2019 (arXiv 1905.00780)",
        blocks="none",
        num_forwards=lambda _, targets: 2 + BACKWARD * targets,
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
    "random": _control("uniform noise"),
    "gaussian": _control("a bell in the middle of the picture"),
    "edges": _control("Sobel's edge detector"),
}

_ONE, _CURVE = "1 F, shared", "29 F"


def _kept(share: int, better: Literal["lower", "higher"]) -> MetricEntry:
    said = "score lost" if better == "lower" else "share of maps whose score grows"
    return MetricEntry(f"{said} when the {share} % most salient pixels stay, dimmed by the map", better, "%", _ONE)


METRICS: Mapping[str, MetricEntry] = {
    "drop": MetricEntry(
        "score lost when only the top 15 % of pixels are kept, relative to the score", "lower", "%", _ONE
    ),
    "increase": MetricEntry(
        "share of records whose score grows when only the top 15 % of pixels are kept", "higher", "%", _ONE
    ),
    "insertion": MetricEntry(
        "mean score while pixels come back onto a blurred picture, salient first", "higher", "0 to 1", _CURVE
    ),
    "deletion": MetricEntry("mean score while pixels go, salient first", "lower", "0 to 1", _CURVE),
    "average_drop_100": _kept(100, "lower"),
    "average_increase_100": _kept(100, "higher"),
    "average_drop_50": _kept(50, "lower"),
    "average_increase_50": _kept(50, "higher"),
    "average_drop_15": _kept(15, "lower"),
    "average_increase_15": _kept(15, "higher"),
    "pos": MetricEntry("how long the prediction stays while salient pixels go", "lower", "0 to 90", "10 F"),
    "neg": MetricEntry("how long the prediction stays while other pixels go", "higher", "0 to 90", "10 F"),
    "road_morf": MetricEntry("as pos, with removed pixels imputed (ROAD)", "lower", "%", "7 F and 7 imputations"),
    "road_lerf": MetricEntry("as neg, with removed pixels imputed (ROAD)", "higher", "%", "7 F and 7 imputations"),
    "positive_density": MetricEntry("score under the map per share of the picture", "higher", "from 0", "2 F, shared"),
    "negative_density": MetricEntry("score under what is left, likewise", "lower", "from 0", "2 F, shared"),
    "ebpg": MetricEntry("share of the map's energy inside the object (needs --truth)", "higher", "%", "none"),
    "miou": MetricEntry("overlap of the top 20 % of pixels with the object (needs --truth)", "higher", "%", "none"),
    "bbox": MetricEntry("share of the object that as many top pixels hit (needs --truth)", "higher", "%", "none"),
    "pointing": MetricEntry("whether the greatest value hits the object (needs --truth)", "higher", "%", "none"),
    "entropy": MetricEntry("of the map, over that of an even one", "lower", "0 to 1", "none"),
    "gini": MetricEntry("Gini index of the map", "higher", "0 to 1", "none"),
    "effective_area": MetricEntry("share of the picture that the map covers", "lower", "%", "none"),
    "sanity": MetricEntry(
        "size of the rank correlation with the map under random weights; only when asked",
        "lower",
        "0 to 1",
        "4 explanations",
    ),
}

CONTROLS = ("random", "gaussian", "edges")
"""Explainers that know nothing of the model."""

MODELS: Mapping[str, ModelEntry] = {
    "efficientnet_lite0": ModelEntry(
        "EfficientNet-Lite0, ImageNet, 224 x 224; the default",
        needs="the demo extra",
        forwards_by_mu=((0.0, 919), (0.1, 502), (0.3, 197), (0.5, 67), (1.0, 5)),
    ),
    "torchvision:NAME": ModelEntry(
        "any classifier of torchvision", "--weights: a state dict, a weight name, or random"
    ),
    "package.module:factory": ModelEntry("a function of yours that returns a module or a ModelAdapter", "your package"),
}
