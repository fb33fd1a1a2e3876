"""Computes a borrowed network's attentions step by step and passes them to a callback.

No module is replaced and no global name is changed: torch passes every call of its functions on this thread to a
mode, which sees the three ways of writing attention.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from blocksight.engine.model.taps import plain_modules


@dataclass(frozen=True)
class Attention:
    """One attention of Q queries over T tokens, part of the graph."""

    name: str
    """The dotted path of the innermost module that computes it."""
    weights: Tensor
    """A [N, heads, Q, T], softmax over the last: how much each query (row) takes from every token."""
    values: Tensor
    """V [N, heads, T, d]."""
    output: Tensor
    """A V [N, heads, Q, d], the tensor that the network continues with."""

    @property
    def kind(self) -> Literal["self", "pool"]:
        """`self`: tokens attend to each other, Q = T; `pool`: queries of their own gather the tokens, Q != T."""
        return "self" if self.weights.shape[2] == self.weights.shape[3] else "pool"


Receive = Callable[[Attention], None]
Replace = Callable[[Tensor], Tensor]
"""From the weights A [N, heads, Q, T] to those that the network continues with."""

_SOFTMAX = (torch.softmax, Tensor.softmax, functional.softmax)
_PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_CASTS = (Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)
_SAME_WEIGHTS = (*_CASTS, functional.dropout, Tensor.detach)
"""A softmax that was taken in float32 is still A in the network's own precision, without dropout, and detached."""
_MULTI_HEAD = inspect.signature(functional.multi_head_attention_forward)


def _kept(weights: Tensor) -> Tensor:
    return weights


@contextmanager
def explicit_attention(
    module: nn.Module, receive: Receive, replace: Replace = _kept
) -> Iterator[list[tuple[int, ...]]]:
    """Computes every attention of the module as softmax and product; calls `receive` in order of execution.

    It finds torch's fused attention (also with a mask), torch's multi-head attention (packed or separate projections),
    and any product of a softmax over [N, heads, Q, T] with values. Causal attention, dropout, fewer heads for keys, and
    multi-head attention with a mask are computed unchanged and not passed on. `replace` gives other weights to continue
    with; `receive` gets these. Affects this thread alone, and leaves nothing on the module.

    Yields the shapes of weights that were not passed on: of each softmax between tokens that no product took as it is,
    complete when the context ends. Heads that talk to each other and gated positions change the weights before.
    """
    running = _ModuleStack()
    mode = _AttentionMode(running, receive, replace)
    with running.tracking(module), mode:
        yield mode.missed
    mode.miss()


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

    def __init__(self, running: _ModuleStack, receive: Receive, replace: Replace) -> None:
        super().__init__()
        self.running, self.receive, self.replace = running, receive, replace
        self.softmax: Tensor | None = None
        """The last one of four axes; a product with values may follow."""
        self.missed: list[tuple[int, ...]] = []
        """The shapes of those between tokens that none followed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._multi_head(_MULTI_HEAD.bind(*args, **kwargs))
        if func in _PRODUCT and args[0] is self.softmax:
            return self._product(args[0], args[1])
        result = func(*args, **kwargs)
        if func in _SOFTMAX and result.dim() == 4:
            self.miss()
            self.softmax = result
        elif func in _SAME_WEIGHTS and self.softmax is not None and args[0] is self.softmax:
            self.softmax = result
        return result

    def miss(self) -> None:
        """Notes that nothing took the last softmax, if it is between tokens."""
        if self.softmax is not None and self.softmax.shape[2] == self.softmax.shape[3]:
            self.missed.append(tuple(self.softmax.shape))
        self.softmax = None

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
        """`softmax(Q K^T scale + mask) V`, of four axes."""
        if query.dim() == 4 and not (dropout_p or is_causal or enable_gqa):
            return self._attend(query, key, value, scale, attn_mask)[1]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _multi_head(self, call: inspect.BoundArguments) -> tuple[Tensor, Tensor | None]:
        """The projections of tokens [T, N, C], attention, and the output projection."""
        call.apply_defaults()
        given = call.arguments
        if not _is_supported(given):
            return functional.multi_head_attention_forward(*call.args, **call.kwargs)
        bias = given["in_proj_bias"]
        separate = [given[f"{name}_proj_weight"] for name in "qkv"]
        weights = separate if given["use_separate_proj_weight"] else given["in_proj_weight"].chunk(3)
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

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A and A V of [N, heads, ..., d] each; the default scale is 1 / sqrt(d).

        A mask is True where a key may be seen, or a number that is added.
        """
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        similarity = (query * factor) @ key.transpose(-2, -1)
        if mask is not None:
            is_open = mask.dtype == torch.bool
            similarity = similarity.masked_fill(~mask, -torch.inf) if is_open else similarity + mask
        attention = similarity.softmax(-1)
        return attention, self._product(attention, value)

    def _product(self, weights: Tensor, values: Tensor) -> Tensor:
        self.softmax = None
        used = self.replace(weights)
        output = used @ values
        self.receive(Attention(self.running.name, used, values, output))
        return output


def _is_supported(given: Mapping[str, Any]) -> bool:
    """True for batched tokens, without masks and without extra keys."""
    absent = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask", "attn_mask")
    dropped = given["dropout_p"] > 0 and given["training"]
    is_special = given["add_zero_attn"] or given["is_causal"] or dropped
    return given["query"].dim() == 3 and not is_special and all(given[name] is None for name in absent)
