"""Objects in columns are those that were collected, in any slice and in order of key; few of many are evenly spread."""

import pickle
from copy import deepcopy
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.storage.stores import object_columns
from blocksight.storage.stores.object_columns import ObjectCollector, collected, evenly_spread
from blocksight.storage.stores.s3_replies import PACKED_KEYS, Listing
from blocksight.storage.stores.store import ObjectInfo

KEYS = st.text(st.characters(), min_size=1, max_size=6)  # also with halves of pairs, as of names that are no UTF-8
INFOS = st.lists(st.builds(ObjectInfo, KEYS, st.integers(0, 2**62), st.text(max_size=4)), max_size=30)


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_columns, "BATCH_OBJECTS", 4)
        patch.setattr(object_columns, "FEW_OBJECTS", 3)
        patch.setattr(object_columns, "TAKEN_OBJECTS", 7)
        yield


@settings(deadline=None, max_examples=40)
@given(INFOS)
def test_all_that_was_collected_is_there(infos):
    objects = collected(infos)
    assert (len(objects), [*objects]) == (len(infos), infos)
    assert [objects[place] for place in range(-len(infos), len(infos))] == [*infos, *infos]


@pytest.mark.parametrize("count", [0, 4, 9])
def test_slices_are_those_of_a_tuple(count):
    twin = tuple(ObjectInfo(str(number), number, "v") for number in range(count))
    objects = collected(twin)
    for start, stop in product([None, *range(-10, 11)], repeat=2):
        assert [*objects[start:stop]] == [*twin[start:stop]]
        assert [*objects[start:stop][1:-1]] == [*twin[start:stop][1:-1]]
    assert [*objects[::-2]] == [*twin[::-2]]


@settings(deadline=None, max_examples=40)
@given(INFOS)
def test_the_order_is_that_of_a_stable_sort(infos):
    assert collected(infos).in_order() == tuple(sorted(infos, key=lambda info: info.key))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(INFOS, st.booleans()), max_size=5))
def test_parts_are_joined_in_their_order(parts):
    collector, wanted = ObjectCollector(), []
    for infos, as_columns in parts:
        collector.extend(collected(infos) if as_columns else infos)
        wanted += infos
    assert collector.objects() == wanted


@settings(deadline=None, max_examples=40)
@given(INFOS)
def test_a_copy_holds_what_the_slice_holds(infos):
    part = collected(infos)[1:3]
    for copy in (deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert copy == tuple(infos[1:3])


def test_what_was_drained_is_given_up():
    objects = collected(ObjectInfo(str(number), 1, "v") for number in range(9))
    part, drained = objects[2:8], objects.drained()
    assert next(drained).key == "0"
    assert (len(objects), len(part)) == (0, 6)
    assert [info.key for info in drained] == list("12345678")


def test_what_differs_is_not_equal():
    objects = collected([ObjectInfo("a", 1, "v")])
    assert objects not in [(), (ObjectInfo("a", 2, "v"),), (*objects, *objects), 7]
    with pytest.raises(IndexError):
        objects[1]


@pytest.mark.parametrize(("total", "wanted"), [(9, [0, 3, 6]), (3, [0, 1, 2]), (2, [0, 1]), (0, [])])
def test_a_few_are_evenly_spread(total, wanted):
    assert evenly_spread(lambda: range(total), 3) == wanted


@pytest.mark.parametrize("count", [5, PACKED_KEYS + 5])
@pytest.mark.parametrize("again", [0, 3, -1])
def test_a_key_of_any_page_is_known_again(count, again):
    names = [f"{number:06}\ud800\n" for number in range(count)]
    listing = Listing("s3://b", "")

    def new(*keys: str) -> list[str]:
        return [entry["Key"] for entry in listing.new_entries({"Contents": [{"Key": key} for key in keys]})]

    assert new(*names) == names
    assert new(names[again], "00", "z", "00") == ["00", "z"]
    assert (listing.num_repeated, new("z", "zz")) == (2, ["zz"])
