"""FullGrad: the gradient terms of the input and of every bias, each made positive and upsampled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explainer import Explainer, pad
from blocksight.engine.explainers.explanation import Explanation, checked_explanation
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import Target

CURVED = (
    *(nn.Hardtanh, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    *(nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Mish),
)
"""Activations of single values that are not `slope x value` everywhere; `Hardtanh` is the base of `ReLU6`."""
MAX_GAP = 1e-3
"""Largest difference between a logit and the sum of its terms, as a share of the image's largest logit."""


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

    def record(self, layer: nn.Module, given: Any, output: Any) -> Any:
        """A forward hook. It returns a copy, so that no in-place operation overwrites the record."""
        bias = implicit_bias(layer, given[0]) if isinstance(layer, CURVED) else bias_of(layer)
        if bias is None or not isinstance(output, Tensor):
            return output
        over_channels = bias.dim() == 1 and not isinstance(layer, nn.Linear)
        self.outputs.append(output)
        self.added.append(bias.detach().view(-1, *[1] * (output.dim() - 2)) if over_channels else bias.detach())
        return output.clone()

    @contextmanager
    def recorded(self, module: nn.Module) -> Iterator[None]:
        """Records what the module computes inside."""
        with ExitStack() as hooks:
            for layer in module.modules():
                if isinstance(layer, CURVED) or bias_of(layer) is not None:
                    hooks.enter_context(layer.register_forward_hook(self.record))
            yield


class FullGrad(Explainer):
    """`psi(dz/dx x) + sum over layers and channels of psi(dz/db b)`, psi = absolute value, min-max per layer, resize.

    Srinivas and Fleuret, NeurIPS 2019 (arXiv 1905.00780), equations 6 and 7. The terms of an image sum to its logit
    (proposition 1); a network of which they do not is refused. Biases of linear layers have no place in the picture:
    they are in the sum alone.
    """

    def _prepare(self, blocks: Sequence[str]) -> None:
        layers = [layer for layer in self.adapter.module.modules() if not isinstance(layer, nn.Linear)]
        if all(bias_of(layer) is None for layer in layers):
            raise ModelError(
                f"fullgrad reads the biases of convolutions and batch norms alone, and {self.adapter.name} has none: "
                "take smoothgrad or integrated_gradients"
            )
        self._check_balance()

    def _check_balance(self) -> None:
        """Raises ModelError if the terms of a random picture's greatest logit do not sum to it."""
        own = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (1, 3, *self.adapter.input_size), dtype=torch.uint8, generator=own)
        inputs = self.adapter.normalise(pixels)
        with self.adapter.borrowed():
            logits, terms_of = self._terms(inputs)
            wanted, index = logits[0].max(0)
            direction = torch.zeros_like(logits)
            direction[0, index] = 1
            found = sum(float(term.double().sum()) for term in terms_of(direction))
        if not abs(found - float(wanted)) <= MAX_GAP * float(logits.abs().max()):
            raise ModelError(
                f"fullgrad is incomplete for {self.adapter.name}: its terms sum to {found:.5g}, and the logit is "
                f"{float(wanted):.5g}. It sees the biases of torch's own convolutions, linear layers, batch norms and "
                "activations, and not those of other layers, of products (squeeze-and-excitation) or of functions: "
                "take smoothgrad or integrated_gradients"
            )

    def _terms(self, inputs_nchw: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """The logits [N, K], and the terms of their sum by a direction [N, K], each in its layer's shape."""
        biases = Biases()
        with torch.enable_grad(), biases.recorded(self.adapter.module):
            inputs = inputs_nchw.detach().requires_grad_(True)
            logits = self.adapter.logits(inputs)

        def terms_of(direction: Tensor) -> list[Tensor]:
            slopes = gradients(logits, direction, [inputs, *biases.outputs])
            factors = [inputs.detach(), *biases.added]
            return [slope * factor for slope, factor in zip(slopes, factors, strict=True)]

        return logits.detach(), terms_of

    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        logits, terms_of = self._terms(pad(inputs_nchw, self.images_per_pass))
        filled = target.of(torch.arange(self.images_per_pass).clamp(max=len(inputs_nchw) - 1))  # padded as by `pad`
        found = []
        for index in range(target.num_targets):
            terms = [term for term in terms_of(filled.raw.direction(logits, index)) if term.dim() == 4]
            found.append(torch.stack([self._positive(term) for term in terms]).sum(0).cpu().numpy())
        return [
            [checked_explanation(found[index][image], score, num_forwards=0) for index, score in enumerate(row)]
            for image, row in enumerate(self._scores(inputs_nchw, target))
        ]

    def _positive(self, product: Tensor) -> Tensor:
        """psi of a product [N, C, h, w], summed over channels and upsampled: float64 [N, H, W]."""
        sizes = product.double().abs()
        low, high = sizes.amin((1, 2, 3), keepdim=True), sizes.amax((1, 2, 3), keepdim=True)
        scaled = torch.where(high > low, (sizes - low) / torch.where(high > low, high - low, 1.0), 0.0)
        return upsampling(grid_of(scaled), self.adapter.input_size, scaled.device)(scaled.sum(1))
