"""What the buttons do. Every action is a POST of one form: `action`, `target`, and where to go back to."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import RedirectResponse

from buquet import keys
from buquet.app import App
from buquet.concurrency import each_of
from buquet.dashboard.guard import local
from buquet.dashboard.sessions import who
from buquet.errors import BuquetError, Refused, UsageError
from buquet.printing import counted
from buquet.records import ABSENT, LATEST
from buquet.workflow.handle import send_signal
from buquet.workflow.schemas import Form, form_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from buquet.dashboard.board import Board

log = logging.getLogger("buquet.dashboard")

AT_ONCE = 32
"""Tasks that are redriven side by side."""
MOST = 5000
"""Tasks of a group that one press redrives."""
LONGEST = 500
"""Characters of a message on the next page."""


@dataclass(frozen=True)
class Button:
    """What one button does to its target, by one call of the App."""

    call: Callable[[App, str], Awaitable[Any]]
    changes: tuple[str, ...]
    """What the feed must read again; `{}` is the target."""
    message: str | Mapping[Any, str]
    """The message on the next page, or one for each result of the call."""

    async def run(self, board: Board, target: str, _: Mapping[str, str]) -> str:
        """Act on the target, and return the message."""
        result = await self.call(board.app, target)
        board.feed.changed(*(topic.format(target) for topic in self.changes))
        message = self.message if isinstance(self.message, str) else self.message[result]
        return message.format(target, result=result)


async def redrive_group(board: Board, target: str, form: Mapping[str, str]) -> str:
    """Run the tasks of an error group again that the page counted and that are still failed. Of steps, retry the runs."""
    times = (form.get("since", "0"), form.get("until", str(LATEST)))
    since, until = (int(text) if text.isdecimal() and len(text) < keys.MOST_DIGITS else 0 for text in times)
    ids = list(dict.fromkeys(line.id for line in board.feed.journal.failures_of(target, since, until)))
    if not ids:
        return "Not done: none of these failures is known any more. Search the failed tasks."
    redriven = refused = 0
    retried: set[str] = set()

    async def redrive(task_id: str) -> None:
        nonlocal redriven, refused
        try:
            record = (await board.app.client.read(task_id)).record
            if record.state != "failed":
                raise Refused("the task is no longer failed")
            if not record.run:
                await board.app.client.redrive(task_id)
                redriven += 1
            elif record.run not in retried:
                retried.add(record.run)
                await board.app.run(record.run).aretry()
        except BuquetError:
            refused += 1

    await each_of(ids[:MOST], redrive, AT_ONCE)
    board.feed.changed("backlog", "runs")
    parts = (
        (redriven or not retried, f"{counted(redriven, 'task waits', 'tasks wait')} again."),
        (retried, f"{counted(len(retried), 'run goes', 'runs go')} on from the failed steps."),
        (refused, f"{refused:,} refused: no longer failed, or gone."),
        (len(ids) > MOST, f"{len(ids) - MOST:,} more to do: press again."),
    )
    return " ".join(text for wanted, text in parts if wanted)


async def signal_run(board: Board, target: str, form: Mapping[str, str]) -> str:
    """Send a signal to a run. Raises UsageError for a value that is no JSON or does not fit."""
    name = form.get("name", "").strip()
    # the page names the waiting step, since two steps may wait for one signal
    step = (await board.app.run(target).agraph()).steps.get(name)
    body = _body(form_of(step.schema if step else ABSENT), name, form.get("value", ""))
    await send_signal(board.app.client, target, step.signal if step else name, body, None, "by the dashboard")
    board.feed.changed("runs", f"run:{target}")
    return f"The signal {name!r} was sent."


def _body(form: Form, name: str, value: str) -> bytes:
    """Return the value of a form's field as JSON. Raises UsageError."""
    if form.kind == "text":
        return msgspec.json.encode(value)
    text = value.strip() or ("null" if form.optional else "")
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        what = f"is no JSON ({error}): a text needs quotes" if text else "is missing"
        raise UsageError(f"the value of signal {name!r} {what}. Such a value fits: {form.example}") from None
    return text.encode()


RUN = ("runs", "run:{}")
TASK = ("backlog", "task:{}")
BUTTONS = {
    "cancel-task": Button(
        App.acancel,
        ("workers", *TASK),
        {
            "cancelled": "The task is cancelled.",
            "requested": "The worker was asked to stop the task. A handler that completes first stays completed.",
        },
    ),
    "redrive-task": Button(App.aredrive, TASK, "The task waits again, with all of its attempts."),
    "pause-queue": Button(
        App.apause_queue,
        ("settings",),
        {
            True: "Queue {} is paused: running tasks go on, and no new task starts.",
            False: "Queue {} was paused already.",
        },
    ),
    "resume-queue": Button(App.aresume_queue, ("settings",), {True: "Queue {} goes on.", False: "Queue {} was not paused."}),
    "drain-worker": Button(
        App.adrain_worker, ("workers",), "The worker was asked to claim nothing more, to finish its running tasks, and to end."
    ),
    "pause-worker": Button(App.apause_worker, ("workers",), "The worker was asked to claim nothing. Its running tasks go on."),
    "resume-worker": Button(App.aresume_worker, ("workers",), "The worker was asked to go on."),
    "trigger-schedule": Button(App.atrigger_schedule, ("schedules", "backlog"), "Task {result.id} was submitted."),
    "pause-schedule": Button(App.apause_schedule, ("schedules",), "Schedule {} is paused."),
    "resume-schedule": Button(App.aresume_schedule, ("schedules",), "Schedule {} goes on. Missed fires are not caught up."),
    "cancel-run": Button(
        lambda app, run: app.run(run).acancel(),
        RUN,
        {
            "cancelled": "The run is cancelled.",
            "requested": "The run is being cancelled: completed steps are undone first.",
        },
    ),
    "pause-run": Button(
        lambda app, run: app.run(run).apause(), RUN, "The run is paused: running steps go on, and no new step starts."
    ),
    "resume-run": Button(lambda app, run: app.run(run).aresume(), RUN, "The run goes on."),
    "retry-run": Button(lambda app, run: app.run(run).aretry(), RUN, "The run goes on from its failed steps."),
}
ACTIONS: dict[str, Callable[[Board, str, Mapping[str, str]], Awaitable[str]]] = {
    **{name: button.run for name, button in BUTTONS.items()},
    "redrive-group": redrive_group,
    "signal-run": signal_run,
}


async def act(board: Board, request: Request) -> Response:
    """Carry out a form, and go back with a message."""
    form: dict[str, str] = request.state.form
    name, target = form.get("action", ""), form.get("target", "")
    action = ACTIONS.get(name)
    if action is None:
        message = f"this dashboard cannot {name[:40]!r}"
    else:
        try:
            message = await action(board, target, form)
        except (BuquetError, TimeoutError) as error:
            message = f"Not done: {error}"
    log.info("%s %s: %s. %s", name[:40], target[:200], who(request), message[:LONGEST])
    request.session["message"] = message[:LONGEST]
    return RedirectResponse(local(form.get("back")), 303)
