"""BEE: gradients integrated from random baselines of the last feature maps; of many maps the best by a metric."""

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
from blocksight.engine.model.targets import ClassLogit, ClassProbability, Target
from blocksight.engine.saliency import minmax
from blocksight.engine.scoring.scorer import Scorer

CHOOSERS: Mapping[SelectionMetric, type[MaskedMetric]] = {
    "average_drop_100": WholeDrop,
    "average_increase_100": WholeDrop,
    "insertion": Insertion,
    "deletion": Deletion,
    "pos": Positive,
    "neg": Negative,
}
"""The metrics that may select a map."""

MAPS_AT_ONCE = 256
"""Maps at full size that are judged together: bounds memory, changes no result."""

LEARNING_BATCH = 8
"""Inputs per forward in the first pass, at most: its images come one by one, and no setting shows in its state."""

IMAGES_TO_CENTRE = 32
"""Least number of images that centre the features before the first is learned from."""

STATE_VERSION = 1

FLOAT16_LIMIT = torch.finfo(torch.float16).max

MEAN = "mean"
"""The name of the candidate that is the mean of all maps."""


@dataclass(frozen=True)
class Draw:
    """One baseline of one image."""

    image: int
    """Of the pass."""
    family: Family
    baseline_khw: Tensor


@dataclass(frozen=True)
class Candidate:
    """The maps of one image's targets from one baseline."""

    image: int
    """Of the pass."""
    name: str
    """The baseline's family."""
    signed_thw: Tensor
    """Float64, at the block's grid; points are added to it as they come."""


@dataclass(frozen=True)
class Point:
    """A place on the path from a baseline."""

    candidate: Candidate
    """The map that its gradient is added to."""
    values_khw: Tensor
    factor_khw: Tensor
    """What the gradient is multiplied by."""
    is_rectified: bool
    """Only positive gradients count."""


@dataclass(frozen=True)
class Seen:
    """The results of one forward pass over some images."""

    inputs_nchw: Tensor
    maps_nkhw: Tensor
    """The last feature maps."""
    target: ClassProbability
    ranks: list[list[int]]
    """The targets' places among the model's classes, [N][T]."""
    scores: list[list[float]]
    """Their probabilities, [N][T]."""

    def only(self, image: int) -> "Seen":
        """One of the images."""
        own = slice(image, image + 1)
        return Seen(self.inputs_nchw[own], self.maps_nkhw[own], self.target.of(own), self.ranks[own], self.scores[own])


@dataclass(frozen=True)
class Learned:
    """The state that the first pass learned."""

    bandit: Bandit | None
    """None: the families take turns."""
    pool: tuple[Tensor, ...] = ()
    """Feature maps [K, h, w] of other images."""
    pool_seeds: tuple[int, ...] = ()
    """Of the images that they are of."""

    def others(self, seed: int) -> list[Tensor]:
        """The pool without the image of this seed, which is no baseline of itself."""
        return [one for one, own in zip(self.pool, self.pool_seeds, strict=True) if own != seed]


class Bee(SignedExplainer):
    """`M = sum_k sum_t g_t (h - b) / (n + 1)`, t = 0, 1/n, ..., 1, for many random b; the best M by a metric.

    h are the last block's feature maps, b a random baseline of one of five families, and g_t the gradient of the
    logit at `b + t (h - b)`, through the network behind the block alone (Barkan et al., BEE). The n + 1 points
    weigh alike, as in the authors' code, and here sum to 1: where the network behind is linear, a map's sum is the
    logit of h less that of b. `relu_grad_act` is that code's integrand: `relu(g_t) relu(h_t)`, and `g_t h_t` for
    baselines of noise.

    Which families an image's baselines are of is drawn by a contextual bandit, learned in a first pass over some
    images and then frozen, so that no map depends on the order of the images. Its context comes from the explained
    model itself: the means of the last feature maps, where the paper trains a layer on a second, pretrained
    network (a ResNet-18).

    A target's `num_forwards` are the points of all its image's paths, each a pass of the network behind the block,
    and the masked inputs of the metric for all the image's targets. Where no map has a value of the metric (the
    prediction is another class, for pos and neg), the first draw's stands.
    """

    parameters: Any

    def _prepare(self, blocks: Sequence[str]) -> None:
        (self.block,) = self.adapter.network.blocks(blocks)[-1:]
        self.taps = self.adapter.network.taps([self.block])
        self.tail = self.taps.tail()
        learns = self.parameters.num_images > 0
        self.learned = self._read(self.state) if self.state is not None and learns else None

    # ------------------------------------------------------------ the first pass

    def learner(self) -> "FirstPass":
        return FirstPass(self)

    def learning_chooser(self) -> MaskedMetric:
        """The metric with batches that one map's masked inputs fill."""
        num_masks = FORWARDS_TO_SELECT[self.parameters.metric]
        batch_size = math.ceil(num_masks / math.ceil(num_masks / LEARNING_BATCH))
        return self._chooser(Scorer(self.adapter, self.scorer.perturbation, batch_size))

    def tried(self, chooser: MaskedMetric, seen: Seen, draw: Draw) -> float | None:
        """The metric's value of one draw's map."""
        num_points = 1 + max(self.parameters.steps, self.parameters.noise_steps)
        ((value,),) = self._judged(chooser, seen, self._integrated(seen, [draw], num_points))
        return value

    def one_by_one(self, inputs_nchw: Tensor, target: Target) -> Iterator[Seen]:
        """Each image, from forwards of one fixed shape; of its targets the first."""
        for start in range(0, len(inputs_nchw), LEARNING_BATCH):
            images = slice(start, start + LEARNING_BATCH)
            first = ClassProbability(_classes(target.of(images))[:, :1])
            batch = self._seen(inputs_nchw[images], first, LEARNING_BATCH)
            for image in range(len(batch.maps_nkhw)):
                yield batch.only(image)

    @property
    def about(self) -> dict[str, Any]:
        """The header of a state; it must equal that of the explainer that uses it."""
        about = {
            "version": STATE_VERSION,
            "block": self.block.name,
            "channels": self.block.channels,
            "grid": list(self.block.grid or ()),
            "choice": "bandit" if self.parameters.has_bandit else "even",
            "families": list(self.parameters.families),
        }
        return {**about, "metric": self.parameters.metric} if self.parameters.has_bandit else about

    def _read(self, state: State) -> Learned:
        """Parses a state. Raises ModelError if its header, types or shapes are others."""
        try:
            return self._checked(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"the state of bee's first pass is damaged, run the first pass again: {error}") from error

    def _checked(self, state: State) -> Learned:
        if "about" not in state:
            raise ModelError(f"this is no state of bee's first pass: it holds {', '.join(sorted(state)) or 'nothing'}")
        found, wanted = json.loads(bytes(state["about"].tolist())), self.about
        odd = [name for name in wanted if found.get(name) != wanted[name]]
        if odd:
            sides = "; ".join(f"{name} {found.get(name)}, wanted {wanted[name]}" for name in odd)
            raise ModelError(f"bee's first pass was over something else: {sides}; run the first pass again")
        bandit = Bandit.of_state(state) if self.parameters.has_bandit else None
        if not self.parameters.has_pool:
            return Learned(bandit)
        return Learned(bandit, tuple(state["pool.maps"]), tuple(state["pool.seeds"].tolist()))

    # ------------------------------------------------------------ maps

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        if self.parameters.num_images and self.learned is None:
            raise ModelError(
                "bee needs the state of its first pass: give what its learner leaves as the state, or take choice even "
                "and families without train, which need none"
            )
        seen = self._seen(inputs_nchw, ClassProbability(_classes(target)), self.images_per_pass)
        size = min(self.scorer.batch_size, MAX_POINTS_PER_PASS)
        made = self._integrated(seen, self._draws(seen.maps_nkhw, seeds), size)
        if self.parameters.with_mean:
            made += [_mean(image, made) for image in range(len(inputs_nchw))]
        chooser = self._chooser(self.scorer)
        values = self._judged(chooser, seen, made)
        found = []
        for image, row in enumerate(self._scores(inputs_nchw, target)):
            own = [number for number, one in enumerate(made) if one.image == image]
            found.append(self._picked([made[number] for number in own], [values[number] for number in own], row))
        return found

    def _seen(self, inputs_nchw: Tensor, target: ClassProbability, size: int) -> Seen:
        """The images, from one forward pass of `size`."""
        logits, (maps,) = self.taps(pad(inputs_nchw, size))
        logits, maps = logits.detach()[: len(inputs_nchw)], maps.detach()[: len(inputs_nchw)]
        images = torch.arange(len(inputs_nchw), device=logits.device)
        ranks = _ranks(logits, target.classes)
        return Seen(inputs_nchw, maps, target, ranks.tolist(), target.score(logits, images).tolist())

    def _draws(self, maps_nkhw: Tensor, seeds: Sequence[int]) -> Iterator[Draw]:
        """The baselines of each image; with more draws the first are the same."""
        for image, (own, seed) in enumerate(zip(maps_nkhw, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            pool = self.learned.others(seed) if self.learned is not None else []
            families = self._families(own, generator)
            for family in islice(families, self.parameters.draws):
                yield Draw(image, family, FAMILIES[family](own, generator, pool))

    def _families(self, maps_khw: Tensor, generator: torch.Generator) -> Iterator[Family]:
        """The families of one image's draws, without end."""
        families = self.parameters.families
        if not self.parameters.has_bandit:
            yield from cycle(families)
        assert self.learned is not None
        assert self.learned.bandit is not None
        bandit = self.learned.bandit
        context = bandit.context(_features(maps_khw))
        while True:
            yield families[bandit.choice(context, generator)]

    def _integrated(self, seen: Seen, draws: Iterable[Draw], size: int) -> list[Candidate]:
        """The maps from each baseline; the points of all paths fill batches of `size`."""
        made: list[Candidate] = []
        for batch in chunks(self._points(seen, draws, made), size):
            images = [point.candidate.image for point in batch]
            chosen = torch.tensor([*images, *images[-1:] * (size - len(images))], device=seen.maps_nkhw.device)
            values = pad(torch.stack([point.values_khw for point in batch]), size).requires_grad_(True)
            with torch.enable_grad():
                logits = self.tail(seen.inputs_nchw[chosen], values)
            raw = seen.target.of(chosen).raw
            for index in range(raw.num_targets):
                (slopes,) = gradients(logits, raw.direction(logits.detach(), index), [values])
                for point, slope in zip(batch, slopes.double(), strict=False):
                    kept = slope.relu() if point.is_rectified else slope
                    point.candidate.signed_thw[index] += (kept * point.factor_khw).sum(0)
        return made

    def _points(self, seen: Seen, draws: Iterable[Draw], made: list[Candidate]) -> Iterator[Point]:
        """The points of all paths, in order; the map that each path adds up to is put into `made`."""
        for draw in draws:
            own = seen.maps_nkhw[draw.image]
            shape = (seen.target.num_targets, *own.shape[1:])
            candidate = Candidate(draw.image, draw.family, torch.zeros(shape, dtype=torch.float64, device=own.device))
            made.append(candidate)
            is_noisy = draw.family in NOISY
            steps = self.parameters.noise_steps if is_noisy else self.parameters.steps
            for step in range(steps + 1):
                values = draw.baseline_khw + step / steps * (own - draw.baseline_khw)
                if self.parameters.integrand == "path":
                    yield Point(candidate, values, (own - draw.baseline_khw) / (steps + 1), False)
                else:
                    yield Point(candidate, values, (values if is_noisy else values.relu()) / (steps + 1), not is_noisy)

    def finish(self, flat_hw: Tensor) -> Tensor:
        """The map at the input's size by bicubic interpolation, where it is positive."""
        if grid_of(flat_hw) == self.adapter.input_size:
            return flat_hw.relu()
        large = functional.interpolate(
            flat_hw[None, None], self.adapter.input_size, mode="bicubic", align_corners=False
        )
        return large[0, 0].relu()

    # ------------------------------------------------------------ the choice

    def _chooser(self, scorer: Scorer) -> MaskedMetric:
        return CHOOSERS[self.parameters.metric](scorer, "zero")

    def _judged(self, chooser: MaskedMetric, seen: Seen, made: Sequence[Candidate]) -> list[list[float | None]]:
        """The metric's values of the maps, one per target; None: it has none."""
        at_once = max(1, MAPS_AT_ONCE // seen.target.num_targets)
        rows = [own for some in chunks(made, at_once) for own in chooser.evaluate(self._maps(seen, some))]
        return [[_number(one[self.parameters.metric]) for one in own] for own in rows]

    def _maps(self, seen: Seen, some: Sequence[Candidate]) -> Maps:
        """The candidates as a metric takes them: to it each is the only map of an image."""
        images = [one.image for one in some]
        chosen = torch.tensor(images, device=seen.inputs_nchw.device)
        return Maps(
            inputs_nchw=seen.inputs_nchw[chosen],
            target=seen.target.of(chosen),
            saliency=[[minmax(self.finish(own).cpu().numpy()) for own in one.signed_thw] for one in some],
            scores=[seen.scores[image] for image in images],
            ranks=[seen.ranks[image] for image in images],
            regions=[[None] * seen.target.num_targets for _ in some],
            seeds=[0] * len(some),
            explainer_seeds=[0] * len(some),
        )

    def _picked(
        self, made: Sequence[Candidate], values: Sequence[Sequence[float | None]], scores: Sequence[float]
    ) -> list[Attribution]:
        """One image's targets, each with the best of its maps; the first of those that are as good."""
        sign = 1.0 if METRICS[self.parameters.metric].better == "higher" else -1.0
        found = []
        for index, score in enumerate(scores):
            own = [row[index] for row in values]
            merits = [-math.inf if value is None else sign * value for value in own]
            best = made[merits.index(max(merits))]
            family = tuple(
                GridMap(one.name, one.signed_thw[index].float().cpu().numpy(), value)
                for one, value in zip(made, own, strict=True)
            )
            products = SideProducts(map_family=family, selected_by=self.parameters.metric)
            blocks = (whole_block(self.block),)
            found.append(Attribution(best.signed_thw[index], score, self._cost(made, values), blocks, products))
        return found

    def _cost(self, made: Sequence[Candidate], values: Sequence[Sequence[float | None]]) -> int:
        """Passes of one image: points of paths, and masked inputs where a metric had a value."""
        parameters = self.parameters
        points = {family: 1 + (parameters.noise_steps if family in NOISY else parameters.steps) for family in FAMILIES}
        judged = sum(value is not None for row in values for value in row)
        return sum(points.get(one.name, 0) for one in made) + judged * FORWARDS_TO_SELECT[parameters.metric]


class FirstPass:
    """What BEE learns before it explains: baselines of the family `train`, and which families suit which images.

    The first images are waited for: of them the pool is made, and from their features the bandit's are centred. Then
    each image, in order, has one draw, one map and one reward. Of several targets per image the first counts. Images
    without finite feature maps teach nothing.
    """

    def __init__(self, bee: Bee) -> None:
        self.bee = bee
        self.waiting: list[Lesson] = []
        self.pool: dict[int, Tensor] = {}
        """Feature maps of the first images, by their seeds."""
        self.bandit: Bandit | None = None
        families, name = bee.parameters.families, bee.parameters.metric
        self.families: Sequence[Family] = families
        self.history = History(METRICS[name].better == "higher", counts_rises=name == "average_increase_100")
        self.chooser = bee.learning_chooser()

    def see(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> None:
        with self.bee.adapter.borrowed():
            for seen, seed in zip(self.bee.one_by_one(inputs_nchw, target), seeds, strict=True):
                (maps,) = seen.maps_nkhw
                if maps.isfinite().all():
                    self._take(Lesson(seen, _features(maps), seed))

    def state(self) -> dict[str, Tensor]:
        """What `Bee` takes as its state. Raises ModelError where no image could be learned from."""
        with self.bee.adapter.borrowed():
            self._begin()
        state = {"about": _as_bytes(self.bee.about)}
        if self.bee.parameters.has_pool:
            state["pool.maps"] = torch.stack(list(self.pool.values()))
            state["pool.seeds"] = torch.tensor(list(self.pool), dtype=torch.int64)
        if self.bee.parameters.has_bandit:
            assert self.bandit is not None
            state |= self.bandit.state()
        return state

    def _take(self, lesson: "Lesson") -> None:
        if self.bandit is not None:
            self._learn(lesson)
            return
        if len(self.pool) < self.bee.parameters.pool and self.bee.parameters.has_pool:
            (maps,) = lesson.seen.maps_nkhw
            self.pool[lesson.seed] = maps.clamp(-FLOAT16_LIMIT, FLOAT16_LIMIT).half().cpu()
        if self.bee.parameters.has_bandit:
            self.waiting.append(lesson)
            if len(self.waiting) >= max(IMAGES_TO_CENTRE, self.bee.parameters.pool):
                self._begin()

    def _begin(self) -> None:
        """Centres the features and learns from the images that waited."""
        if not self.waiting and self.bandit is None and (self.bee.parameters.has_bandit or not self.pool):
            raise ModelError("bee found finite feature maps in none of the images of its first pass")
        if not self.bee.parameters.has_bandit or self.bandit is not None:
            return
        features = torch.stack([lesson.features for lesson in self.waiting])
        self.bandit = Bandit.untrained(features, len(self.families))
        for lesson in self.waiting:
            self._learn(lesson)
        self.waiting.clear()

    def _learn(self, lesson: "Lesson") -> None:
        assert self.bandit is not None
        generator = torch.Generator().manual_seed(lesson.seed)
        arm = self.bandit.choice(self.bandit.context(lesson.features), generator)
        others = [maps for seed, maps in self.pool.items() if seed != lesson.seed]
        baseline = FAMILIES[self.families[arm]](lesson.seen.maps_nkhw[0], generator, others)
        value = self.bee.tried(self.chooser, lesson.seen, Draw(0, self.families[arm], baseline))
        is_good = float(torch.rand((), generator=generator)) < self.history.reward(value)
        self.bandit.update(arm, lesson.features, is_good)


@dataclass(frozen=True)
class Lesson:
    """One image of the first pass."""

    seen: Seen
    features: Tensor
    """[K]."""
    seed: int


def _mean(image: int, made: Sequence[Candidate]) -> Candidate:
    """The mean of all maps of an image: what Expected Gradients would give."""
    return Candidate(image, MEAN, torch.stack([one.signed_thw for one in made if one.image == image]).mean(0))


def _number(value: Value) -> float | None:
    return value.value if value.value is not None and math.isfinite(value.value) else None


def _features(maps_khw: Tensor) -> Tensor:
    """What an image's context is made of: the mean of each feature map, float64 [K] on the CPU."""
    return maps_khw.double().mean((1, 2)).cpu()


def _classes(target: Target) -> Tensor:
    """The classes [N, T] of a target. Raises ModelError where it is of something else."""
    raw = target.raw
    if not isinstance(raw, ClassLogit):
        raise ModelError(f"bee picks a map by the probability of a class, and {type(target).__name__} is of none")
    return raw.classes


def _ranks(logits: Tensor, classes: Tensor) -> Tensor:
    """The classes' places [N, T] in the order of falling logits; ties go to the lower class number."""
    return logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1).gather(1, classes)


def _as_bytes(about: Mapping[str, Any]) -> Tensor:
    """Plain values as a tensor, because a state holds tensors alone."""
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
