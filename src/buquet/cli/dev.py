"""The command `buquet dev`: a worker that restarts when one of its modules changes, and the dashboard."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from buquet.app import App
from buquet.cli.monitor import Host, Port, need_ui
from buquet.cli.output import log_to, say, to_stderr
from buquet.cli.parameters import START, Target, Url, cli
from buquet.clock import YEARS
from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


GRACE = 1.0
"""Seconds that running tasks get when the command ends. Then they return to the queue."""
RESTART_GRACE = YEARS
"""Seconds that running tasks get when the worker restarts: as many as they need."""
OVERDUE = 10.0
"""Seconds after which a worker that does not end is killed. Other workers take its tasks over when its session expires."""
PROBE = (
    "import sys, pathlib\n"
    "from buquet.cli.apps import find_app\n"
    "from buquet.errors import UsageError\n"
    "try:\n"
    "    print(find_app(sys.argv[1], pathlib.Path.cwd()).url)\n"
    "except UsageError as error:\n"
    "    sys.exit(f'error: {error}')\n"
)
"""Prints the URL of the App's store. A process of its own imports the user's module, since this one never could again."""


@cli.command(rich_help_panel=START)
def dev(target: Target, host: Host = "127.0.0.1", port: Port = 8000, url: Url = None) -> None:
    """Run a worker and the dashboard while you write tasks. The worker restarts when a module that it imported changes.

    Before it restarts, the worker finishes its running tasks. If a module fails to import, the error is shown and buquet waits
    for a fix. Ctrl-C ends both, and running tasks return to the queue.
    """
    need_ui()
    from buquet.dashboard.guard import is_loopback  # noqa: PLC0415 - needs the extra `ui`

    if not is_loopback(host):
        msg = f"buquet dev is for this machine only, and {host} is not: use `buquet worker` and `buquet ui --password`"
        raise UsageError(msg)
    if sys.platform == "win32":
        raise UsageError("buquet dev does not run on Windows: run `buquet worker` and `buquet ui` instead")
    with suppress(KeyboardInterrupt):
        asyncio.run(_Dev(target, host, port, url).run())


@dataclass
class _Dev:
    target: str
    host: str
    port: int
    url: str | None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    worker: asyncio.subprocess.Process | None = None
    versions: dict[Path, int] = field(default_factory=dict[Path, int])
    """When each module of the worker was changed before the worker started, in nanoseconds since 1970."""

    async def run(self) -> None:
        """Serve and work until interrupted."""
        from buquet.dashboard.serve import listen, make_server  # noqa: PLC0415 - needs the extra `ui`

        sock, address = listen(self.host, self.port)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stopping.set)
        changes = self._changes()
        await anext(changes, None)
        url = self.url or await self._probe(changes)
        if url is None:
            return
        if url.startswith("memory:"):
            msg = "memory: is one process's own memory, and the worker is another process. Use sqlite:PATH or s3://BUCKET/PREFIX"
            raise UsageError(msg)
        async with App(url) as app:
            await app.client.open()
            server = make_server(app, password=None, read_only=False, host=self.host)
            server.takes_signals = False
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            log_to(sys.stderr)
            logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs each change
            say(f"dashboard of {app.url}: {address}")
            working = asyncio.create_task(self._work(url, app.client.clock.new_op(), changes))
            try:
                await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.stopping.set()
                # `_work` may still be stopping the worker: a third signal would end the worker by force
                await asyncio.gather(working, return_exceptions=True)
                await self._end_worker()
                server.feed.stop()
                server.should_exit = True
                await asyncio.gather(serving, return_exceptions=True)

    async def _changes(self) -> AsyncIterator[set[Any]]:
        """Yield sets of changed files. The first is yielded when watching has begun, so that no change after it is missed."""
        from watchfiles import PythonFilter, awatch  # noqa: PLC0415 - needs the extra `ui`  # pyright: ignore[reportUnknownVariableType]

        watch: Callable[..., AsyncIterator[set[Any]]] = awatch  # pyright: ignore[reportUnknownVariableType]
        watches = False
        async for change in watch(
            Path.cwd(),
            watch_filter=PythonFilter(),
            stop_event=self.stopping,
            debounce=300,
            step=50,
            rust_timeout=200,
            yield_on_timeout=True,
        ):
            if change or not watches:
                watches = True
                yield change

    async def _probe(self, changes: AsyncIterator[set[Any]]) -> str | None:
        """Return the URL of the App's store when the module imports; None if stopped before."""
        while True:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROBE, self.target, stdout=subprocess.PIPE, start_new_session=True
            )
            out, _ = await child.communicate()
            if child.returncode == 0:
                return out.decode().splitlines()[-1]
            to_stderr("waiting for a Python file to change")
            if await anext(changes, None) is None:
                return None

    async def _work(self, url: str, nonce: str, changes: AsyncIterator[set[Any]]) -> None:
        """Run a worker, and a new one after each change of its modules."""
        with TemporaryDirectory() as folder:
            report = Path(folder) / "modules"
            words = [
                *(self.target, "--url", url, "--grace", str(RESTART_GRACE)),
                *("--parent", nonce, "--report-modules", str(report)),
            ]
            while not self.stopping.is_set():
                self.versions = {module: _changed_at(module) for module in _reported(report)}
                report.unlink(missing_ok=True)
                command = [sys.executable, "-m", "buquet", "worker", *words]
                self.worker = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, start_new_session=True)
                ended = asyncio.create_task(self._report_end(self.worker))
                names = ""
                async for change in changes:
                    if names := self._relevant(change, report):
                        break
                ended.cancel()
                if not names:
                    return
                to_stderr(f"{names} changed: the worker finishes its running tasks and restarts")
                await self._end_worker(restart=True)

    def _relevant(self, change: set[Any], report: Path) -> str:
        """Return the names of changed files for which the worker must restart."""
        worker, modules = self.worker, _reported(report)
        paths = {Path(entry[1]).resolve() for entry in change}
        if worker is not None and worker.returncode is None and modules:
            # this worker has read what was saved while the last one finished its tasks
            paths = {path for path in paths & modules if _changed_at(path) != self.versions.get(path)}
        return ", ".join(sorted(path.name for path in paths))

    async def _report_end(self, worker: asyncio.subprocess.Process) -> None:
        """Say so when the worker ends by itself; the worker has printed why."""
        status = await worker.wait()
        to_stderr(f"the worker ended with status {status}; it restarts when a Python file changes")

    async def _end_worker(self, *, restart: bool = False) -> None:
        """Stop the worker. Before a restart it finishes its running tasks, unless this command ends meanwhile."""
        worker = self.worker
        if worker is None:
            return
        ended, stopped = asyncio.create_task(worker.wait()), asyncio.create_task(self.stopping.wait())
        first = (signal.SIGTERM, {ended, stopped}, None) if restart else (signal.SIGTERM, {ended}, GRACE)
        # the second signal makes the worker return its tasks. It has another number: two equal signals at once count as one
        for number, until, seconds in (first, (signal.SIGINT, {ended}, OVERDUE), (signal.SIGKILL, {ended}, None)):
            if not ended.done():
                with suppress(ProcessLookupError):
                    worker.send_signal(number)
                await asyncio.wait(until, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()


def _reported(report: Path) -> set[Path]:
    """Return the files of the modules that the worker has imported; none before its first report."""
    try:
        return {Path(line) for line in report.read_text(encoding="utf-8").splitlines()}
    except FileNotFoundError:
        return set()


def _changed_at(path: Path) -> int:
    """Return when a file was changed, in nanoseconds since 1970; -1 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1
