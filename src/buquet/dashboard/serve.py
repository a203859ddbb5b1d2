"""Serves the dashboard with uvicorn, until it is stopped."""

from __future__ import annotations

import socket
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import uvicorn

from buquet.dashboard.app import dashboard
from buquet.dashboard.guard import is_loopback
from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

    from buquet.app import App
    from buquet.insights.feed import Feed


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


def make_server(app: App, *, password: str | None, read_only: bool, host: str) -> Server:
    """Return the server of an App's dashboard; give `serve` the sockets of `listen`."""
    application = dashboard(app, password=password, read_only=read_only, loopback=is_loopback(host))
    server = Server(
        uvicorn.Config(application, log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False)
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
