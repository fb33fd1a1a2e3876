"""The parameters of each explainer; the defaults are the papers'."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

Removal = Literal["zero", "black", "drop"]
"""What stands where pixels were removed; `drop`: nothing, a vision transformer is not given these patches."""

_REMOVAL = {
    "help": "value of removed pixels: zero in model-input space, or a black pixel; or drop: a vision transformer is "
    "not given the patches"
}


@dataclass(frozen=True)
class SiseParameters:
    """SISE's parameters; the defaults are the paper's."""

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
    baseline: Removal = field(default="zero", metadata=_REMOVAL)
    budget: int | float | Literal["auto"] | None = field(
        default=None,
        metadata={
            "help": "how many masks are scored (other scores are predicted): a number, a share such as 0.1, "
            "or auto; 0: none; not given: all"
        },
    )
    complete_above: float | None = field(
        default=None,
        metadata={
            "help": "with a budget: if a block map's predicted relative error is above this, the image's other "
            "masks are scored too; not given: never"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu must lie in [0, 1), got {self.mu}: at 1 no map would be kept")
        if isinstance(self.budget, float) and not 0 < self.budget < 1:
            raise ValueError(f"a budget of {self.budget} is no share between 0 and 1, and no whole number of forwards")
        if isinstance(self.budget, int) and self.budget < 0:
            raise ValueError(f"budget must be at least 0, got {self.budget}")
        if self.budget is not None and self.baseline == "drop":
            raise ValueError(
                "a budget predicts scores of painted pictures, and baseline drop leaves tokens out: give one"
            )
        if self.complete_above is not None:
            _check_completion(self.complete_above, self.budget)


def _check_completion(above: float, budget: int | float | str | None) -> None:
    if not above >= 0:
        raise ValueError(f"complete_above must be at least 0, got {above}")
    if not budget:
        raise ValueError(
            f"complete_above {above:g} needs a budget above 0, got {'none' if budget is None else budget}: without one "
            "no error is predicted"
        )


@dataclass(frozen=True)
class AdaSiseParameters(SiseParameters):
    """SISE with Otsu's threshold in place of mu."""

    selection: Literal["ada"] = field(default="ada", metadata={"help": "always ada"})


@dataclass(frozen=True)
class NoParameters:
    """No parameters."""


@dataclass(frozen=True)
class ReciproCamParameters:
    """Recipro-CAM's parameters."""

    kernel: Literal["gauss", "single"] = field(
        default="gauss",
        metadata={"help": "what is kept: a bell of 3 x 3 places, as in the paper, or the place alone"},
    )


@dataclass(frozen=True)
class ScoreCamParameters:
    """The paper weighs maps by a softmax over their logits; its authors' code by the probabilities."""

    weights: Literal["softmax", "probability"] = field(
        default="softmax", metadata={"help": "softmax over the maps' logits, or the plain probabilities"}
    )
    baseline: Removal = field(default="zero", metadata=_REMOVAL)


@dataclass(frozen=True)
class RiseParameters:
    """The paper's masks: 4000 for VGG16, 8000 for ResNet-50."""

    num_masks: int = field(default=4000, metadata={"help": "random masks; forwards per image"})
    grid: int = field(default=7, metadata={"help": "cells along a side"})
    keep: float = field(default=0.5, metadata={"help": "probability that a cell is kept"})
    baseline: Removal = field(default="zero", metadata=_REMOVAL)

    def __post_init__(self) -> None:
        _at_least(1, num_masks=self.num_masks, grid=self.grid)
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, got {self.keep}")


@dataclass(frozen=True)
class OcclusionParameters:
    """Sides in pixels of the model's input."""

    window: int = field(default=32, metadata={"help": "side of the hidden square in pixels"})
    stride: int = field(default=16, metadata={"help": "pixels from one window to the next"})
    baseline: Removal = field(default="zero", metadata=_REMOVAL)

    def __post_init__(self) -> None:
        _at_least(1, window=self.window, stride=self.stride)
        if self.stride > self.window:
            raise ValueError(f"a stride of {self.stride} over windows of {self.window} leaves pixels out")


@dataclass(frozen=True)
class IntegratedGradientsParameters:
    """The straight path from a baseline."""

    steps: int = field(default=50, metadata={"help": "points on the path"})
    baseline: Literal["zero", "black"] = field(
        default="zero",
        metadata={"help": "where the path begins: zero in model-input space, or a black picture"},
    )

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps)


_OF_BASE = {"help": "parameters of the wrapped method: base.NAME=VALUE"}


@dataclass(frozen=True)
class SmoothGradParameters:
    """The number of noisy copies, and their noise."""

    samples: int = field(default=25, metadata={"help": "noisy copies"})
    noise: float = field(default=0.15, metadata={"help": "deviation of the noise, as a share of the image's range"})
    base: Any = field(default=None, metadata=_OF_BASE)

    def __post_init__(self) -> None:
        _at_least(1, samples=self.samples)
        if not 0 < self.noise < 1:
            raise ValueError(f"noise must lie between 0 and 1, got {self.noise}")


@dataclass(frozen=True)
class UcagParameters:
    """The authors' constants are for inputs of 224 pixels and scale with the input."""

    crops: int = field(default=6, metadata={"help": "crops along a side"})
    side: int = field(default=124, metadata={"help": "side of a crop, in pixels of an input of 224"})
    enlarge: float | Literal["native"] = field(
        default=2.6,
        metadata={"help": "how much larger the model sees a crop; native: at its own input size, as transformers must"},
    )
    divider: Literal["official", "exact"] = field(
        default="official",
        metadata={"help": "divides the sum; official: overlaps plus 1, as the authors' code; exact: overlaps"},
    )
    weighted: bool = field(default=True, metadata={"help": "weigh crops by the model's confidence in the class"})
    blur: bool = field(default=True, metadata={"help": "a Gaussian of 5 x 5 pixels, sigma 3, over the finished map"})
    base: Any = field(default=None, metadata=_OF_BASE)

    def __post_init__(self) -> None:
        _at_least(1, crops=self.crops, side=self.side)
        if self.side > 224:
            raise ValueError(f"side is in pixels of an input of 224, got {self.side}")
        if self.crops * self.side < 224:
            raise ValueError(f"{self.crops} crops of {self.side} pixels along a side of 224 leave pixels out")
        if self.enlarge != "native" and not 1 <= self.enlarge <= 8:
            raise ValueError(f"enlarge must lie between 1 and 8, or be native, got {self.enlarge}")


@dataclass(frozen=True)
class LibraParameters:
    """No choices of its own."""

    base: Any = field(default=None, metadata=_OF_BASE)


def _reconstruction() -> Literal["reconstruction"]:
    return field(
        default="reconstruction",
        metadata={"help": "always this: no code and no full text was available; the authors' choices may differ"},
    )


@dataclass(frozen=True)
class FeatureCamParameters:
    """A reconstruction from the abstract: each choice that it leaves open is a parameter."""

    edges: Literal["auto", "hed", "scharr"] = field(
        default="auto", metadata={"help": "the feature descriptor; auto: hed where its weights are installed"}
    )
    edge_scale: float = field(
        default=1.0, metadata={"help": "side at which edges are detected, relative to the input's"}
    )
    interior: float = field(default=0.0, metadata={"help": "share of the base's map that is kept where no edge is"})
    threshold: float = field(default=0.0, metadata={"help": "values of the base's map below this become 0"})
    recompute: bool = field(default=False, metadata={"help": "use the mean of the base's maps of all three variants"})
    variant: Literal["product", "sum"] = field(
        default="product", metadata={"help": "the second variant: image times edges, or image plus edges"}
    )
    origin: Literal["reconstruction"] = _reconstruction()
    base: Any = field(default=None, metadata=_OF_BASE)

    def __post_init__(self) -> None:
        if not 0 < self.edge_scale <= 1:
            raise ValueError(f"edge_scale must lie in (0, 1], got {self.edge_scale}")
        for name in ("interior", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class AFmiParameters:
    """A reconstruction from the abstract: each choice that it leaves open is a parameter."""

    references: tuple[Literal["black", "mean", "blur", "noise"], ...] = field(
        default=("black",), metadata={"help": "reference images; of several, the mean map"}
    )
    removal: Literal["reference", "zero", "insert", "two_sided"] = field(
        default="reference",
        metadata={
            "help": "a feature map's importance: the score lost if the reference's map, or zeros, replace it; "
            "the score gained if it replaces the reference's (insert); or the mean of reference and insert"
        },
    )
    score: Literal["logit", "probability"] = field(
        default="logit", metadata={"help": "the score that importance is measured in"}
    )
    threshold: float = field(default=0.0, metadata={"help": "importance above which a feature map is relevant"})
    keep: Literal["relevant", "all"] = field(
        default="relevant", metadata={"help": "relevant: above the threshold; all: with negative importance too"}
    )
    conserve: bool = field(
        default=False, metadata={"help": "each map spreads its importance as a mass, not as a factor"}
    )
    rectify: bool = field(
        default=True, metadata={"help": "keep only evidence for the class; else also the size of evidence against it"}
    )
    channels: int | None = field(
        default=None,
        metadata={
            "help": "if every removal is a pass: only so many feature maps, those that differ most; others are 0"
        },
    )
    tail: Literal["auto", "passes"] = field(
        default="auto", metadata={"help": "auto: no passes if the head is pooling and one linear layer"}
    )
    origin: Literal["reconstruction"] = _reconstruction()

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("references is empty; wanted some of black, mean, blur, noise")
        if not isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {self.threshold}")
        if self.channels is not None:
            _at_least(1, channels=self.channels)


@dataclass(frozen=True)
class FovExParameters:
    """The authors' constants; distances are in halves of the picture's side."""

    fixations: int = field(default=10, metadata={"help": "number of fixations"})
    steps: int = field(default=20, metadata={"help": "gradient steps per fixation"})
    rate: float = field(default=0.1, metadata={"help": "length of a step"})
    fovea: float = field(default=0.15, metadata={"help": "squared radius of the sharp region"})
    heat: float = field(default=0.15, metadata={"help": "squared radius of a fixation in the map"})
    blur: float = field(default=10.0, metadata={"help": "deviation of the blur outside, in pixels"})
    memory: float = field(default=0.1, metadata={"help": "share of the sharp region that the next fixation keeps"})
    decay: float = field(default=1.0, metadata={"help": "factor on earlier fixations in the map, per later one"})
    restarts: bool = field(default=True, metadata={"help": "after a step without progress, restart at a random place"})
    best: Literal["evaluated", "official"] = field(
        default="evaluated",
        metadata={"help": "the place with the least loss; official: the place one step later, as the authors' code"},
    )

    def __post_init__(self) -> None:
        _at_least(1, fixations=self.fixations, steps=self.steps)
        for name in ("rate", "fovea", "heat", "blur"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("memory", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class DaamParameters:
    """DAAM's parameters."""

    of: Literal["class", "feature"] = field(
        default="class",
        metadata={"help": "what is explained: the class's logit, or the picture's own feature (self-supervised)"},
    )
    rectify: bool | None = field(
        default=None,
        metadata={
            "help": "set negative coefficients to 0; not given: yes for a class, no for a feature or a memory bank"
        },
    )
    normalise: bool = field(default=False, metadata={"help": "each block's map is scaled to [0, 1] before it is added"})
    query: Literal["auto", "class", "mean"] = field(
        default="auto",
        metadata={"help": "whose attention counts: the class token's, or all tokens' (auto: if there is none)"},
    )


@dataclass(frozen=True)
class LeGradParameters:
    """LeGrad's parameters."""

    pool: Literal["mean", "model"] = field(
        default="mean",
        metadata={"help": "what reads a block: the model's end on its mean token, or on its tokens as they are"},
    )


Family = Literal["normal", "uniform", "blur", "const", "train"]
SelectionMetric = Literal["average_drop_100", "average_increase_100", "insertion", "deletion", "pos", "neg"]


@dataclass(frozen=True)
class BeeParameters:
    """Random baselines from several families; a metric selects the best of their maps."""

    draws: int = field(default=100, metadata={"help": "number of baselines, and of maps"})
    families: tuple[Family, ...] = field(
        default=("normal", "uniform", "blur", "const", "train"), metadata={"help": "families of baselines"}
    )
    metric: SelectionMetric = field(
        default="average_drop_100",
        metadata={"help": "selects the map, and is never reported as its quality"},
    )
    choice: Literal["bandit", "even"] = field(
        default="bandit",
        metadata={"help": "chooses families: a contextual bandit, learned in a first pass; or each equally often"},
    )
    images: int = field(default=5000, metadata={"help": "images of the first pass"})
    pool: int = field(default=100, metadata={"help": "how many of these are baselines of the family train"})
    steps: int = field(default=4, metadata={"help": "steps of the path from a baseline"})
    noise_steps: int = field(default=3, metadata={"help": "the same, for the families normal and uniform"})
    integrand: Literal["path", "relu_grad_act"] = field(
        default="path",
        metadata={
            "help": "gradient times difference, or the authors' code: positive gradient times positive activation"
        },
    )
    with_mean: bool = field(default=False, metadata={"help": "the mean of all maps is one more candidate"})

    def __post_init__(self) -> None:
        _at_least(1, draws=self.draws, images=self.images, pool=self.pool)
        _at_least(1, steps=self.steps, noise_steps=self.noise_steps)
        if not self.families or len(set(self.families)) < len(self.families):
            raise ValueError(f"families must not be empty or repeat a name, got {list(self.families)}")

    @property
    def has_bandit(self) -> bool:
        """True if a bandit chooses among several families."""
        return self.choice == "bandit" and len(self.families) > 1

    @property
    def has_pool(self) -> bool:
        """True if baselines are drawn from other images."""
        return "train" in self.families

    @property
    def num_images(self) -> int:
        """Images of the first pass; 0: there is none."""
        return self.images if self.has_bandit else self.pool * self.has_pool


@dataclass(frozen=True)
class ExtremalParameters:
    """The authors' benchmark sums the masks of four areas."""

    areas: tuple[float, ...] = field(
        default=(0.025, 0.05, 0.1, 0.2), metadata={"help": "shares of the image that the masks keep"}
    )
    iterations: int = field(default=800, metadata={"help": "gradient steps per area; fewer give larger masks"})

    def __post_init__(self) -> None:
        _at_least(1, iterations=self.iterations)
        if not self.areas or not all(0 < area < 1 for area in self.areas):
            raise ValueError(f"areas must be shares between 0 and 1, got {list(self.areas)}")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
