"""BEE: integrates gradients from random baselines of the last feature maps; keeps the best map by a metric."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.catalog.entries import FORWARDS_TO_SELECT, METRICS
from blocksight.engine.catalog.parameters import Family, SelectionMetric
from blocksight.engine.catalog.side_products import GridMap, SideProducts
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.bandit import Bandit, History
from blocksight.engine.explainers.baselines import FAMILIES, NOISY
from blocksight.engine.explainers.cams import whole_block
from blocksight.engine.explainers.explainer import Attribution, SignedExplainer, State, chunks, pad
from blocksight.engine.explainers.points import MAX_POINTS_PER_PASS
from blocksight.engine.metrics.faithfulness import Deletion, Insertion, MaskedMetric, Negative, Positive, WholeDrop
from blocksight.engine.metrics.metric import Maps, Value
from blocksight.engine.model.resample import grid_of
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import ClassTarget, Target
from blocksight.engine.model.transfers import sent, to_host
from blocksight.engine.saliency import Map, minmax
from blocksight.engine.scoring.scorer import Scorer

SELECTION_METRICS: Mapping[SelectionMetric, type[MaskedMetric]] = {
    "average_drop_100": WholeDrop,
    "average_increase_100": WholeDrop,
    "insertion": Insertion,
    "deletion": Deletion,
    "pos": Positive,
    "neg": Negative,
}
"""The metrics that may select a map."""

MAPS_PER_CALL = 256
"""Full-size maps per call of the metric: bounds memory, changes no result."""

FIRST_PASS_BATCH = 8
"""Most inputs per forward in the first pass: a constant, so that no setting changes the state."""

MIN_IMAGES_TO_CENTRE = 32
"""Least number of images that centre the features before the bandit learns."""

STATE_VERSION = 1

FLOAT16_LIMIT = torch.finfo(torch.float16).max

MEAN = "mean"
"""The name of the candidate that is the mean of all maps."""


@dataclass(frozen=True)
class Draw:
    """One baseline of one image."""

    image: int
    """Its number in the pass."""
    family: Family
    baseline_khw: Tensor


@dataclass(frozen=True)
class Candidate:
    """The maps of one image's targets from one baseline."""

    image: int
    """Its number in the pass."""
    name: str
    """The baseline's family."""
    signed_thw: Tensor
    """Float64, at the block's grid; each point adds to it."""


@dataclass(frozen=True)
class Point:
    """A point on the path from a baseline."""

    candidate: Candidate
    """The map that its gradient is added to."""
    values_khw: Tensor
    factor_khw: Tensor
    """The factor of the gradient."""
    is_rectified: bool
    """Only positive gradients count."""


@dataclass(frozen=True)
class PassResult:
    """The results of one forward pass over some images."""

    inputs_nchw: Tensor
    maps_nkhw: Tensor
    """The last feature maps."""
    target: Target
    ranks: list[list[int]]
    """The targets' ranks among the model's classes, [N][T]."""
    scores: list[list[float]]
    """Their probabilities, [N][T]."""

    def of_image(self, image: int) -> "PassResult":
        """The result for one of the images."""
        own = slice(image, image + 1)
        return PassResult(
            self.inputs_nchw[own], self.maps_nkhw[own], self.target.of(own), self.ranks[own], self.scores[own]
        )


@dataclass(frozen=True)
class Learned:
    """The state that the first pass learned."""

    bandit: Bandit | None
    """None: the families take turns."""
    pool: tuple[Tensor, ...] = ()
    """Feature maps [K, h, w] of other images."""
    pool_seeds: tuple[int, ...] = ()
    """The seeds of these images."""

    def others(self, seed: int) -> list[Tensor]:
        """The pool without the image of this seed: an image is no baseline of itself."""
        return [one for one, own in zip(self.pool, self.pool_seeds, strict=True) if own != seed]


class Bee(SignedExplainer):
    """`M = sum_k sum_t g_t (h - b) / (n + 1)`, t = 0, 1/n, ..., 1, for many random b; the best M by a metric.

    h are the last block's feature maps, b a random baseline of one of five families, and g_t the gradient of the
    logit at `b + t (h - b)`, through the network behind the block alone (Barkan et al., BEE). The n + 1 points
    have equal weights, as in the authors' code, and here these sum to 1: if the network behind is linear, a map's sum
    is the logit of h less that of b. `relu_grad_act` is that code's integrand: `relu(g_t) relu(h_t)`, and `g_t h_t` for
    baselines of noise.

    A contextual bandit draws the families of an image's baselines. It learns in a first pass over some images and is
    then frozen, so that no map depends on the order of the images. Its context is the means of the explained model's
    last feature maps; the paper trains a layer on a second, pretrained network (a ResNet-18).

    A target's `num_forwards` counts the points of all its image's paths, each a pass of the network behind the block,
    and the masked inputs of the metric for all the image's targets. If no map has a value of the metric (for pos and
    neg: the prediction is another class), the first draw's map is kept.
    """

    parameters: Any

    def _prepare(self, blocks: Sequence[str]) -> None:
        self.block, self.taps = self.adapter.network.last_block(blocks)
        self.tail = self.taps.tail()
        learns = self.parameters.num_images > 0
        self.learned = self._read(self.state) if self.state is not None and learns else None

    # ------------------------------------------------------------ the first pass

    def learner(self) -> "FirstPass":
        return FirstPass(self)

    def first_pass_metric(self) -> MaskedMetric:
        """The selection metric, in batches that one map's masked inputs fill."""
        num_masks = FORWARDS_TO_SELECT[self.parameters.metric]
        batch_size = math.ceil(num_masks / math.ceil(num_masks / FIRST_PASS_BATCH))
        return self._selection_metric(Scorer(self.adapter, self.scorer.perturbation, batch_size))

    def value_of_draw(self, metric: MaskedMetric, result: PassResult, draw: Draw) -> float | None:
        """The metric's value of one draw's map; None if it has none."""
        num_points = 1 + max(self.parameters.steps, self.parameters.noise_steps)
        ((value,),) = self._metric_values(metric, result, self._integrated(result, [draw], num_points))
        return value

    def single_images(self, inputs_nchw: Tensor, target: Target) -> Iterator[PassResult]:
        """The result for each image and its first target, from forwards of one fixed shape."""
        for start in range(0, len(inputs_nchw), FIRST_PASS_BATCH):
            images = slice(start, start + FIRST_PASS_BATCH)
            first = self.adapter.target(_classes(target.of(images))[:, :1])
            batch = self._forward(inputs_nchw[images], first, FIRST_PASS_BATCH)
            for image in range(len(batch.maps_nkhw)):
                yield batch.of_image(image)

    @property
    def header(self) -> dict[str, Any]:
        """The header of a state; it must equal that of the explainer that uses it."""
        header = {
            "version": STATE_VERSION,
            "block": self.block.name,
            "channels": self.block.channels,
            "grid": list(self.block.grid or ()),
            "choice": "bandit" if self.parameters.has_bandit else "even",
            "families": list(self.parameters.families),
        }
        return {**header, "metric": self.parameters.metric} if self.parameters.has_bandit else header

    def _read(self, state: State) -> Learned:
        """Parses a state. Raises ModelError if its header, types or shapes differ from this explainer's."""
        try:
            return self._checked(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"the state of bee's first pass is damaged, run the first pass again: {error}") from error

    def _checked(self, state: State) -> Learned:
        if "about" not in state:
            raise ModelError(f"this is no state of bee's first pass: it holds {', '.join(sorted(state)) or 'nothing'}")
        found, wanted = json.loads(bytes(state["about"].tolist())), self.header
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing:
            sides = "; ".join(f"{name} {found.get(name)}, wanted {wanted[name]}" for name in differing)
            raise ModelError(f"the state of bee's first pass does not match: {sides}; run the first pass again")
        bandit = Bandit.of_state(state) if self.parameters.has_bandit else None
        if not self.parameters.has_pool:
            return Learned(bandit)
        return Learned(bandit, tuple(state["pool.maps"]), tuple(state["pool.seeds"].tolist()))

    # ------------------------------------------------------------ maps

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        if self.parameters.num_images and self.learned is None:
            raise ModelError(
                "bee needs the state of its first pass: give the learner's state, or take choice even and families "
                "without train, which need none"
            )
        result = self._forward(inputs_nchw, self.adapter.target(_classes(target)), self.images_per_pass)
        size = min(self.scorer.batch_size, MAX_POINTS_PER_PASS)
        candidates = self._integrated(result, self._draws(result.maps_nkhw, seeds), size)
        if self.parameters.with_mean:
            candidates += [_mean(image, candidates) for image in range(len(inputs_nchw))]
        metric = self._selection_metric(self.scorer)
        values = self._metric_values(metric, result, candidates)
        grids = to_host([one.signed_thw for one in candidates])
        found = []
        for image, row in enumerate(self._scores(inputs_nchw, target)):
            own = [number for number, one in enumerate(candidates) if one.image == image]
            made, signed, measured = (
                [candidates[number] for number in own],
                [grids[number] for number in own],
                [values[number] for number in own],
            )
            found.append(self._best(made, signed, measured, row))
        return found

    def _forward(self, inputs_nchw: Tensor, target: Target, size: int) -> PassResult:
        """The result of one forward pass over the images, padded to `size`."""
        logits, (maps,) = self.taps(pad(inputs_nchw, size))
        logits, maps = logits.detach()[: len(inputs_nchw)], maps.detach()[: len(inputs_nchw)]
        images = torch.arange(len(inputs_nchw), device=logits.device)
        ranks = _ranks(logits, target.leading)
        return PassResult(inputs_nchw, maps, target, ranks.tolist(), target.score(logits, images).tolist())

    def _draws(self, maps_nkhw: Tensor, seeds: Sequence[int]) -> Iterator[Draw]:
        """The baselines of each image. More draws keep the first ones."""
        features = to_host([_features(own) for own in maps_nkhw]) if self.parameters.has_bandit else cycle([None])
        for image, (own, seed, feature) in enumerate(zip(maps_nkhw, seeds, features, strict=False)):
            generator = torch.Generator().manual_seed(seed)
            pool = self.learned.others(seed) if self.learned is not None else []
            families = self._families(feature, generator)
            for family in islice(families, self.parameters.draws):
                yield Draw(image, family, FAMILIES[family](own, generator, pool))

    def _families(self, features: Tensor | None, generator: torch.Generator) -> Iterator[Family]:
        """The families of one image's draws; endless. The bandit chooses by the features, if there are any."""
        families = self.parameters.families
        if features is None:
            yield from cycle(families)
            return
        assert self.learned is not None
        assert self.learned.bandit is not None
        bandit = self.learned.bandit
        context = bandit.context(features)
        while True:
            yield families[bandit.choice(context, generator)]

    def _integrated(self, result: PassResult, draws: Iterable[Draw], size: int) -> list[Candidate]:
        """The maps from each baseline; the points of all paths fill batches of `size`."""
        candidates: list[Candidate] = []
        for batch in chunks(self._points(result, draws, candidates), size):
            images = [point.candidate.image for point in batch]
            padded = torch.tensor([*images, *images[-1:] * (size - len(images))])
            chosen = sent(padded, result.maps_nkhw.device)
            values = pad(torch.stack([point.values_khw for point in batch]), size).requires_grad_(True)
            with torch.enable_grad():
                logits = self.tail(result.inputs_nchw[chosen], values)
            raw = result.target.of(chosen).raw
            for index in range(raw.num_targets):
                (slopes,) = gradients(logits, raw.direction(logits.detach(), index), [values])
                for point, slope in zip(batch, slopes.double(), strict=False):
                    kept = slope.relu() if point.is_rectified else slope
                    point.candidate.signed_thw[index] += (kept * point.factor_khw).sum(0)
        return candidates

    def _points(self, result: PassResult, draws: Iterable[Draw], candidates: list[Candidate]) -> Iterator[Point]:
        """The points of all paths, in order; appends the map of each path to `candidates`."""
        for draw in draws:
            own = result.maps_nkhw[draw.image]
            shape = (result.target.num_targets, *own.shape[1:])
            candidate = Candidate(draw.image, draw.family, torch.zeros(shape, dtype=torch.float64, device=own.device))
            candidates.append(candidate)
            is_noisy = draw.family in NOISY
            steps = self.parameters.noise_steps if is_noisy else self.parameters.steps
            path = own - draw.baseline_khw
            factor = path / (steps + 1)
            for step in range(steps + 1):
                values = draw.baseline_khw + step / steps * path
                if self.parameters.integrand == "path":
                    yield Point(candidate, values, factor, False)
                else:
                    yield Point(candidate, values, (values if is_noisy else values.relu()) / (steps + 1), not is_noisy)

    def saliency_map(self, signed_hw: Tensor) -> Tensor:
        """The positive part of the map, at the input's size by bicubic interpolation."""
        if grid_of(signed_hw) == self.adapter.input_size:
            return signed_hw.relu()
        large = functional.interpolate(
            signed_hw[None, None], self.adapter.input_size, mode="bicubic", align_corners=False
        )
        return large[0, 0].relu()

    # ------------------------------------------------------------ the selection

    def _selection_metric(self, scorer: Scorer) -> MaskedMetric:
        return SELECTION_METRICS[self.parameters.metric](scorer, "zero")

    def _metric_values(
        self, metric: MaskedMetric, result: PassResult, candidates: Sequence[Candidate]
    ) -> list[list[float | None]]:
        """The metric's values of the maps, one per target; None if it has none."""
        at_once = max(1, MAPS_PER_CALL // result.target.num_targets)
        rows = [own for some in chunks(candidates, at_once) for own in metric.evaluate(self._maps(result, some))]
        return [[_finite_value(one[self.parameters.metric]) for one in own] for own in rows]

    def _maps(self, result: PassResult, some: Sequence[Candidate]) -> Maps:
        """The candidates as input of a metric: each is the only map of an image."""
        images = [one.image for one in some]
        chosen = sent(torch.tensor(images), result.inputs_nchw.device)
        return Maps(
            inputs_nchw=result.inputs_nchw[chosen],
            target=result.target.of(chosen),
            saliency=self._saliency(some),
            scores=[result.scores[image] for image in images],
            ranks=[result.ranks[image] for image in images],
            regions=[[None] * result.target.num_targets for _ in some],
            seeds=[0] * len(some),
            explainer_seeds=[0] * len(some),
        )

    def _saliency(self, some: Sequence[Candidate]) -> list[list[Map]]:
        """The min-maxed maps of each candidate's targets."""
        maps = iter(to_host([self.saliency_map(own) for one in some for own in one.signed_thw]))
        return [[minmax(next(maps).numpy()) for _ in one.signed_thw] for one in some]

    def _best(
        self,
        candidates: Sequence[Candidate],
        grids: Sequence[Tensor],
        values: Sequence[Sequence[float | None]],
        scores: Sequence[float],
    ) -> list[Attribution]:
        """The best map for each target of one image; the first of equals. `grids` are the maps on the host."""
        sign = 1.0 if METRICS[self.parameters.metric].better == "higher" else -1.0
        found = []
        for index, score in enumerate(scores):
            own = [row[index] for row in values]
            merits = [-math.inf if value is None else sign * value for value in own]
            best = candidates[merits.index(max(merits))]
            family = tuple(
                GridMap(one.name, grid[index].float().numpy(), value)
                for one, grid, value in zip(candidates, grids, own, strict=True)
            )
            products = SideProducts(map_family=family, selected_by=self.parameters.metric)
            blocks = (whole_block(self.block),)
            found.append(Attribution(best.signed_thw[index], score, self._cost(candidates, values), blocks, products))
        return found

    def _cost(self, candidates: Sequence[Candidate], values: Sequence[Sequence[float | None]]) -> int:
        """Passes of one image: points of paths, and masked inputs of maps that have a value."""
        parameters = self.parameters
        points = {family: 1 + (parameters.noise_steps if family in NOISY else parameters.steps) for family in FAMILIES}
        judged = sum(value is not None for row in values for value in row)
        return sum(points.get(one.name, 0) for one in candidates) + judged * FORWARDS_TO_SELECT[parameters.metric]


class FirstPass:
    """BEE's first pass: collects baselines of the family `train`, and learns which families suit which images.

    The first images are queued: they make up the pool, and their features centre the bandit's. Then each image, in
    order, has one draw, one map and one reward. Only the first target of an image counts. Images without finite
    feature maps are skipped.
    """

    def __init__(self, bee: Bee) -> None:
        self.bee = bee
        self.queue: list[LearningImage] = []
        self.pool: dict[int, Tensor] = {}
        """Feature maps of the first images, by their seeds."""
        self.bandit: Bandit | None = None
        families, name = bee.parameters.families, bee.parameters.metric
        self.families: Sequence[Family] = families
        self.history = History(METRICS[name].better == "higher", counts_rises=name == "average_increase_100")
        self.metric = bee.first_pass_metric()

    def see(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> None:
        with self.bee.adapter.borrowed():
            for result, seed in zip(self.bee.single_images(inputs_nchw, target), seeds, strict=True):
                (maps,) = result.maps_nkhw
                if maps.isfinite().all():
                    self._learn_or_queue(LearningImage(result, _features(maps).cpu(), seed))

    def state(self) -> dict[str, Tensor]:
        """The state for `Bee`. Raises ModelError if no image could be learned from."""
        with self.bee.adapter.borrowed():
            self._start_bandit()
        state = {"about": _as_bytes(self.bee.header)}
        if self.bee.parameters.has_pool:
            state["pool.maps"] = torch.stack(list(self.pool.values()))
            state["pool.seeds"] = torch.tensor(list(self.pool), dtype=torch.int64)
        if self.bee.parameters.has_bandit:
            assert self.bandit is not None
            state |= self.bandit.state()
        return state

    def _learn_or_queue(self, image: "LearningImage") -> None:
        if self.bandit is not None:
            self._learn(image)
            return
        if len(self.pool) < self.bee.parameters.pool and self.bee.parameters.has_pool:
            (maps,) = image.result.maps_nkhw
            self.pool[image.seed] = maps.clamp(-FLOAT16_LIMIT, FLOAT16_LIMIT).half().cpu()
        if self.bee.parameters.has_bandit:
            self.queue.append(image)
            if len(self.queue) >= max(MIN_IMAGES_TO_CENTRE, self.bee.parameters.pool):
                self._start_bandit()

    def _start_bandit(self) -> None:
        """Centres the features and learns from the queued images."""
        if not self.queue and self.bandit is None and (self.bee.parameters.has_bandit or not self.pool):
            raise ModelError("bee found finite feature maps in none of the images of its first pass")
        if not self.bee.parameters.has_bandit or self.bandit is not None:
            return
        features = torch.stack([image.features for image in self.queue])
        self.bandit = Bandit.untrained(features, len(self.families))
        for image in self.queue:
            self._learn(image)
        self.queue.clear()

    def _learn(self, image: "LearningImage") -> None:
        assert self.bandit is not None
        generator = torch.Generator().manual_seed(image.seed)
        arm = self.bandit.choice(self.bandit.context(image.features), generator)
        others = [maps for seed, maps in self.pool.items() if seed != image.seed]
        baseline = FAMILIES[self.families[arm]](image.result.maps_nkhw[0], generator, others)
        value = self.bee.value_of_draw(self.metric, image.result, Draw(0, self.families[arm], baseline))
        is_good = float(torch.rand((), generator=generator)) < self.history.reward(value)
        self.bandit.update(arm, image.features, is_good)


@dataclass(frozen=True)
class LearningImage:
    """One image of the first pass."""

    result: PassResult
    features: Tensor
    """[K]."""
    seed: int


def _mean(image: int, candidates: Sequence[Candidate]) -> Candidate:
    """The mean of all maps of an image, as in Expected Gradients."""
    return Candidate(image, MEAN, torch.stack([one.signed_thw for one in candidates if one.image == image]).mean(0))


def _finite_value(value: Value) -> float | None:
    return value.value if value.value is not None and math.isfinite(value.value) else None


def _features(maps_khw: Tensor) -> Tensor:
    """The features for an image's context: the mean of each feature map, float64 [K]."""
    return maps_khw.double().mean((1, 2))


def _classes(target: Target) -> Tensor:
    """The classes [N, T] of a target. Raises ModelError if it is of something else."""
    if not isinstance(target, ClassTarget):
        raise ModelError(
            "bee picks a map by the probability of a class, and the target is of no single class: take layercam, "
            "sise or rise"
        )
    return target.classes


def _ranks(logits: Tensor, classes: Tensor) -> Tensor:
    """The classes' ranks [N, T] by descending logits, from 1; of equal logits the lower class number is first."""
    return logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1).gather(1, classes) + 1


def _as_bytes(header: Mapping[str, Any]) -> Tensor:
    """Plain values as a tensor, because a state holds tensors alone."""
    return torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)
