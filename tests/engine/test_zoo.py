"""The zoo: blocks of libraries' classifiers are right by the oracle of `zoo.py`, or as the stored table says."""

import re

import pytest

from tests.engine import zoo_table
from tests.engine.zoo_models import LEFT_OUT, Made, kinds
from tests.engine.zoo_table import CHEAP_SECONDS, ENTRIES, Row, judged, stored

STORED = stored()
REFUSED = Row("refused", "", 0)
"""What a model may be that is not in the table yet, if it is not right."""


def in_the_lane(name):
    row = STORED.get(name)
    is_cheap = row is not None and row.verdict == "right" and row.seconds <= CHEAP_SECONDS
    return pytest.param(name, marks=[pytest.mark.judged] if is_cheap else [])


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [in_the_lane(name) for name in ENTRIES])
def test_blocks_are_right_or_what_the_table_says(name):
    for library in ("timm", "transformers"):
        pytest.importorskip(library, reason=f"the extra of {library} is not installed")
    row, before = judged(name), STORED.get(name, REFUSED)
    assert row.verdict == "right" or row.verdict == before.verdict != "wrong", row.why


@pytest.mark.zoo
def test_every_image_classifier_of_transformers_is_in_the_zoo():
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    assert set(kinds()) == {name.removeprefix("hf:") for name in ENTRIES if name.startswith("hf:")} | set(LEFT_OUT)


def test_every_classifier_of_torchvision_is_in_the_zoo():
    import torchvision

    wanted = set(torchvision.models.list_models(module=torchvision.models))
    assert wanted == {name.removeprefix("torchvision:") for name in ENTRIES if name.startswith("torchvision:")}


# ---------------------------------------------------------------- the stored table


def test_the_table_holds_models_of_the_zoo_with_the_reason_and_none_is_wrong():
    assert set(STORED) <= set(ENTRIES) | {f"hf:{name}" for name in LEFT_OUT}
    assert {row.verdict for row in STORED.values()} <= {"right", "refused", "unjudged", "left out"}
    assert all(row.why for row in STORED.values())
    assert all(row.side == ENTRIES[name] for name, row in STORED.items() if name in ENTRIES)


def test_fewer_than_three_of_a_hundred_are_refused():
    assert sum(row.verdict == "refused" for row in STORED.values()) < 0.03 * len(STORED)
    assert sum(name.startswith("timm:") for name in ENTRIES) >= 300


# ---------------------------------------------------------------- the lane


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of one model that was right."""
    monkeypatch.setattr(zoo_table, "TABLE", tmp_path / "zoo.json")
    monkeypatch.setattr(zoo_table, "ENTRIES", {"timm:one": 64})
    zoo_table.store({"timm:one": Row("right", "last (8, 4, 4)", 64, 0.1)})


@pytest.mark.parametrize(("found", "told"), [("right", "right"), ("unjudged", "worse"), ("wrong", "worse")])
def test_the_lane_tells_what_was_right_and_is_no_more(table, monkeypatch, found, told):
    monkeypatch.setattr(zoo_table, "made", lambda _, side: Made(None, side))
    monkeypatch.setattr(zoo_table, "verdict", lambda *_, **__: (found, "why"))
    assert zoo_table.renewed("timm:one") == told
    assert stored()["timm:one"].verdict == found
    assert stored()["hf:ImageGPTForImageClassification"].verdict == "left out"


def test_a_model_that_cannot_be_made_is_told(table, monkeypatch):
    def fails(name, side):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(zoo_table, "made", fails)
    row = zoo_table.judged_apart("timm:one")
    assert row.verdict == "not made"
    assert re.match("RuntimeError: no such layer at test_zoo", row.why)


def test_a_model_that_takes_too_long_is_told(table, monkeypatch):
    def waits(name, side):
        while True:
            pass

    monkeypatch.setattr(zoo_table, "made", waits)
    assert zoo_table.judged_apart("timm:one", 1) == Row("not made", "no verdict in 1 s", 64)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_vit3"])
def test_blocks_of_tiny_networks_are_right(name):
    pytest.importorskip("timm", reason="the timm extra is not installed")
    one = zoo_table.made(f"timm:{name}")
    found, why = zoo_table.verdict(one.module, one.side, one.prefix, is_last=one.is_last)
    assert found == "right", why
