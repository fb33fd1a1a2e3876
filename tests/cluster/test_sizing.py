"""Sizing: what fits a machine, what is refused, and unit sizes that shrink towards the end of a job."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.sizing import (
    LEAST_STORE_BYTES,
    MOST_UNIT_BYTES,
    MOST_UNIT_PIXEL_BYTES,
    local_cpus,
    object_store_bytes,
    shrinking_sizes,
    size_for,
    unit_records,
)


@pytest.mark.parametrize(
    ("resources", "wanted", "num_actors", "gpus"),
    [
        ({"CPU": 3.0}, None, 2, 0.0),
        ({"CPU": 2.0}, None, 1, 0.0),
        ({"CPU": 64.0, "GPU": 8.0}, None, 8, 1.0),
        ({"CPU": 4.0, "GPU": 8.0}, None, 8, 1.0),
        ({"CPU": 8.0, "GPU": 8.0}, None, 8, 1.0),
        ({"CPU": 4.5, "GPU": 8.0}, None, 8, 1.0),
        ({"CPU": 64.0, "GPU": 8.0}, 2, 2, 1.0),
    ],
)
def test_actors_leave_room_for_a_task(resources, wanted, num_actors, gpus):
    sizing = size_for([resources], wanted)
    assert (sizing.num_actors, sizing.gpus_per_actor) == (num_actors, gpus)
    assert sizing.num_actors * sizing.cpus_per_actor + sizing.cpus_per_task <= resources["CPU"]
    assert sizing.cpus_per_task != sizing.cpus_per_actor


@pytest.mark.parametrize(
    ("resources", "wanted"),
    [({}, None), ({"CPU": 1.0}, None), ({"CPU": 4.0}, 4), ({"CPU": 64.0, "GPU": 1.0}, 2), ({"GPU": 1.0}, None)],
)
def test_what_ray_would_wait_for_in_silence_is_refused(resources, wanted):
    with pytest.raises(ClusterError, match=r"explain actors need .* CPUs.*--workers"):
        size_for([resources], wanted)


def test_the_device_that_was_asked_for_is_used_or_refused():
    both, cpus = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0}
    assert size_for([both], None, "cpu") == size_for([cpus])
    assert size_for([both], None, "gpu") == size_for([both])
    with pytest.raises(ClusterError, match="--device gpu: the Ray session has 16 CPUs and no GPU"):
        size_for([cpus], None, "gpu")


@pytest.mark.parametrize(
    ("nodes", "num_actors", "share", "idle"),
    [
        ([{"CPU": 0.0}, {"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 8.0}], 16, 0.9, 0),
        ([{"CPU": 64.0}, {"CPU": 4.0, "GPU": 8.0}], 8, 0.4, 0),  # the poor node decides, tasks run on the other
        ([{"CPU": 64.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 4.0}], 6, 0.3, 0),
        ([{"CPU": 64.0, "GPU": 2.0}, {"GPU": 4.0}], 2, 0.1, 4),
        ([{"CPU": 1.0, "GPU": 1.0}] * 3, 3, 0.4, 0),
    ],
)
def test_actors_fit_on_nodes_and_not_on_sums(nodes, num_actors, share, idle):
    sizing = size_for(nodes)
    assert (sizing.num_actors, sizing.cpus_per_actor, sizing.idle_gpus) == (num_actors, pytest.approx(share), idle)


def test_a_cpu_actor_is_not_cut_over_two_nodes():
    assert size_for([{"CPU": 1.5}, {"CPU": 1.5}]).num_actors == 2
    assert size_for([{"CPU": 0.9}, {"CPU": 0.9}, {"CPU": 1.0}]).num_actors == 1
    assert size_for([{"CPU": 2.0}, {"CPU": 2.0}]).num_actors == 3  # half a CPU is left for tasks


def test_the_object_store_holds_what_actors_wait_for():
    assert object_store_bytes(1, 64 << 30) == LEAST_STORE_BYTES
    assert object_store_bytes(8, 256 << 30) == 24 * MOST_UNIT_PIXEL_BYTES
    assert object_store_bytes(64, 32 << 30) == int(0.3 * (32 << 30))
    assert object_store_bytes(8, 1 << 30) == LEAST_STORE_BYTES


@pytest.mark.parametrize(("num_cores", "wanted", "actors"), [(1, None, 1), (2, None, 2), (2, 5, 5), (16, 3, 3)])
def test_a_session_of_its_own_always_fits(num_cores, wanted, actors):
    assert size_for([{"CPU": float(local_cpus(num_cores, wanted))}], wanted).num_actors == actors


@pytest.mark.parametrize(
    ("seconds", "size", "num_records", "workers", "records"),
    [
        (0.1, 1000, 10**6, 1, 3000),  # five minutes
        (0.1, 1000, 40_000, 1, 2000),  # a twentieth of the share
        (0.1, 1000, 40_000, 4, 500),
        (0.1, 1000, 500, 4, 100),  # at least ten seconds
        (0.001, 65536, 10**6, 1, 1024),  # at most 64 MiB
        (0.001, 1 << 30, 10**6, 1, 1),
        (40.0, 1000, 10, 2, 1),
    ],
)
def test_a_full_unit(seconds, size, num_records, workers, records):
    assert unit_records(seconds, size, num_records, workers) == records


@given(st.floats(1e-6, 1e3), st.floats(1, 1e9), st.integers(0, 10**7), st.integers(1, 1000))
def test_a_full_unit_never_outgrows_one_put(seconds, size, num_records, workers):
    records = unit_records(seconds, size, num_records, workers)
    assert records >= 1
    assert records == 1 or records * size <= MOST_UNIT_BYTES


def test_the_pixels_of_a_unit_pass_as_one_block():
    assert unit_records(0.004, 7_000, 10**6, 8, 3 * 224 * 224) == MOST_UNIT_PIXEL_BYTES // (3 * 224 * 224) == 891
    assert unit_records(0.004, 7_000, 10**6, 8, 1 << 30) == 1


def test_units_shrink_by_hand():
    assert shrinking_sizes(100, 20, 5, 2) == [20, 20, 15, 11, 8, 6, 5, 5, 5, 5]
    assert shrinking_sizes(7, 20, 5, 2) == [5, 2]
    assert shrinking_sizes(9, 3, 5, 2) == [3, 3, 3]


@given(st.integers(0, 5000), st.integers(1, 500), st.integers(1, 500), st.integers(1, 64))
def test_units_add_up_and_never_grow(num_records, first, floor, workers):
    sizes = shrinking_sizes(num_records, first, floor, workers)
    assert sum(sizes) == num_records
    assert sizes == sorted(sizes, reverse=True)
    assert all(min(first, floor) <= size <= first for size in sizes[:-1])
