"""Fits a module to pictures and logits: one of several outputs, `.logits` of an object, grey input."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import device_trouble

LIKELY = ("logits", "logit", "out", "output", "prediction", "predictions", "scores")
"""Names under which logits lie, the likeliest first."""


class OneOutput(nn.Module):
    """A module of which one output is returned, [N, K]."""

    def __init__(self, module: nn.Module, key: str | int) -> None:
        super().__init__()
        self.module, self.key = module, key

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        """The output under the key; a single number per image as a column."""
        found = _at(self.module(inputs_nchw), self.key)
        return found[:, None] if found.dim() == 1 else found


class Grey(nn.Module):
    """A module of one channel, for pictures of three: it is given their brightness, as Pillow has it."""

    weights: Tensor
    gives_channels = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("weights", torch.tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1), persistent=False)

    def forward(self, inputs_nchw: Tensor) -> Any:
        """What the module returns for the brightness [N, 1, H, W]. The weights' sum is 1: mean and std stay right."""
        return self.module((inputs_nchw * self.weights).sum(1, keepdim=True))


def as_it_was(module: nn.Module) -> nn.Module:
    """The module within those of this file."""
    return as_it_was(module.module) if isinstance(module, OneOutput | Grey) else module


def of_channels(adapter: ModelAdapter, channels: int | None) -> ModelAdapter:
    """The adapter for pictures of three channels; `channels` is what its module takes, None: three.

    Raises ModelError for a mean or std that differs by channel, which a grey picture does not have, and for another
    number than a file says.
    """
    if channels == 3 and isinstance(adapter.module, Grey):
        raise ModelError(f"model {adapter.name!r} takes one channel and --channels says 3: leave --channels out")
    if channels in (None, 3) or isinstance(adapter.module, Grey):
        return adapter
    grey = adapter.with_module(Grey(adapter.module).to(adapter.device))
    if len(set(adapter.mean)) > 1 or len(set(adapter.std)) > 1:
        raise ModelError(
            f"model {adapter.name!r} is fed one channel (--channels 1) and has three means or deviations "
            f"({', '.join(f'{value:g}' for value in (*adapter.mean, *adapter.std))}): say --mean and --std with one "
            "number each"
        )
    return grey


def with_one_output(adapter: ModelAdapter, key: str | None = None) -> ModelAdapter:
    """The adapter whose module returns logits [N, K]: the output under the key, or the one that can be logits.

    The same adapter if its module returns them already. The module runs once, and of a library's answer with several
    parts the key is looked up again. Raises ModelError for an unknown key,
    and if several outputs can be logits.
    """
    if isinstance(adapter.module, OneOutput):
        if key is None:
            return adapter
        adapter = adapter.with_module(adapter.module.module)
    output = _run(adapter)
    if output is None:
        return adapter  # the failure is told where it is examined
    if isinstance(output, Tensor):
        if key is not None:
            raise ModelError(f"--output-key {key}, and model {adapter.name!r} has one output: leave the key out")
        return adapter if output.dim() != 1 or len(output) != 2 else _taking(adapter, 0)
    parts = _parts(output)
    if key is not None:
        found = next((name for name in parts if str(name) == key), None)
        if found is None:
            raise ModelError(
                f"--output-key {key}, and model {adapter.name!r} returns {', '.join(map(str, parts)) or 'nothing'}"
            )
        return _taking(adapter, found)
    found = _likely(parts)
    if found is None:
        return adapter  # told with the shapes where it is examined
    chosen = _taking(adapter, found)
    if len(parts) > 1:
        others = ", ".join(str(name) for name in parts if name != found)
        chosen.notes = (
            *chosen.notes,
            f"of the model's outputs {found!r} is explained (others: {others}; --output-key)",
        )
    return chosen


def _run(adapter: ModelAdapter) -> Any:
    """What the module returns for two images; None if it fails."""
    example = adapter.normalise(torch.zeros(2, 3, *adapter.input_size, dtype=torch.uint8))
    try:
        with adapter.borrowed(), torch.inference_mode():
            return adapter.module(example)
    except Exception as error:  # a user's model may raise anything
        if device_trouble(error) is not None:
            raise
        return None


def _taking(adapter: ModelAdapter, key: str | int) -> ModelAdapter:
    return adapter.with_module(OneOutput(adapter.module, key))


def _parts(output: Any) -> dict[str | int, Tensor]:
    """The tensors of an output by key, attribute or place."""
    if isinstance(output, Mapping):
        pairs = list(output.items())
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", None) or range(len(output))
        pairs = list(zip(names, output, strict=True))
    else:
        pairs = list(getattr(output, "__dict__", {}).items())
    return {name: one for name, one in pairs if isinstance(one, Tensor)}


def _likely(parts: Mapping[str | int, Tensor]) -> str | int | None:
    """The part that is called logits, else the only one that can be logits of two images; None: it cannot be told."""
    can_be = [name for name, one in parts.items() if one.is_floating_point() and one.dim() in (1, 2) and len(one) == 2]
    named = [name for word in LIKELY for name in can_be if name == word]
    if named or len(can_be) == 1:
        return (named or can_be)[0]
    first = next(iter(parts), None)
    return first if first == 0 and first in can_be else None  # of a tuple the first, as libraries do


def _at(output: Any, key: str | int) -> Tensor:
    """The tensor under a key, an attribute or a place."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output[key]
    return getattr(output, key) if isinstance(key, str) else output[key]
