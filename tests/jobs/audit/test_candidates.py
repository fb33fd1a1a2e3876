"""Candidates for shortcuts, the records that they are tried on, and oddities: planted, and by hand."""

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from blocksight.jobs.audit.candidates import MAX_CANDIDATES, Candidate, candidates, densities
from blocksight.jobs.audit.clusters import NO_CLUSTER, class_model
from blocksight.jobs.audit.oddities import KEPT, OUTLIER, STRANGE, OddestMaps, with_clusters
from blocksight.jobs.audit.result import MEASURES, ROWS
from blocksight.jobs.audit.samples import Sample
from blocksight.jobs.audit.shortcuts import MEMBERS, OTHERS, suspects_of
from tests.jobs.audit.test_clusters import spot

Maps = NDArray[np.uint8]


def sample_of(target: int, maps: Maps, prefix: str = "") -> Sample:
    num = len(maps)
    keys = tuple(f"{prefix or target}/{index}.png" for index in range(num))
    return Sample(target, f"class {target}", keys, maps, np.ones(num), (None,) * num, np.ones(num, np.bool_))


def anywhere(num: int, seed: int, upto: float = 13) -> Maps:
    rng = np.random.default_rng(seed)
    return np.stack([spot(*rng.uniform(2, upto, 2), rng) for _ in range(num)])


def in_corner(num: int, seed: int) -> Maps:
    rng = np.random.default_rng(seed)
    return np.stack([spot(13, 13, rng) for _ in range(num)])


def found_in(*classes: Maps) -> list[Candidate]:
    return candidates([class_model(sample_of(target, maps), 0) for target, maps in enumerate(classes)])[0]


def test_densities_are_over_the_maps_own_mean() -> None:
    maps = np.zeros((2, 16, 16), np.uint8)
    maps[0, 2, 3] = 100
    assert densities(maps)[0, 2, 3] == 256
    assert (densities(maps)[1] == 1).all()  # a map of zeros is even


@pytest.mark.parametrize("seed", range(4))
def test_objects_at_any_place_are_no_candidates(seed: int) -> None:
    assert found_in(*(anywhere(120, 10 * seed + target) for target in range(4))) == []


def test_a_class_that_looks_into_a_corner_is_a_candidate() -> None:
    one, *rest = found_in(anywhere(120, 0), in_corner(120, 1), anywhere(120, 2))
    assert all(other.model.sample.target_index != 1 for other in rest)
    assert (one.model.sample.target_index, one.source) == (1, "class")
    left, top, right, bottom = one.box
    assert 10 <= left <= 12
    assert 10 <= top <= 12
    assert (right, bottom) == (16, 16)
    assert one.share == 1
    assert one.density > 4
    assert one.elsewhere_density < 1.2
    assert one.shares == (left / 16, top / 16, 1, 1)


def test_a_place_where_all_classes_look_is_no_candidate() -> None:
    assert found_in(*(in_corner(120, seed) for seed in range(3))) == []


def test_a_cluster_that_looks_into_a_corner_is_a_candidate() -> None:
    mixed = np.concatenate([anywhere(100, 3, upto=8), in_corner(16, 4)])
    every = found_in(anywhere(120, 0, upto=8), mixed, anywhere(120, 2, upto=8))
    one, *_ = [one for one in every if one.model.sample.target_index == 1]
    assert one.source.startswith("cluster ")
    assert one.box[0] >= 10
    assert one.share < 0.3


def test_maps_of_few_cells_are_no_hindrance() -> None:
    """Maps of 4 x 4 cells, hardly above an even map: the candidate is still small."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 140, (120, 4, 4))
    coarse[:60, :2, :2] += 60  # of the first class
    coarse[60:, :2, :2] -= 30
    smooth = np.array([np.kron(one, np.ones((4, 4))) for one in coarse]).astype(np.uint8)
    found = found_in(smooth[:60], smooth[60:])
    own = [one for one in found if one.model.sample.target_index == 0]
    assert own
    assert own[0].box[2] <= 8
    assert own[0].box[3] <= 8
    assert own[0].density < 2


def test_no_more_than_can_be_tried_are_kept_the_surest_first() -> None:
    rng = np.random.default_rng(0)
    places = [(x, y) for x in (2, 5, 8, 11, 14) for y in range(1, 16, 2)] + [(3, 3), (9, 9), (12, 6)]
    classes = [np.stack([spot(x, y, rng) for _ in range(12)]) for x, y in places]
    found, num_more = candidates([class_model(sample_of(target, maps), 0) for target, maps in enumerate(classes)])
    assert len(found) == MAX_CANDIDATES
    assert num_more > 0
    assert [one.certainty for one in found] == sorted((one.certainty for one in found), reverse=True)


def test_a_suspect_has_a_fair_draw_of_members_and_others_of_other_classes() -> None:
    samples = [sample_of(0, anywhere(120, 0)), sample_of(1, in_corner(120, 1)), sample_of(2, anywhere(120, 2))]
    found, _ = candidates([class_model(sample, 0) for sample in samples])
    suspect, *_ = suspects_of(found, samples, seed=0)
    assert suspect.members == samples[1].keys[:MEMBERS]
    assert len(suspect.others) == OTHERS
    assert {key.split("/")[0] for key in suspect.others} == {"0", "2"}
    assert suspects_of(found, samples, seed=0)[0].others == suspect.others
    assert suspects_of(found, samples, seed=1)[0].others != suspect.others


def rows_of(maps: Maps, **columns: object) -> pa.Table:
    """Rows of the schema `ROWS`; a column is given as one value, or one value for each row."""
    num = len(maps)
    known: dict[str, object] = {
        **dict.fromkeys(MEASURES),
        "key": [f"{index}.png" for index in range(num)],
        "target_index": 1,
        "target_name": "class 1",
        "is_flat": False,
        "is_own_class": True,
        "is_right": True,
        "score": 0.5,
        "pooled": [one.tobytes() for one in maps],
        **columns,
    }
    rows = [
        {name: own[place] if isinstance(own := known.get(name), list) else own for name in ROWS.names}
        for place in range(num)
    ]
    return pa.Table.from_pylist(rows, schema=ROWS)


def corner_models() -> dict[int, object]:
    return {1: class_model(sample_of(1, in_corner(60, 0)), 0)}


def test_odd_maps_are_reported_and_further_targets_left_out() -> None:
    maps = np.concatenate([in_corner(3, 5), anywhere(1, 0), anywhere(2, 1)])
    table = rows_of(maps, is_own_class=[True] * 5 + [False], is_right=[True, True, True, True, False, False])
    models = corner_models()
    rows = with_clusters(table, models).to_pylist()
    assert [row["strangeness"] is None for row in rows] == [False] * 5 + [True]
    assert all(row["cluster"] is None for row in rows)
    oddest = OddestMaps(models, {})
    oddest.add(with_clusters(table, models))
    assert [(one.key, one.reason) for one in oddest.oddities()] == [("4.png", OUTLIER), ("3.png", STRANGE)]
    assert oddest.sizes == {(1, NO_CLUSTER): 5}


def test_flat_maps_and_classes_without_a_sample_have_no_place() -> None:
    table = rows_of(in_corner(3, 5), is_flat=[True, False, False], target_index=[1, 1, 7])
    assert [row["strangeness"] is None for row in with_clusters(table, corner_models()).to_pylist()] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("usual", "on_object", "is_odd"), [(0.3, 0.09, True), (0.3, 0.11, False), (0.08, 0.0, False), (0.9, 0.2, True)]
)
def test_right_and_off_the_object_is_odd_against_the_usual_range(usual: float, on_object: float, is_odd: bool) -> None:
    models = corner_models()
    oddest = OddestMaps(models, {1: usual})
    oddest.add(with_clusters(rows_of(in_corner(1, 5), on_object=on_object), models))
    assert [one.reason for one in oddest.oddities()] == [STRANGE] * is_odd
    wrong = OddestMaps(models, {1: usual})
    wrong.add(with_clusters(rows_of(in_corner(1, 5), on_object=on_object, is_right=False), models))
    assert wrong.oddities() == ()


def test_only_the_oddest_are_kept_whatever_their_order() -> None:
    models, maps = corner_models(), anywhere(2 * KEPT, 3)
    table = with_clusters(rows_of(maps, is_right=None), models)
    forwards, backwards = OddestMaps(models, {}), OddestMaps(models, {})
    forwards.add(table)
    backwards.add(table.take(list(range(len(table)))[::-1]))
    assert len(forwards.oddities()) == KEPT
    assert forwards.oddities() == backwards.oddities()
    assert forwards.found[OUTLIER] > KEPT
    least = min(one.strength for one in forwards.oddities())
    kept = {one.key for one in forwards.oddities()}
    assert all(row["strangeness"] <= least for row in table.to_pylist() if row["key"] not in kept)
