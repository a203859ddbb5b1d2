"""Several worker processes under one parent, which replaces those that die and reaps their sessions at once."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import BuquetError
from buquet.records import Session
from buquet.store.register import Register
from buquet.worker.fleet import Reaper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from buquet.queue.client import Client

log = logging.getLogger("buquet.worker")

FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0
HEALTHY = 60.0
"""Seconds after which a process that dies is replaced as if it were the first."""


class Processes:
    """Runs `buquet worker ARGUMENTS` in several processes, spawned and never forked.

    A child that dies without being asked has its session reaped at once, so that its tasks need not wait for the session to grow
    too old; then a new one is started. When all have ended by themselves (`--drain`, `--max-time`), so does this.
    """

    def __init__(self, client: Client, arguments: Sequence[str], count: int, *, grace: float = 30.0, quiet: bool = False) -> None:
        self.client = client
        self.arguments = list(arguments)
        self.count = count
        self.grace = grace
        self.quiet = quiet
        self.nonce = client.clock.new_op()
        """Names this parent in its children's sessions."""
        self.children: list[asyncio.subprocess.Process] = []
        self.reaped = 0
        """Sessions of dead children that were reaped."""
        self._stopping = False
        self._stop = asyncio.Event()

    def run(self) -> None:
        """Block until all have ended; SIGINT and SIGTERM are passed on."""
        asyncio.run(self._run_with_signals())

    async def _run_with_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):
                loop.add_signal_handler(number, self.stop)
        await self.arun()

    async def arun(self) -> None:
        """Run until all have ended, on the running loop. Cancelled, it kills its children."""
        await self.client.open()
        try:
            await asyncio.gather(*(self._keep_one(number) for number in range(self.count)))
        finally:
            for child in self.children:
                if child.returncode is None:
                    child.kill()

    def stop(self) -> None:
        """Ask all children to end, as `Worker.stop` does; asked again, they give back at once what they run."""
        self._stopping = True
        self._stop.set()
        for child in self.children:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    child.send_signal(signal.SIGTERM)

    async def _keep_one(self, number: int) -> None:
        clock = self.client.clock
        delay = FIRST_DELAY
        while not self._stopping:
            begun = clock.monotonic()
            child = await self._start()
            log.info("worker process %d started (pid %d)", number + 1, child.pid)
            status = await child.wait()
            self.children.remove(child)
            if status == 0 or self._stopping:
                return
            log.error("worker process %d (pid %d) died: %s", number + 1, child.pid, _reason(status))
            await self._reap(child.pid)
            delay = FIRST_DELAY if clock.monotonic() - begun > HEALTHY else min(delay * 2, LONGEST_DELAY)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay / 2):
                    await self._stop.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "buquet", "worker", *self.arguments, "--parent", self.nonce]
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,  # held open: a child that reads its end knows that the parent is gone
            stderr=subprocess.DEVNULL if self.quiet else None,
            start_new_session=True,  # a Ctrl-C on the terminal reaches the parent only, which passes it on once
        )
        self.children.append(child)
        if self._stopping:
            child.send_signal(signal.SIGTERM)
        return child

    async def _reap(self, pid: int) -> None:
        """Reap the session of a child that is known to be dead."""
        register = Register(self.client.store, self.client.clock, patience=30)
        reaper = Reaper(register, self.client.clock, self.client.added, self.client.ended)
        try:
            for listed in await register.reads.list(keys.WORKERS):
                held = await register.read(Session, listed.key)
                if held and (held.record.pid, held.record.parent, held.record.host) == (pid, self.nonce, socket.gethostname()):
                    self.reaped += await reaper.reap(held.record.id)
        except BuquetError as error:
            log.error("the session of pid %d could not be reaped now; others will, when it is too old: %s", pid, error)  # noqa: TRY400


def _reason(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
