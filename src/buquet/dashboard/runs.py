"""Runs of workflows: their list, and one of them as a graph, a chart of time and a table."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import Response

from buquet.errors import UsageError
from buquet.insights.drawing.gantt import as_gantt
from buquet.insights.drawing.paint import STYLE, tag
from buquet.insights.drawing.svg import as_svg

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request

    from buquet.clock import Clock
    from buquet.dashboard.board import Board
    from buquet.insights.runview import RunView, StepView

FRESH = 1.5
"""Seconds for which what was read of runs serves all browsers."""
KEPT = 200
MOVES = ("cancel", "pause", "resume", "retry")


class RunsPort(Protocol):
    """What the dashboard asks of workflows."""

    async def recent(self) -> list[RunView]:
        """Return the open runs and those that ended lately, the last changed first; their steps may be left out."""
        ...

    async def run(self, run_id: str) -> RunView:
        """Return a run with its steps. Raises a BuquetError where there is none."""
        ...

    async def move(self, run_id: str, move: str) -> str:
        """Cancel, pause, resume or retry a run, and return what came of it."""
        ...

    async def signal(self, run_id: str, name: str, value: str) -> None:
        """Send a signal with a value in JSON. Raises a BuquetError where the run or the value does not fit."""
        ...


@dataclass
class Shared:
    """Reads of runs, each made once for all who look at the same moment."""

    port: RunsPort
    clock: Clock
    known: dict[str, tuple[float, asyncio.Task[list[RunView]]]] = field(
        default_factory=dict[str, tuple[float, "asyncio.Task[list[RunView]]"]]
    )

    async def recent(self) -> list[RunView]:
        """Return the open runs and those that ended lately."""
        return await self._read("", self.port.recent)

    async def run(self, run_id: str) -> RunView:
        """Return a run with its steps."""

        async def one() -> list[RunView]:
            return [await self.port.run(run_id)]

        return (await self._read(run_id, one))[0]

    def forget(self, run_id: str) -> None:
        """Read a run anew next time: this process changed it."""
        self.known.pop(run_id, None)
        self.known.pop("", None)

    async def _read(self, name: str, read: Callable[[], Awaitable[list[RunView]]]) -> list[RunView]:
        at, reading = self.known.get(name, (0.0, None))
        if reading is None or self.clock.monotonic() - at > FRESH:

            async def whole() -> list[RunView]:
                return await read()

            reading = asyncio.create_task(whole())
            self.known = dict(list(self.known.items())[-KEPT:])
            self.known[name] = (self.clock.monotonic(), reading)
        return await asyncio.shield(reading)


def runs_of(board: Board) -> Shared:
    """Return the runs, where this dashboard knows of workflows."""
    if board.runs is None:
        raise HTTPException(404)
    return board.runs


async def runs(board: Board, request: Request) -> Response:
    """Show the runs."""
    return board.page(request, "runs.html", topic="errors", runs=await runs_of(board).recent())


async def run(board: Board, request: Request) -> Response:
    """Show one run."""
    shown = await runs_of(board).run(request.path_params["id"])
    now = board.app.clock.now_ms()
    waits = [step for step in shown.steps if step.kind == "wait" and step.state in {"waiting", "ready", "running"}]
    graph, gantt = _picture(as_svg(shown, now, _link)), _picture(as_gantt(shown, now, _link))
    topic = "" if shown.over else "errors"
    return board.page(request, "run.html", topic=topic, run=shown, waits=waits, graph=graph, gantt=gantt)


def _link(step: StepView) -> str:
    return f"/tasks/{step.task_id}" if step.task_id else ""


def _picture(svg: str) -> Markup:
    """Return a drawing without its own style, which the page's policy would not take: `/run.css` has it."""
    return Markup(svg.replace(tag("style").around(STYLE), ""))  # noqa: S704 - the drawing escapes every text


async def style(_: Board, __: Request) -> Response:
    """Return the style of the drawings."""
    return Response(STYLE, media_type="text/css", headers={"cache-control": "max-age=3600"})


async def move(board: Board, target: str, form: Mapping[str, str]) -> str:
    """Cancel, pause, resume or retry a run."""
    wanted = form.get("action", "").removesuffix("-run")
    if wanted not in MOVES:
        msg = f"a run cannot be told to {wanted[:40]!r}"
        raise UsageError(msg)
    said = await runs_of(board).port.move(target, wanted)
    runs_of(board).forget(target)
    return said


async def signal(board: Board, target: str, form: Mapping[str, str]) -> str:
    """Send a run a signal."""
    name = form.get("name", "").strip()
    await runs_of(board).port.signal(target, name, form.get("value", "") or "null")
    runs_of(board).forget(target)
    return f"The signal {name!r} was sent."
