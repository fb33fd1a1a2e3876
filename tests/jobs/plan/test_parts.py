"""The driver's decisions by numbers: labels, progress, estimates, sizing."""

import pytest

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.sizing import LEAST_UNIT_SECONDS, local_cpus, shrinking_sizes, size_for, unit_records
from blocksight.engine.catalog.entries import BALANCED_BUDGET
from blocksight.jobs.plan.config import load_config
from blocksight.jobs.plan.estimate import AUTO_FULL_SHARE, estimate
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Receipt, Unit, UnitFailure
from blocksight.jobs.plan.text import clock, printable
from blocksight.jobs.plan.units import Workforce, check_units
from blocksight.jobs.worker.progress import Tally
from blocksight.storage.inputs.survey import Layout, Survey
from blocksight.storage.stores.store import ObjectInfo, StoreError
from tests.jobs.jobs_of import pieces_of
from tests.jobs.tiny import tar_bytes
from tests.storage.memory import MemoryStore


def receipt(records, forwards):
    return Receipt("u", 0, "f", 1, "s", records, records, records, 0, {}, forwards, {})


def test_progress_in_numbers():
    tally = Tally(total_records=10, guess_seconds=100)
    assert tally.line(0) == "explaining: 0/10 images, about 1:40 left"
    assert tally.line(30).endswith("about 1:10 left")
    assert Tally(10, None).line(30).endswith("time left is known after the first unit")
    tally.add(receipt(4, 800))
    assert tally.line(20) == "explaining: 4/10 images, 40 masked forwards/s, 0:30 left"
    tally.add(UnitFailure("u", 1, "x", "read", "gone"))
    assert tally.line(20).endswith("0:30 left, 1 unit failed")
    assert clock(3725) == "1:02:05"


def job(**options):
    config, _ = load_config(None, {"data": "in", "output": "out", **options})
    return config


def test_estimates_follow_the_explainer_and_mu():
    full, less = (estimate(job(parameters={"mu": mu}), 10, on_gpu=False) for mu in (0.0, 0.3))
    assert full.is_measured
    assert less.num_forwards < full.num_forwards / 3
    unknown = estimate(job(model="torchvision:resnet50", target="top-3"), 10, on_gpu=True)
    assert not unknown.is_measured
    assert unknown.num_bytes == 3 * 10 * 7000
    cam = estimate(job(model="torchvision:resnet50", explainer="gradcam"), 10, on_gpu=True)
    assert cam.is_measured
    assert cam.num_forwards == 30


def test_estimates_follow_the_fidelity():
    def forwards(**options):
        return estimate(job(**options), 10, on_gpu=False).forwards_per_record

    full = forwards()
    assert forwards(fidelity="preview") == 1
    assert forwards(fidelity="balanced") == pytest.approx(BALANCED_BUDGET * full)
    halfway = AUTO_FULL_SHARE * full + (1 - AUTO_FULL_SHARE) * BALANCED_BUDGET * full
    assert forwards(fidelity="auto") == pytest.approx(halfway)
    assert estimate(job(fidelity="balanced"), 10, on_gpu=False).is_measured
    assert not estimate(job(fidelity="auto"), 10, on_gpu=False).is_measured


def test_sizing_by_numbers():
    gpu = size_for([{"CPU": 16, "GPU": 4}])
    assert (gpu.num_actors, gpu.gpus_per_actor, gpu.threads_per_actor) == (4, 1.0, 1)
    cpu = size_for([{"CPU": local_cpus(2, None)}])
    assert (cpu.num_actors, cpu.gpus_per_actor) == (2, 0.0)
    assert cpu.cpus_per_actor != cpu.cpus_per_task
    assert size_for([{"CPU": 8}], 3).num_actors == 3
    for resources, wanted in (({"CPU": 1}, None), ({"CPU": 3}, 3), ({"CPU": 64, "GPU": 2}, 3)):
        with pytest.raises(ClusterError, match=r"explain actors need .* CPUs.*--workers"):
            size_for([resources], wanted)


@pytest.mark.parametrize(
    ("seconds", "size", "records", "workers", "wanted"),
    [
        (1.0, 6000, 10_000, 1, 300),  # five minutes
        (1.0, 6000, 2000, 2, 50),  # a twentieth of a worker's share
        (1.0, 6000, 20, 4, 10),  # ten seconds at least
        (30.0, 6000, 6, 2, 1),
        (0.001, 6 << 20, 10**9, 1, 10),  # 64 MiB of output
    ],
)
def test_unit_sizes(seconds, size, records, workers, wanted):
    assert unit_records(seconds, size, records, workers) == wanted


def test_units_shrink_towards_the_end():
    sizes = shrinking_sizes(1000, 100, 5, 4)
    assert sum(sizes) == 1000
    assert sizes[0] == 100
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes[:-1]) >= 5
    assert shrinking_sizes(0, 10, 1, 2) == []
    assert shrinking_sizes(3, 10, 1, 8) == [1, 1, 1]
    assert LEAST_UNIT_SECONDS == 10


def test_untrusted_text_cannot_move_the_cursor():
    assert printable("a\x1b[31mb\n[bold]") == "a\\x1b[31mb\\x0a\\[bold]"


@pytest.mark.parametrize(
    ("layout", "limit", "num_records", "is_exact"),
    [
        (Layout.TAR, None, 4, False),
        (Layout.TAR, 4, 4, True),
        (Layout.TAR, 4, 0, False),
        (Layout.PARQUET, None, 4, True),
        (Layout.PARQUET, None, 0, False),
    ],
)
def test_a_count_is_exact_but_for_whole_tars_and_what_cannot_be_read(layout, limit, num_records, is_exact):
    unit = Unit(0, "a" * 20, layout, (ObjectInfo("x", 9, "v"),), 0, 9, num_records)
    plan = Plan({"limit": limit}, layout, (unit,), 1, 9, num_records, {})
    assert plan.is_exact is is_exact


def test_a_gpu_gets_larger_units():
    objects = tuple(ObjectInfo(f"{number}.png", 9, "v") for number in range(10_000))
    config = job(model="torchvision:resnet50", weights="random")
    on_core, on_gpu = (
        next(pieces_of(MemoryStore(), Survey(Layout.IMAGES, objects, {}), config, Workforce(1, on_gpu=on_gpu)))
        for on_gpu in (False, True)
    )
    assert on_gpu.num_records > 10 * on_core.num_records


class Closed(MemoryStore):
    """A store that lists an object that it cannot read."""

    def read(self, key, **asked):
        if key == "a.tar":
            raise StoreError("a.tar: forbidden")
        return super().read(key, **asked)


def test_a_limited_tar_that_cannot_be_read_is_one_unit_of_its_own():
    store = Closed()
    store.put("a.tar", tar_bytes(0, 4))
    store.put("b.tar", tar_bytes(0, 4))
    found = Survey(Layout.TAR, tuple(store.list()), {})
    first, *others = pieces_of(store, found, job(limit=3), Workforce(1, on_gpu=True))
    assert (first.objects[0].key, first.start, first.num_records) == ("a.tar", 0, 0)
    assert sum(piece.num_records for piece in others) == 3


@pytest.mark.parametrize("key", ["../a.png", "", "a/../../b.png"])
def test_units_that_were_read_back_name_objects_of_the_input(key):
    unit = Unit(0, "a" * 20, Layout.IMAGES, (ObjectInfo(key, 9, "v"),), 0, 1, 1)
    with pytest.raises(ValueError, match="unit 0: "):
        check_units((unit,), Layout.IMAGES)


def test_the_units_of_a_tar_join_without_gap():
    store = MemoryStore()
    store.put("a.tar", tar_bytes(0, 40))
    info = store.head("a.tar")
    assert info is not None
    found = list(pieces_of(store, Survey(Layout.TAR, (info,), {}), job(), Workforce(2, on_gpu=False)))
    assert len(found) > 2
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]
    assert found[-1].stop == info.size
