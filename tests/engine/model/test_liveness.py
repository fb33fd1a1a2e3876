"""Long work shows that it goes on, for a bounded time."""

import threading
from threading import Event

import pytest
import torch

from blocksight.engine.model import liveness
from blocksight.engine.scoring import forward
from blocksight.engine.scoring.setting_choice import eager_setting
from tests.jobs.tiny import make


class Beats:
    """Counts beats, and lets a test wait for some."""

    def __init__(self):
        self.count, self.enough = 0, Event()

    def __call__(self):
        self.count += 1
        if self.count >= 3:
            self.enough.set()


@pytest.fixture
def beats(monkeypatch):
    heard = Beats()
    monkeypatch.setattr(liveness, "LISTENERS", [heard])
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.001)
    return heard


def test_work_that_goes_on_is_heard_until_its_end(beats):
    with liveness.busy():
        assert beats.enough.wait(60)
    count = beats.count
    assert not [one for one in threading.enumerate() if one.name == "busy"]
    assert beats.count == count


def test_work_that_fails_is_heard_no_more(beats):
    with pytest.raises(ValueError, match="odd"), liveness.busy():
        raise ValueError("odd")
    assert not [one for one in threading.enumerate() if one.name == "busy"]


def test_work_that_never_ends_is_not_heard_for_ever(beats, monkeypatch):
    monkeypatch.setattr(liveness, "MAX_BUSY_SECONDS", 0.0)
    with liveness.busy():
        (thread,) = [one for one in threading.enumerate() if one.name == "busy"] or [None]
        if thread is not None:
            thread.join(60)
    assert beats.count == 0


def test_a_compiler_is_heard_while_it_works(beats, monkeypatch):
    def compiled(adapter, setting):
        assert beats.enough.wait(60)
        return adapter.logits

    monkeypatch.setattr(forward, "BACKENDS", {"eager": compiled})
    made = forward.make_forward(make(), eager_setting("cpu", 2))
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
