"""What a job asks of its store: no right to delete, no listing per unit, and few writes."""

from collections import Counter
from functools import partial

import pytest

from blocksight.jobs.plan import plan
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.store import StoreError
from tests.faults.stores import InterceptedStore
from tests.faults.verifier import verify
from tests.jobs.jobs_of import run_here
from tests.jobs.tiny import folder_of_images
from tests.storage.memory import MemoryStore


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs a job of so many units of one image on a store in memory, through an interceptor."""
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 1.0)

    def run(num_units, store, interceptor):
        def opened(uri, endpoint_url=None):
            return InterceptedStore(store, interceptor) if uri.endswith("out") else open_store(uri, endpoint_url)

        monkeypatch.setattr(plan, "open_store", opened)
        return run_here(folder_of_images(tmp_path / f"in-{num_units}", num_units, bad=False), tmp_path / "out")

    return run


def refusing_to_delete(name, key, call):
    if name == "delete":
        raise StoreError(f"deleting {key} was refused")
    return call()


def test_a_job_ends_without_the_right_to_delete(job):
    store = MemoryStore()
    assert job(3, store, refusing_to_delete).manifest is not None
    assert verify(store) == []
    assert len(list(store.list("_job/attempts/"))) == 4  # of three units, and the preflight
    assert len(list(store.list("_job/probe-"))) > 0


def noting(seen, name, key, call):
    seen[name] += 1
    return call()


PUT_LIKE = ("create", "put", "delete")


def test_a_unit_costs_two_writes_and_no_listing_where_one_process_does_it(job):
    few, many = Counter(), Counter()
    job(2, MemoryStore(), partial(noting, few))
    assert job(12, MemoryStore(), partial(noting, many)).manifest["num_units"] == 12
    each = {name: (many[name] - few[name]) / 10 for name in ("list", *PUT_LIKE)}
    assert each["list"] == 0
    assert sum(each[name] for name in PUT_LIKE) == 2
