"""A job over the objects of an inventory: no listing, what is gone or changed is a row, and a resume needs none."""

import json

import pytest

from blocksight.jobs.ledger.reconcile import check
from blocksight.jobs.plan.plan import existing_plan, find_input
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import StoreError
from tests.jobs.jobs_of import config_of, rows_in, run_here
from tests.jobs.tiny import picture
from tests.storage.loopback import Bucket, etag_of, served

MANIFEST = "s3://b/reports/manifest.json"
NAMES = ["cat/1.png", "cat/2.png", "dog/changed.png", "dog/gone.png"]


@pytest.fixture
def bucket(monkeypatch):
    """A bucket with images, and an inventory of it that was made before two of them changed."""
    with served() as (running, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr("blocksight.storage.stores.retrying.FIRST_PAUSE_SECONDS", 0.0)
        images = {f"d/{name}": picture(number) for number, name in enumerate(NAMES)}
        body = "".join(f'"b","{key}","{len(data)}",{etag_of(data)}\n' for key, data in images.items()).encode()
        manifest = {
            "sourceBucket": "b",
            "destinationBucket": "arn:aws:s3:::b",
            "fileFormat": "CSV",
            "fileSchema": "Bucket, Key, Size, ETag",
            "files": [{"key": "reports/1.csv", "size": len(body)}],
        }
        del images["d/dog/gone.png"]
        images |= {"d/dog/changed.png": picture(9), "d/dog/new.png": picture(8)}
        running.reset({**images, "reports/1.csv": body, "reports/manifest.json": json.dumps(manifest).encode()})
        yield running


def listings(bucket: Bucket) -> list[str]:
    return [asked.query.get("prefix", "") for asked in bucket.asked if not asked.key]


def test_a_job_takes_its_list_from_an_inventory(bucket, tmp_path):
    asked = {"explainer": "gradient"}
    assert run_here("s3://b/d", tmp_path / "out", inventory=MANIFEST, **asked).job_state.open_units == []
    assert listings(bucket) == []
    store = LocalStore(tmp_path / "out")
    rows = {row["key"]: row["reject_code"] for row in rows_in(store)}
    assert rows == dict(zip(NAMES, (None, None, "input_changed", "input_missing"), strict=True))
    assert "listed by the inventory s3://b/reports/manifest.json" in existing_plan(store).notes[0]
    bucket.objects.clear()
    assert run_here("s3://b/d", tmp_path / "out", **asked).job_state.open_units == []
    assert [fault for _, faults in check(store, existing_plan(store)) for fault in faults] == []


def test_data_that_the_inventory_is_not_of_are_refused_with_both_sides(bucket, tmp_path):
    with pytest.raises(StoreError, match=r"inventory of the bucket 'b', and the data are .*/in: name an"):
        find_input(config_of(tmp_path / "in", tmp_path / "out", inventory=MANIFEST), weights_sha256=None)
    with pytest.raises(StoreError, match="names no object in a bucket; wanted s3://bucket/key"):
        find_input(config_of("s3://b/d", tmp_path / "out", inventory="s3://b"), weights_sha256=None)


def test_a_pattern_chooses_of_an_inventory(bucket, tmp_path):
    found = find_input(config_of("s3://b/d/cat/*.png", tmp_path / "out", inventory=MANIFEST), weights_sha256=None)
    assert [info.key for info in found.survey.objects] == ["1.png", "2.png"]
