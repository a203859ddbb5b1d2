"""An attempt that a test makes itself, to see what a task reports."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from buquet.clock import Clock
from buquet.queue.attempt import Aside, Attempt, given_attempt
from buquet.records import Progress, Task

if TYPE_CHECKING:
    from collections.abc import Mapping


class _Recorder(Aside):
    def __init__(self) -> None:
        self.checkpoints: list[Any] = []
        self.reports: list[Progress] = []

    def run_blocking(self, value: Any) -> None:
        super().run_blocking(value)
        self.checkpoints.append(value)

    def progress(self, fraction: float, message: str) -> None:
        self.reports.append(Progress(fraction=fraction, message=message))


class FakeAttempt(Attempt):
    """The attempt that plain calls of tasks find inside `with`. It records what they report.

    `checkpointed` is what an earlier attempt left; `attempt`, `tags`, `run` and `step` are what `current()` shows.

    >>> from buquet import App, current
    >>> app = App("memory:")
    >>> @app.task
    ... def crawl(pages: int) -> None:
    ...     for page in range(current().checkpointed or 0, pages):
    ...         current().checkpoint(page + 1)
    ...         current().progress((page + 1) / pages)
    >>> with FakeAttempt(attempt=2, checkpointed=2) as attempt:
    ...     crawl(4)
    >>> attempt.checkpoints, [each.fraction for each in attempt.reports]
    ([3, 4], [0.75, 1.0])
    """

    def __init__(
        self,
        *,
        attempt: int = 1,
        checkpointed: Any = None,
        tags: Mapping[str, str] | None = None,
        cancelled: bool = False,
        run: str = "",
        step: str = "",
    ) -> None:
        recorder = _Recorder()
        task_id = Clock().new_id()
        task = Task(id=task_id, queue="", name="", state="running", created=0, tags=dict(tags or {}), run=run, step=step)
        logger = logging.LoggerAdapter(logging.getLogger("buquet.task"), {"task": task_id, "attempt": attempt})
        super().__init__(recorder, task, attempt, logger, checkpointed=checkpointed)
        self.cancelled = cancelled
        self.checkpoints = recorder.checkpoints
        """The values of the checkpoints, in order."""
        self.reports = recorder.reports
        """The reports of progress, in order: `fraction` and `message`."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Make it what plain calls find."""
        self._stack.enter_context(given_attempt(self))
        return self

    def __exit__(self, *_error: object) -> None:
        """Let plain calls have attempts of their own again."""
        self._stack.close()
