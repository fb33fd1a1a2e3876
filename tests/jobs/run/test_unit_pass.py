"""Calls on cores and on a cluster: in order, bounded, and told if they fail."""

import os
import signal
import time
from functools import partial
from itertools import islice

import pytest
from rich.console import Console

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.session import ray_session
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.run import pipeline
from blocksight.jobs.run.unit_pass import AHEAD, LEAST_RECORDS, in_order
from blocksight.storage.stores.store import MissingError

QUIET = Console(quiet=True)
TWO = Execution(workers=2)


def slow_first(number):
    """The first of them ends last."""
    time.sleep(0.3 * (number == 0))
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


def test_results_come_in_order_from_other_processes():
    found = list(in_order(slow_first, range(8), LEAST_RECORDS, TWO, QUIET))
    assert [number for number, _ in found] == list(range(8))
    processes = {process for _, process in found}
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize(
    ("execution", "num_records"),
    [(TWO, LEAST_RECORDS - 1), (Execution(runner="local"), 10**6), (Execution(workers=1), 10**6)],
)
def test_few_records_and_one_worker_stay_in_this_process(execution, num_records):
    found = list(in_order(slow_first, range(3), num_records, execution, QUIET))
    assert {process for _, process in found} == {os.getpid()}


def test_no_more_calls_are_ahead_than_workers_can_take(tmp_path):
    results = in_order(partial(noted, place=tmp_path), range(50), LEAST_RECORDS, TWO, QUIET)
    assert list(islice(results, 3)) == [0, 1, 2]
    results.close()
    assert len(list(tmp_path.iterdir())) <= 3 + 2 * AHEAD


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
