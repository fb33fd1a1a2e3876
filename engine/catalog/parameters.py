"""The choices that each explainer leaves to the user, readable without torch; the defaults are the papers'."""

from dataclasses import dataclass, field
from math import isfinite
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


_OF_BASE = {"help": "of the method that is wrapped: base.NAME=VALUE"}


@dataclass(frozen=True)
class SmoothGradParameters:
    """With how much noise."""

    samples: int = field(default=25, metadata={"help": "noisy copies"})
    noise: float = field(default=0.15, metadata={"help": "deviation of the noise, as a share of the image's range"})
    base: Any = field(default=None, metadata=_OF_BASE)

    def __post_init__(self) -> None:
        _at_least(1, samples=self.samples)
        if not 0 < self.noise < 1:
            raise ValueError(f"noise must lie between 0 and 1, got {self.noise}")


@dataclass(frozen=True)
class UcagParameters:
    """The authors' constants are of inputs of 224 pixels; others scale with the input."""

    crops: int = field(default=6, metadata={"help": "crops along a side"})
    side: int = field(default=124, metadata={"help": "of a crop, in pixels of an input of 224"})
    enlarge: float | Literal["native"] = field(
        default=2.6,
        metadata={"help": "how much larger the model sees a crop; native: at its own input size, as transformers must"},
    )
    divider: Literal["official", "exact"] = field(
        default="official",
        metadata={"help": "of overlaps: official: their number and one, as the authors' code; exact: their number"},
    )
    weighted: bool = field(default=True, metadata={"help": "crops count by the model's confidence in the class there"})
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


def _reconstruction() -> Literal["reconstruction"]:
    return field(
        default="reconstruction",
        metadata={"help": "always this: no code and no full text was at hand, and the choices may differ from theirs"},
    )


@dataclass(frozen=True)
class FeatureCamParameters:
    """A reconstruction from the abstract: every choice that it leaves open is one here."""

    edges: Literal["auto", "hed", "scharr"] = field(
        default="auto", metadata={"help": "the feature descriptor; auto: hed where its weights are installed"}
    )
    edge_scale: float = field(default=1.0, metadata={"help": "side at which edges are sought, relative to the input's"})
    interior: float = field(default=0.0, metadata={"help": "share of the base's map that stays where no edge is"})
    threshold: float = field(default=0.0, metadata={"help": "the base's map counts from this value of [0, 1] on"})
    recompute: bool = field(
        default=False, metadata={"help": "the mean of the base's maps of all three variants, not the image's alone"}
    )
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
    """A reconstruction from the abstract: every choice that it leaves open is one here."""

    references: tuple[Literal["black", "mean", "blur", "noise"], ...] = field(
        default=("black",), metadata={"help": "images that the picture is held against; of several, the mean map"}
    )
    removal: Literal["reference", "zero", "insert", "two_sided"] = field(
        default="reference",
        metadata={
            "help": "a feature map's importance: the score lost when the reference's map, or zeros, take its place; "
            "the score that it brings to the reference's maps (insert); or the mean of the first and the last"
        },
    )
    score: Literal["logit", "probability"] = field(default="logit", metadata={"help": "what the importance is of"})
    threshold: float = field(default=0.0, metadata={"help": "importance above which a feature map is relevant"})
    keep: Literal["relevant", "all"] = field(
        default="relevant", metadata={"help": "relevant: above the threshold; all: with negative importance too"}
    )
    conserve: bool = field(
        default=False, metadata={"help": "each map's importance is a mass that it spreads, not a factor"}
    )
    rectify: bool = field(
        default=True, metadata={"help": "only what speaks for the class; else what speaks against it too, by its size"}
    )
    channels: int | None = field(
        default=None,
        metadata={
            "help": "where every removal is a pass: only so many feature maps, those that differ most; others count 0"
        },
    )
    tail: Literal["auto", "passes"] = field(
        default="auto", metadata={"help": "auto: no passes where the head is pooling and one linear layer"}
    )
    origin: Literal["reconstruction"] = _reconstruction()

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("references names none; wanted some of black, mean, blur, noise")
        if not isfinite(self.threshold):
            raise ValueError(f"threshold is an importance, got {self.threshold}")
        if self.channels is not None:
            _at_least(1, channels=self.channels)


@dataclass(frozen=True)
class FovExParameters:
    """The authors' constants; distances are in halves of the picture's side."""

    fixations: int = field(default=10, metadata={"help": "places looked at, one after the other"})
    steps: int = field(default=20, metadata={"help": "gradient steps for each"})
    rate: float = field(default=0.1, metadata={"help": "how far a step goes"})
    fovea: float = field(default=0.15, metadata={"help": "squared reach of what is seen sharply"})
    heat: float = field(default=0.15, metadata={"help": "squared reach of a fixation in the map"})
    blur: float = field(default=10.0, metadata={"help": "deviation of the blur outside, in pixels"})
    memory: float = field(default=0.1, metadata={"help": "share of what was seen that stays for the next fixation"})
    decay: float = field(default=1.0, metadata={"help": "factor on earlier fixations of the map, for each later one"})
    restarts: bool = field(default=True, metadata={"help": "a step that does not help begins anew somewhere"})
    best: Literal["evaluated", "official"] = field(
        default="evaluated",
        metadata={"help": "the place whose loss was least; official: the place one step after it, as their code"},
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
    """Of a vision transformer's attention."""

    of: Literal["class", "feature"] = field(
        default="class",
        metadata={"help": "what is explained: the class's logit, or the picture's own feature (self-supervised)"},
    )
    rectify: bool | None = field(
        default=None,
        metadata={
            "help": "negative coefficients are cut off; not given: of a class yes, of a feature or by a memory bank no"
        },
    )
    normalise: bool = field(default=False, metadata={"help": "each block's map is scaled to [0, 1] before it is added"})
    query: Literal["auto", "class", "mean"] = field(
        default="auto",
        metadata={"help": "whose attention counts: the class token's, or all tokens' (auto: where there is none)"},
    )


Family = Literal["normal", "uniform", "blur", "const", "train"]
SelectionMetric = Literal["average_drop_100", "average_increase_100", "insertion", "deletion", "pos", "neg"]


@dataclass(frozen=True)
class BeeParameters:
    """Baselines at random from several families; of the maps that they give, the best by a metric."""

    draws: int = field(default=100, metadata={"help": "baselines drawn, and maps made"})
    families: tuple[Family, ...] = field(
        default=("normal", "uniform", "blur", "const", "train"), metadata={"help": "what baselines are drawn from"}
    )
    metric: SelectionMetric = field(
        default="average_drop_100",
        metadata={"help": "picks the map, and is therefore never reported as its quality"},
    )
    choice: Literal["bandit", "even"] = field(
        default="bandit",
        metadata={"help": "of families: a contextual bandit, learned in a first pass; or each equally often"},
    )
    images: int = field(default=5000, metadata={"help": "of the first pass"})
    pool: int = field(default=100, metadata={"help": "of these, how many are baselines of the family train"})
    steps: int = field(default=4, metadata={"help": "of the path from a baseline"})
    noise_steps: int = field(default=3, metadata={"help": "the same, from baselines of normal and uniform"})
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
            raise ValueError(f"families must name some, each once, got {list(self.families)}")

    @property
    def has_bandit(self) -> bool:
        """Of one family there is nothing to choose."""
        return self.choice == "bandit" and len(self.families) > 1

    @property
    def has_pool(self) -> bool:
        """Baselines are drawn from other images."""
        return "train" in self.families

    @property
    def num_images(self) -> int:
        """Of the first pass; 0: there is none."""
        return self.images if self.has_bandit else self.pool * self.has_pool


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
