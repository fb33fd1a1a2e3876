"""Holds float32 to IEEE float32, whatever a model's factory set before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _switches() -> list[Any]:
    """torch's settings of float32 products, by library and operation."""
    cuda, cpu = torch.backends.cudnn, torch.backends.mkldnn
    return [torch.backends.cuda.matmul, cuda.conv, cuda.rnn, cpu.matmul, cpu.conv, cpu.rnn]  # pyright: ignore


def use_ieee_float32() -> None:
    """Sets float32 to IEEE float32 in this process: no TF32 or bfloat16 products, on any device.

    torch allows TF32 in cuDNN's convolutions by default, and a user's model factory may allow more.
    """
    torch.set_float32_matmul_precision("highest")  # the old settings too, or torch fails to read them
    torch.backends.cudnn.allow_tf32 = False
    for switch in _switches():
        switch.fp32_precision = "ieee"


@contextmanager
def fixed_float32() -> Iterator[None]:
    """IEEE float32 and the same cuDNN algorithms in each run, inside; the settings of before after it.

    TF32 has a 10-bit mantissa, which moves scores by more than 1e-4. cuDNN's fastest algorithms may add up a gradient
    in any order.
    """
    cudnn = torch.backends.cudnn
    matmul, convolutions = _readable(torch.get_float32_matmul_precision), _readable(lambda: cudnn.allow_tf32)
    precisions = [switch.fp32_precision for switch in _switches()]
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    try:
        use_ieee_float32()
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for switch, precision in zip(_switches(), precisions, strict=True):
            switch.fp32_precision = precision


def _readable(setting: Callable[[], Any]) -> Any:
    """An old setting; None if it contradicts the new ones, for torch then fails to read it."""
    try:
        return setting()
    except RuntimeError:
        return None
