"""The table that `--explainer auto` rests on: how well methods find planted evidence, on four trained networks.

`python -m tests.engine.planted_table` trains a CNN, a ViT, a Swin and a CLIP from each seed, measures every method on
each, and writes `tests/figures/planted.json` when nothing is missing. What was measured is kept in `build/planted`, so
that the same command goes on where it was stopped. `--seeds 7,8,9 --output FILE` measures it on other networks and
pictures. `--networks clip` measures one, and leaves the others' rows. A seed takes about 15 minutes of one core.
"""

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blocksight.engine.catalog.composition import parameters_of, parse_method
from blocksight.engine.explainers import make_explainer
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.metrics import masked_metrics
from blocksight.engine.metrics.metric import Maps
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.model.threads import one_thread
from blocksight.engine.saliency import minmax
from tests.engine import planted, planted_clip

FIGURE = Path(__file__).parents[1] / "figures" / "planted.json"
WORK = Path(__file__).parents[2] / "build" / "planted"
SOURCES = (Path(planted.__file__), Path(planted_clip.__file__))
"""What trains the networks."""
SEEDS = (0,)
NUM_PICTURES = 12
"""With one object, and as many with two."""
HELD_OUT = 1_000_000
"""Seeds of pictures begin here; no training reaches them."""
QUICK: Mapping[str, Mapping[str, Any]] = {"rise": {"num_masks": 250}, "occlusion": {"window": 8, "stride": 4}}
"""As many masks, and as fine windows, as pictures of 64 pixels need."""
FIGURES = ("energy", "right", "deletion", "insertion")

EVERY = ("sise", "gradcam", "reciprocam", "scorecam", "occlusion", "rise", "integrated_gradients", "random", "edges")
FOR_CURVED = ("libra(integrated_gradients)", "libra(hirescam)")
"""On a network of ReLUs balanced gradients are the plain ones."""
ATTENTION = ("libra(chefer)", "libra(daam)", "libra(legrad)", "chefer", "daam", "legrad")
DROPPING = ("sise baseline=drop", "rise baseline=drop", "occlusion baseline=drop")
"""With tokens left out, not painted over."""
METHODS: Mapping[str, Sequence[str]] = {
    "cnn": EVERY,
    "vit": (*ATTENTION, *FOR_CURVED, *EVERY, *DROPPING),
    "clip": (*ATTENTION, *FOR_CURVED, *EVERY, *DROPPING),
    "swin": (*FOR_CURVED, *EVERY),
}


class Network(NamedTuple):
    """How a network is made, trained from a seed, and asked about the planted classes."""

    make: Callable[[], nn.Module]
    train: Callable[[int], nn.Module]
    adapter: Callable[[nn.Module], ModelAdapter]


def _classifier(name: str) -> Callable[[nn.Module], ModelAdapter]:
    return lambda module: planted.adapter_of(module, name)


NETWORKS = {
    "cnn": Network(
        planted.small_cnn, lambda seed: planted.train_cnn(num_steps=200, seed=seed).module, _classifier("planted CNN")
    ),
    "vit": Network(
        planted.small_vit, lambda seed: planted.train_vit(num_steps=300, seed=seed).module, _classifier("planted ViT")
    ),
    "swin": Network(
        planted.small_swin, lambda seed: planted.train_swin(num_steps=400, seed=seed).module, _classifier("Swin")
    ),
    "clip": Network(
        planted_clip.small_clip,
        lambda seed: planted_clip.train_clip(seed=seed),
        planted_clip.classifier,
    ),
}


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@cache
def trained(name: str, seed: int, work: Path) -> ModelAdapter:
    """The network, trained from this seed; its weights are kept in `work`."""
    network, file = NETWORKS[name], work / f"{name}-{seed}-{_digest(*SOURCES)}.safetensors"
    if not file.exists():
        state = {key: value.contiguous() for key, value in network.train(seed).state_dict().items()}
        safetensors.torch.save_file(state, file)
    module = network.make()
    module.load_state_dict(safetensors.torch.load_file(file))
    return network.adapter(module.eval())


def row_of(network: str, label: str, seed: int, work: Path) -> dict[str, Any]:
    """The figures of one method on one network."""
    adapter = trained(network, seed, work)
    name, *given = label.split()
    values = {**QUICK.get(name, {}), **dict(one.split("=") for one in given)}
    explainer = make_explainer(name, adapter, parameters_of(parse_method(name), values), batch_size=32)
    pixels, classes, boxes = planted.off_centre(NUM_PICTURES, HELD_OUT + 2 * seed)
    target = ClassProbability(classes[:, None])
    maps = _maps(explainer, adapter, pixels, target)
    energies = [planted.energy_inside(torch.from_numpy(own), box) for (own,), box in zip(maps, boxes, strict=True)]
    return {
        "energy": float(np.mean(energies)),
        "right": _share_of_right_choices(explainer, adapter, HELD_OUT + 2 * seed + 1),
        **_curves(adapter, pixels, target, maps),
    }


def _maps(explainer: Explainer, adapter: ModelAdapter, pixels: Tensor, target: ClassProbability) -> list[list[NDArray]]:
    found = explainer.explain(adapter.normalise(pixels), target, range(len(pixels)))
    return [[one.saliency_hw for one in own] for own in found]


def _share_of_right_choices(explainer: Explainer, adapter: ModelAdapter, seed: int) -> float:
    """Of the objects in pairs, those whose box holds more of the map of their class than the other box."""
    pixels, classes, boxes = planted.pairs(NUM_PICTURES, seed)
    right = []
    for own, two in zip(_maps(explainer, adapter, pixels, ClassProbability(classes)), boxes, strict=True):
        inside = [[planted.energy_inside(torch.from_numpy(one), box) for box in two] for one in own]
        right += [inside[0][0] > inside[0][1], inside[1][1] > inside[1][0]]
    return float(np.mean(right))


def _curves(
    adapter: ModelAdapter, pixels: Tensor, target: ClassProbability, maps: Sequence[Sequence[NDArray]]
) -> Mapping[str, float]:
    """Mean deletion and insertion, to grey and from a blur for every method."""
    inputs, count = adapter.normalise(pixels), len(pixels)
    with adapter.borrowed(), torch.no_grad():
        scores = target.score(adapter.logits(inputs), torch.arange(count)).tolist()
    scaled = [[minmax(one) for one in own] for own in maps]
    seen = Maps(inputs, target, scaled, scores, [[0]] * count, [[None]] * count, range(count), range(count))
    curves = {own.names[0]: own for own in masked_metrics(adapter, "zero", 32)}
    return {
        name: float(np.mean([own[0][name].value for own in curves[name].evaluate(seen)]))
        for name in ("deletion", "insertion")
    }


def measured(networks: Sequence[str], seeds: Sequence[int], work: Path) -> list[dict[str, Any]]:
    """All rows, one for each network, method and seed; those that `work` holds are not measured again."""
    work.mkdir(parents=True, exist_ok=True)
    log = work / f"rows-{_digest(*SOURCES, Path(__file__))}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["network"], row["method"], row["seed"]) for row in rows}
    wanted = [(name, label, seed) for seed in seeds for name in networks for label in METHODS[name]]
    with one_thread(), log.open("a") as file:
        for name, label, seed in wanted:
            if (name, label, seed) not in known:
                row = {"network": name, "method": label, "seed": seed, **row_of(name, label, seed, work)}
                rows.append(row)
                print(json.dumps(row), file=file, flush=True)
                print(json.dumps(row), flush=True)
    return [row for row in rows if (row["network"], row["method"], row["seed"]) in set(wanted)]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each network and method the mean, the least and the greatest of every figure over the seeds."""
    found = []
    for name, label in dict.fromkeys((row["network"], row["method"]) for row in rows):
        own = [row for row in rows if (row["network"], row["method"]) == (name, label)]
        figures = {figure: _range([row[figure] for row in own]) for figure in FIGURES}
        found.append({"network": name, "method": label, "seeds": [row["seed"] for row in own], **figures})
    return found


def _range(values: Sequence[float]) -> list[float]:
    return [round(one, 3) for one in (statistics.fmean(values), min(values), max(values))]


def main() -> None:
    """Measures what is missing and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the trainings and the pictures")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="joined by commas")
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the table is written")
    parser.add_argument("--work", type=Path, default=WORK, help="where weights and rows are kept")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    networks = options.networks.split(",")
    rows = summary(measured(networks, seeds, options.work))
    others = json.loads(options.output.read_text()) if options.output.exists() else []
    rows = [*(row for row in others if row["network"] not in networks), *rows]
    options.output.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
