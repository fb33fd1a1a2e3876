"""Moves tensors between the host and a GPU in few copies: each copy from a GPU makes the host wait for it."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as float64 on the CPU: from a GPU in one copy, so that the host waits once."""
    if not tensors or tensors[0].device.type == "cpu":
        return [own.double() for own in tensors]
    moved = torch.cat([own.double().flatten() for own in tensors]).cpu()
    parts = moved.split([prod(own.shape) for own in tensors])
    return [part.view(own.shape) for part, own in zip(parts, tensors, strict=True)]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. A GPU fetches it from pinned memory, and the host does not wait."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one type, [n] each, on the device: to a GPU in one copy, which nothing waits for."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    return list(sent(torch.cat(list(tensors)), device).split([len(own) for own in tensors]))


def together(count: int, device: torch.device) -> list[range]:
    """The numbers of images in groups that are computed at once: all on a GPU, where steps cost more than numbers.

    One by one on a CPU: there padding costs time, and last bits would depend on the other images.
    """
    return [range(count)] if device.type == "cuda" else [range(one, one + 1) for one in range(count)]
