"""Balanced gradients (LibraGrad): the backward pass of a network whose gates and divisors are held constant.

Mehri et al., arXiv 2411.16760. The forward pass stays. Attention weights, the lengths that norms divide by, and the
gates of activations have no gradient of their own; of a product of two activations each gets a half. Then the terms
`x . dz/dx` and those of all biases sum to the logit.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import pi, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from blocksight.engine.errors import ModelError
from blocksight.engine.model.attention import explicit_attention
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.taps import gradients

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter

MAX_GAP = 1e-3
"""Largest error of the sums, as a share of the largest change of a logit."""
TINY = 1e-20
"""Below this an activation's gate is its limit at 0."""

Keep = Callable[[Tensor], Tensor]
"""Returns a value without gradient: of this pass, or in a replay that of the first pass."""


@contextmanager
def balanced(module: nn.Module) -> Iterator[None]:
    """Gradients of passes inside are balanced. Affects this thread alone, and leaves nothing on the module."""
    with _BalancedMode(Tensor.detach), explicit_attention(module, lambda _: None):
        yield


def check_balanced(adapter: "ModelAdapter", method: str) -> None:
    """Raises ModelError if a rule is missing for some operation of the network.

    With the constants of one picture x the network must be affine: at another picture y its logits are
    `z(x) + (y - x) . dz/dx`. Anything bent that no rule reaches breaks this.
    """
    try:
        found, wanted, scale = _sums(adapter)
    except RuntimeError as error:
        if device_trouble(error) is not None:
            raise
        raise _unbalanced(adapter, method, first_line_of(error)) from error
    if found is None:
        raise _unbalanced(adapter, method, "another picture takes another way through it")
    if not abs(found - wanted) <= MAX_GAP * scale:
        raise _unbalanced(adapter, method, f"{found:.4g} in place of {wanted:.4g}")


def _unbalanced(adapter: "ModelAdapter", method: str, shown: str) -> ModelError:
    return ModelError(
        f"{method} holds the gates and divisors of {adapter.name} constant, and then the network must be affine, "
        f"which it is not ({shown}): some operation is not reached, such as a norm, an activation or a pooling of "
        "its own, one in place, a kernel outside torch, or TorchScript; take the method without libra, or daam, chefer "
        "or rise"
    )


def _sums(adapter: "ModelAdapter") -> tuple[float | None, float, float]:
    """The change of a random sum of logits with the constants kept, that by the gradient, and their scale.

    None: the second picture asks for other constants.
    """
    own = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, *adapter.input_size), dtype=torch.uint8, generator=own)
    inputs, other = adapter.normalise(pixels).split(1)
    kept: list[Tensor] = []
    with adapter.borrowed(), torch.enable_grad():
        start = inputs.requires_grad_(True)
        logits = _recorded(adapter, start, lambda value: _append(kept, value.detach()))
        direction = torch.randn(logits.shape, generator=own).to(logits.device)
        (slope,) = gradients(logits, direction, [start])
        replayed = _replayed(adapter, other.detach().requires_grad_(True), kept)
    wanted = (slope.double() * (other - inputs).double()).sum().detach()
    scale = (logits.detach() * direction).abs().sum().double() + wanted.abs()
    found = None if replayed is None else float(((replayed - logits).detach() * direction).sum())
    return found, float(wanted), float(scale)


def _append(kept: list[Tensor], value: Tensor) -> Tensor:
    kept.append(value)
    return value


def _recorded(adapter: "ModelAdapter", inputs_nchw: Tensor, keep: Keep) -> Tensor:
    with _AffineMode(keep), explicit_attention(adapter.module, lambda _: None):
        return adapter.logits(inputs_nchw)


def _replayed(adapter: "ModelAdapter", inputs_nchw: Tensor, kept: list[Tensor]) -> Tensor | None:
    """Logits with the constants of another pass; None if this one asks for others."""
    constants = iter(kept)

    def keep(value: Tensor) -> Tensor:
        constant = next(constants, None)
        if constant is None or constant.shape != value.shape:
            raise _OtherConstantsError
        return constant

    try:
        logits = _recorded(adapter, inputs_nchw, keep)
    except _OtherConstantsError:
        return None
    return logits if next(constants, None) is None else None


class _OtherConstantsError(Exception):
    """A replay that does not need the constants that were kept."""


# ---------------------------------------------------------------- rules

Rule = Callable[..., Any]
"""From `keep`, the function and its arguments to the result."""


def _constant(keep: Keep, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A gate, a length or attention weights. A leaf, so that a method may ask for the gradient by it."""
    return keep(func(*args, **kwargs)).detach().requires_grad_(True)


def _gate(limit: float) -> Rule:
    """`x gate(x)`, with the gate's limit at 0."""

    def rule(keep: Keep, func: Any, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            is_tiny = given.abs() < TINY
            gate = func(given, *args, **kwargs) / given.masked_fill(is_tiny, 1.0)
            gate = gate.masked_fill(is_tiny, limit)
        return given * keep(gate)

    return rule


def _over_length(
    keep: Keep, given: Tensor, axes: tuple[int, ...], least: float, weight: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """The values over their length, which is constant, with a gain and an offset."""
    square = (given**2).mean(axes, keepdim=True) + least
    return _with_gain(given / keep(square.sqrt()), weight, bias)


def _with_gain(given: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    found = given if weight is None else given * weight
    return found if bias is None else found + bias


def _layer_norm(
    keep: Keep,
    _: Any,
    input: Tensor,  # noqa: A002 - torch's own name, by which it may be given
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The mean is not constant: without its gradient the terms would not sum to the output."""
    axes = _last_axes(normalized_shape)
    return _over_length(keep, input - input.mean(axes, keepdim=True), axes, eps, weight, bias)


def _rms_norm(
    keep: Keep,
    _: Any,
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    least = torch.finfo(input.dtype).eps if eps is None else eps
    return _over_length(keep, input, _last_axes(normalized_shape), least, weight)


def _last_axes(normalized_shape: Any) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


def _group_norm(
    keep: Keep,
    _: Any,
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    grouped = input.unflatten(1, (num_groups, -1))
    axes = tuple(range(2, grouped.dim()))
    divided = _over_length(keep, grouped - grouped.mean(axes, keepdim=True), axes, eps, None).flatten(1, 2)
    per_channel = [None if own is None else own.view(1, -1, *[1] * (input.dim() - 2)) for own in (weight, bias)]
    return _with_gain(divided, *per_channel)


def _normalize(
    keep: Keep,
    _: Any,
    input: Tensor,  # noqa: A002
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    **_others: None,
) -> Tensor:
    return input / keep(input.norm(p, dim, keepdim=True).clamp_min(eps))


def _product(keep: Keep, func: Any, one: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a product of two activations each gets half of the gradient."""
    if not all(isinstance(own, Tensor) and own.requires_grad and not own.is_leaf for own in (one, other)):
        return func(one, other, *args, **kwargs)
    return (one * keep(other) + keep(one) * other) / 2


def _quotient(keep: Keep, func: Any, one: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    """The divisor is constant."""
    if not isinstance(other, Tensor) or not other.requires_grad:
        return func(one, other, *args, **kwargs)
    return func(one, keep(other), *args, **kwargs)


def _power(keep: Keep, func: Any, one: Any, exponent: Any) -> Any:
    """`x^n` is x with the gate `x^(n - 1)`; a root is a length."""
    if exponent == 1:
        return func(one, exponent)
    if isinstance(exponent, int | float) and exponent > 1:
        return one * keep(func(one.detach(), exponent - 1))
    return _constant(keep, func, one, exponent)


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((torch.softmax, Tensor.softmax, functional.softmax), _constant),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, functional.sigmoid, functional.hardsigmoid), _constant),
    **dict.fromkeys((torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt), _constant),
    **dict.fromkeys((torch.norm, Tensor.norm, torch.linalg.vector_norm), _constant),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product),
    **dict.fromkeys((torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__), _quotient),
    **dict.fromkeys((functional.silu, functional.gelu, functional.hardswish), _gate(0.5)),
    functional.mish: _gate(0.6),
    **dict.fromkeys((torch.tanh, Tensor.tanh, functional.tanh), _gate(1.0)),
    **dict.fromkeys((torch.erf, Tensor.erf), _gate(2 / sqrt(pi))),
    functional.layer_norm: _layer_norm,
    torch.layer_norm: lambda keep, func, *args, **kwargs: _layer_norm(keep, func, *args[:5], **kwargs),
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.normalize: _normalize,
}
"""By torch's function."""


class _BalancedMode(TorchFunctionMode):
    """Computes torch's functions by the rules, where a gradient will flow."""

    def __init__(self, keep: Keep, rules: Mapping[Any, Rule] = RULES) -> None:
        super().__init__()
        self.keep, self.rules = keep, rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is None or not torch.is_grad_enabled() or not _has_gradient((*args, *kwargs.values())):
            return func(*args, **kwargs)
        return rule(self.keep, func, *args, **kwargs)


def _has_gradient(values: Any) -> bool:
    return any(isinstance(own, Tensor) and own.requires_grad for own in values)


# ---------------------------------------------------------------- kinks, which are linear as they are


def _bent(keep: Keep, func: Any, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An activation of straight pieces, as the straight line on which each value lies."""
    own = given.detach().requires_grad_(True)
    values = func(own.clone(), *args, **kwargs)  # it may work in place
    (slope,) = torch.autograd.grad(values.sum(), own)
    slope = keep(slope)
    return given * slope + keep(values.detach() - own.detach() * slope)


def _bent_in_place(keep: Keep, func: Any, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return given.copy_(_bent(keep, func, given, *args, **kwargs))


_POOL = inspect.signature(functional.max_pool2d_with_indices)


def _max_pool(keep: Keep, _: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The pixels that were the greatest."""
    call = _POOL.bind(*args, **kwargs)
    call.arguments["return_indices"] = False
    given = call.arguments["input"]
    values, places = functional.max_pool2d_with_indices(*call.args, **call.kwargs)
    return given.flatten(2).gather(2, keep(places).flatten(2)).view_as(values)


KINKS: Mapping[Any, Rule] = {
    **dict.fromkeys((torch.relu, Tensor.relu, functional.relu, functional.relu6, functional.leaky_relu), _bent),
    **dict.fromkeys((functional.hardtanh, torch.clamp, Tensor.clamp, torch.abs, Tensor.abs), _bent),
    **dict.fromkeys((torch.relu_, Tensor.relu_, Tensor.clamp_, functional.leaky_relu_), _bent_in_place),
    functional.max_pool2d: _max_pool,
}
"""Operations whose gradient is right as it is; the check alone needs them as straight lines."""


class _AffineMode(_BalancedMode):
    """As balanced, and what is made of straight pieces stays on those of the first pass."""

    def __init__(self, keep: Keep) -> None:
        super().__init__(keep, {**RULES, **KINKS})
