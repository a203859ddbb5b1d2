"""The pages: each reads what it shows from the feed or a record, and hands it to its template."""

from __future__ import annotations

import asyncio
from math import ceil
from typing import TYPE_CHECKING

from starlette.responses import RedirectResponse

from buquet.insights import overview, taskview
from buquet.insights.pace import answering
from buquet.insights.search import Wanted, exact, search
from buquet.insights.tasks import STATUSES, Status, status_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from buquet.dashboard.board import Board
    from buquet.records import Task
    from buquet.store.register import Held

PAGE = 50
"""Tasks on one page."""
SHOWN: tuple[Status, ...] = tuple(status for status in STATUSES if status != "tombstone")


async def first(board: Board, request: Request) -> Response:
    """Show how everything is."""
    await board.feed.ensure("overview")
    return board.page(request, "overview.html", topic="overview", shown=board.overview(request))


async def tasks(board: Board, request: Request) -> Response:
    """Show the tasks that a search finds."""
    asked = request.query_params
    status: Status | None = next((each for each in SHOWN if each == asked.get("status")), None)
    text = asked.get("q", "").strip()
    # side by side: a store that hangs holds the page up once
    task_id, _ = await asyncio.gather(exact(board.feed, text), board.feed.ensure("" if "all" in asked else "tasks"))
    wanted = Wanted(
        text=text,
        status=status,
        queue=asked.get("queue", ""),
        name=asked.get("name", ""),
        key=asked.get("key", ""),
        tag=asked.get("tag", "").strip(),
        everywhere="all" in asked,
        since=board.window(request).since,
    )
    if task_id:
        return RedirectResponse(f"/tasks/{task_id}", 303)
    async with answering("the search") as more:
        found = await search(board.feed, wanted, more)
    pages = max(ceil(len(found) / PAGE), 1)
    page = _page(asked.get("page", ""), pages)
    fields = {
        name: value for name in ("q", "status", "queue", "name", "key", "tag", "all", "window") if (value := asked.get(name))
    }
    met = [*board.feed.journal.lines, *board.feed.backlog.entries.values()]
    return board.page(
        request,
        "tasks.html",
        # a search through all records is not made again every few seconds
        topic="" if wanted.everywhere or wanted.key or wanted.tag else "tasks",
        wanted=wanted,
        rows=found[(page - 1) * PAGE : page * PAGE],
        count=len(found),
        page=page,
        pages=pages,
        fields=fields,
        statuses=SHOWN,
        queues=sorted({each.queue for each in met}),
        names=sorted({each.name for each in met}),
    )


def _page(text: str, pages: int) -> int:
    """Return the number of the page that was asked for, of so many."""
    try:
        return min(max(int(text), 1), pages)
    except ValueError:
        return 1


async def task(board: Board, request: Request) -> Response:
    """Show one task."""
    task_id = request.path_params["id"]
    held = await board.feed.task(task_id)
    record = held.record
    claim = next((claim for each in board.feed.workers.records.values() for claim in each.claims if claim.task == task_id), None)
    client = board.app.client
    values, failed = await asyncio.gather(taskview.values(client, record), taskview.failed_in_pack(client, record))
    return board.page(
        request,
        "task.html",
        topic=f"task:{task_id}",
        task=record,
        shown_as=status_of(record),
        values=values,
        failed=failed,
        progress=claim.progress if claim and record.state == "running" else None,
        has_versions=bool(record.prev),
    )


async def versions(board: Board, request: Request) -> Response:
    """Show the earlier versions of a task's record, and how two of them differ: by default each with the one before."""
    task_id = request.path_params["id"]
    async with answering("the versions of the record") as more:
        kept = await taskview.versions(board.app.client, task_id, more)
    asked = request.query_params
    new = _version(kept, asked.get("new"), 0)
    at = kept.index(new)
    old = _version(kept, asked.get("old"), min(at + 1, len(kept) - 1))
    if old.record.rev > new.record.rev:
        old, new = new, old
    lines = taskview.difference(old.record, new.record)
    return board.page(request, "versions.html", topic="", task_id=task_id, kept=kept, old=old, new=new, lines=lines)


def _version(kept: list[Held[Task]], rev: str | None, otherwise: int) -> Held[Task]:
    return next((held for held in kept if str(held.record.rev) == rev), kept[otherwise])


async def errors(board: Board, request: Request) -> Response:
    """Show what failed for good or is retried, by kind."""
    await board.feed.ensure("errors")
    found = overview.failures(board.feed, board.window(request))
    return board.page(request, "errors.html", topic="errors", failures=found, share=board.feed.journal.share)


async def workers(board: Board, request: Request) -> Response:
    """Show the workers."""
    await board.feed.ensure("workers")
    feed = board.feed
    unreadable = sorted(feed.workers.unreadable.values())
    return board.page(request, "workers.html", topic="workers", crew=overview.crews(feed.workers), unreadable=unreadable)


async def queues(board: Board, request: Request) -> Response:
    """Show the queues."""
    await board.feed.ensure("queues")
    feed = board.feed
    found = overview.queue_states(feed, overview.crews(feed.workers), board.window(request))
    return board.page(request, "queues.html", topic="queues", queues=found, share=feed.journal.share)


async def schedules(board: Board, request: Request) -> Response:
    """Show the schedules."""
    await board.feed.ensure("schedules")
    unreadable = sorted(board.feed.schedules.unreadable.values())
    shown = overview.schedules(board.feed)
    return board.page(request, "schedules.html", topic="schedules", schedules=shown, unreadable=unreadable)
