"""A split listing gives what a listing page by page gives: over folders, flat names, names of any alphabet."""

import logging
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.storage.stores import s3, split_listing
from blocksight.storage.stores.s3 import S3Store
from blocksight.storage.stores.store import UnavailableError
from tests.storage.loopback import Bucket, Reply, etag_of, refused, served

PAGE_KEYS = 8
NAMES = st.text(st.sampled_from("ab/. ~}é水😀\x01"), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Bucket, S3Store]]:
    with served() as both:
        yield both


def listed(shared, keys, prefix="") -> list[str]:
    """The keys that the store lists of a bucket with these keys below d/, in its order."""
    bucket, store = shared
    bucket.reset({f"d/{key}": key.encode() for key in keys})
    bucket.page_size = PAGE_KEYS
    return [info.key for info in store.list(prefix)]


def in_order(keys) -> list[str]:
    return sorted((key for key in set(keys) if not key.endswith("/")), key=str.encode)


def was_split(bucket) -> bool:
    return any("delimiter" in asked.query for asked in bucket.asked)


@settings(max_examples=25, deadline=None)
@given(keys=st.sets(NAMES, min_size=1, max_size=120))
def test_any_names_are_listed_whole_once_and_in_order(shared, keys):
    assert listed(shared, keys) == in_order(keys)


FOLDERS = [f"n{folder:02}/{number:02}.jpg" for folder in range(6) for number in range(15)]
FLAT = [f"{number:03}.jpg" for number in range(80)]
ODD = ["é.jpg", "水/1.jpg", "~", "}", "}x", "\x01"]
MIXED = [*FOLDERS, *FLAT, *(f"n01/deep/{number:03}" for number in range(40)), *ODD]


@pytest.mark.parametrize("keys", [FOLDERS, FLAT, MIXED])
def test_long_listings_are_split(shared, keys):
    assert listed(shared, keys) == in_order(keys)
    assert was_split(shared[0])


def test_a_prefix_is_split_as_the_whole_is(shared):
    assert listed(shared, MIXED, "n") == in_order(key for key in MIXED if key.startswith("n"))
    assert was_split(shared[0])


def test_versions_and_sizes_are_the_objects_own(shared):
    listed(shared, FOLDERS)
    assert {(info.size, info.etag) for info in shared[1].list()} == {
        (len(key), etag_of(key.encode())) for key in FOLDERS
    }


def test_a_short_listing_costs_no_request_more(shared):
    keys = FLAT[: PAGE_KEYS * split_listing.PAGES_ALONE]
    assert listed(shared, keys) == keys
    assert len(shared[0].asked) == split_listing.PAGES_ALONE


def test_several_parts_are_listed_at_once(shared):
    bucket, store = shared
    listed(shared, FOLDERS)
    both = threading.Barrier(2, timeout=20)
    answer = bucket.answer

    def answer_two_together(asked):
        if asked.query.get("prefix") in ("d/n00/", "d/n01/") and "continuation-token" not in asked.query:
            both.wait()
        return answer(asked)

    bucket.answer = answer_two_together
    try:
        assert len(list(store.list())) == len(FOLDERS)
    finally:
        bucket.answer = answer


@pytest.mark.parametrize("unknown", ["start-after", "delimiter"])
def test_a_store_that_knows_no_split_is_listed_whole_and_once(shared, unknown, monkeypatch):
    bucket, _ = shared
    listing = bucket._listing

    def listing_of_less(asked):
        asked.query = {name: value for name, value in asked.query.items() if name not in (unknown, "delimiter")}
        return listing(asked)

    monkeypatch.setattr(bucket, "_listing", listing_of_less)
    assert listed(shared, MIXED) == in_order(MIXED)


def test_a_store_with_an_order_of_its_own_is_listed_page_by_page(shared, monkeypatch):
    monkeypatch.setattr("tests.storage.loopback.sorted", lambda keys, **_: sorted(keys, reverse=True), raising=False)
    assert listed(shared, FLAT) == in_order(FLAT)[::-1]
    assert not was_split(shared[0])


def test_a_directory_bucket_is_listed_page_by_page(shared, monkeypatch):
    monkeypatch.setattr(s3, "DIRECTORY_BUCKET", "b")
    assert listed(shared, FLAT) == FLAT
    assert not was_split(shared[0])


FOREIGN = b"<ListBucketResult><Name>b</Name><Contents><Key>d/x</Key><Size>1</Size></Contents></ListBucketResult>"


@pytest.mark.parametrize("wrong", [refused(403, "AccessDenied"), Reply(body=FOREIGN)], ids=["refused", "foreign"])
def test_a_part_that_is_refused_or_wrong_is_decided_by_the_whole(shared, wrong):
    bucket, store = shared
    listed(shared, FOLDERS)
    bucket.manners = lambda asked, _: wrong if asked.query.get("prefix") == "d/n03/" else None
    assert [info.key for info in store.list()] == FOLDERS


def test_a_store_that_is_busy_ends_the_listing_so_that_it_is_tried_again(shared):
    bucket, store = shared
    listed(shared, FOLDERS)
    bucket.manners = lambda asked, _: refused(503, "SlowDown") if asked.query.get("prefix") == "d/n03/" else None
    with pytest.raises(UnavailableError, match="n03/"):
        list(store.list())


@pytest.mark.parametrize("keys", [FOLDERS, FLAT, [*FOLDERS, *FLAT]], ids=["folders", "flat", "both"])
def test_progress_counts_each_object_once(shared, monkeypatch, caplog, keys):
    monkeypatch.setattr(split_listing, "PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING):
        listed(shared, keys)
    assert f"s3://b/d: listed {len(keys)} objects" in caplog.messages
