"""A crash before and after each single call to the store; then the same command resumes the job."""

import re

import pytest

from blocksight.jobs.plan import plan
from blocksight.jobs.run import job as run
from blocksight.jobs.worker import attempts
from blocksight.storage.stores.opening import open_store
from tests.faults.stores import Crash, InterceptedStore, MortalCalls
from tests.faults.verifier import contents, verify
from tests.jobs.jobs_of import run_here
from tests.jobs.tiny import folder_of_images
from tests.storage.memory import MemoryStore

ALWAYS = 10**9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("crashes"), 3)


@pytest.fixture
def job(data, tmp_path, monkeypatch):
    """Runs the job on a store in memory, through an interceptor; the units are small, so that there are several."""
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 60.0)
    monkeypatch.setattr(run, "probe", lambda *_: None)  # it uses threads; `test_stores.py` tests it

    def go(store, interceptor):
        def opened(uri, endpoint_url=None):
            return InterceptedStore(store, interceptor) if uri.endswith("out") else open_store(uri, endpoint_url)

        monkeypatch.setattr(plan, "open_store", opened)
        return run_here(data, tmp_path / "out")

    return go


@pytest.fixture
def whole(job):
    """The contents that a run without a crash leaves, and the calls that it makes."""
    store, calls = MemoryStore(), MortalCalls(ALWAYS, after=False)
    assert job(store, calls).manifest is not None
    assert verify(store) == []
    return contents(store), calls.made


# a death before a call equals a death after the previous call, except for calls that threads make at the same time
@pytest.mark.parametrize(
    ("after", "every"),
    [
        pytest.param(False, 1, marks=pytest.mark.faults),
        pytest.param(True, 1, marks=pytest.mark.faults),
        (True, 8),
    ],
    ids=["before", "after", "after some"],
)
def test_a_crash_at_any_call_changes_nothing_in_the_end(job, whole, after, every):
    """`every` is 8: every eighth call, and the first call of each method in each folder."""
    expected, calls = whole
    assert len(expected) >= 2
    assert {call.split()[0] for call in calls} == {"read", "head", "list", "create", "put", "delete"}
    for deadly in chosen(calls, every):
        store = MemoryStore()
        with pytest.raises(Crash):
            job(store, MortalCalls(deadly, after=after))
        committed = contents(store)
        assert committed.items() <= expected.items(), f"died at {calls[deadly]}"
        outcome = job(store, MortalCalls(ALWAYS, after=False))
        assert outcome.manifest is not None, f"died at {calls[deadly]}"
        assert verify(store) == [], f"died at {calls[deadly]}"
        assert contents(store) == expected, f"died at {calls[deadly]}"


def chosen(calls, every):
    """The indices of every n-th call, and of the first call of each method in each folder."""
    kinds = [tuple(re.split("[ /]", call)[:3]) if "_job" in call else call.split("/")[0] for call in calls]
    return [place for place, kind in enumerate(kinds) if place % every == 0 or kinds.index(kind) == place]


def test_repeated_crashes_at_the_same_call_end_too(job, whole, monkeypatch):
    """Each run dies at a later call than the one before, often at the same unit, which is not to blame."""
    monkeypatch.setattr(attempts, "CAREFUL_DEATHS", ALWAYS)
    monkeypatch.setattr(attempts, "MAX_DEATHS", ALWAYS)
    expected, calls = whole
    store = MemoryStore()
    for deadly in range(0, len(calls), 4):
        try:
            job(store, MortalCalls(deadly, after=True))
        except Crash:
            continue
        break
    assert job(store, MortalCalls(ALWAYS, after=False)).manifest is not None
    assert verify(store) == []
    assert contents(store) == expected
