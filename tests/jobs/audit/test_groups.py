"""Groups of maps: which are kept, which maps belong to them, and sums that depend on no order and no parts."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.jobs.audit import groups as module
from blocksight.jobs.audit.groups import (
    BINS,
    CENSUS_COLUMNS,
    Census,
    GroupName,
    GroupSums,
    Roster,
    counted,
    is_right,
    num_maps,
)
from blocksight.jobs.audit.result import GRID, MEASURES
from blocksight.storage.outputs.schema import SCHEMA

ALL = GroupName("all", None, None)
TYPES = pa.schema([SCHEMA.field(name) for name in CENSUS_COLUMNS])


def row(label=None, target=0, rank=1, status="ok", label_name=None, source="top"):
    """A row's small columns; the class names follow from the numbers."""
    known = f"label {label}" if label is not None else None
    return {
        "status": status,
        "label": label,
        "label_name": label_name or known,
        "target_index": target if status == "ok" else None,
        "target_name": f"class {target}" if status == "ok" else None,
        "target_source": source if status == "ok" else None,
        "target_rank": rank if status == "ok" else None,
    }


def table_of(rows) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=TYPES)


def roster_of(*parts) -> Roster:
    census = Census()
    for part in parts:
        census.add(counted(table_of(part)))
    return Roster.of(census.table())


ROWS = [
    row(1, 1),
    row(1, 1),
    row(1, 2),
    row(1, 2, rank=2),  # a further target: of no group but `all`
    row(1, 1, rank=4, source="label"),
    row(2, 1),
    row(None, 1, label_name="unheard of"),
    row(None, 3),
    row(1, status="rejected"),
]


def test_a_census_by_hand():
    roster = roster_of(ROWS)
    assert (roster.num_rows, roster.num_maps, roster.num_right, roster.num_targets) == (9, 8, 2, 3)
    assert roster.notes == ()
    assert roster.names == (
        ALL,
        GroupName("class", "label 1", None),
        GroupName("class", "label 2", None),
        GroupName("class", "unheard of", None),
        GroupName("predicted", None, "class 1"),
        GroupName("predicted", None, "class 2"),
        GroupName("predicted", None, "class 3"),
        GroupName("pair", "label 1", "class 2"),
        GroupName("pair", "label 2", "class 1"),
    )
    assert roster.members(table_of(ROWS[:-1])).tolist() == [
        [0, 1, 4, -1],
        [0, 1, 4, -1],
        [0, 1, 5, 7],
        [0, -1, -1, -1],
        [0, 1, -1, -1],
        [0, 2, 4, 8],
        [0, 3, 4, -1],
        [0, -1, 6, -1],
    ]
    nameless = row(None, 2, label_name="label 1")  # a label without a class cannot be wrong
    assert roster.members(table_of([nameless])).tolist() == [[0, 1, 5, -1]]


def test_no_label_is_no_share_of_right_ones():
    assert roster_of([row(None, 1)]).num_right is None
    assert roster_of([row(5, 1)]).num_right == 0
    assert roster_of([row(5, status="rejected"), row(None, 1)]).num_right is None


def test_nothing_at_all():
    roster = roster_of()
    assert (roster.num_rows, roster.num_maps, roster.num_right, roster.names) == (0, 0, None, (ALL,))
    assert num_maps(counted(table_of([]))) == 0
    assert roster.members(table_of([])).shape == (0, 4)


@pytest.mark.parametrize(
    ("label", "target", "rank", "wanted"), [(None, 3, 1, None), (3, 3, 1, True), (3, 3, 2, False), (3, 4, 1, False)]
)
def test_right_is_the_prediction_that_is_the_label(label, target, rank, wanted):
    assert is_right(label, target, rank) is wanted


def test_only_the_most_frequent_groups_are_kept_with_a_note(monkeypatch):
    monkeypatch.setattr(module, "MAX_GROUPS", {"class": 2, "predicted": 1, "pair": 1})
    rows = [row(label, label % 4 + 5) for label in range(6) for _ in range(label + 1)]
    roster = roster_of(rows)
    assert [name.label for name in roster.names if name.kind == "class"] == ["label 5", "label 4"]
    assert [name.predicted for name in roster.names if name.kind == "predicted"] == ["class 6"]
    assert [name[1:] for name in roster.names if name.kind == "pair"] == [("label 5", "class 6")]
    assert roster.notes == (
        "of 6 labels the 2 with most maps are kept as groups",
        "of 4 predicted classes the 1 with most maps are kept as groups",
        "of 6 pairs of a label and a wrong prediction the 1 with most maps are kept as groups",
    )
    assert roster.members(table_of([row(0, 5), row(5, 6)])).tolist() == [[0, -1, -1, -1], [0, 1, 3, 4]]


light_rows = st.builds(
    row,
    label=st.none() | st.integers(0, 3),
    target=st.integers(0, 3),
    rank=st.integers(1, 2),
    status=st.sampled_from(["ok", "rejected"]),
)


@settings(max_examples=60)
@given(st.lists(light_rows, max_size=30), st.randoms(use_true_random=False))
def test_a_census_does_not_depend_on_order_or_parts(rows, random):
    shuffled = random.sample(rows, len(rows))
    cut = random.randint(0, len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PENDING_ROWS", 2)
        one, other = roster_of(rows), roster_of(shuffled[:cut], [], *([each] for each in shuffled[cut:]))
    assert (one.names, one.notes) == (other.names, other.notes)
    found = [(roster.num_rows, roster.num_maps, roster.num_right, roster.num_targets) for roster in (one, other)]
    assert found[0] == found[1]
    sound = [own for own in rows if own["status"] == "ok"]
    assert found[0][:2] == (len(rows), len(sound))
    assert sorted(one.names, key=str) == sorted(set(one.names), key=str)


# ---------------------------------------------------------------- sums


def some_maps(number, num_groups, seed=0):
    """Members, cells and measures of maps, some measures missing."""
    rng = np.random.default_rng(seed)
    members = rng.integers(-1, num_groups, (number, 3)).astype(np.int32)
    members[:, 0] = 0
    members[members[:, 1] == members[:, 2], 2] = -1  # a map is once in a group
    members[:, 1:][members[:, 1:] == 0] = -1
    values = rng.random((number, len(MEASURES))) ** 2
    values[rng.random(values.shape) < 0.2] = math.nan
    values[:1] = 1.0
    return members, rng.integers(0, 256, (number, GRID, GRID), np.uint8), values


def sums_of(maps, num_groups, rows=slice(None)):
    sums = GroupSums.zeros(num_groups)
    sums.add(*(part[rows] for part in maps))
    return sums


def assert_same(one, other):
    for name, own in vars(one).items():
        assert np.array_equal(own, getattr(other, name)), name


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 99), st.integers(0, 40), st.integers(0, 40))
def test_sums_merge_in_any_order_and_any_parts(number, num_groups, seed, first, second):
    maps = some_maps(number, num_groups, seed)
    whole = sums_of(maps, num_groups)
    order = np.random.default_rng(seed).permutation(number)
    cuts = sorted([min(first, number), min(second, number)])
    parts = [sums_of(maps, num_groups, part) for part in np.split(order, cuts)]
    assert_same(parts[0] + parts[1] + parts[2], whole)
    assert_same(parts[2] + (parts[1] + parts[0]), whole)
    bit_by_bit = GroupSums.zeros(num_groups)
    for place in order:
        bit_by_bit.add(*(part[place : place + 1] for part in maps))
    assert_same(bit_by_bit, whole)


def test_sums_of_other_groups_do_not_add_up():
    with pytest.raises(ValueError, match="sums of 2 and 3 groups"):
        GroupSums.zeros(2) + GroupSums.zeros(3)


def test_groups_agree_with_their_slow_twin():
    members, pooled, values = maps = some_maps(500, 4)
    names = [ALL, *(GroupName("class", f"label {place}", None) for place in range(1, 4))]
    for place, group in enumerate(sums_of(maps, 4).groups(names)):
        own = (members == place).any(1)
        assert (group.kind, group.label, group.predicted) == names[place]
        assert group.count == own.sum() > 0
        cells = pooled[own] / 255
        assert group.mean_map == pytest.approx(cells.mean(0), abs=1e-6)
        assert group.variance_map == pytest.approx(cells.var(0), abs=1e-6)
        assert group.mean_map.dtype == np.float32
        for column, name in enumerate(MEASURES):
            known = values[own, column]
            known = known[~np.isnan(known)]
            spread = group.spreads[name]
            assert spread.count == len(known)
            assert spread.mean == pytest.approx(known.mean(), abs=1e-9)
            for short, share in module.QUANTILES.items():
                exact = np.quantile(known, share)
                assert getattr(spread, short) == pytest.approx(exact, abs=1 / BINS + 1e-12), (name, short)


def test_a_group_by_hand():
    sums = GroupSums.zeros(2)
    pooled = np.zeros((2, GRID, GRID), np.uint8)
    pooled[0, 3, 4] = 255
    values = np.full((2, len(MEASURES)), math.nan)
    values[:, 1] = 0.25, 1.0
    values[1, 2] = 0.5
    sums.add(np.array([[0, 1], [0, -1]], np.int32), pooled, values)
    whole, part = sums.groups([ALL, GroupName("class", "a", None)])
    assert (whole.count, part.count) == (2, 1)
    assert (whole.mean_map[3, 4], whole.variance_map[3, 4]) == (0.5, 0.25)
    assert whole.mean_map.sum() == 0.5
    assert (part.mean_map[3, 4], part.variance_map.max()) == (1, 0)
    assert set(whole.spreads) == {"gini", "effective_area"}
    assert set(part.spreads) == {"gini"}
    assert whole.spreads["gini"].mean == 0.625
    half = 0.5 / BINS  # a value is known to half a bin
    assert whole.spreads["gini"].q95 == pytest.approx(0.05 * (0.25 + half) + 0.95 * (1 - half))
    assert whole.spreads["gini"].q50 == pytest.approx(0.625)


def test_a_group_without_maps_is_empty():
    (group,) = GroupSums.zeros(1).groups([ALL])
    assert (group.count, dict(group.spreads), group.mean_map.max(), group.variance_map.max()) == (0, {}, 0, 0)
