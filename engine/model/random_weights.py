"""Finds weights that nobody trained: those of a model that is made a second time, from another seed, are different."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

MAX_SHOWN = 3
MOSTLY = 0.5
"""Share of a model's numbers."""
WEIGHT_PARAMETERS = ("weights", "pretrained")
"""Parameters of the functions by which torchvision, timm and others make a network."""


def random_sentence(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """A loud sentence if tensors of a model differ from those of the same model made from another seed.

    `own` and `other` are their state dicts. None: they are equal, so that somebody chose them.
    """
    tensors = {key: tensor for key, tensor in own.items() if isinstance(tensor, Tensor)}
    drawn = {key: tensor for key, tensor in tensors.items() if _differ(tensor, other.get(key))}
    if not drawn:
        return None
    total = sum(tensor.numel() for tensor in tensors.values())
    shown = ", ".join(list(drawn)[-MAX_SHOWN:])  # the head comes last
    facts = f"{len(drawn)} of {len(own)} tensors of {name} change with the seed, such as {shown}"
    if sum(tensor.numel() for tensor in drawn.values()) > MOSTLY * total:
        return f"THE WEIGHTS ARE RANDOM: {facts}. Nobody named any, and maps of an untrained model say nothing"
    return f"PART OF THE WEIGHTS IS RANDOM: {facts}. Was the head loaded?"


def _differ(tensor: Tensor, other: Any) -> bool:
    return not isinstance(other, Tensor) or tensor.shape != other.shape or not torch.equal(tensor, other)


def weights_parameter(make: Callable[..., Any]) -> str | None:
    """The parameter that asks a library's function for trained weights and is not given; None: there is none."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return None
    for name in WEIGHT_PARAMETERS:
        if name in parameters and parameters[name].default in (None, False, ""):
            return name
    return None
