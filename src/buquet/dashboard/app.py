"""The dashboard as an ASGI application: its routes, its errors, and the guard around them."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from buquet.dashboard import actions, events, pages, runs, sessions
from buquet.dashboard.board import HERE, Board
from buquet.dashboard.guard import Guard
from buquet.dashboard.sessions import Sessions
from buquet.errors import BuquetError, RunNotFound, StoreError, StoreRefused, TaskNotFound
from buquet.insights.feed import Feed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection

    from starlette.requests import Request
    from starlette.responses import Response

    from buquet.app import App

    Handler = Callable[[Board, Request], Awaitable[Response]]

log = logging.getLogger("buquet.dashboard")

GET = {
    "/": pages.first,
    "/tasks": pages.tasks,
    "/tasks/{id}": pages.task,
    "/tasks/{id}/versions": pages.versions,
    "/errors": pages.errors,
    "/workers": pages.workers,
    "/queues": pages.queues,
    "/schedules": pages.schedules,
    "/runs": runs.runs,
    "/runs/{id}": runs.run,
    "/run.css": runs.style,
    "/events": events.events,
    "/login": sessions.login_form,
}
POST = {"/act": actions.act, "/login": sessions.login, "/logout": sessions.logout}


def dashboard(
    app: App,
    *,
    password: str | None = None,
    read_only: bool = False,
    loopback: bool = True,
    hosts: Collection[str] = (),
) -> Starlette:
    """Return the dashboard of an App's store; `feed` of its `state` follows it.

    `password`: what a browser must give before it sees anything. `read_only`: no buttons, and no form is taken.
    `loopback`: it is bound to this machine only, so that without a password other names than this machine's are refused; bound
    elsewhere, addresses are served, too. `hosts`: more names under which it is served without a password; `*` is any.

    >>> dashboard(App("memory:"), read_only=True)  # doctest: +ELLIPSIS, +SKIP
    <starlette.applications.Starlette object at ...>
    """
    board = Board(app, Feed(app.client), Sessions(app.clock, password, app.url), read_only)

    def bound(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(board, request)
            except (BuquetError, HTTPException):
                raise
            except Exception as error:  # here, within the guard: the page of an error has navigation and headers, too
                log.exception("%s %s", request.method, request.url.path)
                return _problem(board, request, error)

        return endpoint

    async def failed(request: Request, error: Exception) -> Response:
        return _problem(board, request, error)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await board.feed.close()

    made = Starlette(
        routes=[
            *(Route(path, bound(handler), methods=["GET"]) for path, handler in GET.items()),
            *(Route(path, bound(handler), methods=["POST"]) for path, handler in POST.items()),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(Guard, sessions=board.sessions, read_only=read_only, loopback=loopback, hosts=hosts)],
        exception_handlers={BuquetError: failed, HTTPException: failed},
        lifespan=lifespan,
    )
    made.state.feed = board.feed
    return made


def _problem(board: Board, request: Request, error: Exception) -> Response:
    """Say what is wrong, in the dashboard's own form."""
    if isinstance(error, HTTPException):
        said = "There is no such page." if error.status_code == 404 else error.detail  # noqa: PLR2004 - HTTP's own number
        return board.page(request, "problem.html", error.status_code, topic="", title="Not here", text=said)
    if isinstance(error, TaskNotFound | RunNotFound):
        return board.page(request, "problem.html", 404, topic="", title="Not found", text=str(error))
    if isinstance(error, StoreError):
        title = "The store refuses that" if isinstance(error, StoreRefused) else "The store does not answer"
        return board.page(request, "problem.html", 503, topic="", title=title, text=str(error))
    if isinstance(error, BuquetError):
        return board.page(request, "problem.html", 409, topic="", title="That does not work", text=str(error))
    said = f"This is a defect of buquet, and the log of the dashboard has the traceback. It is of this page only. {error!r}"
    return board.page(request, "problem.html", 500, topic="", title="This page cannot be shown", text=said)
