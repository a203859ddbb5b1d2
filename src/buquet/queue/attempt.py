"""What a handler can know and say of the attempt that it is."""

from __future__ import annotations

from contextvars import ContextVar
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, cast

from buquet.errors import UsageError, WrongLoop
from buquet.queue.background import running_loop

if TYPE_CHECKING:
    import asyncio
    import logging
    from collections.abc import Mapping

_current: ContextVar[Attempt | None] = ContextVar("buquet_attempt", default=None)


class Host(Protocol):
    """The worker's side of an attempt."""

    loop: asyncio.AbstractEventLoop

    def run_blocking(self, value: Any) -> None:
        """Store a checkpoint from another thread and wait for it."""
        ...

    async def checkpoint(self, value: Any) -> None:
        """Store a checkpoint."""
        ...

    def progress(self, fraction: float, message: str) -> None:
        """Keep the progress for the next heartbeat."""
        ...


class Attempt:
    """One execution of a task, as its handler sees it; `current()` returns it."""

    def __init__(
        self,
        host: Host,
        task_id: str,
        attempt: int,
        checkpointed: Any,
        logger: logging.LoggerAdapter[Any],
        tags: Mapping[str, str],
    ) -> None:
        self._host = host
        self.id = task_id
        self.attempt = attempt
        """The attempt's number, from 1. A snooze, a shutdown or a lost worker does not raise it."""
        self.checkpointed = checkpointed
        """The value of the last checkpoint, by this attempt or an earlier one; None when there was none."""
        self.cancelled = False
        """Whether the task was cancelled, or its time is up. A handler in a thread looks here now and then."""
        self.tags = tags
        """The task's tags. A schedule adds `schedule`, its name, and `fire`, the time that it fired for (ISO 8601, in UTC)."""
        self.logger = logger
        """A logger that adds the task's id and attempt to every line."""

    def progress(self, fraction: float, message: str = "") -> None:
        """Say how far the work is, from 0 to 1. It travels with the worker's next heartbeat and costs nothing.

        >>> current().progress(0.4, "half of the pages")  # doctest: +SKIP
        """
        if not isinstance(cast("object", fraction), Real) or not 0 <= fraction <= 1:
            msg = f"progress is a number from 0 to 1, and this is {fraction!r}"
            raise UsageError(msg)
        # both go into the session's record: what JSON does not carry there would end the worker's heartbeat
        text = str(message)[:200].encode("utf-8", "backslashreplace").decode()
        self._host.progress(float(fraction), text)

    def checkpoint(self, value: Any) -> None:
        """Store a value that the next attempt finds in `checkpointed`, should this one fail or its worker die.

        One write. Raises InvalidArgument when JSON does not carry the value, Refused when the claim was lost.
        """
        if running_loop():
            msg = "checkpoint() blocks, and an event loop is running here: use `await acheckpoint(value)` instead"
            raise WrongLoop(msg)
        self._host.run_blocking(value)
        self.checkpointed = value

    async def acheckpoint(self, value: Any) -> None:
        """Do what `checkpoint` does, on the running event loop."""
        await self._host.checkpoint(value)
        self.checkpointed = value


def current() -> Attempt:
    """Return the attempt that is running here. Raises UsageError outside of a handler.

    >>> current().id  # doctest: +SKIP
    '0193b0f2c4a07d3e9c5f1b2a3d4e5f60'
    """
    attempt = _current.get()
    if attempt is None:
        msg = "current() is for code that a worker runs; here no task is running. Pass what you need as an argument in tests"
        raise UsageError(msg)
    return attempt


def inside_handler() -> Attempt | None:
    """Return the attempt that is running here, or None."""
    return _current.get()


def enter(attempt: Attempt) -> None:
    """Make an attempt the current one of this context."""
    _current.set(attempt)
