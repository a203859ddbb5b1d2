"""A run on a terminal, once or followed until it is over."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from buquet.cli.output import print_json, to_stderr
from buquet.insights import runs
from buquet.insights.drawing import as_text, words
from buquet.insights.scan import Scan
from buquet.printing import counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.text import Text

    from buquet.insights.runview import RunView
    from buquet.queue.client import Client

EVERY = 0.5
"""Seconds from look to look while a run is followed: a step's start is told by its task, not by its run."""


def plain(view: RunView) -> dict[str, Any]:
    """Return a run as JSON values. A step has its `status` also as `state`, the older name."""
    value: dict[str, Any] = msgspec.to_builtins(view)
    value["steps"] = [{"status": step["state"], **step} for step in value["steps"]]
    return value


def show(view: RunView, now: int, width: int = 0) -> str:
    """Return a run as plain text."""
    width = width or shutil.get_terminal_size().columns
    return "".join("".join(text for text, _ in line) + "\n" for line in as_text(view, now, width))


def print_run(view: RunView, now: int) -> None:
    """Print a run: coloured on a terminal, plain elsewhere, where lines may be longer."""
    if not sys.stdout.isatty():
        print(show(view, now, max(shutil.get_terminal_size().columns, 120)), end="")
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, and not needed in pipes

    Console(highlight=False).print(_rich(view, now))


def _rich(view: RunView, now: int, most: int | None = None) -> Text:
    """Return a run in colours; of more than `most` lines the first, and those of what is at work."""
    from rich.text import Text  # noqa: PLC0415 - slow to import

    lines = as_text(view, now, shutil.get_terminal_size().columns)
    if most is not None and len(lines) > most:
        rest = counted(len(lines) - most + 1, "more line")
        lines = [*lines[: most - 1], [(f"… {rest}: `buquet run get {view.id}` shows all", "dim")]]
    return Text("\n", no_wrap=True).join(Text.assemble(*line) for line in lines)


async def watch(client: Client, run_id: str, json: bool) -> None:
    """Follow a run until it is over: live on a terminal, a line for each change elsewhere, as JSON a value a change."""
    scan = Scan(client)
    if json:
        async for view in _views(client, run_id, scan):
            print_json(plain(view))
    elif sys.stdout.isatty():
        await _live(client, run_id, scan)
    else:
        told: dict[str, str] = {}
        async for view in _views(client, run_id, scan):
            for name, line in _lines(view, client.clock.now_ms()).items():
                if told.get(name) != line:
                    told[name] = line
                    print(line, flush=True)
    for problem in dict.fromkeys(scan.unreadable):
        to_stderr(f"unreadable: {problem}")


async def _live(client: Client, run_id: str, scan: Scan) -> None:
    from rich.live import Live  # noqa: PLC0415 - slow to import

    last: RunView | None = None
    with Live(auto_refresh=False, transient=True) as live:
        async for view in _views(client, run_id, scan, changes_only=False):
            last = view
            live.update(_rich(view, client.clock.now_ms(), shutil.get_terminal_size().lines - 1), refresh=True)
    if last is not None:
        print_run(last, client.clock.now_ms())


async def _views(client: Client, run_id: str, scan: Scan, *, changes_only: bool = True) -> AsyncIterator[RunView]:
    """Yield the run again and again, the last time when it is over."""
    before: RunView | None = None
    while True:
        view = await runs.read(client, run_id, scan)
        if view != before or not changes_only:
            yield view
        if view.over:
            return
        before = view
        await client.clock.sleep(EVERY)


def _lines(view: RunView, now: int) -> dict[str, str]:
    """Return a line for the run and one for each step that has begun: of what does not change by itself."""
    status = "paused" if view.paused and not view.over else view.status
    whole = {"": words.plain(f"{view.workflow}: {status}{f', {view.error}' if view.error else ''}")}
    lines: dict[str, str] = {}
    for step in view.steps:
        if step.state in {"waiting", "cancelled"}:
            continue
        took = words.time(step, now) if step.ended else ""
        said = (step.state, took, words.items(step), words.UNDONE[step.undo], step.error)
        lines[step.name] = words.plain(f"{step.name}: {', '.join(each for each in said if each)}")
    return lines | whole if view.over else whole | lines
