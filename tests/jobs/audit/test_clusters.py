"""Clusters of maps and the distances to them: planted groups, continua, and plain loops."""

import numpy as np
import pytest
from numpy.typing import NDArray

from blocksight.jobs.audit.clusters import NEIGHBOURS, NO_CLUSTER, as_points, class_model, clusters_of
from blocksight.jobs.audit.samples import Sample

ROWS, COLUMNS = np.mgrid[:16, :16]


def spot(x: float, y: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    bell = np.exp(-((COLUMNS - x) ** 2 + (ROWS - y) ** 2) / 12) + 0.15 * rng.random((16, 16))
    return (255 * bell / bell.max()).astype(np.uint8)


def sample_of(maps: list[NDArray[np.uint8]]) -> Sample:
    num = len(maps)
    keys = tuple(f"{index}.png" for index in range(num))
    return Sample(4, "eel", keys, np.stack(maps), np.ones(num), (None,) * num, np.zeros(num, np.bool_))


def in_corners(num: int, seed: int) -> list[NDArray[np.uint8]]:
    """Maps with a spot: half of them in the middle, a third and a sixth in two corners."""
    rng = np.random.default_rng(seed)
    places = [(8, 8), (8, 8), (8, 8), (2, 2), (2, 2), (13, 2)]
    return [spot(*places[index % 6], rng) for index in range(num)]


def test_the_distance_is_hellingers() -> None:
    maps = np.zeros((3, 16, 16), np.uint8)
    maps[0, 0, 0], maps[1, 5, 5], maps[2] = 200, 9, 0
    points = as_points(maps)
    assert np.linalg.norm(points[0] - points[1]) == pytest.approx(np.sqrt(2))
    assert points[2] == pytest.approx(np.full(256, 1 / 16))  # a map of zeros is even
    assert as_points(maps // 2)[0] == pytest.approx(points[0])  # strength does not matter


def test_groups_are_found_the_largest_first_and_are_stable() -> None:
    model = class_model(sample_of(in_corners(120, 0)), seed=0)
    assert [int((model.labels == number).sum()) for number in range(model.num_clusters)] == [60, 40, 20]
    assert model.stability is not None
    assert model.stability > 0.9
    found = clusters_of(model, [600, 400, 200, 0])
    assert [one.share for one in found] == [0.5, pytest.approx(1 / 3), pytest.approx(1 / 6)]
    peaks = [np.unravel_index(one.mean_map.argmax(), (16, 16)) for one in found]
    assert peaks == [(8, 8), (2, 2), (2, 13)]
    assert all(int(key.split(".")[0]) % 6 in (3, 4) for key in found[1].examples)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["any place", "one place", "noise"])
def test_a_continuum_has_no_groups(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = {"any place": lambda: rng.uniform(2, 13, 2), "one place": lambda: rng.normal(8, 1, 2)}
    maps = [
        rng.integers(0, 256, (16, 16)).astype(np.uint8) if kind == "noise" else spot(*places[kind](), rng)
        for _ in range(150)
    ]
    model = class_model(sample_of(maps), seed)
    assert model.num_clusters == 0
    assert clusters_of(model, [150]) == []


def test_new_maps_go_to_their_cluster_and_odd_ones_to_none() -> None:
    model = class_model(sample_of(in_corners(120, 0)), seed=0)
    rng = np.random.default_rng(9)
    labels, strangeness = model.place(np.stack([spot(8, 8, rng), spot(2, 2, rng), spot(13, 2, rng), spot(2, 14, rng)]))
    assert labels.tolist() == [0, 1, 2, NO_CLUSTER]
    assert strangeness[:3].max() < model.limit < strangeness[3]


def test_oddity_is_the_fifth_neighbours_distance_over_the_usual() -> None:
    sample = sample_of(in_corners(40, 1))
    model = class_model(sample, seed=0)
    points = as_points(sample.pooled)
    fifth = [sorted(float(np.linalg.norm(one - other)) for other in points)[NEIGHBOURS - 1] for one in points]
    assert model.place(sample.pooled)[1] == pytest.approx(np.array(fifth) / np.median(fifth), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("num", [1, 2, 29])
def test_few_maps_have_no_clusters_but_a_distance(num: int) -> None:
    model = class_model(sample_of(in_corners(num, 2)), seed=0)
    labels, strangeness = model.place(np.stack(in_corners(3, 3)))
    assert labels.tolist() == [NO_CLUSTER] * 3
    assert np.isfinite(strangeness).all()


def test_maps_that_are_all_alike_make_any_other_strange() -> None:
    one = spot(8, 8, np.random.default_rng(0))
    model = class_model(sample_of([one] * 60), seed=0)
    labels, strangeness = model.place(np.stack([one, spot(2, 2, np.random.default_rng(1))]))
    assert labels.tolist() == [NO_CLUSTER] * 2
    assert strangeness[0] < model.limit < strangeness[1]
