"""A proxy between a worker and its S3 server that does to requests what networks and servers do: delay, cut, lose, throttle.

It understands as much of HTTP/1.1 as it needs to know where a request and its answer end.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from weakref import WeakKeyDictionary

FAULTS = ("delay", "cut before", "cut within", "answer lost", "503")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
THROTTLED = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (
    len(SLOW_DOWN),
    SLOW_DOWN,
)


class Proxy:
    """Listens on a free port and passes requests on to `port` of this machine. `rate` is the share of requests disturbed."""

    def __init__(self, port: int, *, rate: float, seed: int, longest_delay: float = 0.5, host: str = "127.0.0.1") -> None:
        self.port_behind = port
        self.rate = rate
        self.longest_delay = longest_delay
        self.host = host
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.port = 0
        self.open = asyncio.Event()
        """Not set: nothing gets through, in neither direction, and nobody is told."""
        self.open.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._behind: WeakKeyDictionary[asyncio.StreamWriter, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            WeakKeyDictionary()
        )
        """The connection to the server behind each one to a worker."""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for each in list(self._connections):
            each.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def cut_off(self) -> None:
        """Let nothing through until `restore`; who waits for an answer goes on waiting."""
        self.faults["cut off"] += 1
        self.open.clear()

    def restore(self) -> None:
        self.open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None
        self._connections.add(this)
        ends = [writer]
        try:
            while await self._exchange(reader, writer, ends):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # one of the two hung up: so does the proxy
        finally:
            self._connections.discard(this)
            for each in ends:
                with suppress(OSError):
                    each.transport.abort()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ends: list[asyncio.StreamWriter]
    ) -> bool:
        """Pass one request and its answer on, disturbed or not; tell whether the connection goes on."""
        request = await _message(reader, request=True)
        await self.open.wait()
        self.requests += 1
        fault = self.random.choice(FAULTS) if self.random.random() < self.rate else ""
        self.faults[fault] += bool(fault)
        if fault == "cut before":
            return False
        if fault == "503":
            writer.write(THROTTLED)
            return True
        if fault == "delay":
            await asyncio.sleep(self.random.uniform(0, self.longest_delay))
        if writer not in self._behind:
            self._behind[writer] = await asyncio.open_connection("127.0.0.1", self.port_behind)
            ends.append(self._behind[writer][1])
        answers, behind = self._behind[writer]
        if fault == "cut within":
            # the server gets the head and, of a request with a body, less than all of it
            behind.write(request[: max(len(request) - 1, 1)])
            await behind.drain()
            return False
        behind.write(request)
        answer = await _message(answers, request=False, head=request.startswith(b"HEAD "))
        await self.open.wait()
        if fault == "answer lost":
            return False
        writer.write(answer)
        await writer.drain()
        return True


async def _message(reader: asyncio.StreamReader, *, request: bool, head: bool = False) -> bytes:
    """Read one request or answer whole."""
    start = await reader.readuntil(b"\r\n\r\n")
    lines = start.split(b"\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:] if line)}
    if not request and (head or lines[0].split(b" ")[1] in {b"204", b"304"}):
        return start
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = b""
        while True:
            size = await reader.readline()
            piece = await reader.readexactly(int(size.partition(b";")[0], 16) + 2)
            body += size + piece
            if piece == b"\r\n":
                return start + body
    return start + await reader.readexactly(int(headers.get(b"content-length", b"0")))
