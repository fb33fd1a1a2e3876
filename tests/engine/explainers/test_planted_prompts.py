"""Prompts on planted pictures: two prompts give two maps, each on its own object, and A - B removes what both share."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from blocksight.engine.catalog.target_expressions import parse_formula
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.adapter import ModelAdapter
from tests.engine import planted, planted_clip

NUM_PICTURES = 4
HELD_OUT = 77
EXPLAINERS = ("chefer", "libra(integrated_gradients)")
STRIPES, OTHER_STRIPES, DISC = 0, 1, 3


@pytest.fixture(scope="module")
def reader() -> ModelAdapter:
    """The network that learned captions: it compares pictures with texts."""
    return planted_clip.adapter_with_texts(planted_clip.stored_clip())


def energies(adapter: ModelAdapter, name: str, texts: Sequence[str], picture: Tensor, boxes: Tensor) -> Tensor:
    """The energy of each text's map in each box, [texts, boxes]."""
    target = adapter.target_of([[parse_formula(text) for text in texts]])
    (maps,) = make_explainer(name, adapter).explain(adapter.normalise(picture[None]), target)
    rows = [[planted.energy_inside(torch.from_numpy(one.saliency_hw), box) for box in boxes] for one in maps]
    return torch.tensor(rows)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_two_prompts_find_their_own_objects(reader, name):
    found = torch.zeros(4, 2)
    for picture, own, boxes in zip(*planted.pairs(NUM_PICTURES, HELD_OUT), strict=True):
        prompts = [[planted_clip.prompt(planted.CLASS_NAMES[one])] for one in own.tolist()]
        texts = ("logit(0)", "logit(1)", "0-1", "1-0")
        found += energies(reader.with_prompts(prompts), name, texts, picture, boxes) / NUM_PICTURES
    assert found[0, 0] > found[0, 1]
    assert found[1, 1] > found[1, 0]
    assert found[2, 0] > 2 * found[2, 1]
    assert found[3, 1] > 2 * found[3, 0]


def test_a_difference_removes_what_both_prompts_share(reader):
    """Both prompts name a disc, which is there; one names the stripes beside it, and the other none that are there."""
    corners = torch.tensor([[4, 4], [40, 40]]).repeat(NUM_PICTURES, 1, 1)
    pictures = planted.draw(torch.tensor([STRIPES, DISC]).repeat(NUM_PICTURES, 1), corners, planted.generator(HELD_OUT))
    boxes = torch.cat([corners, corners + planted.OBJECT_SIDE], 2)
    disc = planted.CLASS_NAMES[DISC]
    prompts = [[planted_clip.prompt(f"{planted.CLASS_NAMES[one]} and {disc}")] for one in (STRIPES, OTHER_STRIPES)]
    adapter, found = reader.with_prompts(prompts), torch.zeros(2, 2)
    for picture, places in zip(pictures, boxes, strict=True):
        found += energies(adapter, EXPLAINERS[1], ("logit(0)", "0-1"), picture, places) / NUM_PICTURES
    alone, less = found
    assert alone[1] > alone[0]  # the disc is most of what the first prompt hears
    assert less[1] < 0.75 * alone[1]
    assert less[0] > 1.25 * alone[0]
