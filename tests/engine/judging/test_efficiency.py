"""Efficiency: the figures for scripted times."""

import pytest
import torch

from blocksight.engine.catalog.entries import EXPLAINERS as ENTRIES
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.judging import efficiency
from blocksight.engine.judging.efficiency import bare_rates, measure
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from tests.engine.nets import Depthwise, seeded, smooth

RATES = {1: 10.0, 4: 40.0, 8: 30.0}
FIRST = ClassProbability(torch.tensor([[0], [1]]))
"""What is explained of two pictures."""


def explainer_of(name):
    adapter = ModelAdapter(seeded(Depthwise), input_size=(32, 32))
    return EXPLAINERS[name](adapter, ENTRIES[name].parameters(), batch_size=4, images_per_pass=2)


def test_the_efficiency_is_bare_time_over_total_time(monkeypatch):
    """Ten batches of four take 1, 2 and 1 s bare: 40, 20 and 40 forwards a second; the explainer takes 2, 3 and 8 s."""
    script = iter([1.0, 2.0, 2.0, 3.0, 1.0, 8.0])
    done = []

    def timed(work, *, on_gpu):
        assert not on_gpu
        work()
        return next(script)

    monkeypatch.setattr(efficiency, "measured_seconds", timed)
    explainer = explainer_of("sise")
    found, explained = measure(
        explainer, smooth(2, 32, 32), ForwardSetting(batch_size=4), RATES, lambda: done.append(1), FIRST
    )
    forwards = sum(own[0].num_forwards for own in explained)
    assert forwards > 0
    assert len(done) == efficiency.ROUNDS == 3
    assert found.best_bare_rate == 40
    assert found.forwards_per_image == forwards / 2
    assert found.seconds_per_image == 3 / 2
    assert found.efficiency == pytest.approx(sorted([forwards / 40 / 2, forwards / 20 / 3, forwards / 40 / 8])[1])
    assert found.forward_rate == pytest.approx(forwards / 3)


def test_a_method_without_masks_has_no_efficiency():
    found, _ = measure(
        explainer_of("gradcam"), smooth(2, 32, 32), ForwardSetting(batch_size=4), RATES, lambda: None, FIRST
    )
    assert found.efficiency is None
    assert found.forwards_per_image == found.forward_rate == 0
    assert found.seconds_per_image > 0


def test_the_bare_model_is_timed_at_every_size_that_fits(monkeypatch):
    seen = []

    def rated(forward, inputs, size):
        seen.append(tuple(forward(inputs[:size]).shape))
        if size == 16:
            raise torch.OutOfMemoryError("no room")
        return float(size)

    monkeypatch.setattr(efficiency, "rate", rated)
    adapter = ModelAdapter(seeded(Depthwise), input_size=(32, 32))
    assert dict(bare_rates(adapter, ForwardSetting("eager"))) == {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
    assert [rows for rows, _ in seen] == [1, 2, 4, 8, 16]
