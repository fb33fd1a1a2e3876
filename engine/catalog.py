"""What the engine offers, readable without torch: names, parameters, needs and costs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


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

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu must lie in [0, 1), got {self.mu}: at 1 no map would be kept")


@dataclass(frozen=True)
class NoParameters:
    """Of an explainer without choices."""


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
    blocks: Literal["all", "last"]
    """Which of the network's blocks it looks at."""
    num_forwards: int | None = None
    """What it costs per image, as forward passes; None: it depends on the model."""


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


def _cam(source: str) -> ExplainerEntry:
    return ExplainerEntry(
        NoParameters,
        needs="a CNN: the last block's feature maps, gradients; no training, no randomness",
        cost="1 F + 1 B per target",
        source=source,
        blocks="last",
        num_forwards=4,
    )


EXPLAINERS: Mapping[str, ExplainerEntry] = {
    "sise": ExplainerEntry(
        SiseParameters,
        needs="a CNN: feature maps at several sizes, gradients; no training, no randomness",
        cost="1 F + 1 B per target, and 1 F per kept feature map (EfficientNet-Lite0: about 900 of 2432 at mu 0)",
        source="Sattarzadeh et al., AAAI 2021 (arXiv 2010.00672); Ada-SISE: arXiv 2102.07799",
        blocks="all",
    ),
    "gradcam": _cam("Selvaraju et al., ICCV 2017 (arXiv 1610.02391)"),
    "gradcam++": _cam("Chattopadhay et al., WACV 2018 (arXiv 1710.11063)"),
    "xgradcam": _cam("Fu et al., BMVC 2020 (arXiv 2008.02312)"),
    "layercam": _cam("Jiang et al., IEEE TIP 2021"),
    "hirescam": _cam("Draelos and Carin (arXiv 2011.08891)"),
}

METRICS: Mapping[str, MetricEntry] = {
    "drop": MetricEntry(
        "score lost when only the top 15 % of pixels are kept, relative to the score",
        "lower",
        "%",
        "1 F, shared",
    ),
    "increase": MetricEntry(
        "share of records whose score grows when only the top 15 % of pixels are kept",
        "higher",
        "%",
        "1 F, shared",
    ),
}

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
