"""Serves the dashboard with uvicorn, until it is stopped."""

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
"""Seconds in which the whole of a request's header must have come."""
TAKES = 30.0
"""Seconds after which a browser that takes nothing of what is sent to it is given up on."""
CONNECTIONS = 700
"""Connections at once; one more is closed."""


class Connection(H11Protocol):
    """A browser's connection, which must send the whole of a request's header in time, and take the answers."""

    _deadline: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, unless too many are connected."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._await_header()
            self._look_at_unsent(0)

    def data_received(self, data: bytes) -> None:
        """Take what came; what is the beginning of a header must go on in time."""
        super().data_received(data)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._look):
            if timer:
                timer.cancel()

    def _look_at_unsent(self, before: int) -> None:
        """Give the browser up where no less waits to be sent than before; closed, a connection waits for that, too."""
        unsent = self.transport.get_write_buffer_size()
        if before and unsent >= before:
            self.transport.abort()
        else:
            self._look = self.loop.call_later(TAKES, self._look_at_unsent, unsent)

    def _await_header(self) -> None:
        # between two requests uvicorn closes what stays idle; it has no limit for a header that began
        waits = self.conn.their_state is h11.IDLE
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS, self.transport.close)
        elif not waits and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """A server whose open event streams end when it is asked to stop."""

    feed: Feed
    takes_signals = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as uvicorn calls it
        """Take the signal: it is a clean end, so uvicorn does not raise it once more afterwards. A second one ends at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.feed.stop()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Take the signals, unless the program around it does."""
        with super().capture_signals() if self.takes_signals else nullcontext():
            yield


def make_server(app: App, *, password: str | None, read_only: bool, host: str, hosts: Collection[str] = ()) -> Server:
    """Return the server of an App's dashboard; give `serve` the sockets of `listen`."""
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
    """Return a socket that listens, and its address for a browser. Raises UsageError where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        sock = socket.create_server(address, family=family)
    except OSError as error:
        msg = (
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Another one is given by --port; --port 0 takes any"
        )
        raise UsageError(msg) from None
    name = f"[{host}]" if ":" in host else host
    return sock, f"http://{name}:{sock.getsockname()[1]}"
