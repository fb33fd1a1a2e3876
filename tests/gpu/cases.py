"""What is run once on the CPU and once on a GPU: small models, every explainer, every metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.composition import num_learning_images, parameters_of, parse_method
from blocksight.engine.explainers import EXPLAINERS, make_explainer
from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.metrics import MASKED
from blocksight.engine.metrics.metric import Maps, Value
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.features import without_head
from blocksight.engine.model.neighbours import NeighbourClassifier
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.saliency import minmax
from blocksight.engine.scoring.forward import Forward
from blocksight.engine.scoring.perturb import perturbation
from blocksight.engine.scoring.scorer import Scorer
from tests.engine.nets import TRANSFORMERS_ONLY, Depthwise, Plain, Pooled, Residual, Transformer, seeded

SIZE = (32, 32)
NUM_IMAGES = 3
BATCH_SIZE, IMAGES_PER_PASS = 16, 4


class Untraceable(nn.Module):
    """Its forward depends on values: places are sub-modules, and hooks record them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * 2 if x.sum() > 1e30 else x)


class Keen(nn.Module):
    """Forty feature maps in two blocks, so that a budget keeps a part of each, and unlike probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(24, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)) * 40)


class Deep(nn.Module):
    """Five blocks, as usual networks have, of few feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=1 if before == 3 else 2, padding=1), nn.ReLU())
            for before, after in ((3, 6), (6, 6), (6, 8), (8, 8), (8, 12))
        )
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)) * 40)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    net = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(net.heads.head.weight)
    return net


def _neighbours() -> nn.Module:
    """Features of a transformer with a bank of thirty images."""
    features = without_head(ModelAdapter(seeded(Transformer), input_size=SIZE)).module
    bank = torch.Generator().manual_seed(3)
    rows, labels = torch.randn(30, 12, generator=bank), torch.randint(0, 5, (30,), generator=bank)
    return NeighbourClassifier(features, rows, labels, list("abcde")).eval()


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "cnn": lambda: seeded(Plain),
    "vit": lambda: seeded(Transformer),
    "keen": lambda: seeded(Keen, 1),
    "deep": lambda: seeded(Deep),
    "untraceable": lambda: seeded(Untraceable),
    "residual": lambda: seeded(Residual),
    "depthwise": lambda: seeded(Depthwise),
    "pooled": lambda: seeded(Pooled),
    "neighbours": _neighbours,
    "fused vit": lambda: seeded(lambda: Transformer(fused=True)),
    "torchvision's vit": lambda: seeded(_torchvision_vit),
}


def adapter_of(net: str) -> ModelAdapter:
    """A small model by name, on the CPU, the same each time."""
    return ModelAdapter(NETS[net](), name=net, input_size=SIZE)


def pixels(num_images: int = NUM_IMAGES) -> Tensor:
    """Smooth pictures, uint8 [N, 3, 32, 32]."""
    colours = torch.rand(num_images, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    return (functional.interpolate(colours, size=SIZE, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def classes(num_images: int, num_targets: int = 2) -> list[list[int]]:
    """Targets of each image, of five classes."""
    return [[(image + target) % 4 for target in range(num_targets)] for image in range(num_images)]


Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One explainer with parameters on one model."""

    explainer: str
    parameters: Mapping[str, Any]
    net: str

    def __str__(self) -> str:
        asked = ",".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.explainer}[{asked}]-{self.net}"


QUICK_BEE = {"draws": 4, "images": 4, "pool": 2, "steps": 2, "noise_steps": 2}
SHORT_BEE = {**QUICK_BEE, "draws": 2, "images": 2}
QUICK: Mapping[str, Mapping[str, Any]] = {
    "rise": {"num_masks": 20, "grid": 4},
    "occlusion": {"window": 8, "stride": 4},
    "integrated_gradients": {"steps": 4},
    "fovex": {"fixations": 2, "steps": 2, "blur": 2.0},
    "bee": QUICK_BEE,
    "extremal_perturbation": {"iterations": 3, "areas": (0.1, 0.2)},
    "smoothgrad": {"samples": 3},
    "ucag": {"crops": 2, "enlarge": "native"},
    "a-fmi": {"channels": 4},
}
"""Parameters that make a method short; no step of it is left out."""

NO_VIT = {"fullgrad"}
"""Explainers that need a network whose biases are all seen."""

VARIANTS: Sequence[tuple[str, Mapping[str, Any], str]] = (
    *[("sise", {"budget": budget}, "cnn") for budget in (0, 5, "auto")],
    ("sise", {"budget": 5, "complete_above": 1e-9}, "cnn"),
    ("sise", {"mu": 0.3}, "cnn"),
    ("sise", {"gate": "soft"}, "cnn"),
    ("sise", {"baseline": "black"}, "cnn"),
    ("sise", {"budget": 0.3}, "keen"),
    ("sise", {"budget": 0.3}, "vit"),
    *[("sise", {}, net) for net in ("untraceable", "residual", "depthwise", "neighbours")],
    ("scorecam", {"weights": "probability"}, "cnn"),
    ("ablationcam", {}, "untraceable"),
    ("gradcam", {}, "neighbours"),
    ("rise", {**QUICK["rise"], "baseline": "black"}, "cnn"),
    ("a-fmi", {"references": ("black", "mean", "blur", "noise")}, "pooled"),
    ("a-fmi", {"references": ("black", "noise"), "removal": "two_sided", "tail": "passes", "channels": 3}, "pooled"),
    ("a-fmi", {"removal": "zero", "conserve": True, "rectify": False, "score": "probability"}, "cnn"),
    ("daam", {"of": "feature"}, "vit"),
    ("daam", {"query": "mean", "normalise": True}, "vit"),
    *[("daam", {}, net) for net in ("neighbours", "fused vit", "torchvision's vit")],
    ("legrad", {"pool": "model"}, "fused vit"),
    *[(f"libra({base})", {}, "fused vit") for base in ("hirescam", "chefer", "legrad")],
    ("libra(hirescam)", {}, "depthwise"),
    *[(name, {}, "torchvision's vit") for name in ("legrad", "chefer")],
    ("bee", {**SHORT_BEE, "metric": "insertion", "with_mean": True, "integrand": "relu_grad_act"}, "cnn"),
    ("bee", {"draws": 4, "choice": "even", "families": ("normal", "uniform", "blur", "const")}, "vit"),
    ("smoothgrad(gradcam)", {"samples": 3}, "cnn"),
    ("smoothgrad(bee)", {"samples": 2, "base": SHORT_BEE}, "cnn"),
    ("ucag(sise)", {"crops": 2, "enlarge": 2.6}, "residual"),
    ("ucag(gradcam)", {"crops": 2, "enlarge": 2.6, "divider": "exact"}, "pooled"),
    ("ucag(bee)", {"crops": 2, "enlarge": 2.0, "base": SHORT_BEE}, "residual"),
    ("feature-cam(ucag(gradcam))", {}, "pooled"),
    ("feature-cam", {"edges": "scharr", "recompute": True, "edge_scale": 0.5}, "cnn"),
)


def _cases() -> list[Case]:
    """Every explainer on a CNN and on a transformer, and variants of their parameters."""
    found = [Case(name, QUICK.get(name, {}), "cnn") for name in EXPLAINERS if name not in TRANSFORMERS_ONLY]
    found += [Case(name, QUICK.get(name, {}), "vit") for name in EXPLAINERS if name not in NO_VIT]
    return found + [Case(*variant) for variant in VARIANTS]


CASES = _cases()


def explained(case: Case, adapter: ModelAdapter) -> list[list[Explanation]]:
    """Two targets of three images."""
    return explaining(case, adapter)()


def explaining(
    case: Case,
    adapter: ModelAdapter,
    num_images: int = NUM_IMAGES,
    batch_size: int = BATCH_SIZE,
    images_per_pass: int = IMAGES_PER_PASS,
    num_targets: int = 2,
    forward: Forward | None = None,
) -> Callable[[], list[list[Explanation]]]:
    """The case's work, ready to be run; what the method learns first is learned.

    The learned state goes through the CPU, as a job stores it.
    """
    inputs = adapter.normalise(pixels(num_images))
    target = ClassProbability(torch.tensor(classes(num_images, num_targets), device=adapter.device))
    seeds = list(range(num_images))
    make = partial(
        make_explainer,
        case.explainer,
        adapter,
        parameters_of(parse_method(case.explainer), case.parameters),
        batch_size=batch_size,
        images_per_pass=images_per_pass,
        forward=forward,
    )
    explainer = make()
    if num_learning_images(parse_method(case.explainer), explainer.parameters):
        learner = explainer.learner()
        learner.see(inputs, target, seeds)
        state = learner.state()
        assert all(tensor.device.type == "cpu" for tensor in state.values()), "the state of a job is on the CPU"
        explainer = make(state=state)
    return lambda: explainer.explain(inputs, target, seeds)


def difference(ours: Sequence[Sequence[Explanation]], others: Sequence[Sequence[Explanation]]) -> float:
    """The largest difference of maps and scores; infinite if masks, kept maps or NaN differ."""
    pairs = [pair for own, other in zip(ours, others, strict=True) for pair in zip(own, other, strict=True)]
    return max(_difference(*pair) for pair in pairs)


def _difference(one: Explanation, other: Explanation) -> float:
    facts = [(own.num_forwards, [(block.name, block.kept) for block in own.blocks]) for own in (one, other)]
    if facts[0] != facts[1] or (np.isnan(one.saliency_hw) != np.isnan(other.saliency_hw)).any():
        return float("inf")
    maps = np.nan_to_num(np.abs(one.saliency_hw - other.saliency_hw))
    return float(max(maps.max(), abs(one.score - other.score)))


def maps_to_measure(adapter: ModelAdapter, num_images: int) -> Maps:
    """Random maps of two targets of each image, with a region for the second."""
    drawn = np.random.default_rng(0)
    return Maps(
        adapter.normalise(pixels(num_images)),
        ClassProbability(torch.tensor(classes(num_images), device=adapter.device)),
        [[minmax(drawn.random(SIZE)) for _ in range(2)] for _ in range(num_images)],
        [[0.3, 0.2]] * num_images,
        [[0, 1]] * num_images,
        [[None, drawn.random(SIZE) > 0.5]] * num_images,
        range(num_images),
        range(num_images),
    )


def measured(name: str, baseline: str, adapter: ModelAdapter) -> Sequence[Sequence[Mapping[str, Value]]]:
    """The values of a metric that calls the model."""
    return measuring(name, baseline, adapter)()


def measuring(
    name: str,
    baseline: str,
    adapter: ModelAdapter,
    num_images: int = NUM_IMAGES,
    batch_size: int = BATCH_SIZE,
    forward: Forward | None = None,
) -> Callable[[], Sequence[Sequence[Mapping[str, Value]]]]:
    """A metric's work, ready to be run."""
    scorer = Scorer(adapter, perturbation(adapter, baseline), batch_size, forward)
    metric, maps = MASKED[name](scorer, baseline), maps_to_measure(adapter, num_images)
    return lambda: metric.evaluate(maps)
