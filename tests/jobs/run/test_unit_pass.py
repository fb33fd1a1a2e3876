"""Calls on cores and on a cluster: in order, bounded, and told if they fail."""

import os
import signal
import time
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import pytest
from rich.console import Console

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.session import ray_session
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.run import pipeline
from blocksight.jobs.run.unit_pass import AHEAD, LEAST_RECORDS, Reopening, in_order
from blocksight.storage.stores.store import MissingError
from tests.faults.cluster import RayCluster

QUIET = Console(quiet=True)
TWO = Execution(workers=2)


def own_process(number):
    return number, os.getpid()


def first_waits_for_another_process(number, place):
    """The first of them ends only after a call in another process, a minute at most."""
    if number:
        place.joinpath(str(os.getpid())).touch()
    for _ in range(600 * (not number)):
        if {file.name for file in place.iterdir()} - {str(os.getpid())}:
            break
        time.sleep(0.1)
    return number, os.getpid()


def noted(number, place):
    place.joinpath(str(number)).touch()
    return number


def failing(number):
    if number == 3:
        raise MissingError("unit 3 is gone")
    return number


def killed(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@dataclass
class Opened(Reopening):
    """Notes each time that a process opens it."""

    place: Path

    @cached_property
    def store(self):
        self.place.joinpath(f"{os.getpid()}-{time.monotonic_ns()}").touch()
        return self.place

    def __call__(self, number):
        return number if self.store else None


def together(number, place, wanted=4):
    """Waits until so many calls are under way, a minute at most; how many there were."""
    place.joinpath(str(number)).touch()
    for _ in range(600):
        if len(list(place.iterdir())) >= wanted:
            break
        time.sleep(0.1)
    return len(list(place.iterdir()))


def test_results_come_in_order_from_other_processes(tmp_path):
    work = partial(first_waits_for_another_process, place=tmp_path)
    found = list(in_order(work, range(8), LEAST_RECORDS, TWO, QUIET))
    assert [number for number, _ in found] == list(range(8))
    processes = {process for _, process in found}
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize(
    ("execution", "num_records"),
    [(TWO, LEAST_RECORDS - 1), (Execution(runner="local"), 10**6), (Execution(workers=1), 10**6)],
)
def test_few_records_and_one_worker_stay_in_this_process(execution, num_records):
    found = list(in_order(own_process, range(3), num_records, execution, QUIET))
    assert {process for _, process in found} == {os.getpid()}


def test_no_more_calls_are_ahead_than_workers_can_take(tmp_path):
    results = in_order(partial(noted, place=tmp_path), range(50), LEAST_RECORDS, TWO, QUIET)
    assert list(islice(results, 3)) == [0, 1, 2]
    results.close()
    assert len(list(tmp_path.iterdir())) <= 3 + 2 * AHEAD


def test_a_process_opens_its_stores_once_for_all_its_calls(tmp_path):
    assert list(in_order(Opened(tmp_path), range(20), LEAST_RECORDS, TWO, QUIET)) == list(range(20))
    assert len(list(tmp_path.iterdir())) <= 2


def test_a_failure_is_raised_as_it_is_and_a_death_is_told():
    with pytest.raises(MissingError, match="unit 3 is gone"):
        list(in_order(failing, range(9), LEAST_RECORDS, TWO, QUIET))
    with pytest.raises(ClusterError, match=r"a process of this command died.*--workers 1"):
        list(in_order(killed, range(9), LEAST_RECORDS, TWO, QUIET))


@pytest.mark.servers
def test_a_session_returns_the_same():
    with ray_session(num_actors=2, device="cpu"):
        submit, result = pipeline.calls_of(failing)
        submitted = [submit(number) for number in range(5)]
        assert [result(one) for one in (*submitted[:3], submitted[4])] == [0, 1, 2, 4]
        with pytest.raises(MissingError, match="unit 3 is gone"):
            result(submitted[3])


@pytest.mark.servers
def test_a_cluster_with_a_gpu_makes_as_many_calls_as_it_has_cpus_and_each_process_opens_once(tmp_path):
    """Five calls fit beside the room for a task; of one GPU's worker two would be under way."""
    calls, opened = tmp_path / "calls", tmp_path / "opened"
    calls.mkdir(), opened.mkdir()
    with RayCluster(0, num_cpus=6, num_gpus=1) as cluster:
        joined = Execution(address=cluster.address)
        seen = list(in_order(partial(together, place=calls), range(4), 4, joined, QUIET))
        assert seen == [4, 4, 4, 4]
        assert list(in_order(Opened(opened), range(40), 40, joined, QUIET)) == list(range(40))
    processes = [note.name.partition("-")[0] for note in opened.iterdir()]
    assert len(processes) == len(set(processes))
