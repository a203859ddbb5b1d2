"""Server-sent events: a browser hears that what it shows was looked at, and asks for its page again. No data is in them."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, StreamingResponse

from buquet import keys
from buquet.insights.feed import TOPICS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request
    from starlette.responses import Response

    from buquet.dashboard.board import Board

MOST = 500
"""Browsers that may follow at once."""


async def events(board: Board, request: Request) -> Response:
    """Tell of news of one topic until the browser leaves."""
    topic = request.query_params.get("topic", "")
    kind, _, name = topic.partition(":")
    if topic not in TOPICS and not (kind in {"task", "run"} and keys.is_id(name)):
        return PlainTextResponse("nothing is followed under this name\n", 404)
    if board.feed.followers >= MOST:
        return PlainTextResponse("too many follow already\n", 503)

    async def stream() -> AsyncGenerator[str]:
        yield "retry: 3000\n\n"
        async with aclosing(board.feed.follow(topic)) as ticks:
            async for version in ticks:
                yield ":\n\n" if version is None else f"data: {version}\n\n"

    return StreamingResponse(
        stream(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
    )
