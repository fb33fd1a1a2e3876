"""Calls a function whose random numbers are seeded, and leaves the user's random numbers alone."""

from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def seeded(make: Callable[[], Made], seed: int) -> Made:
    """What `make()` returns with torch's random numbers of this seed; those of before come back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
