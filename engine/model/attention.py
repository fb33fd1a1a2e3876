"""Computes a borrowed network's self-attentions step by step and passes them to a callback.

No module is replaced and no global name is changed: torch passes every call of its functions on this thread to a
mode, which sees the three ways of writing attention.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from blocksight.engine.model.taps import plain_modules


@dataclass(frozen=True)
class Attention:
    """One self-attention over T tokens, part of the graph."""

    name: str
    """The dotted path of the innermost module that computes it."""
    weights: Tensor
    """A [N, heads, T, T], softmax over the last: how much each token (row) takes from every other."""
    values: Tensor
    """V [N, heads, T, d]."""
    output: Tensor
    """A V [N, heads, T, d], the tensor that the network continues with."""


Receive = Callable[[Attention], None]

_SOFTMAX = (torch.softmax, Tensor.softmax, functional.softmax)
_PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_MULTI_HEAD = inspect.signature(functional.multi_head_attention_forward)


@contextmanager
def explicit_attention(module: nn.Module, receive: Receive) -> Iterator[None]:
    """Computes every self-attention of the module as softmax and product; calls `receive` in order of execution.

    It finds torch's fused attention, torch's multi-head attention (packed projections), and any product of a softmax
    over [N, heads, T, T] with values. Attention with a mask, dropout or fewer heads for keys is computed unchanged and
    not passed on; nor is attention between different numbers of tokens. Affects this thread alone, and leaves nothing
    on the module.
    """
    running = _ModuleStack()
    with running.tracking(module), _AttentionMode(running, receive):
        yield


class _ModuleStack:
    """The module whose forward is running."""

    def __init__(self) -> None:
        self.stack: list[str] = []

    @property
    def name(self) -> str:
        return self.stack[-1] if self.stack else ""

    @contextmanager
    def tracking(self, module: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, child in plain_modules(module):
                hooks.enter_context(child.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name)))
                hooks.enter_context(child.register_forward_hook(lambda *_: self._leave()))
            yield

    def _leave(self) -> None:
        self.stack.pop()  # a hook that returned the name would replace the module's output


class _AttentionMode(TorchFunctionMode):
    """Intercepts the calls of torch's functions, and computes those that are attention."""

    def __init__(self, running: _ModuleStack, receive: Receive) -> None:
        super().__init__()
        self.running, self.receive = running, receive
        self.softmax: Tensor | None = None
        """The last square one; a product with values may follow."""

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
            self._pass_on(args[0], args[1], result)
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
        if not _is_supported(given):
            return functional.multi_head_attention_forward(*call.args, **call.kwargs)
        weight, bias = given["in_proj_weight"], given["in_proj_bias"]
        weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        tokens = (given["query"], given["key"], given["value"])
        query, key, value = (
            functional.linear(*one).unflatten(2, (given["num_heads"], -1)).permute(1, 2, 0, 3)
            for one in zip(tokens, weights, biases, strict=True)
        )
        attention, output = self._attend(query, key, value)
        joined = functional.linear(
            output.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"]
        )
        if not given["need_weights"]:
            return joined, None
        return joined, attention.mean(1) if given["average_attn_weights"] else attention

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """A and A V of [N, heads, T, d] each; the default scale is 1 / sqrt(d)."""
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        attention = ((query * factor) @ key.transpose(-2, -1)).softmax(-1)
        output = attention @ value
        if _is_square(attention):
            self._pass_on(attention, value, output)
        return attention, output

    def _pass_on(self, weights: Tensor, values: Tensor, output: Tensor) -> None:
        self.softmax = None
        self.receive(Attention(self.running.name, weights, values, output))


def _is_square(weights: Tensor) -> bool:
    return weights.dim() == 4 and weights.shape[2] == weights.shape[3]


def _is_supported(given: Mapping[str, Any]) -> bool:
    """True for batched tokens with packed projections, without masks and without extra keys."""
    absent = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask", "attn_mask")
    dropped = given["dropout_p"] > 0 and given["training"]
    is_special = given["add_zero_attn"] or given["use_separate_proj_weight"] or given["is_causal"] or dropped
    return given["query"].dim() == 3 and not is_special and all(given[name] is None for name in absent)
