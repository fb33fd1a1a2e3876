"""The trial of a candidate: its region is removed from members and pasted into others, and random regions likewise."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from torch import Tensor

from blocksight.engine.metrics.road import imputed
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.threads import one_thread
from blocksight.jobs.audit.examples import NUM_EXAMPLES, Example
from blocksight.jobs.audit.result import Effect, Scale
from blocksight.jobs.evaluate.bootstrap import MetricSums, differences, key_hashes
from blocksight.storage.outputs.pictures import Pixels

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

RANDOM_REGIONS = 4
"""Random regions per image, of the candidate's size."""
MAX_SHARED = 0.25
"""Largest part of its area that a random region shares with the candidate's."""
TRIES = 50
"""Draws of a random region at most."""
RIM = 2
"""Pixels around a region that inpainting reads: its equation joins only direct neighbours."""
MARGIN = 0.5
"""Part of a region's sides that an example shows around it."""
IMAGES_PER_PASS = 8
SPLITS = 10
"""Random splits into halves, for the recurrence."""
APART = 1.0
"""A pixel is part of the template if members and others differ there by this many standard deviations."""
AROUND = 5
"""Side in pixels of the window whose mean `_details` subtracts."""
NOISE_FLOOR = 10 / 255
"""Standard deviation that is added to every pixel's, so that equal pixels do not dominate."""
LEAST_PROBABILITY = 1e-6
"""Log-odds are those of a probability held between this and 1 minus this, so within 13.8: beyond, a model's answer is
the same answer, and one image with a logit of 60 would outweigh all others."""
MAX_LOG_ODDS = math.log((1 - LEAST_PROBABILITY) / LEAST_PROBABILITY)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images at the model's input size, with their keys."""

    keys: Sequence[str]
    pixels: Pixels
    """[n, H, W, 3]."""


@dataclass(frozen=True)
class TrialResult:
    """The effects and the recurrence of a region."""

    blanked: Effect
    pasted: Effect
    recurrence: float
    examples: tuple[Example, ...]
    """Some of the images before and after: inpainted members, then others with the pasted region."""


class Trial:
    """Tries candidates' regions on a model."""

    def __init__(self, adapter: ModelAdapter, seed: int) -> None:
        """`seed` decides the random regions."""
        self.adapter, self.seed = adapter, seed

    def try_region(self, target_index: int, box: Box, members: Pictures, others: Pictures) -> TrialResult:
        """The effects on the target's log-odds, p-values not corrected yet, and the region's recurrence.

        Needs two members and two others or more. Inpainting solves ROAD's equation. Random regions are drawn from each
        image's key, and pasted at their own places.
        """
        with self.adapter.borrowed(), torch.inference_mode():
            examples: list[Example] = []
            return TrialResult(
                self._blanked(target_index, box, members, examples),
                self._pasted(target_index, box, members, others, examples),
                max(
                    recurrence(look(members.pixels, box), look(others.pixels, box), self.seed)
                    for look in (_cut, _details)
                ),
                tuple(examples),
            )

    def _blanked(self, target: int, box: Box, members: Pictures, examples: list[Example]) -> Effect:
        """The effect of inpainting the region; appends the first images to `examples`, as `_pasted` does."""
        inputs = self._inputs(members)
        before = self._log_odds(inputs, target)
        falls = []
        for place, (key, image, start) in enumerate(zip(members.keys, inputs, before, strict=True)):
            boxes = [box, *random_boxes(box, tuple(image.shape[1:]), (self.seed, "blank", key))]
            with one_thread():  # its operations are small: 20 ms, with two threads 80 ms on busy cores
                blanked = torch.stack([inpainted(image.cpu(), one) for one in boxes])
            after = self._log_odds(blanked.to(inputs.device), target)
            falls.append([(start - after[1:]).mean().item(), (start - after[0]).item(), _change(after[0], start)])
            if place < NUM_EXAMPLES:
                crops = self._crops(image, blanked[0].to(image.device), box)
                examples.append(Example("inpainted", key, None, *crops, *self._shown(start, after[0])))
        return _effect(members.keys, np.array(falls), self.scale)

    def _pasted(self, target: int, box: Box, members: Pictures, others: Pictures, examples: list[Example]) -> Effect:
        given, taken = self._inputs(members), self._inputs(others)
        before = self._log_odds(taken, target)
        rises = []
        for place, (key, image, start) in enumerate(zip(others.keys, taken, before, strict=True)):
            boxes = [box, *random_boxes(box, tuple(image.shape[1:]), (self.seed, "paste", key))]
            donor = place % len(given)
            mixed = torch.stack([pasted(image, given[donor], one) for one in boxes])
            after = self._log_odds(mixed, target)
            rises.append([(after[1:] - start).mean().item(), (after[0] - start).item(), _change(after[0], start)])
            if place < NUM_EXAMPLES:
                crops = self._crops(image, mixed[0], box)
                examples.append(Example("pasted", key, members.keys[donor], *crops, *self._shown(start, after[0])))
        return _effect(others.keys, np.array(rises), self.scale)

    def _crops(self, before_chw: Tensor, after_chw: Tensor, box: Box) -> tuple[Pixels, Pixels]:
        """The region with a margin in both inputs, as pixels."""
        left, top, right, bottom = with_margin(box, before_chw.shape[1:])
        pixels = self.adapter.pixels_of(torch.stack([before_chw, after_chw]))[..., top:bottom, left:right]
        before, after = (255 * pixels).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return before, after

    def _inputs(self, pictures: Pictures) -> Tensor:
        return self.adapter.normalise(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2))

    @property
    def scale(self) -> Scale:
        """What `_log_odds` returns."""
        return "outputs" if self.adapter.readout == "identity" else "log-odds"

    def _shown(self, *values: Tensor) -> tuple[float, ...]:
        """For people: probabilities of log-odds, outputs as they are."""
        return tuple(float(one if self.scale == "outputs" else one.sigmoid()) for one in values)

    def _log_odds(self, inputs_nchw: Tensor, target: int) -> Tensor:
        """[n] log(p / (1 - p)) of the target's probability p, within `MAX_LOG_ODDS`, in float64 on the CPU.

        Of a raw output, which is no probability, the output itself.
        """
        logits = torch.cat([self.adapter.logits(part) for part in inputs_nchw.split(IMAGES_PER_PASS)]).double().cpu()
        own, readout = logits[:, target], self.adapter.readout
        if readout == "identity":
            return own
        if readout == "probabilities":  # a rounded one may exceed 1
            return own.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY).logit()
        if readout == "sigmoid":
            return own.clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)
        others = torch.cat([logits[:, :target], logits[:, target + 1 :]], 1)
        return (own - others.logsumexp(1)).clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)


def with_margin(box: Box, size: Sequence[int]) -> Box:
    """The box with `MARGIN` of its sides added on each side, within a picture of this size (height, width)."""
    left, top, right, bottom = box
    across, down = round(MARGIN * (right - left)), round(MARGIN * (bottom - top))
    return max(0, left - across), max(0, top - down), min(size[1], right + across), min(size[0], bottom + down)


def inpainted(image_chw: Tensor, box: Box) -> Tensor:
    """The image [C, H, W] with the region inpainted by `blocksight.engine.metrics.road.imputed`."""
    left, top, right, bottom = box
    above, before = max(0, top - RIM), max(0, left - RIM)
    crop = image_chw[:, above : bottom + RIM, before : right + RIM]
    kept = torch.ones(crop.shape[1:], dtype=torch.bool, device=image_chw.device)
    kept[top - above : bottom - above, left - before : right - before] = False
    filled = image_chw.clone()
    filled[:, above : bottom + RIM, before : right + RIM] = imputed(crop, kept)
    return filled


def pasted(image_chw: Tensor, donor_chw: Tensor, box: Box) -> Tensor:
    """The image [C, H, W] with the donor's pixels in the region."""
    left, top, right, bottom = box
    mixed = image_chw.clone()
    mixed[:, top:bottom, left:right] = donor_chw[:, top:bottom, left:right]
    return mixed


def random_boxes(box: Box, size: tuple[int, ...], seed: Sequence[object]) -> Iterator[Box]:
    """Yields `RANDOM_REGIONS` boxes of the same size in a picture (height, width), with little overlap.

    If all `TRIES` draws overlap too much, it is the draw that overlaps least.
    """
    rng = np.random.default_rng(int(key_hashes(["/".join(map(str, seed))])[0]))
    width, height = box[2] - box[0], box[3] - box[1]
    for _ in range(RANDOM_REGIONS):
        drawn: list[tuple[float, Box]] = []
        while len(drawn) < TRIES and (not drawn or min(drawn)[0] > MAX_SHARED):
            left, top = (int(rng.integers(0, free + 1)) for free in (size[1] - width, size[0] - height))
            one = (left, top, left + width, top + height)
            drawn.append((_shared_area(one, box), one))
        yield min(drawn)[1]


def _shared_area(one: Box, other: Box) -> float:
    """The common part of two boxes of one size, 0 to 1."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    return width * height / ((one[2] - one[0]) * (one[3] - one[1]))


def _cut(pixels: Pixels, box: Box) -> NDArray[np.float64]:
    """The region's pixels, [n, d] in [0, 1]."""
    left, top, right, bottom = box
    return pixels[:, top:bottom, left:right].reshape(len(pixels), -1) / 255.0


def _details(pixels: Pixels, box: Box) -> NDArray[np.float64]:
    """`_cut` minus the mean around each pixel, which shows a faint mark on a smooth background."""
    left, top, right, bottom = box
    cut = pixels[:, top:bottom, left:right] / 255.0
    around = np.asarray(uniform_filter(cut, (0, AROUND, AROUND, 0)))  # pyright: ignore[reportArgumentType]
    return (cut - around).reshape(len(cut), -1)


def recurrence(members: NDArray[np.float64], others: NDArray[np.float64], seed: int) -> float:
    """How well the pixels [n, d] of a region tell members from others: area under the ROC curve, 0.5 to 1.

    Half of the images give a template, which scores the other half; the mean over random splits is returned. The
    template is the difference of the means over the variance, at pixels where the means are `APART` deviations apart:
    a mark may fill only part of the region. If all members look the same there it is near 1, otherwise near 0.5.
    """
    rng = np.random.default_rng(seed)
    areas = []
    for _ in range(SPLITS):
        (here, there), (first, second) = (_halves(own, rng) for own in (members, others))
        spread = (here.var(0) + first.var(0)) / 2 + NOISE_FLOOR**2
        apart = here.mean(0) - first.mean(0)
        template = np.where(np.abs(apart) >= APART * np.sqrt(spread), apart / spread, 0)
        ours, theirs = (there @ template)[:, None], (second @ template)[None]
        areas.append(np.mean(ours > theirs) + np.mean(ours == theirs) / 2)
    return max(0.5, float(np.mean(areas)))


def _halves(points: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    order = rng.permutation(len(points))
    return points[order[: len(points) // 2]], points[order[len(points) // 2 :]]


def _change(after: Tensor, before: Tensor) -> float:
    """The change of the probability, given log-odds."""
    return float(after.sigmoid() - before.sigmoid())


def _effect(keys: Sequence[str], changes: NDArray[np.float64], scale: Scale) -> Effect:
    """The effect from changes [n, 3]: log-odds by random regions, log-odds by the region, probability."""
    sums = MetricSums.of(key_hashes(keys), changes[:, :2])
    [own] = differences(sums)
    figures = (own.difference, own.low, own.high, own.p_value)
    assert None not in figures  # two images at least
    probability = float(changes[:, 2].mean()) if scale == "log-odds" else None
    return Effect(*figures, own.count, probability, scale)  # pyright: ignore[reportArgumentType]
