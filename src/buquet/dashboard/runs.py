"""Runs of workflows: their list, and one of them as a graph, a chart of time and a table; and what their buttons do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import msgspec
from markupsafe import Markup
from starlette.responses import RedirectResponse, Response

from buquet import keys
from buquet.errors import RunNotFound, UsageError
from buquet.insights.drawing.svg import STYLE, as_gantt, as_svg, element
from buquet.insights.pace import answering
from buquet.insights.runs import RunFilter, find, row_of
from buquet.insights.runview import RunStatus
from buquet.insights.scan import Scan
from buquet.insights.taskview import run_values
from buquet.records import ABSENT
from buquet.workflow.handle import signals_of
from buquet.workflow.schemas import form_of
from buquet.workflow.sending import send_signal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

    from buquet.dashboard.board import Board
    from buquet.insights.runs import RunRow
    from buquet.insights.runview import StepView
    from buquet.workflow.schemas import Form

MOST = 200
"""Runs in the list."""
SHOWN: tuple[RunStatus, ...] = get_args(RunStatus)
MOVES = {
    "cancel": "The run is being cancelled: what is done is undone first.",
    "pause": "The run is paused: what runs goes on, and nothing more is begun.",
    "resume": "The run goes on.",
    "retry": "The run goes on from its failed steps.",
}


@dataclass(frozen=True)
class Wanted:
    """Which runs are meant. Empty fields do not restrict."""

    text: str = ""
    """Part of the id, the workflow, the key, a tag or the remark."""
    status: RunStatus | None = None
    everywhere: bool = False
    """Look at all runs, with a GET for each, and not only at open ones and those that ended lately."""

    def takes(self, row: RunRow) -> bool:
        """Tell whether a run is meant."""
        text = self.text.lower()
        tags = (f"{name}={value}" for name, value in row.tags.items())
        return self.status in {None, row.status} and (
            not text or any(text in part.lower() for part in (row.id, row.workflow, row.key, row.remark, *tags))
        )


async def runs(board: Board, request: Request) -> Response:
    """Show the runs."""
    asked = request.query_params
    status: RunStatus | None = next((each for each in SHOWN if each == asked.get("status")), None)
    wanted = Wanted(asked.get("q", "").strip(), status, "all" in asked)
    feed = board.feed
    if keys.is_id(wanted.text.lower()):
        try:
            return RedirectResponse(f"/runs/{(await feed.run(wanted.text.lower())).id}", 303)
        except RunNotFound:
            pass  # the list says that there is none
    if wanted.everywhere:
        async with answering("the search") as more:
            views = await find(feed.direct, RunFilter((status,) if status else ()), MOST, Scan(feed.direct, more))
        found = [row_of(each) for each in views]
    else:
        await feed.ensure("runs")
        found = feed.open_runs.rows(feed.journal.select(kind="run", since=board.window(request).since))
    shown = [row for row in found if wanted.takes(row)]
    return board.page(
        request,
        "runs.html",
        # a search through all runs is not made again every few seconds
        topic="" if wanted.everywhere else "runs",
        wanted=wanted,
        statuses=SHOWN,
        runs=shown[:MOST],
        left=len(shown) - MOST,
        unread=0 if wanted.everywhere or wanted.text or status else feed.open_runs.unread,
        more=feed.open_runs.more,
    )


async def run(board: Board, request: Request) -> Response:
    """Show one run."""
    one = await board.feed.run(request.path_params["id"])
    shown, now = board.feed.shown(one), board.app.clock.now_ms()
    values = await run_values(board.app.client, one.held.record) if one.held else {}
    steps = one.graph.steps
    open_waits = [step for step in shown.steps if step.kind == "wait" and step.state in {"ready", "running"}]
    waits = [(step, form_of(steps[step.name].schema)) for step in open_waits]
    signals = await signals_of(board.app.client, one.held.record, one.graph, inline=True) if one.held else []
    graph, gantt = _picture(as_svg(shown, now, _link)), _picture(as_gantt(shown, now, _link))
    # one that has ended is followed too: it may be retried, from elsewhere
    return board.page(
        request,
        "run.html",
        topic=f"run:{shown.id}",
        run=shown,
        waits=waits,
        signals=signals[-MOST:],
        graph=graph,
        gantt=gantt,
        values=values,
    )


def _link(step: StepView) -> str:
    return f"/tasks/{step.task_id}" if step.task_id else ""


def _picture(svg: str) -> Markup:
    """Return a drawing without its own style, which the page's policy would not take: `/run.css` has it."""
    return Markup(svg.replace(element("style", STYLE), ""))  # noqa: S704 - the drawing escapes every text


async def style(_: Board, __: Request) -> Response:
    """Return the style of the drawings."""
    return Response(STYLE, media_type="text/css", headers={"cache-control": "max-age=3600"})


async def move(board: Board, target: str, form: Mapping[str, str]) -> str:
    """Cancel, pause, resume or retry a run. Raises RunNotFound, Refused."""
    wanted = form.get("action", "").removesuffix("-run")
    handle = board.app.run(target)
    moves = {"cancel": handle.acancel, "pause": handle.apause, "resume": handle.aresume, "retry": handle.aretry}
    outcome = await moves[wanted]()
    board.feed.changed("runs", f"run:{target}")
    return "The run is cancelled." if outcome == "cancelled" else MOVES[wanted]


def _body(asked: Form, name: str, value: str) -> bytes:
    """Return what was typed as JSON. Raises UsageError."""
    if asked.kind == "text":
        return msgspec.json.encode(value)
    text = value.strip() or ("null" if asked.optional else "")
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        what = f"is no JSON ({error}): a text needs quotes" if text else "is missing"
        raise UsageError(f"the value of signal {name!r} {what}. Such a value fits: {asked.example}") from None
    return text.encode()


async def signal(board: Board, target: str, form: Mapping[str, str]) -> str:
    """Send a run a signal. Raises UsageError for what is no JSON or does not fit, RunNotFound, Refused."""
    name = form.get("name", "").strip()
    # the page names the step that waits, since two may wait for one signal
    step = (await board.app.run(target).agraph()).steps.get(name)
    body = _body(form_of(step.schema if step else ABSENT), name, form.get("value", ""))
    await send_signal(board.app.client, target, step.signal if step else name, body, None, "by the dashboard")
    board.feed.changed("runs", f"run:{target}")
    return f"The signal {name!r} was sent."
