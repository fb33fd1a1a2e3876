"""Models as training leaves them: wrapped, compiled, in half precision, quantised; each works or is refused."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from blocksight import explain
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter

SIDE = 32


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class LowRank(nn.Module):
    """A linear layer with an update of low rank beside it, 0 at first."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Wrapper(nn.Module):
    """Passes on what it is given, as libraries of adapters do."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.base_model(*args, **kwargs)


def made(**options: int) -> Net:
    torch.manual_seed(0)
    return Net(**options).eval()


def low_rank() -> nn.Module:
    net = made()
    net.head = LowRank(net.head)
    return Wrapper(net).eval()


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(made(), {nn.Linear})


def told_of(module: nn.Module, explainer: str, **options: str):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    adapter = ModelAdapter(module, input_size=(SIDE, SIDE))
    few = {"parameters": {"num_masks": 16}} if explainer == "rise" else {}
    return explain(adapter, pixels, explainer=explainer, console=Console(quiet=True), **few, **options)


WORK: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(made()),
    "data parallel": lambda: nn.DataParallel(made()),
    "data parallel of a compiled one": lambda: nn.DataParallel(torch.compile(made())),
    "low rank": low_rank,
}


@pytest.mark.parametrize(("kind", "explainer"), [*((kind, "gradcam") for kind in WORK), ("data parallel", "rise")])
def test_a_wrapped_model_has_the_map_of_the_plain_one(kind, explainer):
    plain, wrapped = (told_of(make(), explainer) for make in (made, WORK[kind]))
    assert wrapped.score == pytest.approx(plain.score, abs=1e-6)
    assert np.abs(wrapped.map.astype(float) - plain.map).max() <= 1e-3 * np.abs(plain.map).max()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "half": (lambda: made().half(), r"its weights are float16 and images are float32; return model\.float\(\)"),
    "bfloat16": (lambda: made().bfloat16(), "its weights are bfloat16"),
    "four channels": (lambda: made(channels=4), "takes 4 channels; wrap it in a module"),
    "regression": (lambda: made(classes=1), r"identity \(a regression\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(kind):
    make, sentence = REFUSED[kind]
    with pytest.raises(ModelError, match=sentence):
        told_of(make(), "rise")


@pytest.mark.filterwarnings("ignore")  # torch tells that its quantisation moves to another package
def test_a_quantised_model_has_scores_and_no_gradients():
    plain, found = told_of(made(), "rise"), told_of(quantised(), "rise")
    assert np.corrcoef(plain.map.ravel(), found.map.ravel())[0, 1] > 0.999
    with pytest.raises(ModelError, match=r"none reaches block .* rise or occlusion"):
        told_of(quantised(), "gradcam")


def test_one_number_is_explained_as_it_is():
    net = made(classes=1)
    found = told_of(net, "rise", readout="identity")
    doubled = copy.deepcopy(net)
    with torch.no_grad():
        doubled.head.weight.mul_(2)
        doubled.head.bias.mul_(2)
    assert told_of(doubled, "rise", readout="identity").score == pytest.approx(2 * found.score, rel=1e-5)
