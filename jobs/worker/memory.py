"""Tries work again with less at once while memory is short."""

from collections.abc import Callable
from typing import TypeVar

from blocksight.engine.model.device_errors import is_short_of_memory

Result = TypeVar("Result")


def with_less_at_once(work: Callable[[], Result], can_halve: Callable[[], bool], halve: Callable[[], None]) -> Result:
    """The result of `work`, called again after `halve()` while memory is short and something can be halved."""
    while True:
        try:
            return work()
        except Exception as error:
            if not is_short_of_memory(error) or not can_halve():
                raise
        halve()  # outside `except`: the exception holds the failed pass's tensors
