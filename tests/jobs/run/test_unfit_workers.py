"""Workers that cannot use their device: they give their units back, the others go on, and a sentence ends the job."""

import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import GetTimeoutError, RayTaskError
from rich.console import Console

from blocksight.cluster import cores
from blocksight.cluster.errors import ClusterError
from blocksight.cluster.nodes import NodeWatch
from blocksight.cluster.sizing import Sizing
from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import told_by_device
from blocksight.jobs.ledger.stop_request import Stop
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.estimate import MeasuredRate
from blocksight.jobs.plan.records import UnitFailure, UnitReturned, UnitSkipped
from blocksight.jobs.run import job, pipeline, workers
from blocksight.jobs.worker.error_classes import UnfitWorkerError
from tests.faults.devices import LOST, MEMORY, UNFIT, one_of_each
from tests.jobs.jobs_of import config_of
from tests.jobs.tiny import folder_of_images
from tests.jobs.worker.test_commit import UNIT
from tests.storage.memory import MemoryStore

ERRORS = one_of_each()
UNITS = [replace(UNIT, unit_id=name) for name in "abcd"]


def returned(unit, worker="w", *, is_unfit=True):
    return UnitReturned(unit.unit_id, worker, "no driver", is_unfit=is_unfit)


def done(unit):
    return UnitSkipped(unit.unit_id)  # any other outcome


def outcomes_of(waves, units=UNITS, num_actors=4):
    """The outcomes of a run, whose waves are played by these functions of the wave's units; and the waves."""
    seen = []

    def wave_of(some, unfit):
        seen.append(" ".join(["".join(unit.unit_id for unit in some), *sorted(unfit)]))
        return (yielded for yielded in waves[len(seen) - 1](some))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_outcomes_of_wave", lambda wave, *_: wave)
        made = list(
            pipeline._wave_outcomes(units, wave_of, Stop(MemoryStore(), "run"), 60, num_actors, NodeWatch(print))
        )
    return made, seen


def test_a_unit_that_is_given_back_joins_a_later_wave():
    waves = [
        lambda some: [done(some[0]), returned(some[1]), done(some[2]), done(some[3])],
        lambda some: map(done, some),
    ]
    made, seen = outcomes_of(waves)
    assert seen == ["abcd", "b w"]
    assert [one.unit_id for one in made if isinstance(one, UnitSkipped)] == ["a", "c", "d", "b"]


def test_a_unit_that_is_given_back_again_and_again_stays_open():
    lost = [lambda some: [returned(one, is_unfit=False) for one in some]] * pipeline.MAX_RETURNS
    made, seen = outcomes_of(lost, UNITS[:1])
    assert seen == ["a"] * pipeline.MAX_RETURNS
    failure = made[-1]
    assert isinstance(failure, UnitFailure)
    assert (failure.unit_id, failure.error) == ("a", "no driver")


def test_the_job_ends_once_all_workers_are_unfit():
    with pytest.raises(UnfitWorkerError, match=r"no worker can go on.*worker 2 .*no driver"):
        outcomes_of([lambda some: [returned(some[0], "1"), returned(some[1], "2"), done(some[2])]], num_actors=2)


def test_one_unit_that_an_unfit_worker_gave_back_ends_no_job_of_two():
    """The last units are fewer than the workers; the unfit one may be the first that Ray offers, each time."""
    waves = [
        lambda some: [done(some[0]), returned(some[1], "1")],
        lambda some: [returned(some[0], "1")],
        lambda some: [done(some[0])],
    ]
    made, seen = outcomes_of(waves, UNITS[:2], num_actors=2)
    assert seen == ["ab", "b 1", "b 1"]
    assert [one.unit_id for one in made if isinstance(one, UnitSkipped)] == ["a", "b"]


def test_workers_that_are_unfit_one_wave_after_the_other_end_the_job():
    with pytest.raises(UnfitWorkerError, match=r"no worker can go on.*worker 2"):
        outcomes_of([lambda some: [returned(some[0], "1")], lambda some: [returned(some[0], "2")]], UNITS[:1], 2)


def test_a_wave_has_a_worker_for_each_unit_beside_those_that_were_unfit():
    sizing = replace(SIZING, num_actors=8)
    sizes = [pipeline._actors(None, None, sizing, 3, frozenset(unfit))["compute"].max_size for unfit in ("", "ab")]
    assert sizes == [3, 5]
    assert pipeline._actors(None, None, SIZING, 3, frozenset("ab"))["compute"].max_size == 2


@pytest.mark.parametrize(
    "wave",
    [
        lambda some: [returned(some[0], "1"), returned(some[1], "1"), done(some[2]), done(some[3])],
        lambda some: [returned(some[0], "1"), done(some[1]), returned(some[2], "2"), done(some[3])],
        lambda some: [returned(one, str(number), is_unfit=False) for number, one in enumerate(some)],
    ],
    ids=["one of two", "in turns", "each lost its process"],
)
def test_the_job_goes_on_while_one_worker_is_fit(wave):
    made, _ = outcomes_of([wave, lambda some: map(done, some)], num_actors=2)
    assert {one.unit_id for one in made if isinstance(one, UnitSkipped)} == set("abcd")


def test_a_slow_model_is_waited_for_as_long_as_its_measured_rate_says(tmp_path):
    """One forward of a large model may take seconds: an hour without a unit is then no sign that the job hangs."""
    context = SimpleNamespace(config=config_of("in", tmp_path), device="cpu")
    units = [replace(UNIT, num_records=number) for number in (1, 3)]
    assert pipeline._longest_seconds(units, context, MeasuredRate(5_000.0, "measured")) == 15_000
    guess = pipeline._longest_seconds(units, context, None)
    assert pipeline._longest_seconds(units, context, MeasuredRate(1e-3, "measured")) == guess < 3_600


# ---------------------------------------------------------------- the actor


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(pipeline.time, "sleep", seconds.append)
    monkeypatch.setattr(pipeline, "_actor_name", lambda: "node:actor")
    return seconds


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_an_unfit_worker_waits_longer_and_longer_before_it_takes_a_unit(slept):
    held = pipeline._Held(lambda: "step")
    for _ in range(5):
        assert held.outcome(lambda: returned(UNIT)).worker == "node:actor"
    assert slept == [10, 20, 40, 60]
    assert held.outcome(lambda: "table") == "table"
    assert held.outcome(lambda: "table") == "table"
    assert len(slept) == 5


def test_a_worker_that_was_unfit_lets_the_others_take_the_units_first(slept):
    pipeline._Held(lambda: "step", frozenset(["node:another"]))
    assert slept == []
    pipeline._Held(lambda: "step", frozenset(["node:actor"]))
    assert slept == [pipeline.MAX_PAUSE_SECONDS]


@pytest.mark.parametrize(("gpus", "wanted"), [([0], "GPU 0"), ([], "actor a1")])
def test_a_worker_is_named_by_its_gpu_so_that_the_next_wave_knows_it(monkeypatch, gpus, wanted):
    own = SimpleNamespace(get_node_id=lambda: "0123456789", get_actor_id=lambda: "a1")
    played = SimpleNamespace(get_runtime_context=lambda: own, get_gpu_ids=lambda: gpus)
    monkeypatch.setattr(pipeline, "ray", played)
    assert pipeline._actor_name() == f"{os.uname().nodename}:01234567:{wanted}"


def test_a_worker_that_lost_its_device_ends_at_its_next_unit(slept, monkeypatch):
    class Ended(BaseException):
        pass

    monkeypatch.setattr(pipeline, "_end_process", raising(Ended()))
    held = pipeline._Held(lambda: "step")
    assert held.outcome(lambda: returned(UNIT, is_unfit=False)).worker == "node:actor"
    with pytest.raises(Ended):
        held.outcome(lambda: "never called")
    assert slept == []


@pytest.mark.parametrize("trouble", [MEMORY, UNFIT, LOST])
def test_an_actor_whose_device_does_not_work_starts_and_gives_its_units_back(trouble):
    made = iter([raising(ERRORS[trouble])] * 2 + [lambda: "step"])
    held = pipeline._Held(lambda: next(made)())
    with pytest.raises(UnfitWorkerError, match="device"):
        held.step()
    assert held.step() == "step"
    assert held.step() == "step"


def test_an_actor_with_a_bad_model_does_not_start():
    with pytest.raises(ModelError):
        pipeline._Held(raising(ModelError("no such weights")))


@pytest.mark.parametrize("trouble", [MEMORY, UNFIT, LOST])
def test_a_task_that_fails_for_its_device_says_so_with_its_node(trouble):
    cause = pipeline._cause(RayTaskError("learn", "Traceback", ERRORS[trouble], ip="10.0.0.7"))
    assert isinstance(cause, ClusterError)
    assert str(cause) == f"a worker on 10.0.0.7 cannot go on: {told_by_device(ERRORS[trouble])}"
    told = ClusterError("n7 cannot choose: no memory")
    told.__cause__ = ERRORS[trouble]
    assert pipeline._cause(RayTaskError("choose", "Traceback", told)) is told
    assert isinstance(pipeline._cause(RayTaskError("learn", "Traceback", ModelError("x"))), ModelError)


# ---------------------------------------------------------------- before any unit


class Played:
    """Ray, whose tasks are called here; `late` never answers."""

    def __init__(self, *, late=False):
        self.late = late

    def remote(self, **_):
        return lambda task: SimpleNamespace(remote=task)

    def get(self, made, timeout):
        if self.late:
            raise GetTimeoutError
        return made


SIZING = Sizing(2, 1.0, 1.0, 0.5, threads_per_actor=1)


def test_a_gpu_that_ray_counts_and_torch_cannot_use_is_told_before_any_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ray", Played())
    monkeypatch.setattr(job, "session_of", lambda *_: nullcontext(SIZING))
    monkeypatch.setattr(torch, "ones", raising(ERRORS[UNFIT]))
    data = folder_of_images(tmp_path / "in", 1, bad=False)
    with pytest.raises(ClusterError, match=f"cannot use the one of {os.uname().nodename}: the device cannot run this"):
        job.run_job(config_of(data, tmp_path / "out"), Execution(runner="ray"), Console(quiet=True))
    assert not (tmp_path / "out" / "_job" / "plan").exists()


def test_a_gpu_that_works_or_is_not_free_yet_stops_nothing(monkeypatch):
    monkeypatch.setattr(pipeline, "_gpu_trouble", lambda: None)
    for ray in (Played(), Played(late=True)):
        monkeypatch.setattr(pipeline, "ray", ray)
        pipeline.check_gpu(SIZING)
    monkeypatch.setattr(pipeline, "check_gpu", raising(AssertionError("there is no GPU")))
    workers.check_gpu(None)
    workers.check_gpu(replace(SIZING, gpus_per_actor=0.0))


@pytest.mark.parametrize(("gpus", "threads"), [(0, 8), (1, 8), (4, 2), (16, 1)])
def test_a_compiler_has_its_actors_share_of_the_cores(tmp_path, monkeypatch, gpus, threads):
    monkeypatch.setattr(cores, "NVIDIA_GPUS", tmp_path)
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    for number in range(gpus):
        (tmp_path / str(number)).mkdir()
    assert cores.compiler_threads(on_gpu=False) == 1
    pipeline._limit_compiler("cuda")
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads)
    pipeline._limit_compiler("cpu")  # what the user has set stays
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads)
