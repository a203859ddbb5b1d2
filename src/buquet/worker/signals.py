"""SIGINT and SIGTERM end a worker, whatever its handlers do: the second one by force, should it not end by itself."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from buquet import forking

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Mapping

    from buquet.clock import Clock

log = logging.getLogger("buquet.worker")

HEEDED = (signal.SIGINT, signal.SIGTERM)
ANSWER = 5.0
"""Seconds for the event loop to take notice of the second signal."""


class _Watch:
    """Counts the signals, and sees to it that the process ends.

    A signal is noticed in two ways. The interpreter runs a signal handler in the main thread, which a handler of a task that
    never returns from C code prevents. The interpreter also writes the signal's number to a socket, which a thread reads, but
    somebody else's socket may have taken this one's place. Whichever of the two has counted more has counted right.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], None], clock: Clock, seconds: float) -> None:
        self.loop = loop
        self.stop = stop
        self.clock = clock
        self.seconds = seconds
        self.by_interpreter = self.by_socket = self.heeded = 0
        self.second_at: float | None = None
        self.answered = False
        self.before: int | None = None
        """Where the interpreter wrote signals to before: an event loop is woken by them."""

    def heed(self) -> None:
        """Pass on what was counted and not passed on yet."""
        while self.heeded < max(self.by_interpreter, self.by_socket):
            self.heeded += 1
            with suppress(RuntimeError):  # the loop is closed: there is nobody left to ask
                self.loop.call_soon_threadsafe(self.stop)
                if self.heeded > 1:
                    self.loop.call_soon_threadsafe(self._answer)
            if self.heeded == 2:  # noqa: PLR2004 - the second signal
                self.second_at = self.clock.monotonic()
            elif self.heeded > 2:  # noqa: PLR2004
                self._end("it was asked a third time")

    def _answer(self) -> None:
        self.answered = True

    def keep(self, reader: socket.socket, over: threading.Event) -> None:
        """Read the socket until the worker has ended, and end the process when it does not."""
        while not over.is_set():
            reader.settimeout(None if self.second_at is None else 0.1)
            with suppress(TimeoutError):
                numbers = reader.recv(64)
                if self.before is not None:
                    with suppress(OSError):
                        os.write(self.before, numbers)
                self.by_socket += sum(number in HEEDED for number in numbers)
                self.heed()
            if self.second_at is not None:
                left = self.clock.monotonic() - self.second_at
                if left > self.seconds or (left > ANSWER and not self.answered):
                    self._end("its event loop stands still" if not self.answered else "what it runs does not end")

    def _end(self, why: str) -> None:
        timer = threading.Timer(1.0, os._exit, (1,))  # the log may be what stands still
        timer.daemon = True
        timer.start()
        log.critical("this worker is ended by force, %s: its tasks go to other workers once its session is too old", why)
        logging.shutdown()
        os._exit(1)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: it was not set by Python
            signal.signal(number, handler)


class _Forked:
    """Restores the signal handlers from before the worker in processes that a task's handler forks.

    A child that kept the worker's would not end on SIGTERM, which `multiprocessing` sends to its pools. It would also write the
    signal to the worker's socket, and so end the worker. The signals are blocked until the child's own handlers are in place.
    """

    def __init__(self, handlers: Mapping[signal.Signals, Any]) -> None:
        self.handlers = handlers
        self.mask: set[int] = set()
        forking.hold(self)

    def before_fork(self) -> None:
        """Block the signals in the thread that forks."""
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)

    def after_fork_in_parent(self) -> None:
        """Unblock them."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def after_fork(self) -> None:
        """Put the handlers from before the worker in place, in the child."""
        with suppress(ValueError):  # a host that calls no fork hooks: this need not be the child's main thread
            signal.set_wakeup_fd(-1)
            _restore(self.handlers)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


@contextmanager
def heeded(loop: asyncio.AbstractEventLoop, stop: Callable[[], None], clock: Clock, seconds: float) -> Generator[None]:
    """Have SIGINT and SIGTERM call `stop` on the loop, which is to run inside of this; in the main thread only.

    The process is ended `seconds` after the second one, or 5 s after it where the loop stands still, or at the third.
    On Windows signals are left as they are.
    """
    if sys.platform == "win32":
        yield
        return
    watch, over = _Watch(loop, stop, clock, seconds), threading.Event()
    reader, writer = socket.socketpair()
    writer.settimeout(0)

    def arrived(_number: int, _frame: object) -> None:
        watch.by_interpreter += 1
        watch.heed()
        with suppress(OSError):
            writer.send(b"\0")  # the thread is to see how that ends

    def listen() -> None:
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        watch.before = before if before != -1 else None

    handlers = {number: signal.signal(number, arrived) for number in HEEDED}
    forked = _Forked(handlers)
    loop.call_soon(listen)  # a loop takes the place when it begins to run
    thread = threading.Thread(target=watch.keep, args=(reader, over), name="buquet-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        forking.let_go(forked)
        signal.set_wakeup_fd(-1)
        _restore(handlers)
        writer.send(b"\0")
        thread.join()
        reader.close()
        writer.close()
