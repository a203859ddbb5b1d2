"""Commands that change tasks, by id or all that a filter takes: cancel, redrive."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from buquet.cli.base import Ids, Json, Name, Queue, Status, Tag, Url, cli, open_app, run
from buquet.cli.output import print_json, print_table, scan_progress, to_stderr
from buquet.cli.selecting import selection
from buquet.errors import BuquetError, UsageError
from buquet.insights.scan import AT_ONCE, Scan
from buquet.insights.tasks import Filter, find
from buquet.printing import counted
from buquet.records import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from buquet.app import App

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Most = Annotated[int | None, typer.Option("--limit", "-l", min=1, help="Of those that a filter takes, only so many.")]


class _Change(NamedTuple):
    """What a command does to a task."""

    verb: str
    done: str
    fitting: tuple[State, ...]
    """States that allow it."""
    act: Callable[[str], Awaitable[str]]
    """Does it to the task of an id, and returns what has become of it."""


@cli.command()
def cancel(
    ids: Ids = None,
    status: Status = None,
    queue: Queue = None,
    name: Name = None,
    tag: Tag = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Cancel tasks by id, or all pending and running ones that a filter takes. Status 1 when one refused."""
    app = open_app(url)
    change = _Change("cancel", "cancelled", ("pending", "running"), app.client.cancel)
    _change(app, change, _chosen(app, change, ids, selection(status, queue, name, tag), limit), dry_run, yes or bool(ids), json)


@cli.command()
def redrive(
    ids: Ids = None,
    status: Status = None,
    queue: Queue = None,
    name: Name = None,
    tag: Tag = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Run tasks again by id, or all failed, cancelled and expired ones that a filter takes. Status 1 when one refused."""
    app = open_app(url)

    async def again(task_id: str) -> str:
        await app.client.redrive(task_id)
        return "pending"

    change = _Change("redrive", "redriven", ("failed", "cancelled", "expired"), again)
    _change(app, change, _chosen(app, change, ids, selection(status, queue, name, tag), limit), dry_run, yes or bool(ids), json)


def _chosen(
    app: App, change: _Change, ids: list[str] | None, wanted: Filter, limit: int | None
) -> Callable[[], Awaitable[list[str]]]:
    """Return what finds the ids of the tasks that are meant. Raises UsageError at once where the options make no sense."""
    if bool(ids) == (wanted != Filter()):
        msg = (
            f"{change.verb} takes either ids or a filter (--status, --queue, --name, --tag); --dry-run shows what a filter takes"
        )
        raise UsageError(msg)
    if not set(wanted.states) <= set(change.fitting):
        msg = f"no task that is {wanted.states[0]} can be {change.done}, only one that is {' or '.join(change.fitting)}"
        raise UsageError(msg)

    async def search() -> list[str]:
        if ids:
            return list(dict.fromkeys(ids))
        scan = Scan(app.client, scan_progress())
        found = await find(app.client, replace(wanted, states=wanted.states or change.fitting), limit, scan)
        for problem in scan.unreadable:
            to_stderr(f"unreadable: {problem}")
        return [task.id for task in found]

    return search


def _change(
    app: App, change: _Change, search: Callable[[], Awaitable[list[str]]], dry_run: bool, unasked: bool, json: bool
) -> None:
    """Do it to each of the chosen tasks, and go on past those that refuse; status 1 when any did."""

    async def one(task_id: str) -> dict[str, Any]:
        try:
            outcome = await (_would(app, change, task_id) if dry_run else change.act(task_id))
        except BuquetError as error:
            return {"id": task_id, "ok": False, "outcome": str(error)}
        return {"id": task_id, "ok": True, "outcome": outcome}

    async def work() -> bool:
        chosen = await search()
        asks = bool(chosen) and not dry_run and not unasked and sys.stdin.isatty()
        if asks and not typer.confirm(f"{change.verb} {counted(len(chosen), 'task')}?", err=True):
            raise typer.Exit(1)
        outcomes = await _side_by_side(one, chosen)
        if json:
            print_json(outcomes)
        else:
            print_table(("id", "outcome"), [(each["id"], each["outcome"]) for each in outcomes], "no task fits")
        return all(each["ok"] for each in outcomes)

    if not run(app, work):
        raise typer.Exit(1)


async def _would(app: App, change: _Change, task_id: str) -> str:
    task = (await app.client.read(task_id)).record
    if task.state not in change.fitting:
        raise UsageError(f"task {task_id} is {task.state} and cannot be {change.done}")
    return f"would be {change.done}"


async def _side_by_side(one: Callable[[str], Awaitable[dict[str, Any]]], ids: Iterable[str]) -> list[dict[str, Any]]:
    """Do it to some at once; the outcomes come in the order of the ids."""
    lane = asyncio.Semaphore(AT_ONCE)

    async def turn(task_id: str) -> dict[str, Any]:
        async with lane:
            return await one(task_id)

    return await asyncio.gather(*map(turn, ids))
