"""The budget of repeated calls: a burst is free, then one call a second, and what succeeds earns it back."""

import pytest

from blocksight.storage.stores import retry_budget, retrying
from blocksight.storage.stores.retry_budget import CAPACITY, DEEPEST_DEBT, LONGEST_FACTOR, PER_SUCCESS, RetryBudget
from blocksight.storage.stores.retrying import FIRST_PAUSE_SECONDS, PatientStore
from blocksight.storage.stores.store import UnavailableError
from tests.storage.memory import MemoryStore


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(retry_budget.time, "monotonic", lambda: now[0])
    return now


def test_a_burst_waits_its_own_pause_and_then_one_call_goes_each_second(clock):
    budget = RetryBudget(last=0.0)
    waits = [budget.seconds_to_wait(0.5) for _ in range(int(CAPACITY) + 10)]
    assert all(0.25 <= wait <= 0.5 for wait in waits[: int(CAPACITY)])
    assert waits[-1] == 0.5 * LONGEST_FACTOR
    assert RetryBudget(tokens=-9.0, last=0.0).seconds_to_wait(20.0) == pytest.approx(15, abs=5)
    assert RetryBudget(tokens=-29.0, last=0.0).seconds_to_wait(20.0) == 30.0
    clock[0] = 60.0
    assert budget.seconds_to_wait(0.5) <= 0.5


def test_pauses_are_spread_so_that_readers_do_not_come_back_together(clock):
    budget = RetryBudget(last=0.0)
    assert len({budget.seconds_to_wait(8.0) for _ in range(10)}) == 10


def test_success_earns_repetitions(clock):
    budget = RetryBudget(tokens=-5.0, last=0.0)
    for _ in range(round(5 / PER_SUCCESS)):
        budget.succeeded()
    assert budget.seconds_to_wait(0.5) == pytest.approx(1.0, abs=1e-9)
    for _ in range(10_000):
        budget.succeeded()
    assert budget.tokens == CAPACITY


def test_the_debt_of_a_thousand_readers_is_paid_in_a_minute(clock):
    budget = RetryBudget(last=0.0)
    for _ in range(5_000):
        budget.seconds_to_wait(30.0)
    clock[0] = DEEPEST_DEBT + 1
    assert budget.seconds_to_wait(0.5) <= 0.5


def test_a_spent_budget_waits_no_longer_than_the_store_is_waited_for(clock, monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    class Away(MemoryStore):
        def head(self, key):
            raise UnavailableError("the store is away")

    monkeypatch.setattr(retrying, "BUDGET", RetryBudget(tokens=-DEEPEST_DEBT, last=0.0))
    monkeypatch.setattr(retrying.time, "sleep", sleep)
    with pytest.raises(UnavailableError):
        PatientStore(Away(), 2 * FIRST_PAUSE_SECONDS).head("k")
    assert 0 < sum(slept) <= 2 * FIRST_PAUSE_SECONDS
