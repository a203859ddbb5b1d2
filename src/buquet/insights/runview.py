"""A workflow run as it is shown: what `buquet run`, the dashboard and the drawings have in hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import msgspec

from buquet import keys
from buquet.printing import counted, duration, in_seconds
from buquet.workflow import records
from buquet.workflow.graph import packed
from buquet.workflow.handle import never_began

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from buquet.insights.fleet import WorkerView
    from buquet.records import ErrorInfo, Task
    from buquet.workflow.graph import Step
    from buquet.workflow.records import Fan, RunRecord, StepRecord


_STATES: dict[str, StepState] = {
    "done": "completed",
    "failed": "failed",
    "skipped": "skipped",
    "stopped": "stopped",
    "maybe": "stopped",
}


class StepTask(NamedTuple):
    """Where the task of a step is."""

    task_id: str
    at_work: bool
    """Whether the step has begun and not ended."""


def task_of(run: RunRecord, name: str) -> StepTask | None:
    """Return where a step's task is; of an `each` its first one that has not ended. None where there is none to be read."""
    record = run.step(name)
    if record.state in {"idle", "skipped"}:
        return None
    index = 0
    if record.fan is not None:
        index = next(records.missing(record.fan.ended, record.fan.tasks), 0)
    return StepTask(keys.follow_up(run.id, "step", name, index, record.gen), record.state == "due")


def step_view(
    run: RunRecord, name: str, step: Step, tasks: Mapping[str, Task], crew: Sequence[WorkerView] | None, now: int
) -> StepView:
    """Return a step as it is shown. `tasks` are those that were read, by id; `crew` the workers, None where nobody looked."""
    record = run.step(name)
    at = task_of(run, name) if step.call else None
    task = tasks.get(at.task_id) if at else None
    done, total = _items(record.fan, packed(step, record.fan)) if record.fan else (0, 0)
    state = _state(run, record, task, done)
    return StepView(
        name=name,
        kind=step.kind,
        task=step.call.task if step.call else "",
        state=state,
        undo=record.undo,
        depends=step.needs,
        condition=step.condition,
        task_id=at.task_id if at else "",
        started=_started(step, record, task),
        ended=record.at if state != "skipped" else 0,
        attempts=task.attempt if task else 0,
        done=done,
        total=total,
        error=_said(record.error or record.undo_error or (task.error if task and state in {"ready", "running"} else None)),
        reason=_reason(step, record, state, task, crew, now),
    )


def _state(run: RunRecord, record: StepRecord, task: Task | None, done: int) -> StepState:
    if record.state == "idle":
        return "cancelled" if never_began(run, record) else "waiting"
    if record.state == "due":
        return "ready" if task is not None and task.state == "pending" and not done else "running"
    return _STATES[record.state]


def _started(step: Step, record: StepRecord, task: Task | None) -> int:
    """Return when a step began: its task's start; of what has no one task, or none that was read, when it became due."""
    if record.state in {"idle", "skipped"}:
        return 0
    if step.kind == "task" and task is not None:
        return task.started
    return record.due


def _items(fan: Fan, pack: int) -> tuple[int, int]:
    """Return how many items of an `each` have ended, and how many there are."""
    size = pack or 1
    return sum(min(end * size, fan.items) - start * size for start, end in fan.ended), fan.items


def _said(error: ErrorInfo | None) -> str:
    return f"{error.type}: {error.message}" if error else ""


def _reason(
    step: Step, record: StepRecord, state: StepState, task: Task | None, crew: Sequence[WorkerView] | None, now: int
) -> str:
    if record.fan is not None and record.fan.errors and not record.error:
        first = record.fan.errors[0]
        allowed = ", which is allowed" if step.allow_failures else ""
        return f"{counted(len(record.fan.errors), 'item')} failed{allowed}, such as {first.index}: {first.message}"
    if state not in {"ready", "running"}:
        return ""
    if step.kind in {"wait", "sleep"}:
        left = f"{duration(in_seconds(max(record.until - now, 0)))} left" if record.until else ""
        return ", ".join(each for each in (f"waits for {step.signal!r}" if step.signal else "", left) if each)
    if state != "ready" or task is None or step.call is None:
        return ""
    if task.due > now:
        return f"runs again in {duration(in_seconds(task.due - now))}"
    if crew is not None and not any(each.alive and task.queue in each.queues and task.name in each.names for each in crew):
        return f"no live worker has a handler for {task.name!r}"
    return ""


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
