"""Server-sent events: tell a browser that its page has news, so that the browser loads the page again. They carry no data."""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, StreamingResponse

from buquet import keys
from buquet.errors import StoreError
from buquet.insights.feed import TOPICS
from buquet.workflow.handle import find_run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from contextlib import AbstractContextManager

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from buquet.dashboard.board import Board

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
