"""The command `buquet demo`: the main job on real input, with a crash in the middle."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buquet.cli.base import Json, Url, cli
from buquet.cli.output import print_json, print_table, to_stderr
from buquet.records import ENDED, Task
from buquet.worker.processes import Processes

if TYPE_CHECKING:
    from buquet.app import App
    from buquet.cli.demotasks import Index, Report
    from buquet.queue.handle import Handle

CRASH_AFTER = 0.25
"""The share of tasks done when a worker is killed."""
LARGEST = 60_000
"""Larger files are left out: the demo should take seconds."""


@cli.command()
def demo(
    files: Annotated[int, typer.Option("--files", min=20, max=2000, help="How many files to index, a task each.")] = 300,
    url: Url = None,
    json: Json = False,
) -> None:
    """See it work: index Python's own library by hundreds of tasks, with a crash and a retry in the middle."""
    from buquet.cli.demotasks import app  # noqa: PLC0415 - an App of its own, which only this command needs

    if url:
        app.use(url)
    logging.getLogger("buquet").setLevel(logging.CRITICAL)  # what happens is told in the demo's own words
    paths = standard_library(files)
    to_stderr(f"store:   {app.url}\ninput:   {len(paths)} files of Python's standard library, a task each\nworkers: 2 processes")
    result = asyncio.run(_play(app, paths))
    if json:
        print_json(result)
    else:
        _show(app, result)
    if result["lost"] or result["recorded_twice"]:
        raise typer.Exit(1)


def standard_library(count: int) -> list[str]:
    """Return the paths of some files of the standard library, spread over all of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts and "test" not in str(path))
    found = [path for path in found if 0 < path.stat().st_size <= LARGEST]
    step = max(len(found) // count, 1)
    return [str(path) for path in found[::step][:count]]


async def _play(app: App, paths: list[str]) -> dict[str, Any]:
    from buquet.cli.demotasks import index, merge  # noqa: PLC0415

    begun = app.clock.monotonic()
    async with app:
        handles: list[Handle[Index]] = [await index.options(tags={"demo": "retry"}).asubmit(paths[0], stumbles=True)]
        handles += await index.asubmit_many((path,) for path in paths[1:])
        to_stderr(f"submitted {len(handles)} tasks in {app.clock.monotonic() - begun:.1f} s; they are in the store now")
        processes = Processes(app.client, ["buquet.cli.demotasks:app", "--url", app.url, "--concurrency", "4"], 2, quiet=True)
        running = asyncio.create_task(processes.arun())
        try:
            killed = await _watch(app, handles, processes, running)
            indexes = [await handle.aresult() for handle in handles]
            merged = await merge.asubmit(indexes)
            report: Report = await merged.aresult()
            handles_of_all = [*handles, merged]
            tasks = [await handle.arecord() for handle in handles_of_all]
        finally:
            processes.stop()
            await asyncio.gather(running, return_exceptions=True)
    return _count(tasks, killed, report, app.clock.monotonic() - begun)


async def _watch(app: App, handles: list[Handle[Index]], processes: Processes, running: asyncio.Task[None]) -> int:
    """Show how far it is until all tasks have ended; kill a worker on the way. Returns the pid that was killed."""
    done = 0
    killed = 0
    reaped = False
    waiting = [asyncio.create_task(app.client.wait(handle.id, None)) for handle in handles]
    bar = _Bar(len(handles))
    try:
        for ended in asyncio.as_completed(waiting):
            await ended
            done += 1
            if not killed and done >= len(handles) * CRASH_AFTER and processes.children:
                killed = processes.children[0].pid
                os.kill(killed, signal.SIGKILL)
                bar.say(f"killed worker process {killed} with SIGKILL, in the middle of its work")
            if processes.reaped and not reaped:
                reaped = True
                bar.say("its parent saw it die, and gave its tasks back at once; another process takes its place")
            if running.done():
                running.result()
            bar.at(done)
    finally:
        bar.end()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return killed


class _Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, whole: int) -> None:
        self.whole = whole
        self.live = sys.stderr.isatty()

    def at(self, done: int) -> None:
        if self.live:
            width = 40 * done // self.whole
            print(f"\r[{'█' * width}{'·' * (40 - width)}] {done} of {self.whole}", end="", file=sys.stderr, flush=True)
        elif done % max(self.whole // 5, 1) == 0:
            to_stderr(f"{done} of {self.whole}")

    def say(self, text: str) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr)
        to_stderr(text)

    def end(self) -> None:
        if self.live:
            to_stderr("")


def _count(tasks: list[Task], killed: int, report: Report, seconds: float) -> dict[str, Any]:
    """Count, from the records' own timelines, what became of the tasks."""
    why = Counter(event.why for task in tasks for event in task.events)
    ends = [sum(event.state in ENDED for event in task.events) for task in tasks]
    return {
        "seconds": round(seconds, 1),
        "tasks": len(tasks),
        "completed": sum(task.state == "completed" for task in tasks),
        "retries": why["retry"],
        "killed_pid": killed,
        "taken_over": sum(task.losses > 0 for task in tasks),
        "lost": sum(task.state != "completed" for task in tasks),
        "recorded_twice": sum(number > 1 for number in ends),
        "report": report,
        "retried": next((task.id for task in tasks if task.failures), ""),
    }


def _show(app: App, result: dict[str, Any]) -> None:
    report: Report = result["report"]
    print_table(
        ("", "count"),
        [
            ("tasks completed", f"{result['completed']} of {result['tasks']}"),
            ("retried after an error", result["retries"]),
            ("taken over after the crash", result["taken_over"]),
            ("lost", result["lost"]),
            ("duplicates recorded", result["recorded_twice"]),
            ("seconds", result["seconds"]),
        ],
    )
    names = ", ".join(f"{name} {count:,}" for name, count in report["names"][:6])
    print(f"\n{report['lines']:,} lines in {report['files']} files; the names most used: {names}\n")
    option = f" --url '{app.url}'" if app.named else ""
    print("Now try:")
    print(f"  buquet ls{option}                # the tasks, the last changed first")
    print(f"  buquet history {result['retried']}{option}   # the one that was retried")
    print(f"  buquet stats{option}             # what waits, runs and has ended")
