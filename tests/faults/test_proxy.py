"""Each fault of the proxy has its effect, and the S3 store handles it as documented."""

import http.client
import os
import socket
import threading
import time
from collections import Counter

import pytest

from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.s3_client import ATTEMPTS
from blocksight.storage.stores.store import AlreadyExistsError, StoreError
from tests.faults.proxy import FaultProxy

pytestmark = pytest.mark.servers

BODY = bytes(range(256)) * 4096


@pytest.fixture
def proxy(bucket):
    with FaultProxy(bucket.port, seed=3) as running:
        yield running


@pytest.fixture
def store(bucket, proxy, monkeypatch):
    """A store behind the proxy with one object in it; the client's pauses between attempts are short."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.02)
    behind = open_store(f"{bucket.uri}/{os.urandom(4).hex()}", proxy.endpoint_url)
    behind.create("first", BODY, metadata={"attempt": "first"})
    return behind


def test_without_faults_it_is_not_there(proxy, store):
    assert store.read("first") == BODY
    assert store.read("first", start=5, length=7) == BODY[5:12]
    assert store.head("first").metadata == {"attempt": "first"}
    assert [info.key for info in store.list()] == ["first"]
    with pytest.raises(AlreadyExistsError):
        store.create("first", b"other")
    store.delete("first")
    assert store.head("first") is None
    assert proxy.counts == Counter()
    assert proxy.num_requests >= 7


def created(store, key):
    """Creates an object; returns how that ended."""
    try:
        store.create(key, BODY, metadata={"attempt": key})
    except AlreadyExistsError:
        return "exists"
    except StoreError:
        return "failed"
    return "made"


def test_a_lost_reply_leaves_our_object_behind_an_error(proxy, store):
    proxy.lose_reply = 1.0
    assert created(store, "always") == "failed"
    assert proxy.counts["lose_reply"] >= ATTEMPTS  # aiohttp asks once more by itself after a connection that closed
    proxy.lose_reply = 0.6
    ends = Counter(created(store, f"key-{number}") for number in range(5))
    proxy.lose_reply = 0.0
    assert ends["exists"] > 0
    for key in ("always", *(f"key-{number}" for number in range(5))):
        assert store.head(key).metadata == {"attempt": key}
        assert store.read(key) == BODY
    assert proxy.counts["lose_reply"] > 6
    assert store.read("first") == BODY


def test_reads_are_not_lost_unless_asked_for(proxy, store):
    proxy.lose_reply = 1.0
    assert store.read("first") == BODY
    proxy.lose_methods = {"GET"}
    with pytest.raises(StoreError):
        store.read("first")


def test_refused_requests_are_asked_again(proxy, store):
    proxy.refuse = 0.4
    for number in range(4):
        store.create(f"key-{number}", BODY)
        assert store.read(f"key-{number}") == BODY
    assert proxy.counts["refuse"] > 0
    before, proxy.refuse = proxy.num_requests, 1.0
    with pytest.raises(StoreError, match="SlowDown"):
        store.create("never", BODY)
    proxy.refuse = 0.0
    assert proxy.num_requests - before == ATTEMPTS
    assert store.head("never") is None


def test_cut_bodies_are_read_again_whole(proxy, store):
    proxy.cut = 0.2
    for _ in range(12):
        assert store.read("first") == BODY
    assert proxy.counts["cut"] > 0
    proxy.cut = 1.0
    with pytest.raises(StoreError):
        store.read("first")


def test_delays(proxy, store):
    proxy.delay = lambda: 0.3
    start = time.monotonic()
    store.head("first")
    assert time.monotonic() - start >= 0.3
    proxy.delay = 0.1
    store.head("first")
    assert proxy.counts["delay"] == 2


def test_down_and_up_again(proxy, store):
    proxy.down = True
    with pytest.raises(StoreError, match="cannot be reached"):
        store.read("first")
    proxy.down = False
    assert store.read("first") == BODY
    assert proxy.counts["down"] >= ATTEMPTS


def test_down_ends_a_request_that_is_under_way(proxy, store):
    proxy.delay = 30.0
    timer = threading.Timer(0.3, lambda: setattr(proxy, "down", True))
    timer.start()
    start = time.monotonic()
    with pytest.raises(StoreError, match="cannot be reached"):
        store.put("first", b"other")
    assert time.monotonic() - start < 20
    timer.join()
    proxy.down, proxy.delay = False, 0.0
    assert store.read("first") == BODY


def test_the_server_may_move(proxy, store, bucket):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy.upstream_port = closed.getsockname()[1]
        with pytest.raises(StoreError, match="cannot be reached"):
            store.head("first")
    proxy.upstream_port = bucket.port
    assert store.head("first").size == len(BODY)


def answers(listener, conversation):
    """A server: reads the expected parts of each request and sends the replies, one connection for each."""
    for wanted, reply in conversation:
        connection, _ = listener.accept()
        with connection:
            data = b""
            for part, answer in zip(wanted, reply, strict=True):
                while not data.endswith(part):
                    data += connection.recv(1 << 16)
                connection.sendall(answer)


def test_chunked_bodies_and_continue_pass_as_they_are():
    """The server answers part by part; the client uses one connection."""
    chunks = b"5;chunk-signature=ab\r\nhello\r\n0;chunk-signature=cd\r\nx-trailer: 1\r\n\r\n"
    listing = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    go_on, done = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    conversation = [((b"\r\n\r\n", chunks), (go_on, done)), ((b"\r\n\r\n",), (listing,))]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answers, args=(listener, conversation))
        server.start()
        with FaultProxy(listener.getsockname()[1]) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as us:
            us.sendall(b"PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
            assert received(us, b"\r\n\r\n") == go_on
            us.sendall(chunks)
            assert received(us, b"ok") == done
            us.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            assert received(us, b"0\r\n\r\n") == listing
        server.join()


def received(connection, end):
    data = b""
    while not data.endswith(end):
        data += connection.recv(1 << 16)
    return data


def test_a_client_that_dies_leaves_nothing(proxy, store, bucket):
    """Half a body reaches the server, which creates no object from it."""
    dying = http.client.HTTPConnection("127.0.0.1", proxy.port)
    dying.putrequest("PUT", f"/{bucket.name}/half")
    dying.putheader("Content-Length", str(len(BODY)))
    dying.endheaders(BODY[: len(BODY) // 2])
    dying.close()
    assert store.read("first") == BODY
    assert open_store(bucket.uri, bucket.endpoint_url).head("half") is None
