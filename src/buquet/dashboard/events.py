"""Server-sent events: a browser hears that what it shows was looked at, and asks for its page again. No data is in them."""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, StreamingResponse

from buquet import keys
from buquet.errors import StoreError
from buquet.insights.feed import TOPICS
from buquet.workflow.sending import find_run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from contextlib import AbstractContextManager

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from buquet.dashboard.board import Board

MOST = 500
"""Pages that may follow at once, of all browsers."""
MOST_EACH = 100
"""Pages that may follow at once, of browsers at one address."""


async def events(board: Board, request: Request) -> Response:
    """Tell of news of one topic until the browser leaves. Raises TaskNotFound, RunNotFound, UnreadableRecord."""
    topic = request.query_params.get("topic", "")
    kind, _, name = topic.partition(":")
    if topic not in TOPICS and not (kind in {"task", "run"} and keys.is_id(name)):
        return PlainTextResponse("nothing is followed under this name\n", 404)
    origin = request.client.host if request.client else ""
    with suppress(StoreError):  # a store that does not answer is what the page is to hear of
        if kind == "task":
            await board.feed.task(name)
        elif kind == "run":
            await find_run(board.app.client, name)

    # nothing is awaited from here to where the answer takes its place: requests that come at once must not pass together
    if board.following.total() >= MOST or board.following[origin] >= MOST_EACH or not board.feed.has_room(topic):
        return PlainTextResponse("too many follow already\n", 503)

    async def stream() -> AsyncGenerator[str]:
        yield "retry: 3000\n\n"
        async with aclosing(board.feed.follow(topic)) as ticks:
            async for version in ticks:
                yield ":\n\n" if version is None else f"data: {version}\n\n"

    answer = _Events(stream(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"})
    answer.place = _place(board, origin, topic)
    return answer


class _Events(StreamingResponse):
    """A stream that has its place for as long as it is sent."""

    place: AbstractContextManager[None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self.place:
            await super().__call__(scope, receive, send)


@contextmanager
def _place(board: Board, origin: str, topic: str) -> Generator[None]:
    board.following[origin] += 1
    try:
        with board.feed.wanted(topic):
            yield
    finally:
        board.following[origin] -= 1
        board.following += Counter()  # drops addresses from where nobody follows
