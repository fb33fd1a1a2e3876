"""The trial of a candidate: its region is taken out of members and put into others, and random regions likewise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from torch import Tensor

from blocksight.engine.metrics.road import imputed
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.audit.result import Effect
from blocksight.jobs.plan.bootstrap import MetricSums, differences, key_hashes
from blocksight.storage.outputs.pictures import Pixels

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

RANDOM_REGIONS = 4
"""Of the same size, per image."""
MOST_SHARED = 0.25
"""Of its area that a random region may have in common with the candidate's."""
TRIES = 50
RIM = 2
"""Pixels around a region that inpainting looks at: its equation joins direct neighbours alone."""
IMAGES_PER_PASS = 8
SPLITS = 10
APART = 1.0
"""Deviations between the means of members and others, from which on a pixel is part of what recurs."""
AROUND = 5
"""Pixels."""
NOISE_FLOOR = 10 / 255
"""Deviation of a pixel that counts as none."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Records as the model sees them."""

    keys: Sequence[str]
    pixels: Pixels
    """[n, H, W, 3]."""


@dataclass(frozen=True)
class Verdicts:
    """What a trial says of a region."""

    blanked: Effect
    pasted: Effect
    recurrence: float


class Court:
    """Tries regions on one model."""

    def __init__(self, adapter: ModelAdapter, seed: int) -> None:
        """`seed` draws the random regions."""
        self.adapter, self.seed = adapter, seed

    def try_region(self, target_index: int, box: Box, members: Pictures, others: Pictures) -> Verdicts:
        """Effects on the target's log-odds, p-values not corrected yet, and how well the region is recognised.

        Two members and two others at least. Inpainting solves ROAD's equation. A random region is drawn for each
        image from its key, and pasted to where it lay.
        """
        with self.adapter.borrowed(), torch.inference_mode():
            return Verdicts(
                self._blanked(target_index, box, members),
                self._pasted(target_index, box, members, others),
                max(
                    recurrence(look(members.pixels, box), look(others.pixels, box), self.seed)
                    for look in (_cut, _details)
                ),
            )

    def _blanked(self, target: int, box: Box, members: Pictures) -> Effect:
        inputs = self._inputs(members)
        before = self._log_odds(inputs, target)
        falls = []
        for key, image, start in zip(members.keys, inputs, before, strict=True):
            boxes = [box, *random_boxes(box, tuple(image.shape[1:]), (self.seed, "blank", key))]
            with one_thread():
                blanked = torch.stack([inpainted(image.cpu(), one) for one in boxes])
            after = self._log_odds(blanked.to(inputs.device), target)
            falls.append([(start - after[1:]).mean().item(), (start - after[0]).item(), _change(after[0], start)])
        return _effect(members.keys, np.array(falls))

    def _pasted(self, target: int, box: Box, members: Pictures, others: Pictures) -> Effect:
        given, taken = self._inputs(members), self._inputs(others)
        before = self._log_odds(taken, target)
        rises = []
        for place, (key, image, start) in enumerate(zip(others.keys, taken, before, strict=True)):
            boxes = [box, *random_boxes(box, tuple(image.shape[1:]), (self.seed, "paste", key))]
            donor = given[place % len(given)]
            after = self._log_odds(torch.stack([pasted(image, donor, one) for one in boxes]), target)
            rises.append([(after[1:] - start).mean().item(), (after[0] - start).item(), _change(after[0], start)])
        return _effect(others.keys, np.array(rises))

    def _inputs(self, pictures: Pictures) -> Tensor:
        return self.adapter.normalise(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2))

    def _log_odds(self, inputs_nchw: Tensor, target: int) -> Tensor:
        """log(p / (1 - p)) of the target's probability, [n], in double precision on the CPU."""
        logits = torch.cat([self.adapter.logits(part) for part in inputs_nchw.split(IMAGES_PER_PASS)]).double().cpu()
        others = torch.cat([logits[:, :target], logits[:, target + 1 :]], 1)
        return logits[:, target] - others.logsumexp(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations, which several threads only slow down: 20 ms become 80 where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inpainted(image_chw: Tensor, box: Box) -> Tensor:
    """The image with the region as its surroundings suggest (see `blocksight.engine.metrics.road.imputed`)."""
    left, top, right, bottom = box
    above, before = max(0, top - RIM), max(0, left - RIM)
    crop = image_chw[:, above : bottom + RIM, before : right + RIM]
    kept = torch.ones(crop.shape[1:], dtype=torch.bool, device=image_chw.device)
    kept[top - above : bottom - above, left - before : right - before] = False
    filled = image_chw.clone()
    filled[:, above : bottom + RIM, before : right + RIM] = imputed(crop, kept)
    return filled


def pasted(image_chw: Tensor, donor_chw: Tensor, box: Box) -> Tensor:
    """The image with the donor's pixels in the region."""
    left, top, right, bottom = box
    mixed = image_chw.clone()
    mixed[:, top:bottom, left:right] = donor_chw[:, top:bottom, left:right]
    return mixed


def random_boxes(box: Box, size: tuple[int, ...], seed: Sequence[object]) -> Iterator[Box]:
    """So many boxes of the same size in a picture (height, width), that hardly meet the given one.

    Where it is so large that every draw meets it, the draw that meets it least.
    """
    rng = np.random.default_rng(int(key_hashes(["/".join(map(str, seed))])[0]))
    width, height = box[2] - box[0], box[3] - box[1]
    for _ in range(RANDOM_REGIONS):
        drawn: list[tuple[float, Box]] = []
        while len(drawn) < TRIES and (not drawn or min(drawn)[0] > MOST_SHARED):
            left, top = (int(rng.integers(0, free + 1)) for free in (size[1] - width, size[0] - height))
            one = (left, top, left + width, top + height)
            drawn.append((_shared(one, box), one))
        yield min(drawn)[1]


def _shared(one: Box, other: Box) -> float:
    """Of the area of either: they are of one size."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    return width * height / ((one[2] - one[0]) * (one[3] - one[1]))


def _cut(pixels: Pixels, box: Box) -> NDArray[np.float64]:
    """[n, pixels] in [0, 1]"""
    left, top, right, bottom = box
    return pixels[:, top:bottom, left:right].reshape(len(pixels), -1) / 255.0


def _details(pixels: Pixels, box: Box) -> NDArray[np.float64]:
    """The same less the mean around each pixel: a faint mark shows where the picture under it varies slowly."""
    left, top, right, bottom = box
    cut = pixels[:, top:bottom, left:right] / 255.0
    around = np.asarray(uniform_filter(cut, (0, AROUND, AROUND, 0)))  # pyright: ignore[reportArgumentType]
    return (cut - around).reshape(len(cut), -1)


def recurrence(members: NDArray[np.float64], others: NDArray[np.float64], seed: int) -> float:
    """How well the pixels [n, d] of a region tell members from others, as the area under the ROC curve, 0.5 to 1.

    One half of each gives the template, by which the other half is judged: the difference of their means over their
    variance, at the pixels where they are a deviation apart, for a mark may fill only a part of the region. The mean
    over some splits. What looks the same in all members comes near 1, what differs from image to image near 0.5.
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
    """Of the probability."""
    return float(after.sigmoid() - before.sigmoid())


def _effect(keys: Sequence[str], changes: NDArray[np.float64]) -> Effect:
    """From `[n, 3]`: the log-odds' change by random regions and by the region, and the probability's."""
    sums = MetricSums.of(key_hashes(keys), changes[:, :2])
    [own] = differences(sums)
    figures = (own.difference, own.low, own.high, own.p_value)
    assert None not in figures  # two images at least
    return Effect(*figures, own.count, float(changes[:, 2].mean()))  # pyright: ignore[reportArgumentType]
