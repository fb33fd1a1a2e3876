"""Units are cut by a measured rate, once, before the first unit; the plan stores the rate."""

import json
from dataclasses import replace
from math import inf, nan

import pytest

from blocksight.cluster.sizing import MOST_UNIT_BYTES, MOST_UNIT_PIXEL_BYTES
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.estimate import HOST_SECONDS, MeasuredRate
from blocksight.jobs.plan.forward_setting import PlannedForward
from blocksight.jobs.plan.machine_rates import MeasuredCost, rate_of_forward, recall, remember, remembered_rate
from blocksight.jobs.plan.plan import PLAN_KEY, ensure_plan, existing_plan, find_input, load_plan
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.run import job, workers
from blocksight.jobs.run.job import plan_job
from blocksight.storage.inputs.survey import Layout, Survey
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import ObjectInfo
from tests.jobs.jobs_of import blocksight, config_of, pieces_of, run_here
from tests.jobs.tiny import MODEL, folder_of_images, folder_of_tars
from tests.storage.memory import MemoryStore

H200 = PlannedForward(ForwardSetting(), forwards_per_second=5e4, hardware="H200", compute_capability="9.0")
MANY = Survey(Layout.IMAGES, tuple(ObjectInfo(f"{number:06}.png", 9, "v") for number in range(50_000)), {})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def first_size(workforce, **options):
    config = config_of("in", "out", **{"model": "torchvision:resnet50", "weights": "random", **options})
    return next(pieces_of(MemoryStore(), MANY, config, workforce)).num_records


def test_a_faster_gpu_gets_longer_units_within_the_limits():
    slow, fast = (Workforce(8, True, MeasuredRate(seconds, "measured")) for seconds in (0.5, 0.05))
    assert (first_size(slow), first_size(fast)) == (313, 313)  # a twentieth of a worker's share of the records
    assert first_size(replace(slow, num_workers=1)) == 600  # five minutes
    assert first_size(replace(fast, num_workers=1)) == MOST_UNIT_PIXEL_BYTES // (3 * 224 * 224)
    hour = Workforce(64, True, MeasuredRate(3600.0, "measured"))
    assert first_size(hour) == 1
    assert first_size(Workforce(1, True)) != first_size(replace(slow, num_workers=1))


def test_pixels_and_maps_count_by_the_models_own_input():
    quick = Workforce(1, True, MeasuredRate(0.001, "measured"))
    assert first_size(replace(quick, input_size=(448, 448))) == MOST_UNIT_PIXEL_BYTES // (3 * 448 * 448)
    wide = first_size(replace(quick, input_size=(448, 448)), target="top-20")
    assert wide == MOST_UNIT_BYTES // (20 * (4 * 5_700 + 1_300))
    assert first_size(replace(quick, input_size=(64, 64))) == MOST_UNIT_BYTES // 7_000


def test_a_gpus_rate_holds_the_hosts_share():
    rate = rate_of_forward(H200, 1_000)
    assert rate is not None
    assert rate.seconds_per_record == pytest.approx(0.02 + HOST_SECONDS)
    assert str(rate) == "0.024 s a record (measured: 50,000 forwards/s on H200, compute capability 9.0)"
    assert rate_of_forward(replace(H200, forwards_per_second=None), 1_000) is None
    assert rate_of_forward(PlannedForward(ForwardSetting(), forwards_per_second=9.0), 1_000) is None  # of a CPU


def test_an_input_is_read_once_and_cut_twice(tmp_path):
    config = config_of(folder_of_tars(tmp_path / "in"), tmp_path / "out")
    found = find_input(config, weights_sha256=None)
    for folder in (tmp_path / "in").iterdir():
        folder.unlink()
    slow, quick = (found.cut(Workforce(1, False, MeasuredRate(seconds, "x"))) for seconds in (20.0, 1e-3))
    assert len(slow.units) > len(quick.units)
    assert slow.num_records == quick.num_records
    assert (slow.fingerprint, slow.rate) == (quick.fingerprint, MeasuredRate(20.0, "x"))


def test_a_plan_keeps_its_rate_and_an_old_plan_has_none(tmp_path):
    config = config_of(folder_of_images(tmp_path / "in", 3), tmp_path / "out")
    output, found = job.begun_or_new(config)
    ensure_plan(output, found.cut(Workforce(1, False, MeasuredRate(2.0, "measured on a node"))))
    made = existing_plan(output)
    assert made.rate == MeasuredRate(2.0, "measured on a node")
    assert "units cut by" in blocksight("status", tmp_path / "out").stdout
    assert json.loads(blocksight("status", tmp_path / "out", "--json").stdout)["rate"]["seconds_per_record"] == 2.0
    ensure_plan(output, found.cut(Workforce(1, False, MeasuredRate(9.0, "another driver"))))
    assert existing_plan(output) == made
    old = json.loads((tmp_path / "out" / PLAN_KEY).read_bytes())
    del old["rate"]
    (tmp_path / "out" / PLAN_KEY).write_text(json.dumps(old))
    assert existing_plan(output).rate is None
    assert "units cut by" not in blocksight("status", tmp_path / "out").stdout


def test_what_this_machine_remembers_cuts_a_new_plan(tmp_path):
    config = config_of(folder_of_images(tmp_path / "in", 20, bad=False), tmp_path / "out")
    execution = job.Execution(runner="local", workers=1)
    assert plan_job(config, execution)[1].rate is None
    before = plan_job(config, execution)[1].units
    remember(config, "cpu", MeasuredCost(9.0, 900.0, 7000, "2026-01-01"))
    rate = remembered_rate(config, "cpu")
    assert rate is not None
    plan = plan_job(config, execution)[1]
    assert plan.rate == rate
    assert rate.seconds_per_record == 9.0 + HOST_SECONDS
    assert [len(unit.objects) for unit in plan.units] == [2] * 9 + [1] * 2 != [len(unit.objects) for unit in before]
    asked = ("--data", config.data, "--output", config.output, "--model", MODEL, "--runner", "local")
    assert "cut by 9 s a record (measured on" in blocksight("plan", *asked).stdout
    run_here(config.data, config.output)
    stored = existing_plan(LocalStore(tmp_path / "out"))
    assert stored.rate == rate
    remember(config, "cpu", MeasuredCost(0.1, 900.0, 7000, "2026-01-02"))
    assert plan_job(config, execution)[1] == stored


ABSURD = [0, -5, -HOST_SECONDS, nan, inf, 1e300, "much"]


@pytest.mark.parametrize(
    "change",
    [
        *({"seconds_per_record": seconds} for seconds in ABSURD),
        *({"forwards_per_record": number} for number in (-1, nan, inf)),
        {"bytes_per_record": -7},
    ],
    ids=str,
)
def test_what_no_measurement_says_is_not_remembered(tmp_path, change):
    config = config_of(tmp_path / "in", tmp_path / "out")
    file = remember(config, "cpu", MeasuredCost(1.0, 900.0, 7000, "2026-01-01"))
    assert recall(config, "cpu") is not None
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **change}))
    assert recall(config, "cpu") is None
    assert remembered_rate(config, "cpu") is None


@pytest.mark.parametrize("seconds", ABSURD[:5])
def test_a_plan_with_an_absurd_rate_is_damaged(tmp_path, seconds):
    config = config_of(folder_of_images(tmp_path / "in", 3), tmp_path / "out")
    output, found = job.begun_or_new(config)
    ensure_plan(output, found.cut(Workforce(1, False, MeasuredRate(2.0, "x"))))
    stored = json.loads((tmp_path / "out" / PLAN_KEY).read_bytes())
    stored["rate"]["seconds_per_record"] = seconds
    (tmp_path / "out" / PLAN_KEY).write_text(json.dumps(stored))
    with pytest.raises(UnreconciledError, match="rate"):
        existing_plan(output)


def test_without_a_home_nothing_is_remembered_and_a_job_is_planned(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a container's user may have no entry
    config = config_of(folder_of_images(tmp_path / "in", 3), tmp_path / "out")
    assert plan_job(config, job.Execution(runner="local", workers=1))[1].rate is None
    with pytest.raises(ConfigError, match=r"home directory.*XDG_CACHE_HOME"):
        remember(config, "cpu", MeasuredCost(1.0, 900.0, 7000, "2026-01-01"))


def test_a_new_job_on_gpus_is_cut_by_the_rate_of_its_probe(tmp_path, monkeypatch):
    config = config_of(folder_of_images(tmp_path / "in", 30, bad=False), tmp_path / "out")
    slow = replace(H200, forwards_per_second=7.0)  # 14 forwards take 2 s
    monkeypatch.setattr(job, "_chosen_forward", lambda *_: slow)
    monkeypatch.setattr(job, "workforce_of", lambda _: Workforce(1, True))
    run_here(config.data, config.output)
    plan = load_plan(LocalStore(tmp_path / "out"))
    assert plan is not None
    assert plan.rate == rate_of_forward(slow, 14)
    assert {len(unit.objects) for unit in plan.units} == {5}


def test_a_plan_for_gpus_says_that_one_is_measured_first(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "workforce_of", lambda _: Workforce(8, True))
    data = folder_of_images(tmp_path / "in", 3)
    said = blocksight("plan", "--data", data, "--output", tmp_path / "out", "--model", MODEL).stdout
    assert "a new job measures one GPU first" in " ".join(said.split())
