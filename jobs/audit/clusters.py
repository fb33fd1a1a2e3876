"""Clusters of a class's maps: pooled, put on principal axes, parted by density; kept where resamples part alike.

The idea is SpRAy's (Lapuschkin et al., Nature Communications 2019): where a class's maps form groups, the model
has several reasons for the class, and one of them may be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import HDBSCAN
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from blocksight.jobs.audit.result import Cluster
from blocksight.jobs.audit.samples import Sample

Floats = NDArray[np.float64]
Labels = NDArray[np.int16]

NO_CLUSTER = -1
MIN_MAPS = 30
"""Of a class: with fewer, no clusters are looked for."""
AXES = 12
LEAST_SHARE = 0.05
"""Of a class's maps: the smallest cluster."""
NEIGHBOURS = 5
"""Of a map: the last one's distance says how lonely it is; also HDBSCAN's `min_samples`."""
RESAMPLES = 10
RESAMPLED = 2 / 3
MIN_STABILITY = 0.6
"""Groups in a continuum, such as objects at any place, fall below half; real ones come near 1."""
FAR = 3.0
"""Interquartile ranges above the third quartile of a class's distances: from there on a map is an outlier."""
LEAST_LIMIT = 2.0
REACH = 0.95
"""Quantile of its members' distances within which a further map belongs to a cluster."""
EXAMPLES = 8


def as_points(pooled_nhw: NDArray[np.uint8]) -> Floats:
    """Maps [n, 16, 16] as points [n, 256] of length 1: roots of their shares, with Hellinger's distance, 0 to sqrt(2).

    How strong a map is says nothing then, only where. A map of zeros is taken as even.
    """
    flat = pooled_nhw.reshape(len(pooled_nhw), -1).astype(np.float64)
    flat[~flat.any(1)] = 1
    return np.sqrt(flat / flat.sum(1, keepdims=True))


@dataclass(frozen=True, eq=False)
class ClassModel:
    """How the maps of one class usually look."""

    sample: Sample
    labels: Labels
    """[n] the sampled maps' clusters, the largest 0; `NO_CLUSTER` between them, or where there are none."""
    stability: float | None
    """Mean adjusted Rand index of clusterings of resamples; None where there are no clusters."""
    typical: float
    """Median distance of a sampled map from its fifth neighbour."""
    limit: float
    """From here on a map is an outlier, in typical distances."""

    @property
    def num_clusters(self) -> int:
        return int(self.labels.max(initial=NO_CLUSTER)) + 1

    def place(self, pooled_nhw: NDArray[np.uint8]) -> tuple[Labels, NDArray[np.float32]]:
        """Of maps [n, 16, 16] their cluster, and the distance from their fifth neighbour in typical distances."""
        points, known = as_points(pooled_nhw), as_points(self.sample.pooled)
        strangeness = (_loneliness(points, known) / self.typical).astype(np.float32)
        if not self.num_clusters:
            return np.full(len(points), NO_CLUSTER, np.int16), strangeness
        centres = np.stack([known[self.labels == number].mean(0) for number in range(self.num_clusters)])
        own = _distances(known, centres)
        reach = [np.quantile(own[self.labels == number, number], REACH) for number in range(self.num_clusters)]
        distances = _distances(points, centres)
        nearest = distances.argmin(1).astype(np.int16)
        return np.where(distances.min(1) <= np.array(reach)[nearest], nearest, np.int16(NO_CLUSTER)), strangeness


def class_model(sample: Sample, seed: int) -> ClassModel:
    """What is usual among a class's sampled maps; `seed` draws the resamples."""
    points = as_points(sample.pooled)
    labels, stability = _clusters(points, np.random.default_rng([seed, sample.target_index]))
    lonely = _loneliness(points, points)
    low, typical, high = (float(value) for value in np.quantile(lonely, [0.25, 0.5, 0.75]))
    typical = max(typical, float(np.finfo(np.float32).eps))  # where all maps are alike any other is far away
    limit = max((high + FAR * (high - low)) / typical, LEAST_LIMIT)
    return ClassModel(sample, labels, stability, typical, limit)


def clusters_of(model: ClassModel, counts: Sequence[int]) -> list[Cluster]:
    """The class's clusters for the reader; `counts`: how many of all its maps are in each, and in none as the last."""
    sample, found = model.sample, []
    for number in range(model.num_clusters):
        own = np.flatnonzero(model.labels == number)
        points = as_points(sample.pooled[own])
        middle = _distances(points, points.mean(0)[None])[:, 0].argsort(kind="stable")[:EXAMPLES]
        found.append(
            Cluster(
                sample.target_index,
                sample.target_name,
                number,
                counts[number],
                counts[number] / max(1, sum(counts)),
                model.stability or 0.0,
                (sample.pooled[own].mean(0) / 255).astype(np.float32),
                tuple(sample.keys[place] for place in own[middle]),
            )
        )
    return found


def _distances(points: Floats, others: Floats) -> Floats:
    squares = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)
    return np.sqrt(squares.clip(0))


def _loneliness(points: Floats, known: Floats) -> Floats:
    """Each point's distance from its fifth nearest among the known, or from the farthest of fewer."""
    last = min(NEIGHBOURS, len(known)) - 1
    return np.partition(_distances(points, known), last, axis=1)[:, last]


def _clusters(points: Floats, rng: np.random.Generator) -> tuple[Labels, float | None]:
    none = np.full(len(points), NO_CLUSTER, np.int16), None
    if len(points) < MIN_MAPS or np.ptp(points, axis=0).max() == 0:
        return none
    scores = PCA(min(AXES, *points.shape), svd_solver="full").fit_transform(points)
    labels = _parted(scores)
    if labels.max() == NO_CLUSTER:
        return none
    stability = _stability(scores, labels, rng)
    return (labels, stability) if stability >= MIN_STABILITY else none


def _parted(scores: Floats) -> Labels:
    """Clusters by density, the largest first."""
    size = max(NEIGHBOURS, round(LEAST_SHARE * len(scores)))
    found = HDBSCAN(min_cluster_size=size, min_samples=NEIGHBOURS, copy=True)  # pyright: ignore[reportArgumentType]
    labels = found.fit_predict(scores)
    order = np.argsort(-np.bincount(labels[labels >= 0], minlength=1), kind="stable")
    renamed = np.full(labels.max() + 2, NO_CLUSTER, np.int16)
    renamed[order[: labels.max() + 1]] = np.arange(labels.max() + 1)
    return renamed[labels]  # the last entry is that of no cluster


def _stability(scores: Floats, labels: Labels, rng: np.random.Generator) -> float:
    """How alike resamples part those points that they hold."""
    agreements = []
    for _ in range(RESAMPLES):
        drawn = rng.choice(len(scores), round(RESAMPLED * len(scores)), replace=False)
        agreements.append(adjusted_rand_score(labels[drawn], _parted(scores[drawn])))
    return float(np.mean(agreements))
