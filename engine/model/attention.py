"""Attention in the open: a borrowed network's self-attentions, computed step by step and shown.

No module is swapped and no global name is changed: torch hands every call of its functions on this thread to a
mode, which sees the three ways in which attention is written.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Attention:
    """One self-attention over T tokens, part of the graph."""

    name: str
    """The dotted path of the innermost module that computes it."""
    weights: Tensor
    """A [N, heads, T, T], softmax over the last: how much each token (row) takes of every other."""
    values: Tensor
    """V [N, heads, T, d]."""
    output: Tensor
    """A V [N, heads, T, d], the very tensor that the network goes on with."""


Show = Callable[[Attention], None]

_SOFTMAX = (torch.softmax, Tensor.softmax, functional.softmax)
_PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_MULTI_HEAD = inspect.signature(functional.multi_head_attention_forward)


@contextmanager
def explicit_attention(module: nn.Module, show: Show) -> Iterator[None]:
    """Inside, every self-attention of the module is computed as softmax and product, and shown in order of execution.

    Seen are torch's fused attention, torch's multi-head attention (packed projections), and the product of a softmax
    over [N, heads, T, T] with values, however the network writes them. Attention with a mask, dropout or fewer heads
    for keys is computed as it was and not shown, nor is attention from some tokens to others of another number.
    Of this thread alone; nothing is left on the module.
    """
    where = _Where()
    with where.following(module), _Seen(where, show):
        yield


class _Where:
    """The module whose forward is running."""

    def __init__(self) -> None:
        self.stack: list[str] = []

    @property
    def name(self) -> str:
        return self.stack[-1] if self.stack else ""

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        handles = []
        try:
            for name, child in module.named_modules():
                handles.append(child.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name)))
                handles.append(child.register_forward_hook(lambda *_: self._leave()))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self.stack.pop()  # a hook that returned the name would replace the module's output


class _Seen(TorchFunctionMode):
    """Sees the calls of torch's functions, and answers those that are attention."""

    def __init__(self, where: _Where, show: Show) -> None:
        super().__init__()
        self.where, self.show = where, show
        self.softmax: Tensor | None = None
        """The last one, which a product with values may follow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._multi_head(_MULTI_HEAD.bind(*args, **kwargs))
        result = func(*args, **kwargs)
        if func in _SOFTMAX and _is_square(result):
            self.softmax = result
        elif func in _PRODUCT and args[0] is self.softmax:
            self._show(args[0], args[1], result)
        return result

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`softmax(Q K^T scale) V`, of four axes."""
        if query.dim() == 4 and attn_mask is None and not (dropout_p or is_causal or enable_gqa):
            return self._attend(query, key, value, scale)[1]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _multi_head(self, call: inspect.BoundArguments) -> tuple[Tensor, Tensor | None]:
        """The packed projection of tokens [T, N, C], attention, and the output projection."""
        call.apply_defaults()
        given = call.arguments
        if not _is_plain(given):
            return functional.multi_head_attention_forward(*call.args, **call.kwargs)
        weight, bias = given["in_proj_weight"], given["in_proj_bias"]
        weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        tokens = (given["query"], given["key"], given["value"])
        query, key, value = (
            functional.linear(*one).unflatten(2, (given["num_heads"], -1)).permute(1, 2, 0, 3)
            for one in zip(tokens, weights, biases, strict=True)
        )
        taken, output = self._attend(query, key, value)
        joined = functional.linear(
            output.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"]
        )
        if not given["need_weights"]:
            return joined, None
        return joined, taken.mean(1) if given["average_attn_weights"] else taken

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """A and A V of [N, heads, T, d] each; the usual scale is one over the root of d."""
        by = query.shape[-1] ** -0.5 if scale is None else scale
        taken = ((query * by) @ key.transpose(-2, -1)).softmax(-1)
        output = taken @ value
        if _is_square(taken):
            self._show(taken, value, output)
        return taken, output

    def _show(self, weights: Tensor, values: Tensor, output: Tensor) -> None:
        self.softmax = None
        self.show(Attention(self.where.name, weights, values, output))


def _is_square(weights: Tensor) -> bool:
    return weights.dim() == 4 and weights.shape[2] == weights.shape[3]


def _is_plain(given: Mapping[str, Any]) -> bool:
    """Whether a multi-head attention of batched tokens has packed projections, and neither masks nor more keys."""
    absent = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask", "attn_mask")
    dropped = given["dropout_p"] > 0 and given["training"]
    is_special = given["add_zero_attn"] or given["use_separate_proj_weight"] or given["is_causal"] or dropped
    return given["query"].dim() == 3 and not is_special and all(given[name] is None for name in absent)
