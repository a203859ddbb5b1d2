"""A worker's process: signals that stop it, and several such processes under one parent that replaces dead ones."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buquet import forking, keys
from buquet.concurrency import each_of
from buquet.errors import BuquetError, UnreadableRecord, UsageError
from buquet.journal.writer import JournalWriter
from buquet.printing import counted
from buquet.records import Session
from buquet.store.register import Register
from buquet.worker.fleet import Reaper
from buquet.worker.logs import Observers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from buquet.clock import Clock
    from buquet.queue.client import Client

log = logging.getLogger("buquet.worker")

FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0
HEALTHY = 60.0
"""Seconds after which a process that dies is replaced as if it were the first."""
WRONG_USAGE = 2
"""The exit status of a child that cannot start, and could not the next time."""
OVERDUE = 45.0
"""Seconds after the grace period in which a child may store its outcomes and end; then it is killed."""
AT_ONCE = 32
"""Sessions read side by side."""
STOPPING = (signal.SIGINT, signal.SIGTERM)
ANSWER = 5.0
"""Seconds for the event loop to notice the second signal."""


@dataclass(eq=False)
class Processes:
    """Runs `buquet worker ARGUMENTS` in several processes, spawned and never forked.

    A child that dies without being asked has its session reaped at once, so that its tasks need not wait until the session is too
    old. Then a new child is started, after 1 s and growing to 30 s. Once all have ended by themselves (`--drain`), `run` returns.
    `grace` is the grace period of the children. After `max_time` seconds all are asked to end.
    """

    client: Client
    arguments: Sequence[str]
    count: int
    grace: float = field(default=30.0, kw_only=True)
    max_time: float | None = field(default=None, kw_only=True)
    quiet: bool = field(default=False, kw_only=True)
    each: Callable[[int], Sequence[str]] = field(default=lambda _number: (), kw_only=True)
    """Further arguments of each process, by its number from 0, such as a port of its own."""
    children: list[asyncio.subprocess.Process] = field(default_factory=list["asyncio.subprocess.Process"], init=False)
    reaped: int = field(default=0, init=False)
    """Sessions of dead children that were reaped."""

    def __post_init__(self) -> None:
        if self.client.store.url.startswith("memory:"):
            raise UsageError(
                "memory: is this process's own memory, which other processes do not see. Use sqlite:PATH or s3://BUCKET/PREFIX"
            )
        if sys.platform == "win32":
            raise UsageError("on Windows a worker is one process: start several by hand")
        if self.max_time is not None and self.max_time <= 0:
            raise UsageError(f"max_time is a number of seconds above 0, not {self.max_time:g}")
        self.nonce = self.client.clock.new_op()
        """Names this parent in its children's sessions."""
        self._not_ours: set[str] = set()
        """Keys of sessions that are not this parent's children's, and never will be."""
        self._stop = asyncio.Event()

    def run(self) -> int:
        """Block until all have ended, and return the exit status; SIGINT and SIGTERM are passed on."""

        async def with_signals() -> int:
            for number in STOPPING:
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
            return await self.arun()

        return asyncio.run(with_signals())

    async def arun(self) -> int:
        """Run until all have ended, on the running loop; return 0, or the status of a child that could not start.

        Cancelled, it kills its children.
        """
        await self.client.open()
        timer = asyncio.get_running_loop().call_later(self.max_time, self.stop) if self.max_time else None
        overdue = asyncio.create_task(self._kill_overdue())
        try:
            return max(await asyncio.gather(*(self._keep_one(number) for number in range(self.count))))
        finally:
            if timer:
                timer.cancel()
            overdue.cancel()
            left = list(self.children)
            self._send(signal.SIGKILL)
            await asyncio.gather(*(child.wait() for child in left))

    def stop(self) -> None:
        """Ask all children to end, as `Worker.stop` does; asked again, they put back at once what they run."""
        self._stop.set()
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for child in self.children:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    async def _kill_overdue(self) -> None:
        await self._stop.wait()
        await self.client.clock.sleep(self.grace + OVERDUE)
        for child in self.children:
            log.error("worker process with pid %d does not end, and is killed", child.pid)
        self._send(signal.SIGKILL)

    async def _keep_one(self, number: int) -> int:
        """Keep one process alive until it ends by itself or all are stopped; return its exit status if it can never start."""
        clock = self.client.clock
        delay = FIRST_DELAY
        while not self._stop.is_set():
            begun = clock.monotonic()
            status, pid = await self._run_one(number)
            if status == 0:
                return 0
            if pid:
                await self._reap(pid)
            if self._stop.is_set():
                return 0
            if status == WRONG_USAGE:
                log.error("worker process %d cannot start, and is not started again", number + 1)
                return status
            if clock.monotonic() - begun > HEALTHY:
                delay = FIRST_DELAY
            log.info("worker process %d is started again in %g s", number + 1, delay)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.wait()
            delay = min(delay * 2, LONGEST_DELAY)
        return 0

    async def _run_one(self, number: int) -> tuple[int, int]:
        """Start a process and wait for its end; return its exit status (negative: the signal) and pid."""
        own = ("--parent", self.nonce)
        try:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "buquet", "worker", *self.arguments, *self.each(number), *own),
                stdin=subprocess.PIPE,  # held open: see `watch_parent`
                stderr=subprocess.DEVNULL if self.quiet else None,
                start_new_session=True,  # a Ctrl-C on the terminal reaches the parent only, which passes it on once
            )
        except OSError as error:  # no memory or too many processes: it may pass
            log.error("worker process %d cannot be started now: %s", number + 1, error)  # noqa: TRY400 - the text says all
            return 1, 0
        self.children.append(child)
        if self._stop.is_set():
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        log.info("worker process %d started (pid %d)", number + 1, child.pid)
        status = await child.wait()
        self.children.remove(child)
        if self._stop.is_set() and status == -signal.SIGTERM:
            log.info("worker process %d (pid %d) was stopped before it had begun", number + 1, child.pid)
        elif status != 0:
            log.error("worker process %d (pid %d) died: %s", number + 1, child.pid, _reason(status))
        return status, child.pid

    async def _reap(self, pid: int) -> None:
        clock = self.client.clock
        register = Register(self.client.store, clock, patience=30)
        # the parent is no worker, but readers must see what it ends, such as a task that has killed its last process
        journal = JournalWriter(register.reads, clock, lambda: self.nonce, clock.now_ms)
        reaper = Reaper(register, self.client.added, Observers(self.client, journal).moved)
        try:
            for session in await self._sessions_of(pid, register):
                count = len(session.claims)
                if await reaper.reap(session.id):
                    self.reaped += 1
                    log.info("the session of pid %d was reaped, and %s with it", pid, counted(count, "claim"))
            await journal.flush()
        except BuquetError as error:
            log.error("the session of pid %d could not be reaped now; others will, when it is too old: %s", pid, error)  # noqa: TRY400

    async def _sessions_of(self, pid: int, register: Register) -> list[Session]:
        ours = (self.nonce, socket.gethostname())
        sessions: list[Session] = []

        async def look(key: str) -> None:
            try:
                stored = await register.read(Session, key)
            except UnreadableRecord:
                stored = None
            if stored is None or (stored.record.parent, stored.record.host) != ours:
                self._not_ours.add(key)
            elif stored.record.pid == pid:
                sessions.append(stored.record)

        listed = [listed.key async for page in register.reads.pages(keys.WORKERS) for listed in page]
        await each_of([key for key in listed if key not in self._not_ours], look, AT_ONCE)
        self._not_ours.intersection_update(listed)
        return sessions


def watch_parent(gone: Callable[[], None]) -> None:
    """In a child of `Processes`: call `gone`, in a thread, when the parent has ended in any way.

    The parent holds the other end of this process's standard input and never writes to it. Handlers see an empty one.
    """
    pipe = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)

    def watch() -> None:
        # not through sys.stdin: a thread that waits in it holds its lock, and the interpreter then aborts at exit
        while os.read(pipe, 1024):
            pass
        log.warning("the process that started this worker is gone")
        gone()

    threading.Thread(target=watch, name="buquet-parent", daemon=True).start()


def _reason(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


# ---------------------------------------------------------------------- signals


@contextmanager
def stop_on_signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None], clock: Clock, seconds: float) -> Generator[None]:
    """Have SIGINT and SIGTERM call `stop` on the loop, which is to run inside of this; in the main thread only.

    The process is ended `seconds` after the second one, or 5 s after it where the loop stands still, or at the third.
    On Windows signals are left as they are.
    """
    if sys.platform == "win32":
        yield
        return
    watch, over = _SignalWatch(loop, stop, clock, seconds), threading.Event()
    reader, writer = socket.socketpair()
    writer.settimeout(0)

    def arrived(_number: int, _frame: object) -> None:
        watch.by_interpreter += 1
        watch.pass_on()
        with suppress(OSError):
            writer.send(b"\0")  # wakes the thread, which sees to the end

    def listen() -> None:
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        watch.before = before if before != -1 else None

    handlers = {number: signal.signal(number, arrived) for number in STOPPING}
    forked = _ForkedSignals(handlers)
    loop.call_soon(listen)  # a loop sets its own descriptor when it begins to run
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


@dataclass(eq=False)
class _SignalWatch:
    """Counts the signals, and makes sure that the process ends.

    A signal is noticed in two ways. The interpreter runs a signal handler in the main thread, unless a task's handler never
    returns from C code. The interpreter also writes the signal's number to a socket, which a thread reads, unless other code has
    replaced that socket. Whichever of the two has counted more is right.
    """

    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None]
    clock: Clock
    seconds: float
    by_interpreter: int = 0
    by_socket: int = 0
    passed_on: int = 0
    second_at: float | None = None
    answered: bool = False
    before: int | None = None
    """Where the interpreter wrote signals to before: they wake an event loop."""

    def pass_on(self) -> None:
        """Call `stop` for each signal that was counted since."""
        while self.passed_on < max(self.by_interpreter, self.by_socket):
            self.passed_on += 1
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self.stop)
                if self.passed_on > 1:
                    self.loop.call_soon_threadsafe(self._answer)
            if self.passed_on == 2:  # noqa: PLR2004 - the second signal
                self.second_at = self.clock.monotonic()
            elif self.passed_on > 2:  # noqa: PLR2004
                self._end("it was asked a third time")

    def _answer(self) -> None:
        self.answered = True

    def keep(self, reader: socket.socket, over: threading.Event) -> None:
        """Read the socket until the worker has ended, and end the process when the worker does not."""
        while not over.is_set():
            reader.settimeout(None if self.second_at is None else 0.1)
            with suppress(TimeoutError):
                numbers = reader.recv(64)
                if self.before is not None:
                    with suppress(OSError):
                        os.write(self.before, numbers)
                self.by_socket += sum(number in STOPPING for number in numbers)
                self.pass_on()
            if self.second_at is not None:
                waited = self.clock.monotonic() - self.second_at
                if waited > self.seconds or (waited > ANSWER and not self.answered):
                    self._end("its event loop stands still" if not self.answered else "what it runs does not end")

    def _end(self, why: str) -> None:
        timer = threading.Timer(1.0, os._exit, (1,))  # the log may be what stands still
        timer.daemon = True
        timer.start()
        log.critical("this worker is ended by force, %s: its tasks go to other workers once its session is too old", why)
        logging.shutdown()
        os._exit(1)


class _ForkedSignals:
    """Restores the signal handlers from before the worker in processes that a task's handler forks.

    A child with the worker's handlers would not end on SIGTERM, which `multiprocessing` sends to its pools. It would also write
    the signal to the worker's socket, and so end the worker. The signals are blocked until the child has its own handlers.
    """

    def __init__(self, handlers: Mapping[signal.Signals, Any]) -> None:
        self.handlers = handlers
        self.mask: set[int] = set()
        forking.hold(self)

    def before_fork(self) -> None:
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def after_fork_in_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def after_fork(self) -> None:
        with suppress(ValueError):  # a host that calls no fork hooks: this need not be the child's main thread
            signal.set_wakeup_fd(-1)
            _restore(self.handlers)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: it was not set by Python
            signal.signal(number, handler)
