"""Buckets that are not plainly ours: public, paid for by who asks, encrypted, locked, of two accounts or endpoints."""

import base64
import hashlib

import pytest

from blocksight.jobs.plan.config import ConfigError
from blocksight.storage.stores.opening import open_named
from blocksight.storage.stores.s3 import S3Store
from blocksight.storage.stores.s3_access import client_options, value_for
from blocksight.storage.stores.s3_endpoints import endpoint_for
from blocksight.storage.stores.store import StoreError
from tests.jobs.jobs_of import config_of
from tests.storage.loopback import Reply, refused, served

VARIABLES = ("AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER", "BLOCKSIGHT_S3_ENCRYPTION", "BLOCKSIGHT_S3_PROFILES")


@pytest.fixture(scope="module")
def connect():
    """One bucket and one store for all tests of the file."""
    with served() as both:
        yield both


@pytest.fixture
def bucket(connect, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    connect[0].reset({"d/1.png": b"image"})
    return connect[0]


@pytest.fixture
def store(connect):
    return connect[1]


def say(store, ask):
    """The sentence of a refused request."""
    with pytest.raises(StoreError) as caught:
        ask(store)
    return str(caught.value)


ASKING = {
    "listing s3://b/d/some/": (lambda store: list(store.list("some/")), "s3:ListBucket"),
    "reading s3://b/d/1.png": (lambda store: store.read("1.png"), "s3:GetObject"),
    "writing s3://b/d/2.png": (lambda store: store.create("2.png", b"1"), "s3:PutObject"),
    "deleting s3://b/d/1.png": (lambda store: store.delete("1.png"), "s3:DeleteObject"),
}


@pytest.mark.parametrize("action", ASKING)
def test_a_refusal_names_the_action_and_the_key_and_asks_for_nothing_that_is_set(bucket, store, action):
    ask, permission = ASKING[action]
    for code in ("AccessDenied", "InvalidAccessKeyId", "ExpiredToken"):
        bucket.manners = lambda _asked, _reply, code=code: refused(403, code)
        sentence = say(store, ask)
        assert sentence.startswith(f"{action} at {bucket.url} was refused ({code}): the credentials in use (from env")
        assert "set AWS_ACCESS_KEY_ID" not in sentence
        assert (permission in sentence) == (code == "AccessDenied")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("InvalidAccessKeyId", "AWS_NO_SIGN_REQUEST=YES does without them in a public bucket"),
        ("SignatureDoesNotMatch", "their secret key is another than the store's"),
        ("ExpiredToken", "they have expired: renew them"),
        ("RequestTimeTooSkewed", "clock"),
    ],
)
def test_credentials_that_are_refused_are_told_what_is_wrong_with_them(bucket, store, code, words):
    bucket.manners = lambda _asked, _reply: refused(403, code)
    assert words in say(store, lambda one: one.read("1.png"))


@pytest.mark.parametrize(("status", "code"), [(400, "AuthorizationHeaderMalformed"), (301, "PermanentRedirect")])
def test_a_region_that_the_reply_does_not_name_is_asked_for(bucket, store, status, code):
    bucket.manners = lambda _asked, _reply: refused(status, code)
    assert "the bucket's region in AWS_REGION (us-east-1 was asked)" in say(store, lambda one: one.read("1.png"))


def test_one_named_object_is_looked_up_and_not_listed(bucket):
    bucket.manners = lambda asked, reply: reply if asked.key else refused(403, "AccessDenied")
    store, key = open_named("s3://b/d/1.png", bucket.url)
    assert (store.uri, key) == ("s3://b/d", "1.png")
    assert [(asked.method, asked.key) for asked in bucket.asked] == [("HEAD", "d/1.png")]


def test_what_a_bucket_demands_goes_with_each_request(bucket, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    monkeypatch.setenv("BLOCKSIGHT_S3_ENCRYPTION", "aws:kms:arn:key/1")

    def manners(asked, reply: Reply) -> Reply:
        if asked.headers.get("x-amz-request-payer") != "requester":
            return refused(403, "AccessDenied")
        if asked.method == "PUT" and asked.headers.get("x-amz-server-side-encryption") != "aws:kms":
            return refused(403, "AccessDenied")
        return reply

    bucket.manners = manners
    store = S3Store("s3://b/d", bucket.url)
    store.create("x", b"1", metadata={"attempt": "one"})
    assert [info.key for info in store.list()] == ["1.png", "x"]
    found = store.head("x")
    assert found is not None
    assert store.read("x", etag=found.etag) == b"1"
    store.put("x", b"2")
    store.delete("x")
    written = [asked.headers for asked in bucket.asked if asked.method == "PUT"]
    assert {one["x-amz-server-side-encryption-aws-kms-key-id"] for one in written} == {"arn:key/1"}


def test_a_refusal_says_which_variable_a_bucket_may_want(bucket, store):
    bucket.manners = lambda _asked, _reply: refused(403, "AccessDenied")
    assert "AWS_REQUEST_PAYER=requester" in say(store, lambda one: one.read("1.png"))
    assert "BLOCKSIGHT_S3_ENCRYPTION=AES256 or aws:kms" in say(store, lambda one: one.put("x", b""))


def test_a_write_carries_its_checksum_for_buckets_with_object_lock(bucket, store):
    store.create("x", b"1")
    store.put("y", b"2")
    sums = [asked.headers["content-md5"] for asked in bucket.asked]
    assert sums == [base64.b64encode(hashlib.md5(body).digest()).decode() for body in (b"1", b"2")]


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_public_bucket_is_read_unsigned(bucket, monkeypatch, caplog, asked_for):
    if asked_for:
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    else:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, "/nowhere")
    bucket.manners = lambda asked, reply: refused(403, "Forbidden") if "authorization" in asked.headers else reply
    store = S3Store("s3://b/d", bucket.url)
    assert store.read("1.png") == b"image"
    assert ("no credentials were found: s3://b/d is asked without them" in caplog.text) is not asked_for
    bucket.manners = lambda _asked, _reply: refused(403, "AccessDenied")
    wanted = "AWS_NO_SIGN_REQUEST is set" if asked_for else "no credentials were found.*set AWS_ACCESS_KEY_ID"
    with pytest.raises(StoreError, match=wanted):
        store.put("x", b"1")


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_REQUEST_PAYER", "me"), ("BLOCKSIGHT_S3_ENCRYPTION", "aes"), ("BLOCKSIGHT_S3_ENCRYPTION", "aws:kms:")],
)
def test_a_variable_without_sense_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=f"{name} is '{value}'"):
        client_options("s3://b")


def test_a_bucket_may_have_its_own_profile(monkeypatch):
    monkeypatch.setenv("BLOCKSIGHT_S3_PROFILES", "in=reader, out=writer")
    assert client_options("s3://in/photos")["profile"] == "reader"
    assert client_options("s3://out/maps")["profile"] == "writer"
    assert "profile" not in client_options("s3://in-other")


def test_a_profile_that_is_not_there_is_named(bucket, monkeypatch):
    monkeypatch.setenv("BLOCKSIGHT_S3_PROFILES", "b=nobody")
    sentence = say(S3Store("s3://b/d", bucket.url), lambda one: one.read("1.png"))
    assert "nobody" in sentence
    assert "BLOCKSIGHT_S3_PROFILES" in sentence


TWO = "https://a.example,in=http://b.example:9000,s3://in/deep=https://c.example"


@pytest.mark.parametrize(
    ("place", "endpoint"),
    [
        ("s3://out/x", "https://a.example"),
        ("s3://in", "http://b.example:9000"),
        ("s3://in/deeper", "http://b.example:9000"),
        ("s3://in/deep/x", "https://c.example"),
    ],
)
def test_buckets_at_two_endpoints(place, endpoint):
    assert S3Store(place, TWO).endpoint_url == endpoint
    assert endpoint_for(place, "in=http://b.example") == ("http://b.example" if "in" in place else None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("in=http://169.254.169.254", "metadata address"),
        ("in=http://a,in=http://b", "s3://in has two values"),
        ("http://a,http://b", "all other buckets has two values"),
        ("in", "not of the form"),
        ("in=", "not of the form"),
    ],
)
def test_endpoints_of_buckets_are_checked_too(text, words):
    with pytest.raises(StoreError, match=words):
        endpoint_for("s3://in", text)
    with pytest.raises(ConfigError, match=words):
        config_of("s3://in/x", "out", endpoint_url=text)


def test_an_endpoint_of_a_bucket_that_no_place_is_in_is_refused():
    with pytest.raises(ConfigError, match="for s3://inn, and neither data, output, weights nor model is there"):
        config_of("s3://in/x", "s3://out/x", endpoint_url="inn=https://a,out=https://b")
    assert value_for("s3://out/x", "inn=https://a,out=https://b") == "https://b"


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, r"was refused \(403\): .*lack s3:ListBucket"),
        (404, r"there is no bucket of s3://b/d.*404.*or no S3 store"),
    ],
)
def test_a_page_of_a_gateway_is_told_by_its_status(bucket, store, status, sentence):
    page = Reply(status, {"Content-Type": "text/html"}, b"<html>sorry</html>")
    bucket.manners = lambda _asked, _reply: page
    with pytest.raises(StoreError, match=sentence) as caught:
        list(store.list())
    assert "cannot be reached" not in str(caught.value)
