"""A proxy before an S3 server on loopback: it injects faults into connections at the rates that a test sets."""

import asyncio
import random
import threading
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress

HOST = "127.0.0.1"
PIECE_BYTES = 1 << 16
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>fault-proxy</RequestId></Error>"
)
BROKEN = (OSError, EOFError, asyncio.LimitOverrunError, ValueError)
"""Exceptions of a connection that a peer closed early, or on which it sent something else than HTTP."""


class Head:
    """A start line with its headers: the raw bytes, and the length of the body that follows."""

    def __init__(self, raw: bytes) -> None:
        first, *lines = raw.decode("latin-1").lower().split("\r\n")
        headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.raw, self.words = raw, first.split()
        self.is_chunked = "chunked" in headers.get("transfer-encoding", "")
        self.length = int(headers.get("content-length", 0))
        self.awaits_continue = headers.get("expect") == "100-continue"

    @classmethod
    async def read(cls, reader: StreamReader) -> "Head":
        return cls(await reader.readuntil(b"\r\n\r\n"))

    async def body(self, reader: StreamReader) -> AsyncIterator[bytes]:
        """Yields the raw bytes of the body, framing included. Raises EOFError if they end early."""
        left = 0 if self.is_chunked else self.length
        while left:
            piece = await reader.read(min(left, PIECE_BYTES))
            if not piece:
                raise EOFError(f"{left} of {self.length} bytes never came")
            left -= len(piece)
            yield piece
        size = int(self.is_chunked)
        while size:
            line = await reader.readuntil(b"\n")
            size = int(line.partition(b";")[0], 16)
            yield line + (await reader.readexactly(size + 2) if size else b"")
        while self.is_chunked:  # trailers, and the empty line that ends them
            yield (line := await reader.readuntil(b"\n"))
            if line == b"\r\n":
                return


class FaultProxy:
    """An HTTP/1.1 proxy on a free loopback port while a `with` body runs. Rates are probabilities per request and
    may be set at any time. Each fault has its own seeded random numbers.

    Requests and replies pass unchanged, so signatures hold. A request is streamed: if the client dies within
    it, the server gets half of it.
    """

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        self.upstream_port, self.port = upstream_port, 0
        self.lose_reply = 0.0
        """Rate: the request is forwarded, its reply is dropped and the connection closed."""
        self.lose_methods = {"PUT"}
        self.refuse = 0.0
        """Rate: the request is answered with 503 SlowDown and not forwarded."""
        self.cut = 0.0
        """Rate: the reply's body is cut in its middle, and the connection closed."""
        self.delay: float | Callable[[], float] = 0.0
        """Seconds before a request is forwarded."""
        self.counts: Counter[str] = Counter()
        """How often each fault was injected."""
        self.num_requests = 0
        self._down = False
        self._dice = {name: random.Random(f"{seed} {name}") for name in ("lose_reply", "refuse", "cut")}
        self._clients: set[StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def down(self) -> bool:
        """If true, every connection is closed at once, open ones included."""
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        if value:
            self._loop.call_soon_threadsafe(self._drop_all)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        assert self._ready.wait(10), "the proxy did not start"
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        self._drop_all()

    def _drop_all(self) -> None:
        for writer in self._clients:
            self.counts["down"] += self._down
            writer.transport.abort()

    async def _client(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._clients.add(writer)
        if self._down:
            self.counts["down"] += 1
            writer.transport.abort()
        with suppress(*BROKEN), closing(writer):
            while await self._exchange(await Head.read(reader), reader, writer):
                pass
        self._clients.discard(writer)

    async def _exchange(self, request: Head, reader: StreamReader, writer: StreamWriter) -> bool:
        """Forwards one request and its reply. Returns True if the connection can carry another."""
        self.num_requests += 1
        if self._is_drawn("refuse"):
            return await self._refuse(request, reader, writer)
        seconds = self.delay() if callable(self.delay) else self.delay
        if seconds > 0:
            self.counts["delay"] += 1
            await asyncio.sleep(seconds)
        up_reader, up_writer = await asyncio.open_connection(HOST, self.upstream_port)
        with closing(up_writer):
            sending = asyncio.create_task(_send(request, reader, up_writer))
            reply, body = await _receive(request, up_reader, writer)
            is_sent = sending.done()  # a server may answer before it has the whole request
            sending.cancel()
        return await self._answer(request, reply, body, writer) and is_sent

    async def _refuse(self, request: Head, reader: StreamReader, writer: StreamWriter) -> bool:
        if not request.awaits_continue:
            _ = [piece async for piece in request.body(reader)]  # unread, it would reset the connection too early
        self.counts["refuse"] += 1
        body = b"" if request.words[0] == "head" else SLOW_DOWN
        head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
        return False

    async def _answer(self, request: Head, reply: Head, body: bytes, writer: StreamWriter) -> bool:
        """Passes the reply on, or what a fault leaves of it. Returns False if the connection must end."""
        if request.words[0].upper() in self.lose_methods and self._is_drawn("lose_reply"):
            self.counts["lose_reply"] += 1
            return False
        is_cut = len(body) > 1 and self._is_drawn("cut")
        self.counts["cut"] += is_cut
        writer.write(reply.raw + (body[: len(body) // 2] if is_cut else body))
        await writer.drain()
        return not is_cut

    def _is_drawn(self, fault: str) -> bool:
        return self._dice[fault].random() < getattr(self, fault)


async def _send(request: Head, reader: StreamReader, upstream: StreamWriter) -> None:
    """Streams the request to the server. If the client breaks off, the server's connection is closed too."""
    try:
        upstream.write(request.raw)
        async for piece in request.body(reader):
            upstream.write(piece)
            await upstream.drain()
    except BROKEN:
        upstream.transport.abort()


async def _receive(request: Head, upstream: StreamReader, writer: StreamWriter) -> tuple[Head, bytes]:
    """Reads the final reply, whole. A 100 Continue before it is passed on at once."""
    reply = await Head.read(upstream)
    while reply.words[1].startswith("1"):
        writer.write(reply.raw)
        reply = await Head.read(upstream)
    if request.words[0] == "head" or reply.words[1] in ("204", "304"):
        return reply, b""
    return reply, b"".join([piece async for piece in reply.body(upstream)])
