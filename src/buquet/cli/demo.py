"""The command `buquet demo`: runs real tasks without any set-up, with a crash and a retry on the way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TextIO

import typer
from typer import Option

from buquet.app import App
from buquet.cli.output import AT_ONCE, print_json, print_table
from buquet.cli.parameters import START, Json, Url, cli
from buquet.concurrency import each_of
from buquet.errors import UsageError
from buquet.insights import fleet
from buquet.printing import counted
from buquet.queue.handle import Handle
from buquet.records import ENDED, Task
from buquet.worker.processes import Processes

if TYPE_CHECKING:
    from buquet.cli.demotasks import Index, Report

TARGET = "buquet.cli.demotasks:app"
LARGEST = 60_000
"""Bytes of the largest file that is indexed: the demo should take seconds."""
PROCESSES = 2
SLOTS = 4
CRASH_AT = 0.35
"""Share of the tasks after which a worker process is killed."""
WAITED_AT_ONCE = 16
"""Tasks that are waited for side by side."""
TIMEOUT = 180.0

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "__pycache__"}
"""Folders with files that are not the library's own, or broken on purpose."""


class Numbers(NamedTuple):
    """What the histories of the tasks say."""

    seconds: float
    tasks: int
    completed: int
    lost: int
    """Tasks that did not complete."""
    retries: int
    killed: int
    """Worker processes that were killed."""
    taken_over: int
    """Tasks that were running in a killed process."""
    recorded_twice: int
    """Tasks with more than one end in their history."""
    example: str
    """A task that was taken over."""


@cli.command(rich_help_panel=START)
def demo(
    files: Annotated[int, Option("--files", min=20, max=2000, help="Files to index, one task each.")] = 300,
    url: Url = None,
    json: Json = False,
) -> None:
    """See it work: hundreds of tasks index Python's own library, with a crash and a retry on the way."""
    from buquet.cli.demotasks import app  # noqa: PLC0415 - declares tasks, which no other command needs

    if url is not None:
        app.use(url)
    if app.url == "memory:":
        msg = "the demo's workers are other processes, which do not see this one's memory. Use sqlite:PATH or s3://BUCKET/PREFIX"
        raise UsageError(msg)
    logging.getLogger("buquet").setLevel(logging.CRITICAL)  # the demo prints its own messages
    paths = library(files)

    async def work() -> tuple[Numbers, Report]:
        async with app, asyncio.timeout(TIMEOUT):
            return await _Demo(app, _Screen(sys.stderr if json else sys.stdout)).run(paths)

    numbers, report = asyncio.run(work())
    if json:
        print_json({"url": app.url, **numbers._asdict(), "report": report})
    else:
        _print_report(numbers, report, "" if url is None else f" --url {shlex.quote(url)}")
    if numbers.lost or numbers.recorded_twice:
        raise typer.Exit(1)


def _print_report(numbers: Numbers, report: Report, url: str) -> None:
    print()
    print_table(
        ("tasks", "count"),
        [
            ("completed", f"{numbers.completed} of {numbers.tasks}, in {numbers.seconds:.1f} s"),
            ("retried after an error", numbers.retries),
            ("taken over after the crash", numbers.taken_over),
            ("lost", numbers.lost),
            ("duplicates recorded", numbers.recorded_twice),
        ],
    )
    print(f"\n{report['files']:,} files, {report['lines']:,} lines, {report['identifiers']:,} identifiers. The most used:\n")
    print_table(("identifier", "uses", "files"), [(name, f"{uses:,}", f"{files:,}") for name, uses, files in report["names"]])
    print("\nNow try:")
    command = _command()
    print(f"  {command} history {numbers.example}{url}    # the task that survived the crash")
    print(f"  {command} ls{url}")
    print(f"  {command} doctor{url}")


def _command() -> str:
    """Return how this command was called, so that users can paste what is printed even if buquet is not on the path."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m buquet"
    on_path = shutil.which("buquet")
    if not called.exists() or (on_path is not None and called.samefile(on_path)):
        return "buquet"
    return shlex.quote(str(called))


class _Screen:
    """Shows the progress: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.tenths = 0

    def say(self, text: str) -> None:
        """Print a line, over the bar if there is one."""
        print(("\r\033[K" if self.stream.isatty() else "") + text, file=self.stream, flush=True)

    def show(self, done: int, total: int) -> None:
        """Show how many tasks are done."""
        if self.stream.isatty():
            width = 40
            full = width * done // total
            line = f"\r\033[K\033[32m{'━' * full}\033[0m{'─' * (width - full)} {done}/{total} tasks"
            print(line, end="\n" if done == total else "", file=self.stream, flush=True)
        elif done * 10 // total > self.tenths:
            self.tenths = done * 10 // total
            self.say(f"{done}/{total} tasks done")


@dataclass
class _Demo:
    app: App
    screen: _Screen
    killed: int = 0

    async def run(self, paths: Sequence[str]) -> tuple[Numbers, Report]:
        from buquet.cli.demotasks import index, merge  # noqa: PLC0415 - as above

        begun = self.app.clock.monotonic()
        self.screen.say(f"store: {self.app.url}")
        failing = len(paths) // 10
        handles = await index.asubmit_many({"path": path, "stumbles": number == failing} for number, path in enumerate(paths))
        self.screen.say(f"submitted {counted(len(handles), 'task')}: each indexes a file of {sysconfig.get_path('stdlib')}")
        options = ["--url", self.app.url, "--concurrency", str(SLOTS)]
        workers = Processes(self.app.client, [TARGET, *options], PROCESSES, quiet=True)
        running = asyncio.create_task(workers.arun())
        try:
            await self._wait(handles, workers)
            merged = await merge.asubmit([handle.id for handle in handles])
            report = await merged.aresult(timeout=TIMEOUT)
        finally:
            workers.stop()
            try:
                async with asyncio.timeout(20):
                    await running
            except TimeoutError:
                self.screen.say("a worker did not end in time, and was killed")
        records = [await handle.arecord() for handle in [*handles, merged]]
        return self._count(records, self.app.clock.monotonic() - begun), report

    async def _wait(self, handles: Sequence[Handle[Index]], workers: Processes) -> None:
        """Wait for all tasks, and kill a worker on the way."""
        done = 0
        crashes: list[asyncio.Task[None]] = []

        async def wait(handle: Handle[Index]) -> None:
            nonlocal done
            await self.app.client.wait(handle.id, TIMEOUT)
            done += 1
            self.screen.show(done, len(handles))
            if done == int(len(handles) * CRASH_AT):
                crashes.append(asyncio.create_task(self._crash(handles, workers)))

        self.screen.say(f"{PROCESSES} worker processes start")
        await each_of(handles, wait, WAITED_AT_ONCE)
        await asyncio.gather(*crashes)

    async def _crash(self, handles: Sequence[Handle[Index]], workers: Processes) -> None:
        """Kill a worker process that is running tasks. SIGSTOP first, so that none of them ends in between."""
        for _ in range(20):
            rows = await fleet.workers(self.app.client)
            ids = {row.session.pid: row.session.id for row in rows if row.alive and row.session.host == socket.gethostname()}
            for child in list(workers.children):
                if child.pid not in ids or child.returncode is not None:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGSTOP)
                    await self.app.clock.sleep(0.05)  # requests that it has sent are answered by then
                    tasks = await each_of(handles, lambda handle: handle.arecord(), AT_ONCE)
                    running = sum(task.state == "running" and task.worker == ids[child.pid] for task in tasks)
                    if running:
                        os.kill(child.pid, signal.SIGKILL)
                        self.killed += 1
                        during = f"while it ran {counted(running, 'task')}; a new one starts"
                        self.screen.say(f"killed worker process {child.pid} with SIGKILL {during}")
                        return
                    os.kill(child.pid, signal.SIGCONT)
            await self.app.clock.sleep(0.05)
        self.screen.say("no worker process was found running a task, so none was killed")

    def _count(self, records: Sequence[Task], seconds: float) -> Numbers:
        def counts(wanted: Callable[[str, str], bool]) -> list[int]:
            return [sum(wanted(event.why, event.state) for event in task.events) for task in records]

        losses = counts(lambda why, _: why in {"taken over", "lost"})
        ends = counts(lambda _, state: state in ENDED)
        completed = sum(task.state == "completed" for task in records)
        return Numbers(
            seconds=round(seconds, 1),
            tasks=len(records),
            completed=completed,
            lost=len(records) - completed,
            retries=sum(counts(lambda why, _: why == "retry")),
            killed=self.killed,
            taken_over=sum(count > 0 for count in losses),
            recorded_twice=sum(count > 1 for count in ends),
            example=next((task.id for task, count in zip(records, losses, strict=True) if count), records[0].id),
        )


def library(count: int) -> list[str]:
    """Return the paths of up to `count` files of Python's standard library, evenly spread, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[str] = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - SKIPPED)
        files = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        paths += [str(path) for path in files if 0 < path.stat().st_size <= LARGEST]
    if not paths:
        msg = f"there are no Python files in {root}: this Python keeps its library in another form, and the demo needs it"
        raise UsageError(msg)
    step = max(len(paths) // count, 1)
    return paths[::step][:count]
