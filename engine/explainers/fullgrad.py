"""FullGrad: the gradient terms of the input and of every bias, each made positive and upsampled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.errors import ImageError, ModelError
from blocksight.engine.explainers.explainer import Explainer, pad, scores_of
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.layouts import is_channels_last
from blocksight.engine.model.resample import Grid, grid_of, upsampling
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target

CURVED = (
    *(nn.Hardtanh, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    *(nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Mish),
)
"""Activations of single values that are not `slope x value` everywhere; `Hardtanh` is the base of `ReLU6`."""
MAX_GAP = 1e-3
"""Largest difference between a logit and the sum of its terms, as a share of the image's largest logit."""
ROUNDING = 1e-6
"""The same, as a share of the sum of the terms' sizes: large terms that cancel leave float32's rounding."""


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a layer for each channel [C]: a convolution's, a linear layer's, or that of a frozen batch norm.

    None for a layer without one. Batch norm computes `g (x - m) / s + b`, so it adds `b - g m / s`.
    """
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return layer.bias
    if (
        not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        or layer.running_mean is None
        or layer.running_var is None
    ):
        return None
    scale = (layer.running_var + layer.eps).rsqrt()
    if layer.weight is None or layer.bias is None:
        return -layer.running_mean * scale
    return layer.bias - layer.weight * layer.running_mean * scale


def implicit_bias(activation: nn.Module, values: Tensor) -> Tensor:
    """`f(x) - f'(x) x` of an activation of single values, in their shape (Srinivas and Fleuret, section 3)."""
    with torch.enable_grad():
        own = values.detach().requires_grad_(True)
        made = activation.forward(own)
        (slopes,) = torch.autograd.grad(made.sum(), own)
    return (made - slopes * own).detach()


@dataclass
class Biases:
    """What the calls of layers with a bias returned, in order of execution, and the bias of each."""

    outputs: list[Tensor] = field(default_factory=list)
    added: list[Tensor] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)

    def record(self, layer: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
        """A forward hook. It returns a copy, so that no in-place operation overwrites the record."""
        given = [*args, *named.values()]
        bias = implicit_bias(layer, given[0]) if isinstance(layer, CURVED) else bias_of(layer)
        if bias is None or not isinstance(output, Tensor):
            return output
        over_channels = bias.dim() == 1 and not isinstance(layer, nn.Linear)
        self.outputs.append(output)
        self.added.append(bias.detach().view(-1, *[1] * (output.dim() - 2)) if over_channels else bias.detach())
        self.layers.append(layer)
        return output.clone()

    @contextmanager
    def recorded(self, module: nn.Module) -> Iterator[None]:
        """Records what the module computes inside."""
        with ExitStack() as hooks:
            for layer in module.modules():
                if isinstance(layer, CURVED) or bias_of(layer) is not None:
                    hooks.enter_context(layer.register_forward_hook(self.record, with_kwargs=True))
            yield


@dataclass(frozen=True)
class Terms:
    """The terms of some images' logits by a direction [N, K]: `sum of terms = direction . logits`."""

    logits: Tensor
    """[N, K]."""
    direction: Tensor
    """[N, K]."""
    values: tuple[Tensor, ...]
    """[N, ...] each: the input's, then one for each call of a layer, in its output's shape."""
    layers: tuple[nn.Module | None, ...]
    """The layer of each term; None: the input."""

    def gap(self) -> tuple[float, float] | None:
        """The sum of the terms of the first image whose terms do not sum to its logit, and that; None: there is none.

        Numbers that are not finite are no gap: their maps are refused elsewhere.
        """
        logits = self.logits.double()
        wanted = (self.direction.double() * logits).sum(1)
        flat = [term.double().flatten(1) for term in self.values]
        found = torch.stack([term.sum(1) for term in flat]).sum(0)
        sizes = torch.stack([term.abs().sum(1) for term in flat]).sum(0)
        is_apart = (found - wanted).abs() > MAX_GAP * logits.abs().amax(1) + ROUNDING * sizes
        apart = is_apart.nonzero().flatten().tolist()
        return (float(found[apart[0]]), float(wanted[apart[0]])) if apart else None

    def maps(self, input_size: Grid) -> list[Tensor]:
        """The terms that have a place in the picture of this size, [N, C, h, w] each."""
        pairs = zip(self.layers, self.values, strict=True)
        return [_with_channels_first(layer, term, input_size) for layer, term in pairs if term.dim() == 4]


def _with_channels_first(layer: nn.Module | None, term: Tensor, input_size: Grid) -> Tensor:
    """The term [N, C, h, w]. A linear layer's channels come last; those of an activation are told by the aspect."""
    is_last = isinstance(layer, nn.Linear) or is_channels_last(term.shape, input_size)
    return term.permute(0, 3, 1, 2) if is_last else term


class FullGrad(Explainer):
    """`psi(dz/dx x) + sum over layers and channels of psi(dz/db b)`, psi = absolute value, min-max per layer, resize.

    Srinivas and Fleuret, NeurIPS 2019 (arXiv 1905.00780), equations 6 and 7. The terms of an image sum to its logit
    (proposition 1). A network of which they do not is refused, and so is an image. Biases of linear layers on vectors
    have no place in the picture: they are in the sum alone.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        layers = [layer for layer in self.adapter.module.modules() if not isinstance(layer, nn.Linear)]
        if all(bias_of(layer) is None for layer in layers):
            raise ModelError(
                f"fullgrad reads the biases of convolutions and batch norms alone, and {self.adapter.name} has none: "
                "take smoothgrad or integrated_gradients"
            )
        own = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (1, 3, *self.adapter.input_size), dtype=torch.uint8, generator=own)
        with self.adapter.borrowed():
            logits, terms_of = self._terms(self.adapter.normalise(pixels))
            for index in {int(logits.argmax()), int(logits.argmin())}:
                direction = functional.one_hot(torch.tensor([index]), logits.shape[1]).to(logits)
                if gap := self._gap(terms_of(direction)):
                    raise ModelError(gap)

    def _gap(self, terms: Terms) -> str | None:
        """A sentence if the terms of an image do not sum to its logit."""
        gap = terms.gap()
        if gap is None:
            return None
        return (
            f"fullgrad is incomplete for {self.adapter.name}: its terms sum to {gap[0]:.5g}, and the logit is "
            f"{gap[1]:.5g}. It sees the biases of torch's own convolutions, linear layers, batch norms and "
            "activations, and not those of other layers, of products (squeeze-and-excitation) or of functions: "
            "take smoothgrad or integrated_gradients"
        )

    def _terms(self, inputs_nchw: Tensor) -> tuple[Tensor, Callable[[Tensor], Terms]]:
        """The logits [N, K], and a function from a direction [N, K] to its terms."""
        biases = Biases()
        with torch.enable_grad(), biases.recorded(self.adapter.module):
            inputs = inputs_nchw.detach().requires_grad_(True)
            logits = self.adapter.logits(inputs)

        def terms_of(direction: Tensor) -> Terms:
            slopes = gradients(logits, direction, [inputs, *biases.outputs])
            factors = [inputs.detach(), *biases.added]
            values = tuple(slope * factor for slope, factor in zip(slopes, factors, strict=True))
            return Terms(logits.detach(), direction, values, (None, *biases.layers))

        return logits.detach(), terms_of

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        logits, terms_of = self._terms(pad(inputs_nchw, self.images_per_pass))
        filled = target.of(torch.arange(self.images_per_pass).clamp(max=len(inputs_nchw) - 1))  # padded as by `pad`
        found = []
        for index in range(target.num_targets):
            terms = terms_of(filled.raw.direction(logits, index))
            if gap := self._gap(terms):
                raise ImageError(gap)  # another class, or a picture without large values, showed none
            found.append(
                torch.stack([self._positive(term) for term in terms.maps(self.adapter.input_size)]).sum(0).cpu().numpy()
            )
        return [
            [checked_explanation(found[index][image], score, num_forwards=0) for index, score in enumerate(row)]
            for image, row in enumerate(scores_of(logits, target, len(inputs_nchw)))
        ]

    def _positive(self, product: Tensor) -> Tensor:
        """psi of a product [N, C, h, w], summed over channels and upsampled: float64 [N, H, W]."""
        sizes = product.double().abs()
        low, high = sizes.amin((1, 2, 3), keepdim=True), sizes.amax((1, 2, 3), keepdim=True)
        scaled = torch.where(high > low, (sizes - low) / torch.where(high > low, high - low, 1.0), 0.0)
        return upsampling(grid_of(scaled), self.adapter.input_size, scaled.device)(scaled.sum(1))
