"""Several worker processes under one parent, which replaces those that die and reaps their sessions at once."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import BuquetError, UnreadableRecord, UsageError
from buquet.journal.writer import JournalWriter
from buquet.printing import counted
from buquet.records import Session
from buquet.store.register import Register
from buquet.worker.fleet import Reaper
from buquet.worker.observers import Telling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from buquet.queue.client import Client

log = logging.getLogger("buquet.worker")

FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0
HEALTHY = 60.0
"""Seconds after which a process that dies is replaced as if it were the first."""
WRONG_USAGE = 2
"""The exit status of a child that cannot start, and could not the next time."""
OVERDUE = 45.0
"""Seconds after the grace in which a child may store its outcomes and end; then it is killed."""
AT_ONCE = 32
"""Sessions read side by side."""


class Processes:
    """Runs `buquet worker ARGUMENTS` in several processes, spawned and never forked.

    A child that dies without being asked has its session reaped at once, so that its tasks need not wait for the session to grow
    too old; then a new one is started, after 1 s and growing to 30 s. Once all have ended by themselves (`--drain`), it ends.
    `grace` is what the children are told, `max_time` the seconds after which all are asked to end.
    """

    def __init__(
        self,
        client: Client,
        arguments: Sequence[str],
        count: int,
        *,
        grace: float = 30.0,
        max_time: float | None = None,
        quiet: bool = False,
        each: Callable[[int], Sequence[str]] = lambda _number: (),
    ) -> None:
        if client.store.url.startswith("memory:"):
            msg = "memory: is this process's own memory, which other processes do not see. Use sqlite:PATH or s3://BUCKET/PREFIX"
            raise UsageError(msg)
        if sys.platform == "win32":
            raise UsageError("on Windows a worker is one process: start several by hand")
        if max_time is not None and max_time <= 0:
            raise UsageError(f"max_time is a number of seconds above 0, not {max_time:g}")
        self.client = client
        self.arguments = list(arguments)
        self.count = count
        self.each = each
        """Further arguments of each process, by its number from 0, such as a port of its own."""
        self.grace = grace
        self.max_time = max_time
        self.quiet = quiet
        self.nonce = client.clock.new_op()
        """Names this parent in its children's sessions."""
        self.children: list[asyncio.subprocess.Process] = []
        self.reaped = 0
        """Sessions of dead children that were reaped."""
        self._foreign: set[str] = set()
        """Keys of sessions that are not my children's, and never will be."""
        self._stopping = False
        self._stop = asyncio.Event()

    def run(self) -> int:
        """Block until all have ended, and return the exit status; SIGINT and SIGTERM are passed on."""
        return asyncio.run(self._run_with_signals())

    async def _run_with_signals(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        return await self.arun()

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
            self._kill(left)
            await asyncio.gather(*(child.wait() for child in left))

    def stop(self) -> None:
        """Ask all children to end, as `Worker.stop` does; asked again, they give back at once what they run."""
        self._stopping = True
        self._stop.set()
        for child in self.children:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    async def _kill_overdue(self) -> None:
        await self._stop.wait()
        await self.client.clock.sleep(self.grace + OVERDUE)
        for child in self.children:
            log.error("worker process with pid %d does not end, and is killed", child.pid)
        self._kill(self.children)

    @staticmethod
    def _kill(children: Sequence[asyncio.subprocess.Process]) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                child.kill()

    async def _keep_one(self, number: int) -> int:
        """Keep one process alive until it ends by itself or all are stopped; return its exit status where that is lasting."""
        clock = self.client.clock
        delay = FIRST_DELAY
        while not self._stopping:
            begun = clock.monotonic()
            status, pid = await self._run_one(number)
            if status == 0:
                return 0
            if pid:
                await self._reap(pid)
            if self._stopping:
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
        try:
            child = await self._start(number)
        except OSError as error:  # no memory or too many processes: it may pass
            log.error("worker process %d cannot be started now: %s", number + 1, error)  # noqa: TRY400 - the text says all
            return 1, 0
        log.info("worker process %d started (pid %d)", number + 1, child.pid)
        status = await child.wait()
        self.children.remove(child)
        if self._stopping and status == -signal.SIGTERM:
            log.info("worker process %d (pid %d) was stopped before it had begun", number + 1, child.pid)
        elif status != 0:
            log.error("worker process %d (pid %d) died: %s", number + 1, child.pid, _reason(status))
        return status, child.pid

    async def _start(self, number: int) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "buquet", "worker", *self.arguments, *self.each(number), "--parent", self.nonce]
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,  # held open: see `watch_parent`
            stderr=subprocess.DEVNULL if self.quiet else None,
            start_new_session=True,  # a Ctrl-C on the terminal reaches the parent only, which passes it on once
        )
        self.children.append(child)
        if self._stopping:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        return child

    async def _reap(self, pid: int) -> None:
        """Reap the sessions of a child that is known to be dead."""
        register = Register(self.client.store, self.client.clock, patience=30)
        # the parent is no worker, but what it ends (a task that has killed its last process) is to be seen as well
        journal = JournalWriter(register.reads, self.client.clock, lambda: self.nonce, self.client.clock.now_ms)
        reaper = Reaper(register, self.client.clock, self.client.added, Telling(self.client, journal).moved)
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
        """Find a child's sessions; whatever else lies there, and cannot be read, is no concern of this."""
        host = socket.gethostname()
        found: list[Session] = []

        async def look(key: str) -> None:
            try:
                held = await register.read(Session, key)
            except UnreadableRecord:
                self._foreign.add(key)
                return
            if held is None or (held.record.parent, held.record.host) != (self.nonce, host):
                self._foreign.add(key)
            elif held.record.pid == pid:
                found.append(held.record)

        listed: set[str] = set()
        async for page in register.reads.pages(keys.WORKERS):
            listed.update(each.key for each in page)
            unknown = [each.key for each in page if each.key not in self._foreign]
            for start in range(0, len(unknown), AT_ONCE):
                await asyncio.gather(*map(look, unknown[start : start + AT_ONCE]))
        self._foreign &= listed
        return found


def watch_parent(gone: Callable[[], None]) -> None:
    """In a child of `Processes`: call `gone`, in a thread, when the parent has ended, however that was.

    The parent holds the other end of this process's standard input and never writes to it. Handlers find an empty one.
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
