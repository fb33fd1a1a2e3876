"""Makes jobs in tests score masks with eager PyTorch: OpenVINO's conversion takes longer than a tiny model's job.

`python -m tests.plain` is the command line without OpenVINO, for tests that start a process.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

from blocksight.jobs.cli.main import main


@contextmanager
def without_openvino() -> Iterator[None]:
    """While the body runs, a driver finds no OpenVINO. It stores eager PyTorch in the plan, and all workers use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blocksight.engine.scoring.setting_choice.find_spec", lambda _: None)
        yield


@pytest.fixture(scope="package", autouse=True)
def plain_forwards() -> Iterator[None]:
    """A fixture for a folder's conftest.py: holds for all tests and fixtures of the folder."""
    with without_openvino():
        yield


@pytest.fixture(autouse=True)
def chosen_forwards(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A test marked `chooses` sees the backends that are installed."""
    if request.node.get_closest_marker("chooses") is not None:
        monkeypatch.setattr("blocksight.engine.scoring.setting_choice.find_spec", find_spec)


if __name__ == "__main__":
    sys.modules["openvino"] = None  # pyright: ignore[reportArgumentType] # as where it is not installed
    main()
