"""The command for writing tasks: a worker that starts again when a source file changes, and the dashboard, in one terminal."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buquet.app import App
from buquet.cli.base import Target, Url, cli
from buquet.cli.output import log_to, say, to_stderr
from buquet.cli.ui import Host, Port, need_ui
from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

GRACE = 1.0
"""Seconds that running tasks get when the worker is to start again; then they are given back, and the next one runs them."""
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
    """Run a worker and the dashboard while you write tasks; the worker starts again when a Python file here changes.

    A module that does not import is told, and waited for. Ctrl-C ends both; what runs is given back.
    """
    need_ui()
    from buquet.dashboard.guard import is_loopback  # noqa: PLC0415 - needs the extra `ui`

    if not is_loopback(host):
        msg = f"buquet dev is for this machine only, and {host} is not: use `buquet worker` and `buquet ui --password`"
        raise UsageError(msg)
    if sys.platform == "win32":
        msg = "on Windows there is no `buquet dev`: run `buquet worker` and `buquet ui` by hand"
        raise UsageError(msg)
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
            say(f"dashboard of {app.url}: {address}")
            working = asyncio.create_task(self._work(url, app.client.clock.new_op(), changes))
            try:
                await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.stopping.set()
                await self._end()
                server.feed.stop()
                server.should_exit = True
                await asyncio.gather(serving, working, return_exceptions=True)

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
        while not self.stopping.is_set():
            command = [
                sys.executable,
                "-m",
                "buquet",
                "worker",
                self.target,
                "--url",
                url,
                "--grace",
                str(GRACE),
                "--parent",
                nonce,
            ]
            self.child = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, start_new_session=True)
            ended = asyncio.create_task(self._told_end(self.child))
            changed = await self._next(changes, quiet=True)
            ended.cancel()
            await self._end()
            if changed is None:
                return
            names = ", ".join(sorted({Path(each[1]).name for each in changed}))
            to_stderr(f"{names} changed: the worker starts again")

    async def _told_end(self, child: asyncio.subprocess.Process) -> None:
        """Say so when the worker ends by itself; what it printed says why."""
        status = await child.wait()
        to_stderr(f"the worker ended with status {status}; it starts again when a Python file changes")

    async def _next(self, changes: AsyncIterator[set[Any]], *, quiet: bool = False) -> set[Any] | None:
        """Wait for a change; None when stopped."""
        if not quiet:
            to_stderr("waiting for a Python file to change")
        return await anext(changes, None)

    async def _end(self) -> None:
        """Stop the worker, and wait until what it ran is finished or given back."""
        child, self.child = self.child, None
        if child is None or child.returncode is not None:
            return
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(OVERDUE):
                await child.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
