"""Jobs of tests score masks by PyTorch as it is: OpenVINO's conversion takes longer than a tiny model's whole job.

`python -m tests.plain` is the command line without OpenVINO, for tests that start a process.
"""

import sys

import pytest

from jobs.cli import main


@pytest.fixture(autouse=True)
def plain_forwards(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The driver writes that into the plan, and all workers follow it; not for tests of how it chooses."""
    if request.node.get_closest_marker("chooses") is None:
        monkeypatch.setattr("engine.probe.find_spec", lambda _: None)


if __name__ == "__main__":
    sys.modules["openvino"] = None  # pyright: ignore[reportArgumentType] # as where it is not installed
    main()
