"""The fidelity curve: how similar cheaper maps are to full SISE, by number of forwards.

Every mask of an image is scored once. Subsets, thresholds and budgets then read these scores: they cost no further
forwards, and differ from full SISE by their method alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.catalog.entries import CONTROLS
from blocksight.engine.catalog.entries import EXPLAINERS as ENTRIES
from blocksight.engine.catalog.forward_setting import Precision
from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.budget import Budget, Candidates, Sampled, sample
from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.explainers.sise import Captured, Sise
from blocksight.engine.metrics.faithfulness import Deletion, Insertion, KeepTop
from blocksight.engine.metrics.localisation import Localisation
from blocksight.engine.metrics.metric import Maps, Region
from blocksight.engine.metrics.similarity import iou_of_tops, pearson, spearman, ssim
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import Target
from blocksight.engine.saliency import Map, minmax
from blocksight.engine.scoring.forward import Forward, frozen_copy
from blocksight.engine.scoring.scorer import Scorer

FULL = "full SISE"
MUS = (0.1, 0.3, 0.5)
SUBSETS = (0.1, 0.3)
"""Shares of the masks that the random subsets score."""
BUDGETS: tuple[Budget, ...] = (0, 0.03, 0.05, 0.1, 0.2, 0.4, "auto")
RISE_MASKS = 1000
SLOW_EVERY, PRECISION_EVERY = 8, 32
"""Score-CAM and RISE are run on every eighth image, and each half precision on every thirty-second."""

SIMILARITIES = ("block_correlation", "worst_block_correlation", "spearman", "ssim", "iou_15")
FAITHFULNESS = ("drop", "increase", "insertion", "deletion", "ebpg")
MEASURES = (*SIMILARITIES, *FAITHFULNESS, "map_error")

Kind = Literal["reference", "selection", "random subset", "budget", "explainer", "control", "precision"]


@dataclass(frozen=True)
class Method:
    """One point of the curve."""

    name: str
    kind: Kind
    setting: Any = None
    """By kind: SISE's parameters, a share, a budget, an explainer's name and parameters, a precision."""
    every: int = 1
    """Run on every n-th image only."""


METHODS: tuple[Method, ...] = (
    Method(FULL, "reference"),
    *(Method(f"SISE, mu {mu:g}", "selection", SiseParameters(mu=mu)) for mu in MUS),
    Method("Ada-SISE", "selection", SiseParameters(selection="ada")),
    *(Method(f"random {share:.0%} of the masks", "random subset", share) for share in SUBSETS),
    *(Method(f"budget {budget}", "budget", budget) for budget in BUDGETS),
    Method("Grad-CAM", "explainer", ("gradcam", {})),
    Method("Score-CAM", "explainer", ("scorecam", {}), every=SLOW_EVERY),
    Method(f"RISE, {RISE_MASKS} masks", "explainer", ("rise", {"num_masks": RISE_MASKS}), every=SLOW_EVERY),
    *(Method(f"control: {name}", "control", (name, {})) for name in CONTROLS),
    *(
        Method(f"{precision} scores", "precision", precision, every=PRECISION_EVERY)
        for precision in get_args(Precision)
        if precision != "float32"
    ),
)


@dataclass(frozen=True)
class Reading:
    """The measurements of one method's map of one image."""

    image: int
    """Its number in the data set."""
    method: str
    num_forwards: int
    values: Mapping[str, float]
    """By name: SIMILARITIES to full SISE, FAITHFULNESS if defined, and the `map_error` that a budget predicted."""


class _Insertion(Insertion):
    """In 14 steps, for the curve measures many maps of each image."""

    shares = Insertion.shares[::2]


class _Deletion(Deletion):
    """In 14 steps, as `_Insertion`."""

    shares = Deletion.shares[::2]


Run = Callable[["_Pass", Sequence[int]], list[Explanation]]
"""A method's maps of some images of a pass."""


@dataclass(frozen=True)
class _Pass:
    """A few images, every mask of which was scored."""

    inputs_nchw: Tensor
    target: Target
    seeds: Sequence[int]
    regions: Sequence[Region | str | None]
    scores: Mapping[int, Sequence[Tensor]]
    """Per image and block the scores [C, 1] by channel; NaN for channels that full SISE leaves out."""
    captured: dict[Sise, Sequence[Captured]]
    """The images with the masks that each selection keeps."""

    def captured_by(self, sise: Sise) -> Sequence[Captured]:
        """The images as this selection captures them; computed once."""
        if sise not in self.captured:
            self.captured[sise] = sise.capture(self.inputs_nchw, self.target)
        return self.captured[sise]

    def known_scores(self, captured: Captured, block: int, rows: Tensor | slice) -> Tensor:
        """The scores [K, 1] of some of an image's masks, or of all of a block (a slice), for any selection."""
        candidates, channels = captured.candidates, captured.blocks[block].channels
        scores = self.scores[candidates.image][block]
        if not isinstance(rows, slice):
            channels = channels[(rows - candidates.places[block].start).cpu()]
        return scores[channels.to(scores.device)]


class FidelityBench:
    """One model and all methods; `readings` takes a few images at a time."""

    def __init__(
        self, adapter: ModelAdapter, *, batch_size: int, images_per_pass: int = 4, forward: Forward | None = None
    ) -> None:
        """`forward` scores masks in batches of `batch_size`. Raises ModelError where the model cannot be explained."""
        self.adapter, self.images_per_pass = adapter, images_per_pass
        self.options = {"batch_size": batch_size, "images_per_pass": images_per_pass, "forward": forward}
        self.full = self._sise(SiseParameters())
        self.budgeted = self._sise(SiseParameters(budget="auto"))
        self.scorer = self.full.scorer
        self.methods = [one for one in METHODS if one.setting != 0 or self.budgeted.head is not None]
        self.runs = {method.name: self._run(method) for method in self.methods}
        self.metrics = [
            *(make(self.scorer, "zero") for make in (KeepTop, _Insertion, _Deletion)),
            Localisation({}),
        ]

    def _sise(self, parameters: SiseParameters) -> Sise:
        return Sise(self.adapter, parameters, **self.options)

    def readings(
        self,
        inputs_nchw: Tensor,
        classes: Sequence[int],
        numbers: Sequence[int],
        seeds: Sequence[int],
        regions: Sequence[Region | str | None],
    ) -> list[Reading]:
        """Every method's readings of some images, for a class of each.

        Inputs [N, 3, H, W] as `adapter.normalise` gives them, `images_per_pass` at most; `numbers` are their places
        in the data set; `regions` are those of the class, if they are annotated. An image without a finite full map
        has no reading.
        """
        target = self.adapter.target(torch.tensor(classes, device=inputs_nchw.device)[:, None])
        with self.adapter.borrowed():
            images = self._scored(inputs_nchw, target, seeds, regions)
            reference = self.runs[FULL](images, range(len(inputs_nchw)))
            sound = [place for place, one in enumerate(reference) if np.isfinite(one.saliency_hw).all()]
            found: list[Reading] = []
            for method in self.methods:
                chosen = [place for place in sound if numbers[place] % method.every == 0]
                if not chosen:
                    continue
                full = [reference[place] for place in chosen]
                own = full if method.kind == "reference" else self.runs[method.name](images, chosen)
                for place, values, one in zip(chosen, self._values(images, chosen, own, full), own, strict=True):
                    found.append(Reading(numbers[place], method.name, one.num_forwards, values))
        return found

    def _scored(
        self,
        inputs_nchw: Tensor,
        target: Target,
        seeds: Sequence[int],
        regions: Sequence[Region | str | None],
    ) -> _Pass:
        captured = self.full.capture(inputs_nchw, target)
        scores = self._scores(self.scorer, inputs_nchw, target, captured)
        return _Pass(inputs_nchw, target, seeds, regions, scores, {self.full: captured})

    def _scores(
        self, scorer: Scorer, inputs_nchw: Tensor, target: Target, captured: Sequence[Captured]
    ) -> dict[int, list[Tensor]]:
        """The scores of every mask, as in `_Pass`."""
        blocks = range(len(self.full.blocks))
        sources = [
            one.candidates.source(one.candidates.all_rows()[block], block) for one in captured for block in blocks
        ]
        found = iter(scorer.scores(inputs_nchw, target, sources))
        scores: dict[int, list[Tensor]] = {}
        for one in captured:
            own = scores.setdefault(one.candidates.image, [])
            for place, block in zip(self.full.blocks, one.blocks, strict=True):
                values = next(found)
                by_channel = values.new_full((place.channels, 1), torch.nan)
                by_channel[block.channels.to(values.device)] = values
                own.append(by_channel)
        return scores

    def _run(self, method: Method) -> Run:
        """The function that makes the method's maps."""
        setting = method.setting
        if method.kind in ("explainer", "control"):
            return self._explained(*setting)
        if method.kind == "precision":
            return self._in_precision(setting)
        if method.kind == "random subset":
            return lambda images, chosen: _fused(images, chosen, self.full, partial(_subset, share=setting))
        if method.kind == "budget":
            return lambda images, chosen: _fused(images, chosen, self.budgeted, partial(_sampled, budget=setting))
        sise = self._sise(setting) if method.kind == "selection" else self.full
        return lambda images, chosen: _fused(images, chosen, sise, _sampled)

    def _explained(self, name: str, parameters: Mapping[str, Any]) -> Run:
        explainer = EXPLAINERS[name](self.adapter, ENTRIES[name].parameters(**parameters), **self.options)

        def run(images: _Pass, chosen: Sequence[int]) -> list[Explanation]:
            inputs, target = images.inputs_nchw[chosen], images.target.of(torch.tensor(chosen))
            return [one for (one,) in explainer.explain(inputs, target, [images.seeds[place] for place in chosen])]

        return run

    def _in_precision(self, precision: Precision) -> Run:
        def run(images: _Pass, chosen: Sequence[int]) -> list[Explanation]:
            scorer = replace(self.scorer, forward=rounded(self.adapter, precision))
            captured = images.captured_by(self.full)
            scores = self._scores(scorer, images.inputs_nchw, images.target, [captured[place] for place in chosen])
            return _fused(replace(images, scores=scores), chosen, self.full, _sampled)

        return run

    def _values(
        self, images: _Pass, chosen: Sequence[int], own: Sequence[Explanation], full: Sequence[Explanation]
    ) -> list[dict[str, float]]:
        """The values of each map of a method, as in `Reading`."""
        maps = Maps(
            images.inputs_nchw[chosen],
            images.target.of(torch.tensor(chosen)),
            saliency=[[stored(one.saliency_hw)] for one in own],
            scores=[[one.score] for one in own],
            ranks=[[1]] * len(chosen),
            regions=[[images.regions[place]] for place in chosen],
            seeds=[images.seeds[place] for place in chosen],
            explainer_seeds=[images.seeds[place] for place in chosen],
        )
        measured = [metric.evaluate(maps) for metric in self.metrics]
        values = []
        for index, (one, other) in enumerate(zip(own, full, strict=True)):
            found = {name: value.value for metric in measured for name, value in metric[index][0].items()}
            found |= similarities(one, other)
            found["map_error"] = None if one.quality is None else one.quality.map_error
            values.append({name: float(found[name]) for name in MEASURES if found.get(name) is not None})
        return values


def _fused(
    images: _Pass, chosen: Sequence[int], sise: Sise, scores: Callable[[_Pass, Captured], Sampled]
) -> list[Explanation]:
    captured = images.captured_by(sise)
    return [sise.fuse([captured[place]], [scores(images, captured[place])], 0)[0] for place in chosen]


def similarities(explanation: Explanation, reference: Explanation) -> dict[str, float]:
    """The SIMILARITIES. A block without a map, of which the reference has one, counts as correlation 0."""
    pairs = zip(explanation.blocks, reference.blocks, strict=False)  # another method's blocks are its own
    maps = [(one.saliency_hw, other.saliency_hw) for one, other in pairs if other.saliency_hw is not None]
    ours, theirs = stored(explanation.saliency_hw), stored(reference.saliency_hw)
    found = {"spearman": spearman(ours, theirs), "ssim": ssim(ours, theirs), "iou_15": iou_of_tops(ours, theirs)}
    if len(explanation.blocks) != len(reference.blocks) or all(one is None for one, _ in maps):
        return found
    blocks = [0.0 if one is None else pearson(one, other) for one, other in maps if other is not None]
    return {**found, "block_correlation": float(np.mean(blocks)), "worst_block_correlation": min(blocks)}


def stored(saliency_hw: Map) -> Map:
    """The map as it is stored: in [0, 1], in steps of 1/255; zeros where it is constant or not finite."""
    return np.rint(minmax(np.nan_to_num(saliency_hw)) * 255) / 255


def _sampled(images: _Pass, captured: Captured, budget: Budget | None = None) -> Sampled:
    """The scores under the budget. Measured ones are read from the known scores."""

    def run(wanted: Sequence[tuple[Candidates, int, Tensor | slice]]) -> list[Tensor]:
        return [images.known_scores(captured, block, rows) for _, block, rows in wanted]

    (found,) = sample(run, [captured.candidates], 1, budget)
    return found


def _subset(images: _Pass, captured: Captured, share: float) -> Sampled:
    """The scores of a random share of each block's masks; the other masks are left out of the sums."""
    found = _sampled(images, captured)
    generator = torch.Generator().manual_seed(images.seeds[captured.candidates.image])
    scores = torch.zeros_like(found.scores)
    num_scored = 0
    for place, size in zip(captured.candidates.places, captured.candidates.sizes, strict=True):
        rows = place.start + torch.randperm(size, generator=generator)[: ceil(share * size)]
        scores[rows] = found.scores[rows]
        num_scored += len(rows)
    return Sampled(scores, (None,), num_scored)


def rounded(adapter: ModelAdapter, precision: Precision) -> Forward:
    """The forward pass with weights and every layer's output rounded to this precision, and sums in float32.

    Slow. Hardware with that precision computes the same, but for the order of its sums.
    """
    dtype = getattr(torch, precision)
    module = frozen_copy(adapter)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype).float())
    for child in module.modules():
        if not list(child.children()):
            child.register_forward_hook(lambda _, __, output: output.to(dtype).float())

    def forward(inputs_nchw: Tensor) -> Tensor:
        with torch.no_grad():
            return module(inputs_nchw.to(dtype).float())

    return forward
