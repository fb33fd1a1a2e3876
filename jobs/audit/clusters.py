"""Clusters a class's pooled maps: principal components, then HDBSCAN; kept if resamples are clustered alike.

The idea is SpRAy's (Lapuschkin et al., Nature Communications 2019): if a class's maps form clusters, the model has
several reasons for the class, and one of them may be wrong.
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
"""Fewest maps of a class that are clustered."""
AXES = 12
"""Principal components that are kept."""
MIN_SHARE = 0.05
"""Smallest share of a class's maps in a cluster."""
NEIGHBOURS = 5
"""A map's strangeness is its distance from its fifth neighbour; also HDBSCAN's `min_samples`."""
RESAMPLES = 10
RESAMPLED = 2 / 3
MIN_STABILITY = 0.6
"""Least mean adjusted Rand index. Clusters of a continuum, such as objects anywhere, have less than 0.5; real ones
nearly 1."""
FAR = 3.0
"""A map is an outlier if its distance is this many interquartile ranges above its class's third quartile."""
MIN_LIMIT = 2.0
"""Least limit for outliers, in typical distances."""
REACH = 0.95
"""Another map belongs to a cluster if its distance is within this quantile of the members' distances."""
NUM_EXAMPLES = 8


def as_points(pooled_nhw: NDArray[np.uint8]) -> Floats:
    """Maps [n, 16, 16] as unit vectors [n, 256]: roots of their shares, with Hellinger's distance, 0 to sqrt(2).

    The strength of a map has no effect, only its places. A map of zeros counts as even.
    """
    flat = pooled_nhw.reshape(len(pooled_nhw), -1).astype(np.float64)
    flat[~flat.any(1)] = 1
    return np.sqrt(flat / flat.sum(1, keepdims=True))


@dataclass(frozen=True, eq=False)
class ClassModel:
    """The clusters and typical distances of one class's maps."""

    sample: Sample
    labels: Labels
    """[n] clusters of the sampled maps, 0 is the largest; `NO_CLUSTER` for a map in none."""
    stability: float | None
    """Mean adjusted Rand index of clusterings of resamples; None if there are no clusters."""
    typical: float
    """The typical distance: the median of the sampled maps' distances from their fifth neighbours."""
    limit: float
    """A map with a larger distance is an outlier, in typical distances."""

    @property
    def num_clusters(self) -> int:
        return int(self.labels.max(initial=NO_CLUSTER)) + 1

    def place(self, pooled_nhw: NDArray[np.uint8]) -> tuple[Labels, NDArray[np.float32]]:
        """The clusters [n] of maps [n, 16, 16], and their distances [n] from fifth neighbours, in typical distances."""
        points, known = as_points(pooled_nhw), as_points(self.sample.pooled)
        strangeness = (_neighbour_distances(points, known) / self.typical).astype(np.float32)
        if not self.num_clusters:
            return np.full(len(points), NO_CLUSTER, np.int16), strangeness
        centres = np.stack([known[self.labels == number].mean(0) for number in range(self.num_clusters)])
        own = _distances(known, centres)
        reach = [np.quantile(own[self.labels == number, number], REACH) for number in range(self.num_clusters)]
        distances = _distances(points, centres)
        nearest = distances.argmin(1).astype(np.int16)
        return np.where(distances.min(1) <= np.array(reach)[nearest], nearest, np.int16(NO_CLUSTER)), strangeness


def class_model(sample: Sample, seed: int) -> ClassModel:
    """Clusters a class's sampled maps and measures their typical distance. `seed` draws the resamples."""
    points = as_points(sample.pooled)
    labels, stability = _clusters(points, np.random.default_rng([seed, abs(sample.target_index)]))
    distances = _neighbour_distances(points, points)
    low, typical, high = (float(value) for value in np.quantile(distances, [0.25, 0.5, 0.75]))
    typical = max(typical, float(np.finfo(np.float32).eps))  # if all maps are alike, any other one is far away
    limit = max((high + FAR * (high - low)) / typical, MIN_LIMIT)
    return ClassModel(sample, labels, stability, typical, limit)


def clusters_of(model: ClassModel, counts: Sequence[int]) -> list[Cluster]:
    """The class's clusters as results. `counts`: how many of all its maps are in each cluster, then in none."""
    sample, found = model.sample, []
    for number in range(model.num_clusters):
        own = np.flatnonzero(model.labels == number)
        points = as_points(sample.pooled[own])
        nearest = _distances(points, points.mean(0)[None])[:, 0].argsort(kind="stable")[:NUM_EXAMPLES]
        found.append(
            Cluster(
                sample.target_index if sample.is_of_class else None,
                sample.target_name,
                number,
                counts[number],
                counts[number] / max(1, sum(counts)),
                model.stability or 0.0,
                (sample.pooled[own].mean(0) / 255).astype(np.float32),
                tuple(sample.keys[index] for index in own[nearest]),
                "" if sample.is_of_class else sample.target_name,
            )
        )
    return found


def _distances(points: Floats, others: Floats) -> Floats:
    squares = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)
    return np.sqrt(squares.clip(0))


def _neighbour_distances(points: Floats, known: Floats) -> Floats:
    """Each point's distance from its fifth nearest known point, or from the farthest if there are fewer."""
    last = min(NEIGHBOURS, len(known)) - 1
    return np.partition(_distances(points, known), last, axis=1)[:, last]


def _clusters(points: Floats, rng: np.random.Generator) -> tuple[Labels, float | None]:
    none = np.full(len(points), NO_CLUSTER, np.int16), None
    if len(points) < MIN_MAPS or np.ptp(points, axis=0).max() == 0:
        return none
    scores = PCA(min(AXES, *points.shape), svd_solver="full").fit_transform(points)
    labels = _density_clusters(scores)
    if labels.max() == NO_CLUSTER:
        return none
    stability = _stability(scores, labels, rng)
    return (labels, stability) if stability >= MIN_STABILITY else none


def _density_clusters(scores: Floats) -> Labels:
    """Each point's cluster by HDBSCAN; cluster 0 is the largest."""
    size = max(NEIGHBOURS, round(MIN_SHARE * len(scores)))
    found = HDBSCAN(min_cluster_size=size, min_samples=NEIGHBOURS, copy=True)  # pyright: ignore[reportArgumentType]
    labels = found.fit_predict(scores)
    order = np.argsort(-np.bincount(labels[labels >= 0], minlength=1), kind="stable")
    renamed = np.full(labels.max() + 2, NO_CLUSTER, np.int16)
    renamed[order[: labels.max() + 1]] = np.arange(labels.max() + 1)
    return renamed[labels]  # label -1 takes the last entry, which is NO_CLUSTER


def _stability(scores: Floats, labels: Labels, rng: np.random.Generator) -> float:
    """The mean adjusted Rand index between the clusters and those of resamples, at most 1."""
    agreements = []
    for _ in range(RESAMPLES):
        drawn = rng.choice(len(scores), round(RESAMPLED * len(scores)), replace=False)
        agreements.append(adjusted_rand_score(labels[drawn], _density_clusters(scores[drawn])))
    return float(np.mean(agreements))
