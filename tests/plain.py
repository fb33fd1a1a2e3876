"""Jobs of tests score masks by PyTorch as it is: OpenVINO's conversion takes longer than a tiny model's whole job."""

import pytest


@pytest.fixture(autouse=True)
def plain_forwards(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The driver writes that into the plan, and all workers follow it; not for tests of how it chooses."""
    if request.node.get_closest_marker("chooses") is None:
        monkeypatch.setattr("engine.probe.find_spec", lambda _: None)
