"""A workflow run as it is shown: what `buquet run`, the dashboard and the drawings have in hand."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from buquet.insights.duration import in_seconds

RunStatus: TypeAlias = Literal["pending", "running", "failing", "cancelling", "completed", "failed", "cancelled"]
StepKind: TypeAlias = Literal["task", "each", "wait", "sleep"]
StepState: TypeAlias = Literal["waiting", "ready", "running", "completed", "failed", "skipped", "stopped", "cancelled"]
Undo: TypeAlias = Literal["", "due", "done", "failed"]

ENDED: frozenset[RunStatus] = frozenset({"completed", "failed", "cancelled"})


class StepView(msgspec.Struct, kw_only=True, frozen=True):
    """One step of a run. Times are milliseconds since 1970; 0 is "not yet".

    >>> StepView(name="charge", state="completed", started=1000, ended=3500).seconds(now=9000)
    2.5
    """

    name: str
    kind: StepKind = "task"
    task: str = ""
    """The name of the task function; "" for a step that runs none."""
    state: StepState = "waiting"
    undo: Undo = ""
    depends: tuple[str, ...] = ()
    """Names of the steps that come before it."""
    condition: str = ""
    """What decides whether it runs, such as `ok.granted == true`."""
    task_id: str = ""
    started: int = 0
    ended: int = 0
    attempts: int = 0
    done: int = 0
    """Of `each`: items that are finished."""
    total: int = 0
    """Of `each`: all its items; 0 while they are not known."""
    error: str = ""
    reason: str = ""
    """Why it does not go on, such as "no live worker has a handler for 'ship'"."""

    def seconds(self, now: int) -> float | None:
        """Return for how long it ran, or has run at `now` (milliseconds); None before its start."""
        return _seconds(self.started, self.ended, now)


class RunView(msgspec.Struct, kw_only=True, frozen=True):
    """A run and its steps, in the order in which the workflow names them. Times are milliseconds since 1970; 0 is "not yet".

    >>> run = RunView(id="0" * 32, workflow="order", steps=[StepView(name="charge")])
    >>> run.step("charge").state
    'waiting'
    """

    id: str
    workflow: str
    key: str = ""
    status: RunStatus = "pending"
    paused: bool = False
    generation: int = 1
    """Raised by each retry."""
    created: int = 0
    started: int = 0
    ended: int = 0
    tags: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    error: str = ""
    reason: str = ""
    """Why it does not begin, such as "no live worker serves queue 'default'"."""
    steps: list[StepView] = msgspec.field(default_factory=list[StepView])

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.status in ENDED

    def step(self, name: str) -> StepView:
        """Return the step of a name. Raises KeyError where there is none."""
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def seconds(self, now: int) -> float | None:
        """Return for how long it ran, or has run at `now` (milliseconds); None before its start."""
        return _seconds(self.started, self.ended, now)


def _seconds(started: int, ended: int, now: int) -> float | None:
    return in_seconds(max((ended or now) - started, 0)) if started else None
