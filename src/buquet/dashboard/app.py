"""The dashboard as an ASGI application: its routes, its errors, and the guard around them."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from buquet import keys
from buquet.dashboard import actions, pages
from buquet.dashboard.board import HERE, Board
from buquet.dashboard.guard import Guard
from buquet.dashboard.sessions import Logins, SessionCookies
from buquet.errors import BuquetError, RunNotFound, StoreError, StoreRefused, TaskNotFound
from buquet.insights.feed import TOPICS, Feed
from buquet.workflow.handle import find_run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator
    from contextlib import AbstractContextManager

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from buquet.app import App

    Handler = Callable[[Board, Request], Awaitable[Response]]


MOST = 500
"""Streams at once, of all browsers."""
MOST_EACH = 100
"""Streams at once, of the browsers at one address."""


async def events(board: Board, request: Request) -> Response:
    """Stream the news of one topic until the browser leaves. Raises TaskNotFound, RunNotFound, UnreadableRecord."""
    topic = request.query_params.get("topic", "")
    kind, _, name = topic.partition(":")
    if topic not in TOPICS and not (kind in {"task", "run"} and keys.is_id(name)):
        return PlainTextResponse("there is no such topic\n", 404)
    origin = request.client.host if request.client else ""
    with suppress(StoreError):  # the page then shows that the store does not answer
        if kind == "task":
            await board.feed.task(name)
        elif kind == "run":
            await find_run(board.app.client, name)

    # nothing is awaited from here until the stream is counted: requests that come at once must not pass together
    if board.following.total() >= MOST or board.following[origin] >= MOST_EACH or not board.feed.has_room(topic):
        return PlainTextResponse("there are too many streams already\n", 503)

    async def stream() -> AsyncGenerator[str]:
        yield "retry: 3000\n\n"
        async with aclosing(board.feed.follow(topic)) as ticks:
            async for version in ticks:
                yield ":\n\n" if version is None else f"data: {version}\n\n"

    answer = _Stream(stream(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"})
    answer.counted = _counted(board, origin, topic)
    return answer


class _Stream(StreamingResponse):
    """A stream that counts for as long as it is sent."""

    counted: AbstractContextManager[None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        with self.counted:
            await super().__call__(scope, receive, send)


@contextmanager
def _counted(board: Board, origin: str, topic: str) -> Generator[None]:
    board.following[origin] += 1
    try:
        with board.feed.wanted(topic):
            yield
    finally:
        board.following[origin] -= 1
        board.following += Counter()  # drops addresses without streams


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
    "/runs": pages.runs,
    "/runs/{id}": pages.run,
    "/run.css": pages.style,
    "/events": events,
    "/login": pages.login_form,
}
POST = {"/act": actions.act, "/login": pages.login, "/logout": pages.logout}


def dashboard(
    app: App,
    *,
    password: str | None = None,
    read_only: bool = False,
    loopback: bool = True,
    hosts: Collection[str] = (),
) -> Starlette:
    """Return the dashboard of an App's store. Its `state.feed` follows the store.

    `password`: what a browser must give before it sees anything. `read_only`: no buttons, and no form is taken.
    `loopback`: whether it listens on this machine only. If so, it is served without a password under this machine's names only;
    if not, under any address as well. `hosts`: more names under which it is served without a password; `*` is any.

    >>> dashboard(App("memory:"), read_only=True)  # doctest: +ELLIPSIS, +SKIP
    <starlette.applications.Starlette object at ...>
    """
    board = Board(app, Feed(app.client), Logins(app.clock, password), read_only)

    def bound(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(board, request)
            except (BuquetError, HTTPException):
                raise
            except Exception as error:  # within the guard, so that the page has navigation and headers
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
        middleware=[
            Middleware(SessionCookies, app.url),
            Middleware(Guard, board.logins, read_only, loopback, {host.lower() for host in hosts}),
        ],
        exception_handlers={BuquetError: failed, HTTPException: failed},
        lifespan=lifespan,
    )
    made.state.feed = board.feed
    return made


def _problem(board: Board, request: Request, error: Exception) -> Response:
    """Show an error as a page of the dashboard."""
    status, title, text = 500, "This page cannot be shown", str(error)
    if isinstance(error, HTTPException):
        missing = error.status_code == 404  # noqa: PLR2004 - HTTP's own number
        status, title, text = error.status_code, "Not here", "There is no such page." if missing else error.detail
    elif isinstance(error, TaskNotFound | RunNotFound):
        status, title = 404, "Not found"
    elif isinstance(error, StoreError):
        status = 503
        title = "The store refused the request" if isinstance(error, StoreRefused) else "The store does not answer"
    elif isinstance(error, BuquetError):
        status, title = 409, "This does not work"
    else:
        text = f"This is a defect of buquet, on this page only. The log of the dashboard has the traceback. {error!r}"
    return board.page(request, "problem.html", status, topic="", title=title, text=text)
