"""One thread, because results are compared bit by bit, and eager PyTorch, as in the tests of jobs."""

from collections.abc import Iterator

import pytest

from blocksight.engine.model.threads import one_thread
from tests.plain import chosen_forwards, plain_forwards

__all__ = ["chosen_forwards", "plain_forwards"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
