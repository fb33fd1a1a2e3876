"""The S3 store checks each reply, for real gateways deviate from S3 in many ways."""

import os
from dataclasses import replace

import pytest

from blocksight.storage.inputs.loose import read_images
from blocksight.storage.inputs.survey import survey
from blocksight.storage.stores import retrying
from blocksight.storage.stores.opening import WeakStoreError, open_file, open_named, probe, probe_reads
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.s3 import S3Store, extended_deadline
from blocksight.storage.stores.s3_client import ATTEMPTS
from blocksight.storage.stores.s3_endpoints import check_resolved_endpoint
from blocksight.storage.stores.s3_replies import version
from blocksight.storage.stores.store import ChangedError, ObjectError, StoreError, UnavailableError
from blocksight.storage.stores.windowed_file import WindowedFile
from tests.storage.loopback import Bucket, Reply, etag_of, refused, served
from tests.storage.memory import MemoryStore


@pytest.fixture(scope="module")
def connect():
    """One bucket and one store for all tests of the file."""
    with served() as both:
        yield both


@pytest.fixture
def bucket(connect):
    connect[0].reset({f"d/{number}.png": b"image %d" % number for number in range(7)})
    return connect[0]


@pytest.fixture
def store(connect, monkeypatch):
    monkeypatch.setattr(connect[1], "_has_warned", False)
    return connect[1]


KEYS = [f"{number}.png" for number in range(7)]


def keys(store):
    return [info.key for info in store.list()]


def test_pages_are_followed_to_the_end_and_folder_markers_left_out(bucket, store):
    bucket.page_size = 3
    bucket.objects["d/"] = b""
    bucket.objects["d/sub/"] = b""
    bucket.objects["dd/other.png"] = b"of a folder whose name begins alike"
    found = list(store.list())
    assert [info.key for info in found] == KEYS
    assert [info.size for info in found] == [7] * 7
    assert [info.etag for info in found] == [etag_of(b"image %d" % number) for number in range(7)]
    assert [asked.query["prefix"] for asked in bucket.asked] == ["d/"] * 3


def test_repeated_keys_are_taken_once_and_reported(bucket, store, caplog):
    bucket.page_size, bucket.overlap = 3, 1
    assert keys(store) == KEYS
    assert "lists 2 keys more than once" in caplog.text
    assert keys(store) == KEYS
    assert len(caplog.records) == 1


ODD_KEYS = (
    *(
        "a\nb.png",
        "a\r.png",
        "tab\t.png",
        "\x01\x1b[31m.png",
        " .png",
        "a+b%41&amp;<.png",
        "a?b#c.png",
        "\u202egnp.png",
    ),
    *("e\u0301.png", "\U0001f40d.png", f"{'n' * 1018}.png", f"{'o/' * 500}1.png"),
)


def test_odd_keys_are_listed_and_read(bucket, store):
    """All of these keys are legal; a key has up to 1,024 bytes, prefix included."""
    bucket.reset({f"d/{key}": key.encode() for key in ODD_KEYS})
    found = survey(store)
    assert [info.key for info in found.objects] == sorted(ODD_KEYS)
    assert found.ignored == {}
    read = list(read_images(store, found.objects))
    assert [(record.key, record.data) for record in read] == [(key, key.encode()) for key in sorted(ODD_KEYS)]


def page(*, token, names, truncated="true"):
    entries = "".join(f"<Contents><Key>{n}</Key><Size>1</Size><ETag>x</ETag></Contents>" for n in names)
    next_token = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    body = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{next_token}{entries}</ListBucketResult>"
    return Reply(200, {"Content-Type": "application/xml"}, body.encode())


def test_a_listing_with_one_token_for_ever_is_refused(bucket, store):
    bucket.manners = lambda _asked, _reply: page(token="same", names=["d/1.png"])
    with pytest.raises(StoreError, match="does not move on after 1 keys"):
        keys(store)
    assert len(bucket.asked) == 2


def test_a_listing_with_new_tokens_and_old_keys_is_refused(bucket, store, monkeypatch):
    monkeypatch.setattr("blocksight.storage.stores.s3_replies.MAX_IDLE_PAGES", 5)
    bucket.manners = lambda _asked, _reply: page(token=len(bucket.asked), names=["d/1.png"])
    with pytest.raises(StoreError, match="does not move on"):
        keys(store)
    assert len(bucket.asked) == 6


def test_a_listing_that_goes_on_and_does_not_say_where_is_refused(bucket, store):
    bucket.manners = lambda _asked, _reply: page(token="", names=["d/1.png"])
    with pytest.raises(StoreError, match="no continuation token"):
        keys(store)


def test_a_token_counts_where_the_listing_forgets_to_say_that_it_goes_on(bucket, store):
    pages = {
        None: page(token="2", names=["d/1.png"], truncated="false"),
        "2": page(token="", names=["d/2.png"], truncated="false"),
    }
    bucket.manners = lambda asked, _reply: pages[asked.query.get("continuation-token")]
    assert keys(store) == ["1.png", "2.png"]


def test_a_listing_that_says_it_ends_may_name_a_token_all_the_same(bucket, store):
    """Some gateways return the last token again at the end."""
    bucket.manners = lambda asked, _reply: page(
        token="end", names=[] if "continuation-token" in asked.query else ["d/1.png"], truncated="false"
    )
    assert keys(store) == ["1.png"]


def test_a_key_outside_the_prefix_is_refused(bucket, store):
    bucket.manners = lambda _asked, _reply: page(token="", names=["e/1.png"], truncated="false")
    with pytest.raises(StoreError, match=r"'e/1\.png', which does not begin with 'd/'"):
        keys(store)


def test_a_negative_size_is_refused(bucket, store):
    bucket.listed = lambda _key, entry: {**entry, "Size": "-1"}
    with pytest.raises(StoreError, match="with -1 bytes"):
        keys(store)


@pytest.mark.parametrize("size", ["many", ""])
def test_a_size_that_is_no_number_is_no_traceback(bucket, store, size):
    bucket.listed = lambda _key, entry: {**entry, "Size": size}
    with pytest.raises(UnavailableError, match="no S3 reply"):
        keys(store)


@pytest.mark.parametrize("body", [b"<html><body>please log in</body></html>", b"<ListBucketResult/>"])
def test_what_is_no_listing_is_not_an_empty_one(bucket, store, body):
    bucket.manners = lambda _asked, _reply: Reply(200, {"Content-Type": "text/html"}, body)
    with pytest.raises(StoreError, match="is no listing"):
        keys(store)


def test_an_error_inside_a_listing_of_status_200_is_an_error(bucket, store):
    bucket.manners = lambda _asked, _reply: Reply(200, {}, b"<Error><Code>InternalError</Code></Error>")
    with pytest.raises(UnavailableError, match="InternalError"):
        keys(store)


@pytest.mark.parametrize("missing", ["ETag", "Size"])
def test_what_a_listing_lacks_is_asked_for(bucket, store, missing):
    bucket.listed = lambda _key, entry: {name: value for name, value in entry.items() if name != missing}
    assert [(info.key, info.size, info.etag) for info in store.list("3")] == [("3.png", 7, etag_of(b"image 3"))]


@pytest.mark.parametrize("missing", ["ETag", "Content-Length"])
def test_what_head_lacks_is_in_the_listing(bucket, store, missing):
    def without(asked, reply):
        if asked.method == "HEAD":
            reply.headers[missing] = None

    bucket.manners = without
    info = store.head("3.png")
    assert (info.size, info.etag) == (7, etag_of(b"image 3"))
    bucket.listed = lambda _key, entry: {"Key": entry["Key"]}
    with pytest.raises(StoreError, match="neither HEAD nor the listing"):
        store.head("3.png")


@pytest.mark.parametrize(
    "spelling",
    [
        lambda tag: tag.strip('"'),
        lambda tag: f"W/{tag}",
        lambda tag: tag.upper(),
        lambda tag: f'W/"{tag.strip(chr(34)).upper()}"',
    ],
)
def test_a_version_may_be_spelled_in_two_ways(bucket, store, spelling):
    bucket.listed = lambda _key, entry: {**entry, "ETag": spelling(entry["ETag"])}
    (info,) = store.list("3")
    assert store.read("3.png", etag=info.etag) == b"image 3"
    assert info.etag == store.head("3.png").etag


def test_a_server_of_weak_tags_matches_none_and_is_compared_here(bucket, store):
    def weak(asked, reply):
        if "if-match" in asked.headers:
            return refused(412, "PreconditionFailed")
        if "ETag" in reply.headers:
            reply.headers["ETag"] = f"W/{reply.headers['ETag']}"
        return reply

    bucket.manners = weak
    etag = store.head("3.png").etag
    assert store.read("3.png", etag=etag) == b"image 3"
    bucket.objects["d/3.png"] = b"another"
    with pytest.raises(ChangedError):
        store.read("3.png", etag=etag)


def test_tags_that_are_no_digests_keep_their_case():
    assert version('"aB"') != version('"ab"')
    assert version(f'"{"aB" * 16}-3"') == version(f'"{"ab" * 16}-3"')


def ignoring_conditions(bucket):
    def ignore(asked, reply):
        held = bucket.objects.get(asked.key)
        if reply.status == 412 and held is not None and asked.method == "GET":
            return Reply(200, {"ETag": etag_of(held)}, held)
        return reply

    return ignore


def test_a_server_that_ignores_if_match_is_compared_here(bucket, store):
    bucket.manners = ignoring_conditions(bucket)
    etag = store.head("3.png").etag
    bucket.objects["d/3.png"] = b"another"
    with pytest.raises(ChangedError, match="wanted"):
        store.read("3.png", etag=etag)


def test_a_reply_without_a_version_is_compared_by_head(bucket, store):
    def without(asked, reply):
        if asked.method == "GET" and asked.key:
            reply.headers["ETag"] = None

    bucket.manners = without
    etag = store.head("3.png").etag
    assert store.read("3.png", etag=etag, length=7) == b"image 3"
    with pytest.raises(ChangedError):
        store.read("3.png", etag='"other"')


def test_an_error_inside_a_reply_of_status_200_is_no_object(bucket, store):
    bucket.manners = lambda asked, reply: (
        Reply(200, {}, b"<?xml?><Error><Code>SlowDown</Code></Error>") if asked.method == "GET" else reply
    )
    etag = store.head("3.png").etag
    for asked in ({}, {"etag": etag, "length": 7}, {"start": 2, "length": 3}):
        with pytest.raises(UnavailableError, match="SlowDown"):
            store.read("3.png", **asked)


def cut(bucket, times):
    """Cuts the next `times` bodies, without a length that would show it."""
    left = [times]

    def manners(asked, reply):
        if asked.method == "GET" and asked.key and left[0] > 0:
            left[0] -= 1
            return Reply(reply.status, {**reply.headers, "Content-Length": None}, reply.body[: len(reply.body) // 2])
        return reply

    bucket.manners = manners


def test_a_body_that_ends_early_is_asked_for_again(bucket, store):
    etag = store.head("3.png").etag
    cut(bucket, ATTEMPTS - 1)
    assert store.read("3.png", etag=etag, length=7) == b"image 3"
    cut(bucket, ATTEMPTS - 1)
    assert store.read("3.png", start=2, length=100) == b"age 3"
    cut(bucket, ATTEMPTS)
    with pytest.raises(UnavailableError, match="with 3 bytes in place of 7, 3 times"):
        store.read("3.png", etag=etag, length=7)


def test_a_file_read_in_windows_has_no_gaps(bucket, store):
    body = bytes(range(256)) * 4
    bucket.objects["d/shard.tar"] = body
    info = store.head("shard.tar")
    cut(bucket, 2)
    file = WindowedFile(store, info, window_bytes=100)
    assert file.read(10) == body[:10]
    file.seek(-5, os.SEEK_END)
    assert file.read() == body[-5:]
    assert file.read_at(250, 90) == body[250:340]
    assert file.read_at(0, 1024) == body
    file.seek(0)
    assert file.read() == body


@pytest.mark.parametrize("pause", [0.02, 60.0])
def test_a_body_that_drips_or_hangs_is_given_up(bucket, store, monkeypatch, pause):
    monkeypatch.setattr("blocksight.storage.stores.s3.MAX_LAG_SECONDS", 0.3)
    body = bytes(100)
    bucket.objects["d/3.png"] = body
    bucket.manners = lambda asked, reply: replace(reply, pause=pause) if asked.method == "GET" else reply
    for asked in ({}, {"length": 100}, {"start": 1, "length": 50}):
        with pytest.raises(
            UnavailableError, match=r"comes too slowly: for 0\.3 s it was silent or behind 16,384 bytes"
        ):
            store.read("3.png", **asked)


def test_a_slow_link_is_lived_with():
    """A read may be 90 s behind 16 KiB/s; a faster start does not give it more time."""
    assert extended_deadline(100.0, 50.0, 0) == 100.0
    assert extended_deadline(100.0, 50.0, 20 * 16 << 10) == 120.0
    assert extended_deadline(139.5, 50.0, 16 << 10) == 140.0
    deadline = 90.0
    for second in range(1, 600):  # an image of 9 MiB
        deadline = extended_deadline(deadline, float(second), 16 << 10)
        assert deadline >= second + 89


def test_ranges_are_those_that_were_asked_for(bucket, store):
    etag = store.head("3.png").etag
    assert store.read("3.png", etag=etag, start=2, length=3) == b"age"
    assert store.read("3.png", start=4) == b"e 3"
    assert store.read("3.png", start=6, length=1) == b"3"
    assert store.read("3.png", start=7, length=1) == b""
    assert store.read("3.png", length=0) == b""
    assert [asked.headers.get("range") for asked in bucket.asked[1:]] == [
        "bytes=2-4",
        "bytes=4-",
        "bytes=6-6",
        "bytes=7-7",
    ]
    with pytest.raises(ChangedError):  # a range of a pinned object lies inside it
        store.read("3.png", etag=etag, start=7, length=1)


@pytest.mark.parametrize("shift", [-1, 1])
def test_another_range_is_refused(bucket, store, shift):
    def shifted(asked, reply):
        if "range" not in asked.headers:
            return reply
        held = bucket.objects[asked.key]
        return Reply(
            206, {**reply.headers, "Content-Range": f"bytes {2 + shift}-{4 + shift}/7"}, held[2 + shift : 5 + shift]
        )

    bucket.manners = shifted
    with pytest.raises(StoreError, match="with the range"):
        store.read("3.png", start=2, length=3)


def test_a_range_that_is_ignored_is_refused_unless_the_whole_was_wanted(bucket, store):
    def ignored(asked, reply):
        if asked.method == "GET" and "range" in asked.headers:
            held = bucket.objects[asked.key]
            return Reply(200, {"ETag": etag_of(held)}, held)
        return reply

    bucket.manners = ignored
    assert store.read("3.png", length=7) == b"image 3"
    for asked in ({"start": 2, "length": 3}, {"length": 3}, {"start": 2}):
        with pytest.raises(StoreError, match="ignores the Range header"):
            store.read("3.png", **asked)


def test_metadata_come_back_whatever_the_case_of_their_names(bucket, store):
    store.create("x", b"1", metadata={"attempt": "One"})
    assert bucket.asked[-1].headers["if-none-match"] == "*"
    bucket.metadata["d/x"] = {"X-Amz-Meta-Attempt": "One"}
    assert store.head("x").metadata == {"attempt": "One"}


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "InvalidObjectState", ObjectError),
        (403, "AccessDenied", ObjectError),
        (403, "ExpiredToken", StoreError),
        (503, "SlowDownRead", UnavailableError),
        (429, "TooManyRequests", UnavailableError),
        (403, "RequestLimitExceeded", UnavailableError),
        (400, "ThrottlingException", UnavailableError),
        (408, "Anything", UnavailableError),
        (500, "Anything", UnavailableError),
        (501, "NotImplemented", StoreError),
    ],
)
def test_a_status_is_an_error_of_the_object_or_of_the_store(bucket, store, status, code, kind):
    bucket.manners = lambda _asked, _reply: refused(status, code)
    with pytest.raises(StoreError, match=code) as caught:
        store.read("3.png")
    assert type(caught.value) is kind


def forgets(_bucket):
    def manners(asked, reply):
        if asked.method == "HEAD":
            reply.headers = {name: value for name, value in reply.headers.items() if "meta" not in name}

    return manners


def small_letters(_bucket):
    def manners(_asked, reply):
        reply.headers = {name: value.lower() if value else value for name, value in reply.headers.items()}

    return manners


def empty_heads(_bucket):
    def manners(asked, reply):
        if asked.method == "HEAD":
            reply.headers["Content-Length"] = "0"

    return manners


def lists_nothing(_bucket):
    return lambda asked, reply: page(token="", names=[], truncated="false") if not asked.key else reply


def lists_other_versions(bucket):
    bucket.listed = lambda _key, entry: {**entry, "ETag": '"other"'}
    return lambda _asked, reply: reply


def lists_twice_under_other_names(bucket):
    bucket.listed = lambda key, entry: {**entry, "Key": f"{key}x"}
    return lambda _asked, reply: reply


def begins_anew(bucket):
    def manners(asked, reply):
        if reply.status == 206:
            held = bucket.objects[asked.key]
            reply.body = held[: len(reply.body)]
            reply.headers["Content-Range"] = None

    return manners


def one_version_for_all(bucket):
    bucket.listed = lambda _key, entry: {**entry, "ETag": "always"}

    def manners(_asked, reply):
        if "ETag" in reply.headers:
            reply.headers["ETag"] = '"always"'

    return manners


def knows_no_condition(bucket):
    def manners(asked, reply):
        if "if-none-match" not in asked.headers:
            return reply
        del bucket.objects[asked.key]
        return refused(501, "NotImplemented")

    return manners


def ignores_the_condition(bucket):
    def manners(asked, reply):
        if asked.method == "PUT" and reply.status == 412:
            bucket.objects[asked.key] = asked.body
            return Reply(200, {"ETag": etag_of(asked.body)})
        return reply

    return manners


def keeps_what_is_deleted(bucket):
    kept = {}

    def manners(asked, reply):
        if asked.method == "PUT":
            kept[asked.key] = asked.body
        if asked.method == "DELETE":
            bucket.objects[asked.key] = kept[asked.key]
        return reply

    return manners


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (forgets, "it keeps {}"),
        (small_letters, "it keeps .*probe-1"),
        (empty_heads, "has 0 by HEAD"),
        (lists_nothing, "its listing does not name"),
        (lists_other_versions, "its listing does not name"),
        (lists_twice_under_other_names, "its listing does not name"),
        (begins_anew, "answers a range with other bytes"),
        (one_version_for_all, "keeps its version"),
        (knows_no_condition, "refuses the condition If-None-Match"),
        (ignores_the_condition, "ignores If-None-Match"),
        (keeps_what_is_deleted, "deleted is still there"),
    ],
)
def test_the_probe_finds_what_a_store_cannot_do(bucket, store, spoil, words):
    bucket.manners = spoil(bucket)
    with pytest.raises(WeakStoreError, match=words) as caught:
        probe(store, "_job/probe-")
    assert str(caught.value).startswith("s3://b/d cannot hold exactly-once output: ")


def test_the_probe_accepts_a_store_that_keeps_the_contract(bucket, store):
    before = dict(bucket.objects)
    probe(store, "_job/probe-")
    assert bucket.objects == before


def test_a_store_that_may_not_be_written_says_so(bucket, store):
    bucket.manners = lambda asked, reply: refused(403, "AccessDenied") if asked.method == "PUT" else reply
    with pytest.raises(StoreError, match=r"writing .* was refused") as caught:
        probe(store, "_job/probe-")
    assert type(caught.value) is StoreError


def test_a_role_that_may_delete_nothing_is_enough_and_its_refusal_says_so(bucket, store):
    bucket.manners = lambda asked, reply: refused(403, "AccessDenied") if asked.method == "DELETE" else reply
    probe(store, "_job/probe-")
    with pytest.raises(StoreError, match=r"deleting s3://b/d/0.png at .* was refused .*s3:DeleteObject"):
        store.delete("0.png")


def refuses(*names):
    return lambda asked, reply: refused(403, "InvalidObjectState") if asked.key in names else reply


def test_an_input_that_is_served_as_it_is_listed_may_be_read(bucket, store):
    objects = list(store.list())
    probe_reads(store, objects)
    bucket.manners = refuses("d/0.png", "d/1.png")
    probe_reads(store, objects)
    bucket.manners = lambda _asked, _reply: refused(503, "SlowDown")
    probe_reads(store, objects)
    probe_reads(store, [])


@pytest.mark.parametrize(
    ("manners", "words"),
    [
        (refuses(*(f"d/{number}.png" for number in range(7))), r"no object that was tried \(7\) .* is archived"),
        (lambda _asked, _reply: refused(404, "NoSuchKey"), r"no object that was tried \(7\) .* there is no object"),
    ],
)
def test_an_input_of_which_nothing_can_be_read_is_refused(bucket, store, manners, words):
    objects = list(store.list())
    bucket.manners = manners
    with pytest.raises(StoreError, match=words):
        probe_reads(store, objects)


def test_an_input_whose_versions_differ_between_listing_and_reading_is_refused(bucket, store):
    bucket.listed = lambda _key, entry: {**entry, "ETag": '"other"'}
    with pytest.raises(StoreError, match=r"as s3://b/d lists it: .* has changed"):
        probe_reads(store, list(store.list()))


def test_an_input_whose_listing_says_too_few_bytes_is_refused(bucket, store):
    bucket.listed = lambda _key, entry: {**entry, "Size": "3"}
    with pytest.raises(StoreError, match="with 3 bytes, and more are there"):
        probe_reads(store, list(store.list()))


@pytest.mark.parametrize("beyond", [refused(416, "InvalidRange"), refused(400, "InvalidArgument"), Reply(206), None])
def test_a_range_behind_the_end_may_be_refused_in_any_way(bucket, store, beyond):
    """Some gateways return the whole object."""

    def manners(asked, reply):
        whole = Reply(200, {"ETag": etag_of(bucket.objects[asked.key])}, bucket.objects[asked.key])
        return (beyond or whole) if reply.status == 416 else reply

    objects = list(store.list())
    bucket.manners = manners
    probe_reads(store, objects)


def test_an_input_whose_ranges_are_wrong_is_refused(bucket, store):
    bucket.manners = begins_anew(bucket)
    with pytest.raises(StoreError, match="with other bytes than were asked for"):
        probe_reads(store, list(store.list()))


@pytest.mark.parametrize("place", ["data.v1", "ILSVRC2012.val", "my.prefix/x.tar"])
def test_a_prefix_may_have_a_dot(bucket, place):
    bucket.reset({f"{place}/cat/1.png": b"one", f"{place}.png": b"two", f"{place}/": b""})
    for slash in ("", "/", "//"):
        store, key = open_named(f"s3://my.images/{place}{slash}", bucket.url)
        assert [info.key for info in survey(store, key).objects] == ["cat/1.png"]
    store, key = open_named(f"s3://my.images/{place}.png", bucket.url)
    assert [info.key for info in survey(store, key).objects] == [f"{place}.png".rpartition("/")[2]]


def test_a_pattern_chooses_objects_of_a_bucket(bucket):
    bucket.reset({"p/0.tar": b"", "p/1.tar": b"", "p/deep/2.tar": b"", "p/0.parquet": b"", "q/a*b/1.png": b"one"})
    for pattern, wanted in (("p/*.tar", ["0.tar", "1.tar"]), ("p/**/2*", ["deep/2.tar"]), ("*/0.tar", ["p/0.tar"])):
        store, key = open_named(f"s3://b/{pattern}", bucket.url)
        assert [info.key for info in survey(store, key).objects] == wanted
    store, key = open_named("s3://b/q/a*b", bucket.url)
    assert [info.key for info in survey(store, key).objects] == ["1.png"]


def test_a_bucket_may_have_a_dot(bucket):
    bucket.reset({"1.png": b"one"})
    store, key = open_named("s3://my.images/", bucket.url)
    assert [info.key for info in survey(store, key).objects] == ["1.png"]


def test_an_empty_object_of_a_prefixs_name_is_its_marker(bucket):
    bucket.reset({"d.v1": b"", "d.v1/1.png": b"one", "e.tar": b""})
    store, key = open_named("s3://b/d.v1", bucket.url)
    assert [info.key for info in survey(store, key).objects] == ["1.png"]
    store, key = open_named("s3://b/e.tar", bucket.url)
    assert key == "e.tar"


def test_who_may_list_a_prefix_alone_may_use_it(bucket):
    bucket.manners = lambda asked, reply: refused(403, "AccessDenied") if asked.method == "HEAD" else reply
    store, key = open_named("s3://b/d", bucket.url)
    assert len(survey(store, key).objects) == 7


@pytest.mark.parametrize("opened", [open_named, open_file], ids=["open_named", "open_file"])
def test_what_a_user_names_is_asked_for_again_while_the_store_is_away(bucket, monkeypatch, opened):
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 0.001)
    store, key = opened("s3://b/d/1.png", bucket.url)
    refusals = iter(range(2 * ATTEMPTS))
    bucket.manners = lambda _asked, reply: reply if next(refusals, None) is None else refused(503, "SlowDown")
    assert store.read(key) == b"image 1"


def test_patience_does_not_multiply():
    inner = MemoryStore()
    assert PatientStore(PatientStore(inner, 5), 5).store is inner


def test_a_store_that_is_away_is_not_taken_for_a_prefix(bucket):
    bucket.manners = lambda _asked, _reply: refused(503, "SlowDown")
    with pytest.raises(UnavailableError):
        open_named("s3://b/d", bucket.url, wait_seconds=0)


@pytest.fixture
def elsewhere():
    with Bucket() as running:
        yield running


@pytest.mark.parametrize("method", ["read", "head", "list", "create"])
def test_no_redirect_is_followed(bucket, store, elsewhere, method):
    calls = {
        "read": lambda: store.read("3.png"),
        "head": lambda: store.head("3.png"),
        "list": lambda: keys(store),
        "create": lambda: store.create("x", b"1"),
    }
    where = elsewhere.url.removeprefix("http://")
    body = f"<Error><Code>TemporaryRedirect</Code><Endpoint>{where}</Endpoint><Region>eu-west-1</Region></Error>"
    headers = {"Location": f"{elsewhere.url}/b/d/3.png", "x-amz-bucket-region": "eu-west-1"}
    for status in (301, 302, 303, 307, 308):
        bucket.manners = lambda _asked, _reply, status=status: Reply(status, dict(headers), body.encode())
        with pytest.raises(StoreError, match="redirected to another address, which is not followed"):
            calls[method]()
    assert elsewhere.asked == []


def test_a_name_that_resolves_to_a_metadata_address_is_refused(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_a, **_o: [(0, 0, 0, "", ("169.254.169.254", 0))])
    with pytest.raises(StoreError, match=r"resolves to 169\.254\.169\.254"):
        check_resolved_endpoint("http://innocent.example")
    with pytest.raises(StoreError, match="resolves to"):
        S3Store("s3://b/d", "http://innocent.example").read("x")
