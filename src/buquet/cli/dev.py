"""The command for writing tasks: a worker that starts again when one of its modules changes, and the dashboard, in one go."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from buquet.app import App
from buquet.cli.base import Target, Url, cli
from buquet.cli.output import log_to, say, to_stderr
from buquet.cli.ui import Host, Port, need_ui
from buquet.clock import YEARS
from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.clock import Clock

GRACE = 1.0
"""Seconds that running tasks get when the command ends; then they are given back."""
PATIENT = YEARS
"""Seconds that running tasks get when the worker is to start again: as long as they take."""
OVERDUE = 10.0
"""Seconds after which a worker that does not end is killed; its tasks are then taken over when its session is too old."""
PROBE = (
    "import sys, pathlib\n"
    "from buquet.cli.load import find_app\n"
    "from buquet.errors import UsageError\n"
    "try:\n"
    "    print(find_app(sys.argv[1], pathlib.Path.cwd()).url)\n"
    "except UsageError as error:\n"
    "    sys.exit(f'error: {error}')\n"
)
"""Imports the user's module in a process of its own, and says where its App's store is: this process never imports it."""


@cli.command()
def dev(target: Target, host: Host = "127.0.0.1", port: Port = 8000, url: Url = None) -> None:
    """Run a worker and the dashboard while you write tasks; the worker restarts when a module that it imported changes.

    Before it restarts, the worker finishes its running tasks. If a module fails to import, the error is shown and buquet waits
    for a fix. Ctrl-C ends both, and running tasks go back to the queue.
    """
    need_ui()
    from buquet.dashboard.guard import is_loopback  # noqa: PLC0415 - needs the extra `ui`

    if not is_loopback(host):
        msg = f"buquet dev is for this machine only, and {host} is not: use `buquet worker` and `buquet ui --password`"
        raise UsageError(msg)
    if sys.platform == "win32":
        raise UsageError("on Windows there is no `buquet dev`: run `buquet worker` and `buquet ui` by hand")
    with suppress(KeyboardInterrupt):
        asyncio.run(_Dev(target, host, port, url).run())


class _Dev:
    def __init__(self, target: str, host: str, port: int, url: str | None) -> None:
        self.target = target
        self.host = host
        self.port = port
        self.url = url
        self.stopping = asyncio.Event()
        self.child: asyncio.subprocess.Process | None = None
        self.versions: dict[Path, int] = {}
        """The modules of the worker, and when each was changed before the worker started (nanoseconds since 1970)."""

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
                # one after the other: a third signal would end the worker by force
                await asyncio.gather(working, return_exceptions=True)
                await self._end()
                server.feed.stop()
                server.should_exit = True
                await asyncio.gather(serving, return_exceptions=True)

    async def _changes(self) -> AsyncIterator[set[Any]]:
        """Yield what changed; first nothing, once it watches: a change right after the module was read must not be missed."""
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
        """Return the URL of the user's App, once its module imports; None when stopped before."""
        while True:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROBE, self.target, stdout=subprocess.PIPE, start_new_session=True
            )
            out, _ = await child.communicate()
            if child.returncode == 0:
                return out.decode().splitlines()[-1]
            if await self._next(changes) is None:
                return None

    async def _work(self, url: str, nonce: str, changes: AsyncIterator[set[Any]]) -> None:
        """Keep a worker running, a new one after each change."""
        with TemporaryDirectory() as folder:
            report = Path(folder) / "modules"
            words = [self.target, "--url", url, "--grace", str(PATIENT), "--parent", nonce, "--report-modules", str(report)]
            while not self.stopping.is_set():
                self.versions = {module: _changed_at(module) for module in _reported(report)}
                report.unlink(missing_ok=True)
                command = [sys.executable, "-m", "buquet", "worker", *words]
                self.child = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, start_new_session=True)
                ended = asyncio.create_task(self._told_end(self.child))
                names = ""
                async for change in changes:
                    if names := self._concerns(change, report):
                        break
                ended.cancel()
                if not names:
                    return
                to_stderr(f"{names} changed: the worker finishes its running tasks and restarts")
                await self._end(patient=True)

    def _concerns(self, change: set[Any], report: Path) -> str:
        """Return the names of what changed, where the worker is to start again for it."""
        child, modules = self.child, _reported(report)
        paths = {Path(each[1]).resolve() for each in change}
        if child is not None and child.returncode is None and modules:
            # what was saved while the worker before finished its work is what this one has read
            paths = {path for path in paths & modules if _changed_at(path) != self.versions.get(path)}
        return ", ".join(sorted(path.name for path in paths))

    async def _told_end(self, child: asyncio.subprocess.Process) -> None:
        """Say so when the worker ends by itself; what it printed says why."""
        status = await child.wait()
        to_stderr(f"the worker ended with status {status}; it restarts when a Python file changes")

    async def _next(self, changes: AsyncIterator[set[Any]]) -> set[Any] | None:
        """Wait for a change; None when stopped."""
        to_stderr("waiting for a Python file to change")
        return await anext(changes, None)

    async def _end(self, *, patient: bool = False) -> None:
        """Stop the worker; what it runs is given back. `patient`: it finishes that first, unless this command ends."""
        child = self.child
        if child is None:
            return
        ended, stopped = asyncio.create_task(child.wait()), asyncio.create_task(self.stopping.wait())
        first = (signal.SIGTERM, {ended, stopped}, None) if patient else (signal.SIGTERM, {ended}, GRACE)
        # a second signal makes the worker give back what it runs; another number, since two equal ones at once count as one
        for number, until, seconds in (first, (signal.SIGINT, {ended}, OVERDUE), (signal.SIGKILL, {ended}, None)):
            if not ended.done():
                with suppress(ProcessLookupError):
                    child.send_signal(number)
                await asyncio.wait(until, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()


def _reported(report: Path) -> set[Path]:
    """Return the files of the modules that the worker has imported; none before it says so."""
    try:
        return {Path(line) for line in report.read_text(encoding="utf-8").splitlines()}
    except FileNotFoundError:
        return set()


def _changed_at(path: Path) -> int:
    """Return when a file was changed, nanoseconds since 1970; -1 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def report_modules(report: Path, clock: Clock) -> None:
    """Write the files of the modules that this process has imported, and again whenever there are more, for `buquet dev`."""

    def write() -> int:
        known = len(sys.modules)
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        fresh = report.with_suffix(".new")
        fresh.write_text("\n".join(sorted(str(Path(each).resolve()) for each in files if each)), encoding="utf-8")
        fresh.replace(report)
        return known

    def keep(known: int) -> None:
        with suppress(FileNotFoundError):  # the command has ended, and its folder is gone
            while True:
                clock.block(0.5)
                known = write() if len(sys.modules) != known else known

    threading.Thread(target=keep, args=(write(),), daemon=True).start()
