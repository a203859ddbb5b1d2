"""What the buttons do. Every action is a POST of one form: `action`, `target`, and where to go back to."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.responses import RedirectResponse

from buquet import keys
from buquet.dashboard import runs
from buquet.dashboard.guard import local, who
from buquet.errors import BuquetError, Refused
from buquet.insights.overview import group_of
from buquet.printing import counted
from buquet.records import LATEST

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from buquet.dashboard.board import Board

    Action = Callable[[Board, str, Mapping[str, str]], Awaitable[str]]

log = logging.getLogger("buquet.dashboard")

AT_ONCE = 32
"""Tasks that are redriven side by side."""
MOST = 5000
"""Tasks of a group that one press redrives."""
LONGEST = 500
"""Characters of a message that is told on the next page."""


async def act(board: Board, request: Request) -> Response:
    """Carry out a form, and go back with what came of it."""
    form: dict[str, str] = request.state.form
    name, target = form.get("action", ""), form.get("target", "")
    action = ACTIONS.get(name)
    if action is None:
        said = f"this dashboard cannot {name[:40]!r}"
    else:
        try:
            said = await action(board, target, form)
        except (BuquetError, TimeoutError) as error:
            said = f"Not done: {error}"
    log.info("%s %s: %s. %s", name[:40], target[:200], who(request), said[:LONGEST])
    response = RedirectResponse(local(form.get("back")), 303)
    # quoted: a cookie holds no quotes, line ends, or letters beyond ASCII
    response.set_cookie(
        board.sessions.cookie_name("said", request.url),
        board.sessions.sign("said", quote(said[:LONGEST])),
        max_age=60,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


async def cancel_task(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Cancel a task."""
    outcome = await board.app.client.cancel(target)
    board.feed.changed("workers", "backlog", f"task:{target}")
    if outcome == "requested":
        return "Its worker was asked to stop it. A handler that ends first stays completed."
    return "The task is cancelled."


async def redrive_task(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Run an ended task again."""
    await board.app.client.redrive(target)
    board.feed.changed("backlog", f"task:{target}")
    return "The task waits again, with all of its attempts before it."


async def redrive_group(board: Board, target: str, form: Mapping[str, str]) -> str:
    """Run the tasks of an error group that the page counted again, if still failed; of those that are steps, the runs go on."""
    times = (form.get("since", "0"), form.get("until", str(LATEST)))
    since, until = (int(each) if each.isdecimal() and len(each) < keys.MOST_DIGITS else 0 for each in times)
    ids = list(dict.fromkeys(line.id for line in group_of(board.feed.journal.lines, target, since, until)))
    if not ids:
        return "Not done: nothing that failed so is known any more. Search the tasks that failed."
    lane = asyncio.Semaphore(AT_ONCE)
    redriven = refused = 0
    runs_met: set[str] = set()

    async def one(task_id: str) -> None:
        nonlocal redriven, refused
        async with lane:
            try:
                record = (await board.app.client.read(task_id)).record
                if record.state != "failed":
                    raise Refused("it is not failed any more")
                if not record.run:
                    await board.app.client.redrive(task_id)
                    redriven += 1
                elif record.run not in runs_met:
                    runs_met.add(record.run)
                    await board.app.run(record.run).aretry()
            except BuquetError:
                refused += 1

    await asyncio.gather(*map(one, ids[:MOST]))
    board.feed.changed("backlog", "runs")
    return _told(redriven, len(runs_met), refused, len(ids) - MOST)


def _told(redriven: int, retried: int, refused: int, left: int) -> str:
    """Say what came of a group that was run again."""
    said: list[str] = []
    if redriven or not retried:
        said.append(f"{counted(redriven, 'task waits', 'tasks wait')} again.")
    if retried:
        said.append(f"{counted(retried, 'run goes', 'runs go')} on from the failed steps.")
    if refused:
        said.append(f"{refused:,} refused: not failed any more, or gone.")
    if left > 0:
        said.append(f"{left:,} more are to be done: press again.")
    return " ".join(said)


async def pause_queue(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Let workers claim nothing more of a queue."""
    fresh = await board.app.apause_queue(target)
    board.feed.changed("settings")
    return (
        f"Queue {target} is paused: what runs goes on, nothing more is claimed."
        if fresh
        else f"Queue {target} was paused already."
    )


async def resume_queue(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Let workers claim from a queue again."""
    fresh = await board.app.aresume_queue(target)
    board.feed.changed("settings")
    return f"Queue {target} goes on." if fresh else f"Queue {target} was not paused."


async def drain_worker(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Ask a worker to end after what it runs."""
    await board.app.adrain_worker(target)
    board.feed.changed("workers")
    return "The worker was asked to claim nothing more, to finish what it runs, and to end."


async def pause_worker(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Ask a worker to claim nothing for now."""
    await board.app.apause_worker(target)
    board.feed.changed("workers")
    return "The worker was asked to claim nothing; what it runs goes on."


async def resume_worker(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Ask a worker to claim again."""
    await board.app.aresume_worker(target)
    board.feed.changed("workers")
    return "The worker was asked to go on."


async def trigger_schedule(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Submit a schedule's task now."""
    handle = await board.app.atrigger_schedule(target)
    board.feed.changed("schedules", "backlog")
    return f"Task {handle.id} was submitted."


async def pause_schedule(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Let a schedule fire no more."""
    await board.app.apause_schedule(target)
    board.feed.changed("schedules")
    return f"Schedule {target} is paused."


async def resume_schedule(board: Board, target: str, _: Mapping[str, str]) -> str:
    """Let a schedule fire again."""
    await board.app.aresume_schedule(target)
    board.feed.changed("schedules")
    return f"Schedule {target} goes on; what passed meanwhile is not caught up."


ACTIONS: dict[str, Action] = {
    "cancel-task": cancel_task,
    "redrive-task": redrive_task,
    "redrive-group": redrive_group,
    "pause-queue": pause_queue,
    "resume-queue": resume_queue,
    "drain-worker": drain_worker,
    "pause-worker": pause_worker,
    "resume-worker": resume_worker,
    "trigger-schedule": trigger_schedule,
    "pause-schedule": pause_schedule,
    "resume-schedule": resume_schedule,
    "signal-run": runs.signal,
    **{f"{move}-run": runs.move for move in runs.MOVES},
}
