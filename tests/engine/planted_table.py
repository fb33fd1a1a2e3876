"""The table that `--explainer auto` rests on: how well methods find planted evidence, on a CNN and on a ViT.

`python -m tests.engine.planted_table` measures it in a few minutes and writes `tests/figures/planted.json`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blocksight.engine.catalog.composition import parameters_of, parse_method
from blocksight.engine.explainers import make_explainer
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.metrics import MASKED
from blocksight.engine.metrics.metric import Maps
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.model.threads import one_thread
from blocksight.engine.saliency import minmax
from blocksight.engine.scoring.perturb import perturbation
from blocksight.engine.scoring.scorer import Scorer
from tests.engine import planted
from tests.engine.explainers.test_planted import HELD_OUT, off_centre

FIGURE = Path(__file__).parents[1] / "figures" / "planted.json"
NUM_PICTURES = 24
QUICK: Mapping[str, Mapping[str, Any]] = {"rise": {"num_masks": 1000}, "occlusion": {"window": 8, "stride": 4}}
"""As many masks, and as fine windows, as pictures of 64 pixels need."""

EVERY = ("sise", "hirescam", "gradcam", "layercam", "reciprocam", "scorecam", "occlusion", "rise")
EVERY += ("integrated_gradients", "random", "gaussian", "edges")
FOR_CURVED = ("libra(integrated_gradients)", "libra(hirescam)", "libra(gradient)")
"""On a network of ReLUs balanced gradients are the plain ones."""
ATTENTION = ("libra(chefer)", "libra(daam)", "libra(legrad)", "chefer", "daam", "legrad")
METHODS: Mapping[str, Sequence[str]] = {"cnn": EVERY, "vit": (*ATTENTION, *FOR_CURVED, *EVERY)}
NETWORKS = {"cnn": planted.trained_cnn, "vit": planted.trained_vit}


def row_of(network: str, name: str) -> dict[str, Any]:
    """The figures of one method on one network."""
    adapter, method = NETWORKS[network](), parse_method(name)
    explainer = make_explainer(name, adapter, parameters_of(method, QUICK.get(name, {})), batch_size=32)
    pixels, classes, boxes = off_centre(NUM_PICTURES)
    target = ClassProbability(classes[:, None])
    maps = _maps(explainer, adapter, pixels, target)
    energies = [planted.energy_inside(torch.from_numpy(own), box) for (own,), box in zip(maps, boxes, strict=True)]
    return {
        "network": network,
        "method": str(method),
        "energy": round(float(np.mean(energies)), 3),
        "right": round(_share_of_right_choices(explainer, adapter), 3),
        **_curves(adapter, pixels, target, maps),
    }


def _maps(explainer: Explainer, adapter: ModelAdapter, pixels: Tensor, target: ClassProbability) -> list[list[NDArray]]:
    found = explainer.explain(adapter.normalise(pixels), target, range(len(pixels)))
    return [[one.saliency_hw for one in own] for own in found]


def _share_of_right_choices(explainer: Explainer, adapter: ModelAdapter) -> float:
    """Of the objects in pairs, those whose box holds more of the map of their class than the other box."""
    pixels, classes, boxes = planted.pairs(NUM_PICTURES, HELD_OUT + 1)
    right = []
    for own, two in zip(_maps(explainer, adapter, pixels, ClassProbability(classes)), boxes, strict=True):
        inside = [[planted.energy_inside(torch.from_numpy(one), box) for box in two] for one in own]
        right += [inside[0][0] > inside[0][1], inside[1][1] > inside[1][0]]
    return float(np.mean(right))


def _curves(
    adapter: ModelAdapter, pixels: Tensor, target: ClassProbability, maps: Sequence[Sequence[NDArray]]
) -> Mapping[str, float]:
    """Mean deletion and insertion."""
    inputs, count = adapter.normalise(pixels), len(pixels)
    with adapter.borrowed(), torch.no_grad():
        scores = target.score(adapter.logits(inputs), torch.arange(count)).tolist()
    scorer = Scorer(adapter, perturbation(adapter, "zero"), 32, None)
    scaled = [[minmax(one) for one in own] for own in maps]
    seen = Maps(inputs, target, scaled, scores, [[0]] * count, [[None]] * count, range(count), range(count))
    return {
        name: round(float(np.mean([own[0][name].value for own in MASKED[name](scorer, "zero").evaluate(seen)])), 3)
        for name in ("deletion", "insertion")
    }


def main() -> None:
    """Measures all rows and writes the figure."""
    rows = []
    with one_thread():
        for network, names in METHODS.items():
            for name in names:
                rows.append(row_of(network, name))
                print(rows[-1], flush=True)
    FIGURE.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
