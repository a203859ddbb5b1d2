"""The command that shows the main job on real input, with nothing set up: workers, a crash, a retry, results."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from buquet import keys
from buquet.cli.base import Json, Url, cli
from buquet.cli.output import print_json, print_table
from buquet.errors import BuquetError, UsageError
from buquet.printing import counted
from buquet.records import ENDED, Session
from buquet.worker.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from buquet.app import App
    from buquet.cli.demotasks import Index, Report
    from buquet.queue.handle import Handle
    from buquet.records import Task

TARGET = "buquet.cli.demotasks:app"
LARGEST = 60_000
"""Larger files, in bytes, are left out: the demo should take seconds."""
PROCESSES = 2
SLOTS = 4
CRASH_AT = 0.35
"""Share of the tasks after which a worker process is killed."""
LOOKED_AT = 16
"""Tasks that are waited for at once."""
TIMEOUT = 180.0

NOT_READ = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "__pycache__"}
"""Folders of the library that are not its own code, or hold files that are broken on purpose."""


class Numbers(NamedTuple):
    """What the tasks' own timelines say."""

    seconds: float
    tasks: int
    completed: int
    lost: int
    """Tasks that did not complete."""
    retries: int
    killed: int
    """Worker processes killed."""
    taken_over: int
    """Tasks that were in the middle of their work when it happened."""
    recorded_twice: int
    """Tasks with more than one outcome in their timeline."""
    example: str
    """A task that went through the crash."""


@cli.command()
def demo(
    files: Annotated[int, typer.Option("--files", min=20, max=2000, help="How many files to index, a task each.")] = 300,
    url: Url = None,
    json: Json = False,
) -> None:
    """See it work: hundreds of tasks index Python's own library, with a crash and a retry in the middle."""
    from buquet.cli.demotasks import app  # noqa: PLC0415 - an App of its own, that nobody else needs

    if url is not None:
        app.use(url)
    if app.url == "memory:":
        msg = "the demo's workers are processes of their own, and do not see this one's memory. Use sqlite:PATH or s3://BUCKET/PREFIX"
        raise UsageError(msg)
    logging.getLogger("buquet").setLevel(logging.CRITICAL)  # what happens is told in the demo's own words
    paths = library(files)

    async def work() -> tuple[Numbers, Report]:
        async with app, asyncio.timeout(TIMEOUT):
            return await _Demo(app, _Screen(for_program=json)).run(paths)

    numbers, report = asyncio.run(work())
    if json:
        print_json({"url": app.url, **numbers._asdict(), "report": report})
    else:
        _show(numbers, report, "" if url is None else f" --url {shlex.quote(url)}")
    if numbers.lost or numbers.recorded_twice:
        raise typer.Exit(1)


def _show(numbers: Numbers, report: Report, url: str) -> None:
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
    print_table(("identifier", "uses", "files"), [(name, f"{uses:,}", f"{where:,}") for name, uses, where in report["names"]])
    print("\nNow try:")
    command = _command()
    print(f"  {command} history {numbers.example}{url}    # the task that went through the crash")
    print(f"  {command} ls{url}")
    print(f"  {command} doctor{url}")


def _command() -> str:
    """Return how this command was called, so that what is shown can be pasted also where it is not on the path."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m buquet"
    found = shutil.which("buquet")
    if not called.exists() or (found is not None and called.samefile(found)):
        return "buquet"
    return shlex.quote(str(called))


class _Screen:
    """Shows how it goes: a bar on a terminal, plain lines elsewhere, on stderr where stdout is for a program."""

    def __init__(self, *, for_program: bool) -> None:
        self.file = sys.stderr if for_program else sys.stdout
        self.bar = self.file.isatty()
        self.shown = 0

    def say(self, text: str) -> None:
        """Print a line; a bar that is on screen makes room."""
        print(("\r\033[K" if self.bar else "") + text, file=self.file, flush=True)

    def at(self, done: int, whole: int) -> None:
        """Show how many tasks are done."""
        if self.bar:
            width = 40
            full = width * done // whole
            line = f"\r\033[K\033[32m{'━' * full}\033[0m{'─' * (width - full)} {done}/{whole} tasks"
            print(line, end="\n" if done == whole else "", file=self.file, flush=True)
        elif done * 10 // whole > self.shown:
            self.shown = done * 10 // whole
            self.say(f"{done}/{whole} tasks done")


class _Demo:
    def __init__(self, app: App, screen: _Screen) -> None:
        self.app = app
        self.client = app.client
        self.clock = app.clock
        self.screen = screen
        self.killed = 0

    async def run(self, paths: Sequence[str]) -> tuple[Numbers, Report]:
        from buquet.cli.demotasks import merge  # noqa: PLC0415 - as above

        begun = self.clock.monotonic()
        self.screen.say(f"store: {self.app.url}")
        handles = await self._submit(paths)
        self.screen.say(f"submitted {counted(len(handles), 'task')}: each indexes a file of {sysconfig.get_path('stdlib')}")
        options = ["--url", self.app.url, "--concurrency", str(SLOTS)]
        workers = Processes(self.client, [TARGET, *options], PROCESSES, quiet=True)
        running = asyncio.create_task(workers.arun())
        try:
            await self._watch(handles, workers)
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
        return self._count(records, self.clock.monotonic() - begun), report

    async def _submit(self, paths: Sequence[str]) -> Sequence[Handle[Index]]:
        from buquet.cli.demotasks import index  # noqa: PLC0415 - as above

        stumbling = len(paths) // 10
        return await index.asubmit_many({"path": path, "stumbles": number == stumbling} for number, path in enumerate(paths))

    async def _watch(self, handles: Sequence[Handle[Index]], workers: Processes) -> None:
        """Wait for all tasks, in order, and kill a worker on the way."""
        crash = int(len(handles) * CRASH_AT)
        done = 0
        waiting = iter(handles)
        crashes: list[asyncio.Task[None]] = []

        async def lane() -> None:
            nonlocal done
            for handle in waiting:
                await self.client.wait(handle.id, TIMEOUT)
                done += 1
                self.screen.at(done, len(handles))
                if done == crash:
                    crashes.append(asyncio.create_task(self._crash(handles, workers)))

        self.screen.say(f"{PROCESSES} worker processes start")
        await asyncio.gather(*(lane() for _ in range(LOOKED_AT)))
        await asyncio.gather(*crashes)

    async def _crash(self, handles: Sequence[Handle[Index]], workers: Processes) -> None:
        """Kill a worker process that is in the middle of some tasks. It is stopped first, to be sure that it is."""
        for _ in range(20):
            for child in list(workers.children):
                worker = await self._worker_of(child.pid)
                if worker is None or child.returncode is not None:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGSTOP)
                    await self.clock.sleep(0.05)  # what it had sent is answered by then
                    caught = await self._running_under(worker, handles)
                    if caught:
                        os.kill(child.pid, signal.SIGKILL)
                        self.killed += 1
                        middle = f"in the middle of {counted(caught, 'task')}"
                        self.screen.say(f"killed worker process {child.pid} with SIGKILL, {middle}; another follows")
                        return
                    os.kill(child.pid, signal.SIGCONT)
            await self.clock.sleep(0.05)
        self.screen.say("no worker was met in the middle of a task, so none was killed")

    async def _worker_of(self, pid: int) -> str | None:
        for listed in await self.client.reads.list(keys.WORKERS):
            with contextlib.suppress(BuquetError):
                held = await self.client.register.read(Session, listed.key)
                if held is not None and (held.record.pid, held.record.host) == (pid, socket.gethostname()):
                    return held.record.id
        return None

    async def _running_under(self, worker: str, handles: Sequence[Handle[Index]]) -> int:
        """Return how many tasks run under a worker."""
        lane = asyncio.Semaphore(32)

        async def runs(handle: Handle[Index]) -> bool:
            async with lane:
                task = await handle.arecord()
            return task.state == "running" and task.worker == worker

        return sum(await asyncio.gather(*(runs(handle) for handle in handles)))

    def _count(self, records: Sequence[Task], seconds: float) -> Numbers:
        """Count from the timelines that the tasks' records keep."""

        def times(wanted: Callable[[str, str], bool]) -> list[int]:
            return [sum(wanted(event.why, event.state) for event in task.events) for task in records]

        over = times(lambda why, _: why in {"taken over", "lost"})
        ends = times(lambda _, state: state in ENDED)
        completed = sum(task.state == "completed" for task in records)
        return Numbers(
            seconds=round(seconds, 1),
            tasks=len(records),
            completed=completed,
            lost=len(records) - completed,
            retries=sum(times(lambda why, _: why == "retry")),
            killed=self.killed,
            taken_over=sum(number > 0 for number in over),
            recorded_twice=sum(number > 1 for number in ends),
            example=next((task.id for task, number in zip(records, over, strict=True) if number), records[0].id),
        )


def library(count: int) -> list[str]:
    """Return the paths of up to `count` files of this Python's standard library, spread over all of it, without its own tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - NOT_READ)
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        found += [str(path) for path in paths if 0 < path.stat().st_size <= LARGEST]
    if not found:
        msg = f"there are no Python files in {root}: this Python keeps its library in another form, and the demo needs it"
        raise UsageError(msg)
    step = max(len(found) // count, 1)
    return found[::step][:count]
