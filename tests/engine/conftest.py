"""One thread for the engine's tests: results are compared bit by bit, and small tensors gain nothing from two."""

from collections.abc import Iterator

import pytest

from blocksight.engine.model.threads import one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
