"""The sanity check: a map must change when the model's weights become random, layer by layer from the top."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.metrics.metric import Maps, Metric, Value, undefined
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.taps import plain_modules
from blocksight.engine.saliency import Map, is_flat, minmax

STAGES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the layers, from the output down, whose weights are random."""
NUM_PICTURES = 16
"""Random pictures that batch norms' statistics are estimated from: the same for every record and batch."""
CELLS = (2, 4, 8, 16, 32)
"""Details of the random pictures, along each side."""
MIN_SPREAD = 1e-4
"""Least deviation of a random network's logits over pictures, as a share of the largest: less is near rounding."""
DEAD = "with random weights the model's output hardly depends on the image"


def random_pictures(adapter: ModelAdapter, seed: int) -> Tensor:
    """Model inputs [NUM_PICTURES, 3, H, W] with details of all sizes, as photographs have; by the seed."""
    own = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(NUM_PICTURES, 3, *adapter.input_size)
    for cells in CELLS:
        coarse = torch.randn(NUM_PICTURES, 3, cells, cells, generator=own)
        pixels += functional.interpolate(coarse, adapter.input_size, mode="bilinear")
    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    return adapter.normalise((255 * (pixels - low) / (high - low)).byte())


def layers_by_execution(module: nn.Module, inputs: Tensor) -> list[nn.Module]:
    """The layers with weights of their own in the order of their first call; one that is not called is with its parent.

    The order of registration is another one: many networks register their head, or a shortcut, before other layers.
    """
    calls: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in module.named_modules():
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name)))
        module(inputs)
    first = {name: place for place, name in reversed(list(enumerate(calls)))}

    def place(name: str) -> int:
        while name not in first:
            name = name.rpartition(".")[0]
        return first[name]

    layers = {name: own for name, own in module.named_modules() if any(True for _ in own.parameters(recurse=False))}
    return [layers[name] for name in sorted(layers, key=place)]


def randomised(module: nn.Module, share: float, seed: int, inputs: Tensor) -> nn.Module:
    """A copy in which the last `share` of the executed layers with weights is reset, as before training.

    Weights that no method of their layer resets are put in a random order. The statistics of batch norms that were
    reset are estimated anew from the inputs: with mean 0 and variance 1 a deep network's signal dies out, and its
    logits are the same for every picture.
    """
    with torch.no_grad():
        module(inputs[:1])  # torch's older weight_norm then holds a plain weight, which can be copied
    fresh = copy.deepcopy(module).eval()
    layers = layers_by_execution(fresh, inputs[:1])
    chosen = layers[len(layers) - ceil(share * len(layers)) :]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in chosen:
            _reset(layer)
        _estimate_statistics(fresh, [layer for layer in chosen if isinstance(layer, BatchNorm)], inputs)
    return fresh


def _refuse_hidden_weights(module: nn.Module) -> None:
    """Raises ModelError for TorchScript and for quantised weights: they would stay as they were trained."""
    is_script = len(plain_modules(module)) < len(list(module.modules()))
    packed = [name for name, own in module.state_dict().items() if not isinstance(own, Tensor) or own.is_quantized]
    if is_script or packed:
        what = "the layers of TorchScript cannot be reached" if is_script else f"{packed[0]} is quantised"
        raise ModelError(
            f"sanity makes all weights random, and {what}: take the model's Python class with weights in float32"
        )


def _reset(layer: nn.Module) -> None:
    """Draws a layer's own weights anew.

    A layer's method may leave some as they are, such as those from which `spectral_norm` computes the weight.
    """
    before = [own.clone() for own in layer.parameters(recurse=False)]
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    if callable(reset):
        reset()
    for own, old in zip(layer.parameters(recurse=False), before, strict=True):
        if torch.equal(own, old) and own.min() < own.max():
            order = torch.randperm(own.numel()).to(own.device)
            own.copy_(own.flatten()[order].view_as(own))


def _estimate_statistics(module: nn.Module, norms: Sequence[BatchNorm], inputs: Tensor) -> None:
    """Sets the running statistics of the batch norms to those of one pass of the inputs."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all passes, of which there is one
        norm.train()
    if norms:
        module(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def tells_apart(logits: Tensor) -> bool:
    """True if the logits [N, K] of different pictures differ by more than rounding."""
    return bool(logits.std(0).max() > MIN_SPREAD * logits.abs().max())


def rank_correlation(one: Map, other: Map) -> float:
    """Spearman's rank correlation of two maps, -1 to 1; ties share the mean of their ranks. NaN where one is flat."""
    if is_flat(one) or is_flat(other):
        return float("nan")
    return float(np.corrcoef(_mean_ranks(one), _mean_ranks(other))[0, 1])


def _mean_ranks(values: Map) -> Map:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[place.ravel()]


class Sanity(Metric):
    """The absolute rank correlation with the map under random weights (Adebayo et al., NeurIPS 2018): 0 to 1.

    The curve has one point per share of random layers. The value is its last one, where all weights are random.
    """

    names = ("sanity",)

    def __init__(self, adapter: ModelAdapter, make: Callable[[ModelAdapter], Explainer], seed: int) -> None:
        """`make` builds the explainer that made the maps, for any model; `seed` draws the weights.

        Raises ModelError if the module holds weights that cannot be reached.
        """
        _refuse_hidden_weights(adapter.module)
        self.adapter, self.make, self.seed = adapter, make, seed

    def details(self) -> Mapping[str, Any]:
        return {
            "stages": STAGES,
            "similarity": "Spearman",
            "order": "execution, output to input",
            "weights": "reset, or in a random order where that leaves them",
            "batch norm": f"statistics of {NUM_PICTURES} random pictures",
            "seed": self.seed,
        }

    def evaluate(self, maps: Maps) -> list[list[Mapping[str, Value]]]:
        curves: dict[tuple[int, int], list[float]] = {place: [] for place in maps.positions()}
        pictures, is_alive = random_pictures(self.adapter, self.seed), True
        for share in STAGES:
            module = randomised(self.adapter.module, share, self.seed, pictures)
            with torch.no_grad():
                is_alive = tells_apart(module(pictures))
            explanations = self.make(self.adapter.with_weights_of(module)).explain(
                maps.inputs_nchw, maps.target, maps.explainer_seeds
            )
            for image, index in curves:
                other = np.nan_to_num(explanations[image][index].saliency_hw)
                curves[image, index].append(abs(rank_correlation(maps.saliency[image][index], minmax(other))))
        result: list[list[Mapping[str, Value]]] = [[] for _ in maps.saliency]
        for (image, _), curve in curves.items():
            result[image].append({"sanity": _value(curve) if is_alive else undefined(DEAD)})
        return result


def _value(curve: Sequence[float]) -> Value:
    if np.isfinite(curve[-1]):
        return Value(curve[-1], curve=tuple(curve))
    return undefined("the map is flat, or the random one")
