"""One contract for every store: objects are whole, created once and pinned; the probe refuses others."""

import os
import pickle
import socket
import threading
import time

import pytest
from botocore.exceptions import ClientError

from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.opening import WeakStoreError, open_store, probe
from blocksight.storage.stores.s3 import S3Store
from blocksight.storage.stores.s3_endpoints import check_endpoint
from blocksight.storage.stores.s3_replies import refuse_failed_deletes
from blocksight.storage.stores.store import AlreadyExistsError, ChangedError, MissingError, StoreError
from tests.storage.memory import MemoryStore


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.servers)])
def store(request, tmp_path):
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return LocalStore(tmp_path / "root")
    bucket = request.getfixturevalue("bucket")
    return open_store(f"{bucket.uri}/contract-{os.urandom(4).hex()}", bucket.endpoint_url)


def test_what_is_created_can_be_read(store):
    store.create("a/b.bin", b"hello", metadata={"attempt": "one"})
    assert store.read("a/b.bin") == b"hello"
    assert store.read("a/b.bin", start=1, length=3) == b"ell"
    assert store.read("a/b.bin", start=2) == b"llo"
    assert store.read("a/b.bin", start=9, length=3) == b""
    assert store.read("a/b.bin", start=1, length=0) == b""
    info = store.head("a/b.bin")
    assert (info.key, info.size, dict(info.metadata)) == ("a/b.bin", 5, {"attempt": "one"})


def test_a_second_create_changes_nothing(store):
    store.create("x", b"first", metadata={"attempt": "one"})
    before = store.head("x")
    with pytest.raises(AlreadyExistsError):
        store.create("x", b"second", metadata={"attempt": "two"})
    assert store.read("x") == b"first"
    assert store.head("x") == before
    assert [info.key for info in store.list()] == ["x"]


def test_of_many_writers_one_wins(store):
    won, start = [], threading.Barrier(8)

    def write(number):
        start.wait()
        try:
            store.create("race", b"%d" % number, metadata={"attempt": str(number)})
        except AlreadyExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("race") == b"%d" % won[0]
    assert store.head("race").metadata["attempt"] == str(won[0])


def test_reads_are_pinned(store):
    store.put("x", b"one")
    etag = store.head("x").etag
    assert store.read("x", etag=etag) == b"one"
    time.sleep(0.01)
    store.put("x", b"two")
    with pytest.raises(ChangedError):
        store.read("x", etag=etag)


def test_what_is_not_there(store):
    assert store.head("nothing") is None
    assert list(store.list("no/where/")) == []
    store.delete("nothing")
    with pytest.raises(MissingError):
        store.read("nothing")


def test_listings_are_complete_and_by_prefix(store):
    for key in ("b/2", "a", "b/10", "b-c/1", "b/1/deep"):
        store.put(key, b"x")
    assert sorted(info.key for info in store.list()) == sorted(["b/2", "a", "b/10", "b-c/1", "b/1/deep"])
    assert sorted(info.key for info in store.list("b/")) == ["b/1/deep", "b/10", "b/2"]
    assert sorted(info.key for info in store.list("b/1")) == ["b/1/deep", "b/10"]
    store.delete("b/2")
    assert store.head("b/2") is None


def test_the_probe_passes_and_leaves_nothing(store):
    probe(store, "_job/probe-")
    assert list(store.list()) == []


class Losing(MemoryStore):
    """Loses the reply of each write, and refuses the client's second try."""

    def create(self, key, data, *, metadata=None):
        super().create(key, data, metadata=metadata)
        raise AlreadyExistsError(f"{key} already exists")


def test_the_probe_is_not_deceived_by_lost_replies():
    probe(Losing(), "_job/probe-")


class Overwriting(MemoryStore):
    """A store that ignores the condition, as some gateways do."""

    def create(self, key, data, *, metadata=None):
        self.put(key, data)


def test_the_probe_refuses_a_store_that_overwrites():
    with pytest.raises(WeakStoreError, match="exactly-once"):
        probe(Overwriting(), "_job/probe-")


class Racy(MemoryStore):
    """A store that checks and then writes: it refuses a later writer, but not one at the same time."""

    def create(self, key, data, *, metadata=None):
        is_there = self.head(key) is not None
        time.sleep(0.2)
        if is_there:
            raise AlreadyExistsError(key)
        self.put(key, data)


def test_the_probe_refuses_a_store_that_looks_and_then_writes():
    with pytest.raises(WeakStoreError, match="at once"):
        probe(Racy(), "_job/probe-")


def test_a_copied_folder_keeps_its_metadata(tmp_path):
    import shutil

    LocalStore(tmp_path / "a").create("data/x", b"1", metadata={"attempt": "one"})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert dict(LocalStore(tmp_path / "b").head("data/x").metadata) == {"attempt": "one"}


def test_local_leaves_no_aside_files(tmp_path):
    store = LocalStore(tmp_path)
    store.create("x", b"1")
    with pytest.raises(AlreadyExistsError):
        store.create("x", b"2", metadata={"attempt": "two"})
    store.put("x", b"3")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a/..", "./x", "a/./x", "", "a\0b", "/", ".."])
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_keys_stay_below_the_root(tmp_path, monkeypatch, kind, key):
    (tmp_path / "x").write_bytes(b"not ours")
    store = LocalStore(tmp_path / "root") if kind == "local" else S3Store("s3://bucket/root")
    monkeypatch.setattr(S3Store, "filesystem", property(lambda _: pytest.fail("the bucket was asked")))
    for ask in (
        store.read,
        store.head,
        store.delete,
        lambda one: store.put(one, b"2"),
        lambda one: store.create(one, b"2"),
    ):
        with pytest.raises(StoreError, match="is not an object's key"):
            ask(key)
    assert (tmp_path / "x").read_bytes() == b"not ours"


def test_a_full_or_closed_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/x.*[Nn]ot a directory|Not a directory"):
        LocalStore(tmp_path).create("file/x/y", b"1")


def test_uris():
    assert open_store("photos").uri.endswith("/photos")
    assert open_store("file:///tmp/x").uri == "/tmp/x"
    with pytest.raises(StoreError, match="gs:// is not known; known: a local path, file://, s3://"):
        open_store("gs://bucket/x")
    with pytest.raises(StoreError, match="names no bucket"):
        open_store("s3://")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://user:secret@host:9000", "holds user info"),
        ("http://host:9000#secret", "or a fragment"),
        ("ftp://host", "not of the form"),
        ("http://169.254.169.254", "metadata address"),
        ("http://[fe80::1]:80", "metadata address"),
        ("http://[fd00:ec2::254]", "metadata address"),
    ],
)
def test_endpoints_that_are_refused(url, sentence):
    with pytest.raises(StoreError, match=sentence) as caught:
        check_endpoint(url)
    assert "secret" not in str(caught.value)
    check_endpoint("http://127.0.0.1:9000")


@pytest.mark.servers
def test_s3_errors_are_one_sentence_without_secrets(bucket, monkeypatch):
    def sentence(uri, endpoint):
        with pytest.raises(StoreError) as caught:
            list(open_store(uri, endpoint).list())
        return str(caught.value)

    assert "there is no bucket 'not-there'" in sentence("s3://not-there/x", bucket.endpoint_url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    refused = sentence(bucket.uri, bucket.endpoint_url)
    assert "was refused" in refused
    assert "the credentials in use (from environment variables)" in refused
    store = S3Store(bucket.uri, bucket.endpoint_url)
    for text in (refused, repr(store), str(pickle.dumps(store))):
        assert "canary-secret" not in text
        assert bucket.access_key not in text
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "no credentials" in sentence(bucket.uri, bucket.endpoint_url)


@pytest.mark.servers
def test_a_dead_endpoint_is_named(bucket):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(StoreError, match=f"http://127.0.0.1:{port} cannot be reached"):
        list(S3Store("s3://bucket/x", f"http://127.0.0.1:{port}").list())


@pytest.mark.servers
def test_a_pickled_store_connects_anew(bucket):
    store = open_store(f"{bucket.uri}/pickled", bucket.endpoint_url)
    store.put("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b'{"sha256": 1}', b"\xff", b"[" * 9999, b'{"a": "' + b"b" * 70000])
def test_damaged_metadata_are_none(tmp_path, body):
    store = LocalStore(tmp_path)
    store.create("x", b"1", metadata={"sha256": "2"})
    (tmp_path / ".metadata-x.json").write_bytes(body)
    head = store.head("x")
    assert head is not None
    assert (head.size, dict(head.metadata)) == (1, {})


def test_many_objects_are_removed_together(store):
    for key in ("a/1", "a/2", "b/3"):
        store.create(key, b"x")
    store.delete_many(["a/1", "a/missing", "b/3"])
    assert [info.key for info in store.list()] == ["a/2"]
    store.delete_many([])


def test_a_bulk_delete_that_is_refused_for_one_object_is_an_error():
    refuse_failed_deletes({"Errors": [{"Key": "a", "Code": "NoSuchKey"}]}, "s3://b/a")
    with pytest.raises(StoreError, match=r"was refused for 'a' \(AccessDenied\).*s3:DeleteObject"):
        refuse_failed_deletes({"Errors": [{"Key": "a", "Code": "AccessDenied"}]}, "s3://b/a")


@pytest.mark.parametrize(("status", "is_known"), [(501, False), (403, True)])
def test_a_store_without_bulk_deletes_is_asked_for_each_object(monkeypatch, status, is_known):
    asked = []

    def call(_, method, **named):
        asked.append((method, named.get("Key")))
        if method == "delete_objects":
            reply = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise OSError from ClientError(reply, "DeleteObjects")

    monkeypatch.setattr(S3Store, "_call", call)
    store = S3Store("s3://bucket/prefix")
    if is_known:
        with pytest.raises(StoreError, match="403"):
            store.delete_many(["a", "b"])
    else:
        store.delete_many(["a", "b"])
    assert asked[1:] == ([] if is_known else [("delete_object", "prefix/a"), ("delete_object", "prefix/b")])


def test_more_keys_than_one_request_takes_are_removed_in_several(monkeypatch):
    sizes = []
    monkeypatch.setattr(S3Store, "_call", lambda *_, Delete: sizes.append(len(Delete["Objects"])) or {})
    S3Store("s3://bucket").delete_many([f"k{number}" for number in range(2_001)])
    assert sizes == [1_000, 1_000, 1]


def test_a_job_may_begin_without_the_right_to_delete():
    class Keeping(MemoryStore):
        def delete(self, key):
            raise StoreError("denied")

    probe(Keeping(), "_job/probe-")
