"""The pages: each reads what it shows from the feed or a record, and hands it to its template."""

from __future__ import annotations

import asyncio
import logging
from math import ceil
from typing import TYPE_CHECKING, get_args

from markupsafe import Markup
from starlette.responses import RedirectResponse, Response

from buquet import keys
from buquet.dashboard.guard import local
from buquet.dashboard.sessions import who
from buquet.errors import RunNotFound
from buquet.insights import overview, taskview
from buquet.insights.drawing.svg import STYLE, as_gantt, as_svg, element
from buquet.insights.feed import answering
from buquet.insights.runs import RunFilter, find
from buquet.insights.runview import RunStatus
from buquet.insights.scan import Scan
from buquet.insights.tasks import STATUSES, Status, Wanted, exact, search, status_of
from buquet.workflow.handle import signals_of
from buquet.workflow.schemas import form_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from buquet.dashboard.board import Board
    from buquet.records import Task
    from buquet.store.register import Held
    from buquet.workflow.handle import StepInfo

log = logging.getLogger("buquet.dashboard")

PAGE = 50
"""Tasks on one page."""
MOST_RUNS = 200
"""Runs in the list, and signals on the page of a run."""
TASK_STATUSES: tuple[Status, ...] = tuple(status for status in STATUSES if status != "tombstone")
RUN_STATUSES: tuple[RunStatus, ...] = get_args(RunStatus)


async def first(board: Board, request: Request) -> Response:
    """Show the overview."""
    await board.feed.ensure("overview")
    return board.page(request, "overview.html", topic="overview", overview=board.overview(request))


async def tasks(board: Board, request: Request) -> Response:
    """Show the tasks that match a search."""
    query = request.query_params
    text = query.get("q", "").strip()
    # side by side: a store that hangs holds the page up once
    task_id, _ = await asyncio.gather(exact(board.feed, text), board.feed.ensure("" if "all" in query else "tasks"))
    if task_id:
        return RedirectResponse(f"/tasks/{task_id}", 303)
    wanted = Wanted(
        text=text,
        status=next((status for status in TASK_STATUSES if status == query.get("status")), None),
        queue=query.get("queue", ""),
        name=query.get("name", ""),
        key=query.get("key", ""),
        tag=query.get("tag", "").strip(),
        everywhere="all" in query,
        since=board.window(request).since,
    )
    async with answering("the search") as more:
        rows = await search(board.feed, wanted, more)
    pages = max(ceil(len(rows) / PAGE), 1)
    number = query.get("page", "")
    page = min(max(int(number), 1), pages) if number.isdecimal() and len(number) < keys.MOST_DIGITS else 1
    known = [*board.feed.journal.lines, *board.feed.backlog.entries.values()]
    return board.page(
        request,
        "tasks.html",
        # a search through all records is not repeated every few seconds
        topic="" if wanted.everywhere or wanted.key or wanted.tag else "tasks",
        wanted=wanted,
        rows=rows[(page - 1) * PAGE : page * PAGE],
        count=len(rows),
        page=page,
        pages=pages,
        fields={
            name: value for name in ("q", "status", "queue", "name", "key", "tag", "all", "window") if (value := query.get(name))
        },
        statuses=TASK_STATUSES,
        queues=sorted({entry.queue for entry in known}),
        names=sorted({entry.name for entry in known}),
    )


async def task(board: Board, request: Request) -> Response:
    """Show one task."""
    task_id = request.path_params["id"]
    record = (await board.feed.task(task_id)).record
    claims = (claim for session in board.feed.workers.records.values() for claim in session.claims)
    claim = next((claim for claim in claims if claim.task == task_id), None)
    client = board.app.client
    values, failed = await asyncio.gather(taskview.values(client, record), taskview.failed_in_pack(client, record))
    return board.page(
        request,
        "task.html",
        topic=f"task:{task_id}",
        task=record,
        task_status=status_of(record),
        values=values,
        failed=failed,
        progress=claim.progress if claim and record.state == "running" else None,
        has_versions=bool(record.prev),
    )


async def versions(board: Board, request: Request) -> Response:
    """Show the earlier versions of a task's record, and the difference between two: by default the last two."""
    task_id = request.path_params["id"]
    async with answering("the versions of the record") as more:
        kept = await taskview.versions(board.app.client, task_id, more)
    query = request.query_params
    new = _version(kept, query.get("new"), 0)
    old = _version(kept, query.get("old"), min(kept.index(new) + 1, len(kept) - 1))
    if old.record.rev > new.record.rev:
        old, new = new, old
    lines = taskview.difference(old.record, new.record)
    return board.page(request, "versions.html", topic="", task_id=task_id, kept=kept, old=old, new=new, lines=lines)


def _version(kept: list[Held[Task]], rev: str | None, default: int) -> Held[Task]:
    return next((version for version in kept if str(version.record.rev) == rev), kept[default])


async def errors(board: Board, request: Request) -> Response:
    """Show failures by kind, of tasks that failed for good or are retried."""
    await board.feed.ensure("errors")
    failures = overview.failures(board.feed, board.window(request))
    return board.page(request, "errors.html", topic="errors", failures=failures, share=board.feed.journal.share)


async def workers(board: Board, request: Request) -> Response:
    """Show the workers."""
    await board.feed.ensure("workers")
    workers = board.feed.workers
    unreadable = sorted(workers.unreadable.values())
    return board.page(request, "workers.html", topic="workers", workers=workers.rows(), unreadable=unreadable)


async def queues(board: Board, request: Request) -> Response:
    """Show the queues."""
    await board.feed.ensure("queues")
    feed = board.feed
    rows = overview.queues(feed, board.window(request))
    return board.page(request, "queues.html", topic="queues", queues=rows, share=feed.journal.share)


async def schedules(board: Board, request: Request) -> Response:
    """Show the schedules."""
    await board.feed.ensure("schedules")
    unreadable = sorted(board.feed.schedules.unreadable.values())
    shown = overview.schedules(board.feed)
    return board.page(request, "schedules.html", topic="schedules", schedules=shown, unreadable=unreadable)


async def runs(board: Board, request: Request) -> Response:
    """Show the runs that match a search."""
    query, feed = request.query_params, board.feed
    text, everywhere = query.get("q", "").strip(), "all" in query
    status: RunStatus | None = next((status for status in RUN_STATUSES if status == query.get("status")), None)
    wanted = RunFilter((status,) if status else (), text=text)
    if keys.is_id(text.lower()):
        try:
            return RedirectResponse(f"/runs/{(await feed.run(text.lower())).id}", 303)
        except RunNotFound:
            pass  # the list is empty, and says so
    if everywhere:
        async with answering("the search") as more:
            rows = await find(wanted, MOST_RUNS, Scan(feed.direct, more))
    else:
        await feed.ensure("runs")
        rows = list(filter(wanted.takes, feed.open_runs.rows(feed.journal.select(kind="run", since=board.window(request).since))))
    return board.page(
        request,
        "runs.html",
        # a search through all runs is not repeated every few seconds
        topic="" if everywhere else "runs",
        text=text,
        wanted_status=status,
        everywhere=everywhere,
        statuses=RUN_STATUSES,
        runs=rows[:MOST_RUNS],
        left=len(rows) - MOST_RUNS,
        unread=0 if everywhere or text or status else feed.open_runs.unread,
        more=feed.open_runs.more,
    )


async def run(board: Board, request: Request) -> Response:
    """Show one run: as a graph, a chart of time and a table."""
    one = await board.feed.run(request.path_params["id"])
    client, record = board.app.client, one.held.record if one.held else None
    shown, now = board.feed.shown(one), board.app.clock.now_ms()
    open_waits = [step for step in shown.steps if step.kind == "wait" and step.status in {"ready", "running"}]
    signals = await signals_of(client, record, one.graph, inline=True) if record else []
    return board.page(
        request,
        "run.html",
        topic=f"run:{shown.id}",  # also of an ended run, which may be retried
        run=shown,
        waits=[(step, form_of(one.graph.steps[step.name].schema)) for step in open_waits],
        signals=signals[-MOST_RUNS:],
        graph=_picture(as_svg(shown, now, _link)),
        gantt=_picture(as_gantt(shown, now, _link)),
        values=await taskview.run_values(client, record) if record else {},
    )


def _link(step: StepInfo) -> str:
    return f"/tasks/{step.task_id}" if step.task_id else ""


def _picture(svg: str) -> Markup:
    """Return a drawing without its own style, which the page's policy would block: `/run.css` has it."""
    return Markup(svg.replace(element("style", STYLE), ""))  # noqa: S704 - the drawing escapes every text


async def style(_: Board, __: Request) -> Response:
    """Return the style of the drawings."""
    return Response(STYLE, media_type="text/css", headers={"cache-control": "max-age=3600"})


async def login_form(board: Board, request: Request) -> Response:
    """Show the form for the password. Browsers that are logged in, or need no password, are sent on."""
    back = local(request.query_params.get("back"))
    if board.logins.password is None or board.logins.has(request):
        return RedirectResponse(back, 303)
    return board.page(request, "login.html", topic="", back=back, wrong="")


async def login(board: Board, request: Request) -> Response:
    """Check the password, and log the browser in."""
    form: dict[str, str] = request.state.form
    back = local(form.get("back"))
    right = await board.logins.is_password(form.get("password", ""), request.client.host if request.client else "")
    log.info("%s: %s", "login" if right else "refused login" if right is None else "login with a wrong password", who(request))
    if not right:
        wrong = "Too many logins at once. Wait a moment." if right is None else "That is not the password."
        return board.page(request, "login.html", 429 if right is None else 401, topic="", back=back, wrong=wrong)
    board.logins.begin(request)
    return RedirectResponse(back, 303)


async def logout(board: Board, request: Request) -> Response:
    """Log the browser out."""
    log.info("logout: %s", who(request))
    board.logins.end(request)
    return RedirectResponse("/", 303)
