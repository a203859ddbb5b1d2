"""Serves the dashboard with uvicorn, and bounds what its connections may take."""

from __future__ import annotations

import socket
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from buquet.dashboard.app import dashboard
from buquet.dashboard.guard import is_loopback
from buquet.errors import UsageError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Generator
    from types import FrameType

    from buquet.app import App
    from buquet.insights.feed import Feed


HEADERS = 10.0
"""Seconds within which a whole request header must arrive."""
STALLED = 30.0
"""Seconds after which a connection is closed whose browser reads nothing of its answer."""
CONNECTIONS = 700
"""Connections at once. One more is closed."""


class Connection(H11Protocol):
    """A connection, closed if its browser is too slow to send a request header or to read an answer."""

    _deadline: asyncio.TimerHandle | None = None
    _check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, unless there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._await_header()
            self._check_unsent(0)

    def data_received(self, data: bytes) -> None:
        """Receive data."""
        super().data_received(data)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._check):
            if timer:
                timer.cancel()

    def _check_unsent(self, before: int) -> None:
        """Abort the connection if the browser has read nothing since the last check. Closing would wait for it."""
        unsent = self.transport.get_write_buffer_size()
        if before and unsent >= before:
            self.transport.abort()
        else:
            self._check = self.loop.call_later(STALLED, self._check_unsent, unsent)

    def _await_header(self) -> None:
        # uvicorn closes connections that are idle between requests, but does not limit how long a header may take
        waits = self.conn.their_state is h11.IDLE
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS, self.transport.close)
        elif not waits and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """A server that ends its event streams when it is asked to stop."""

    feed: Feed
    takes_signals = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as uvicorn calls it
        """Stop cleanly: unlike in uvicorn, the signal is not raised again afterwards. A second signal stops at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.feed.stop()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Handle signals, unless the surrounding program does."""
        with super().capture_signals() if self.takes_signals else nullcontext():
            yield


def make_server(app: App, *, password: str | None, read_only: bool, host: str, hosts: Collection[str] = ()) -> Server:
    """Return the server of an App's dashboard. Its `serve` takes the sockets of `listen`."""
    own = {host, socket.gethostname(), *hosts}
    application = dashboard(app, password=password, read_only=read_only, loopback=is_loopback(host), hosts=own)
    server = Server(
        uvicorn.Config(
            application,
            http=Connection,
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
            server_header=False,
        )
    )
    server.feed = application.state.feed
    return server


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Return a listening socket, and its address for a browser. Raises UsageError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.create_server(address, family=family)
    except OSError as error:
        msg = f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another --port; --port 0 takes any"
        raise UsageError(msg) from None
    name = f"[{host}]" if ":" in host else host
    return sock, f"http://{name}:{sock.getsockname()[1]}"
