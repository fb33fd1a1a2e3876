"""The trial of a region on a model with known numbers, and the verdicts that follow from its figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.metrics.road import imputed
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.audit.result import Effect, Shortcut
from blocksight.jobs.audit.shortcuts import judged
from blocksight.jobs.audit.trial import Pictures, Trial, inpainted, pasted, random_boxes, recurrence, with_margin

SIDE = 24
BOX = (16, 16, 20, 20)


class Reader(nn.Module):
    """Two classes: the first one's logit is 0, the second one's ten times the mean of the red channel in BOX."""

    def forward(self, x: Tensor) -> Tensor:
        left, top, right, bottom = BOX
        seen = 10 * x[:, 0, top:bottom, left:right].mean((1, 2))
        return torch.stack([torch.zeros_like(seen), seen], 1)


def adapter() -> ModelAdapter:
    return ModelAdapter(Reader(), input_size=(SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1), class_names=("no", "yes"))


def pictures(num: int, level: int, prefix: str) -> Pictures:
    """Black pictures; BOX has one level of red."""
    pixels = np.zeros((num, SIDE, SIDE, 3), np.uint8)
    pixels[:, BOX[1] : BOX[3], BOX[0] : BOX[2], 0] = level
    return Pictures([f"{prefix}{index}" for index in range(num)], pixels)


def test_effects_are_those_that_follow_from_the_model() -> None:
    found = Trial(adapter(), 0).try_region(1, BOX, pictures(10, 255, "m"), pictures(12, 51, "o"))
    # members: logit 10, blanked 0; random regions may take up to a quarter of the box. Others: from 2 to 10.
    assert found.blanked.count == 10
    assert found.blanked.mean == pytest.approx(10, abs=2.6)
    assert found.blanked.mean >= 7.4
    assert found.blanked.probability == pytest.approx(0.5 - torch.tensor(10.0).sigmoid().item(), abs=1e-3)
    assert found.pasted.count == 12
    assert 5.9 <= found.pasted.mean <= 8.1
    assert found.pasted.probability == pytest.approx(
        (torch.tensor(10.0).sigmoid() - torch.tensor(2.0).sigmoid()).item(), abs=1e-3
    )
    assert found.recurrence == 1


def test_effects_on_a_raw_output_are_differences_of_it() -> None:
    raw = adapter()
    raw.readout = "identity"
    found = Trial(raw, 0).try_region(1, BOX, pictures(10, 255, "m"), pictures(12, 51, "o"))
    assert (found.blanked.scale, found.blanked.probability) == ("outputs", None)
    assert found.blanked.mean == pytest.approx(10, abs=2.6)
    assert found.examples[0].probability_before == pytest.approx(10)


def test_examples_show_the_crop_before_and_after_without_a_map() -> None:
    found = Trial(adapter(), 0).try_region(1, BOX, pictures(10, 255, "m"), pictures(12, 51, "o"))
    assert [(one.what, one.key, one.donor) for one in found.examples] == [
        ("inpainted", "m0", None),
        ("inpainted", "m1", None),
        ("pasted", "o0", "m0"),
        ("pasted", "o1", "m1"),
    ]
    assert with_margin(BOX, (SIDE, SIDE)) == (14, 14, 22, 22)
    inside = slice(2, 6)
    for one in found.examples:
        assert one.before.shape == one.after.shape == (8, 8, 3)
        changed = (one.before != one.after).any(-1)
        assert changed[inside, inside].all()
        assert changed.sum() == 16
    removed, pasted_in = found.examples[0], found.examples[2]
    assert (removed.before[inside, inside, 0] == 255).all()
    assert (pasted_in.before[inside, inside, 0] == 51).all()
    assert (pasted_in.after[inside, inside, 0] == 255).all()
    assert removed.probability_before == pytest.approx(torch.tensor(10.0).sigmoid().item())
    assert removed.probability_after < 0.6
    assert with_margin((0, 20, 8, 24), (SIDE, SIDE)) == (0, 18, 12, 24)


def test_a_region_that_the_model_ignores_has_no_effect() -> None:
    found = Trial(adapter(), 0).try_region(1, (0, 0, 4, 4), pictures(10, 255, "m"), pictures(10, 255, "o"))
    assert found.blanked.mean <= 0
    assert found.pasted.mean == pytest.approx(0, abs=1e-6)
    assert found.recurrence == 0.5


class Fixed(nn.Module):
    """Returns the same logits for any input."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


def log_odds(logits: list[list[float]], readout: ReadoutName = "softmax") -> NDArray[np.float64]:
    """The trial's log-odds of class 1."""
    trial = Trial(ModelAdapter(Fixed(logits), input_size=(8, 8)), 0)
    trial.adapter.readout = readout
    return trial._log_odds(torch.zeros(len(logits), 3, 8, 8), 1).numpy()


def test_log_odds_count_all_other_classes() -> None:
    logits = [[1.0, 2.0, 3.0], [0.5, -1.0, 9.0]]
    shares = torch.tensor(logits).double().softmax(1)[:, 1]
    assert log_odds(logits) == pytest.approx((shares / (1 - shares)).log().numpy())


def test_log_odds_of_saturated_probabilities_are_bounded() -> None:
    most = np.log((1 - 1e-6) / 1e-6)
    assert log_odds([[0.0, 60.0], [0.0, -60.0], [0.0, 1e30], [0.0, 5.0]]) == pytest.approx([most, -most, most, 5.0])


@pytest.mark.parametrize(
    ("readout", "values", "expected"),
    [
        ("sigmoid", [60.0, -60.0, 2.0], [13.8155, -13.8155, 2.0]),
        ("probabilities", [1.0, 1.0000002, 0.0, 0.75], [13.8155, 13.8155, -13.8155, 1.0986]),
        ("identity", [60.0, -60.0, 2.0], [60.0, -60.0, 2.0]),
    ],
)
def test_log_odds_are_those_of_the_readouts_probability(
    readout: ReadoutName, values: list[float], expected: list[float]
) -> None:
    found = log_odds([[9.0, value] for value in values], readout)
    assert found == pytest.approx(expected, abs=1e-3)


def test_inpainting_a_part_is_inpainting_the_whole() -> None:
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for box in (BOX, (0, 0, 5, 7), (20, 3, 24, 24)):
        kept = torch.ones(SIDE, SIDE, dtype=torch.bool)
        kept[box[1] : box[3], box[0] : box[2]] = False
        assert torch.allclose(inpainted(image, box), imputed(image, kept), atol=2e-4)


def test_pasting_copies_the_region_and_nothing_else() -> None:
    ours, theirs = torch.zeros(3, SIDE, SIDE), torch.ones(3, SIDE, SIDE)
    mixed = pasted(ours, theirs, BOX)
    assert mixed.sum() == 3 * 16
    assert mixed[:, 16:20, 16:20].all()
    assert not ours.any()


def test_random_regions_have_the_size_lie_inside_and_hardly_meet_the_box() -> None:
    for number in range(50):
        for left, top, right, bottom in random_boxes(BOX, (SIDE, SIDE), ("seed", number)):
            assert (right - left, bottom - top) == (4, 4)
            assert left >= 0
            assert top >= 0
            assert max(right, bottom) <= SIDE
            width, height = min(right, 20) - max(left, 16), min(bottom, 20) - max(top, 16)
            assert max(0, width) * max(0, height) <= 4
    assert list(random_boxes(BOX, (SIDE, SIDE), (1, "a"))) == list(random_boxes(BOX, (SIDE, SIDE), (1, "a")))
    whole = (0, 0, SIDE, SIDE)
    assert set(random_boxes(whole, (SIDE, SIDE), (1,))) == {whole}


def test_recurrence_is_near_one_for_a_mark_and_near_half_for_anything_else() -> None:
    rng = np.random.default_rng(0)
    others = rng.random((32, 192))
    mark = rng.integers(0, 2, 192)
    assert recurrence(0.5 * rng.random((32, 192)) + 0.5 * mark, others, 0) > 0.95
    assert recurrence(np.tile(mark, (32, 1)).astype(float), others, 0) == 1
    assert recurrence(rng.random((32, 192)), others, 0) < 0.65
    assert recurrence(np.full((32, 192), 0.5), np.full((32, 192), 0.5), 0) == 0.5  # an even background in all


def test_a_faint_mark_is_recognised_where_the_picture_under_it_varies_slowly() -> None:
    rng = np.random.default_rng(0)
    slow = 128 + 60 * rng.normal(size=(64, 1, 1, 1)) + 2 * rng.normal(size=(64, SIDE, SIDE, 3))
    mark = np.zeros((SIDE, SIDE, 3))
    mark[BOX[1] : BOX[3] : 2, BOX[0] : BOX[2]] = 20
    others = Pictures([f"o{index}" for index in range(32)], slow[32:].clip(0, 255).astype(np.uint8))
    for added, least, most in ((mark, 0.95, 1.0), (0 * mark, 0.5, 0.75)):
        pixels = (slow[:32] + added).clip(0, 255).astype(np.uint8)
        members = Pictures([f"m{index}" for index in range(32)], pixels)
        assert least <= Trial(adapter(), 0).try_region(1, BOX, members, others).recurrence <= most


REAL = Effect(3.0, 2.5, 3.5, 1e-6, 32, 0.4)
SHORTCUT = Shortcut(
    target_index=1,
    target_name="yes",
    source="class",
    box=(0.7, 0.7, 0.9, 0.9),
    share=0.9,
    recurrence=0.99,
    density=3.0,
    elsewhere_density=0.4,
    on_object=None,
    blanked=REAL,
    pasted=REAL,
    is_confirmed=False,
    why="",
    members=("a",),
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blanked": replace(REAL, mean=0.5, low=0.4)}, "inpainted, its log-odds fall by 0.50 [0.40, 3.50] more"),
        ({"blanked": replace(REAL, low=-0.1)}, "inpainted, its log-odds fall no differently than with a random"),
        ({"blanked": replace(REAL, mean=-3.0, low=-4.0, high=-2.0)}, "log-odds fall by 3.00 [2.00, 4.00] less than"),
        ({"pasted": replace(REAL, p_value=0.2)}, "pasted into other images, its log-odds rise no differently than"),
        ({"on_object": 0.5}, "objects cover 50% of it"),
        ({"elsewhere_density": 1.6}, "other classes' maps look there too"),
        ({"recurrence": 0.7}, "pixels differ from member to member"),
        ({"blanked": None, "pasted": None, "why": "not put to the test"}, "not put to the test"),
    ],
)
def test_one_doubt_is_enough_for_no_finding(change: dict[str, object], reason: str) -> None:
    [one] = judged([replace(SHORTCUT, **change)])
    assert not one.is_confirmed
    assert reason in one.why


@pytest.mark.parametrize("change", [{}, {"on_object": 0.0, "recurrence": 0.5, "elsewhere_density": 2.0}])
def test_without_doubt_it_is_a_finding(change: dict[str, object]) -> None:
    [one] = judged([replace(SHORTCUT, **change)])
    assert one.is_confirmed
    assert "fall by 3.00 [2.50, 3.50] more than" in one.why


def test_p_values_are_corrected_over_all_trials() -> None:
    weak = replace(SHORTCUT, blanked=replace(REAL, p_value=0.02), pasted=replace(REAL, p_value=0.02))
    assert judged([weak])[0].is_confirmed
    found = judged([weak, SHORTCUT, *[replace(SHORTCUT, blanked=replace(REAL, p_value=0.5))] * 3])
    assert [one.is_confirmed for one in found] == [True, False, False, False, False]
    assert found[0].blanked is not None
    assert found[0].blanked.p_value == pytest.approx(1e-5)  # ten trials
