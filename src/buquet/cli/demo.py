"""The command that shows the main job on real input, with nothing set up: workers, a crash, a retry, results."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import sysconfig
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from buquet import keys
from buquet.cli.base import Json, Url, cli
from buquet.cli.output import print_json, print_table
from buquet.errors import BuquetError, UsageError
from buquet.records import ENDED, Session
from buquet.worker.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from buquet.app import App
    from buquet.cli.demotasks import Index, Summary
    from buquet.queue.handle import Handle
    from buquet.records import Task

TARGET = "buquet.cli.demotasks:app"
TASKS = 240
PROCESSES = 2
SLOTS = 4
CRASH_AT = 0.35
"""Share of the tasks after which a worker process is killed."""
LOOKED_AT = 16
"""Tasks that are waited for at once."""
TIMEOUT = 180.0


class Numbers(NamedTuple):
    """What the tasks' own timelines say."""

    tasks: int
    completed: int
    retries: int
    killed: int
    taken_over: int
    duplicates: int
    seconds: float
    example: str
    """A task that went through the crash."""


@cli.command()
def demo(url: Url = None, json: Json = False) -> None:
    """Index Python's own library with two worker processes, one of which is killed half way. Needs nothing."""
    from buquet.cli.demotasks import app  # noqa: PLC0415 - an App of its own, that nobody else needs

    if url is not None:
        app.use(url)
    if app.url == "memory:":
        msg = "the demo's workers are processes of their own, and do not see this one's memory. Use sqlite:PATH or s3://BUCKET/PREFIX"
        raise UsageError(msg)

    async def work() -> tuple[Numbers, Summary]:
        async with app, asyncio.timeout(TIMEOUT):
            return await _Demo(app, _Screen(plain=json)).run()

    numbers, summary = asyncio.run(work())
    good = numbers.completed == numbers.tasks and not numbers.duplicates
    if json:
        print_json({"url": app.url, **numbers._asdict(), "summary": summary})
    else:
        _report(numbers, summary, "" if url is None else f" --url '{url}'")
    if not good:
        raise typer.Exit(1)


def _report(numbers: Numbers, summary: Summary, url: str) -> None:
    print()
    print_table(
        ("the tasks", ""),
        [
            ("completed", f"{numbers.completed} of {numbers.tasks}, in {numbers.seconds:.1f} s"),
            ("retried after an error", numbers.retries),
            ("worker processes killed", numbers.killed),
            ("taken over after the crash", numbers.taken_over),
            ("outcomes recorded twice", numbers.duplicates),
        ],
    )
    print(f"\n{summary['files']:,} files, {summary['lines']:,} lines, {summary['identifiers']:,} identifiers. The most used:\n")
    print_table(
        ("identifier", "uses", "files"),
        [(each["name"], f"{each['uses']:,}", f"{each['files']:,}") for each in summary["most_used"]],
    )
    print("\nLook around:")
    print(f"  buquet history {numbers.example}{url}    # the task that went through the crash")
    print(f"  buquet ls --queue demo{url}")
    print(f"  buquet doctor{url}")


class _Screen:
    """Shows how it goes: a bar on a terminal, plain lines elsewhere, on stderr where stdout is for a program."""

    def __init__(self, *, plain: bool) -> None:
        self.file = sys.stderr if plain else sys.stdout
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

    async def run(self) -> tuple[Numbers, Summary]:
        from buquet.cli.demotasks import merge  # noqa: PLC0415 - as above

        begun = self.clock.monotonic()
        files = library()
        self.screen.say(f"store: {self.app.url}")
        handles = await self._submit(files)
        self.screen.say(
            f"{len(handles)} tasks were submitted: an index of {len(files):,} files of {sysconfig.get_path('stdlib')}"
        )
        options = ["--url", self.app.url, "--concurrency", str(SLOTS)]
        workers = Processes(self.client, [TARGET, *options], PROCESSES, quiet=True)
        running = asyncio.create_task(workers.arun())
        try:
            await self._watch(handles, workers)
            summary_handle = await merge.asubmit([handle.id for handle in handles])
            summary = await summary_handle.aresult(timeout=TIMEOUT)
        finally:
            workers.stop()
            try:
                async with asyncio.timeout(20):
                    await running
            except TimeoutError:
                self.screen.say("a worker did not end in time, and was killed")
        records = [await handle.arecord() for handle in [*handles, summary_handle]]
        return self._count(records, self.clock.monotonic() - begun), summary

    async def _submit(self, files: Sequence[str]) -> list[Handle[Index]]:
        from buquet.cli.demotasks import index  # noqa: PLC0415 - as above

        count = min(TASKS, len(files))
        calls = [{"paths": list(files[number::count]), "stumble": number == count // 10} for number in range(count)]
        return await index.asubmit_many(calls)

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
                        self.screen.say(
                            f"kill -9 {child.pid}: a worker process dies in the middle of {caught} tasks; its parent replaces it"
                        )
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
        return Numbers(
            tasks=len(records),
            completed=sum(task.state == "completed" for task in records),
            retries=sum(times(lambda why, _: why == "retry")),
            killed=self.killed,
            taken_over=sum(number > 0 for number in over),
            duplicates=sum(max(number - 1, 0) for number in ends),
            seconds=round(seconds, 2),
            example=next((task.id for task, number in zip(records, over, strict=True) if number), records[0].id),
        )


def library() -> list[str]:
    """Return the Python files of this Python's standard library that can be read, without its own tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if parts & {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib"}:
            continue
        with contextlib.suppress(OSError, SyntaxError), tokenize.open(path):
            found.append(str(path))
    if not found:
        msg = f"there are no Python files in {root}: this Python keeps its library in another form, and the demo needs it"
        raise UsageError(msg)
    return found
