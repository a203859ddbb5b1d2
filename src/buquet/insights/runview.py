"""A workflow run as people see it: what `buquet run`, the dashboard and the drawings show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import msgspec

from buquet import keys
from buquet.printing import counted, duration, in_seconds
from buquet.workflow.graph import Graph, Step, packed
from buquet.workflow.handle import never_began
from buquet.workflow.records import RunRecord, missing
from buquet.workflow.values import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from buquet.insights.fleet import WorkerRow
    from buquet.queue.client import Client
    from buquet.records import ErrorInfo, Task
    from buquet.workflow.records import StepRecord

RunStatus: TypeAlias = Literal["pending", "running", "failing", "cancelling", "completed", "failed", "cancelled"]
StepKind: TypeAlias = Literal["task", "each", "wait", "sleep"]
StepState: TypeAlias = Literal["waiting", "ready", "running", "completed", "failed", "skipped", "stopped", "cancelled"]
Undo: TypeAlias = Literal["", "due", "done", "failed"]

ENDED: frozenset[RunStatus] = frozenset({"completed", "failed", "cancelled"})
_STATES: dict[str, StepState] = {
    "done": "completed",
    "failed": "failed",
    "skipped": "skipped",
    "stopped": "stopped",
    "maybe": "stopped",
}


class StepView(msgspec.Struct, kw_only=True, frozen=True):
    """One step of a run. Times are milliseconds since 1970; 0 is "not yet".

    >>> StepView(name="charge", state="completed", started=1000, ended=3500).seconds(now=9000)
    2.5
    """

    name: str
    kind: StepKind = "task"
    task: str = ""
    """The name of the task function; "" for a step without one."""
    state: StepState = "waiting"
    undo: Undo = ""
    depends: tuple[str, ...] = ()
    """Names of the steps that come before it."""
    condition: str = ""
    """The condition under which it runs, such as `ok.granted == true`."""
    task_id: str = ""
    started: int = 0
    ended: int = 0
    attempts: int = 0
    done: int = 0
    """Of `each`: items that have ended."""
    total: int = 0
    """Of `each`: all items; 0 while they are not known."""
    error: str = ""
    reason: str = ""
    """Why it does not go on, such as "no live worker has a handler for 'ship'"."""

    def seconds(self, now: int) -> float | None:
        """Return for how long it ran, or has run at `now` (milliseconds); None before its start."""
        return _seconds(self.started, self.ended, now)


class RunView(msgspec.Struct, kw_only=True, frozen=True):
    """A run and its steps, in the order of the workflow. Times are milliseconds since 1970; 0 is "not yet".

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

    @property
    def done(self) -> int:
        """How many steps are completed."""
        return sum(step.state == "completed" for step in self.steps)

    def step(self, name: str) -> StepView:
        """Return the step of a name. Raises KeyError."""
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def seconds(self, now: int) -> float | None:
        """Return for how long it ran, or has run at `now` (milliseconds); None before its start."""
        return _seconds(self.started, self.ended, now)


def _seconds(started: int, ended: int, now: int) -> float | None:
    return in_seconds(max((ended or now) - started, 0)) if started else None


def graph_of_begun(source: RunRecord | Task) -> Graph:
    """Return what is known of a graph without its key: the steps that have begun, without conditions and constants."""
    return Graph(steps={name: Step(kind="task") for name in source.steps} if isinstance(source, RunRecord) else {})


def view_of(client: Client, run: RunRecord, graph: Graph, tasks: Mapping[str, Task], crew: Sequence[WorkerRow] | None) -> RunView:
    """Return the view of a run. `tasks`: those of its steps that were read, by id. `crew`: the workers, where they are known."""
    run = shown(run, client.values)
    now = client.clock.now_ms()
    return RunView(
        id=run.id,
        workflow=run.workflow,
        key=run.key,
        status=run.state if run.state != "pruned" else "completed",
        paused=run.paused,
        generation=run.gen,
        created=run.created,
        started=run.created,
        ended=run.finished,
        tags=run.tags,
        error=run.error.message if run.error else "",
        steps=[_step_view(run, name, step, tasks, crew, now) for name, step in graph.steps.items()],
    )


def view_of_start(client: Client, start: Task, graph: Graph, crew: Sequence[WorkerRow] | None) -> RunView:
    """Return the view of a run that no worker has begun, by the task that starts it."""
    run = RunRecord(id=start.run, workflow=start.step, queue=start.queue, created=start.created, key=start.key, tags=start.tags)
    view = view_of(client, run, graph, {}, crew)
    served = crew is None or any(worker.alive and start.queue in worker.session.queues for worker in crew)
    reason = "" if served else f"no live worker serves queue {start.queue!r}"
    return msgspec.structs.replace(view, status="pending", started=0, reason=reason)


class StepTask(NamedTuple):
    """The task of a step."""

    task_id: str
    at_work: bool
    """Whether the step has begun and not ended."""


def task_of(run: RunRecord, name: str) -> StepTask | None:
    """Return a step's task; of an `each` the first task that has not ended. None where no task can be read."""
    record = run.step(name)
    if record.state in {"idle", "skipped"}:
        return None
    index = next(missing(record.fan.ended, record.fan.tasks), 0) if record.fan else 0
    return StepTask(keys.run_task_id(run.id, "step", name, index, record.gen), record.state == "due")


def _step_view(
    run: RunRecord, name: str, step: Step, tasks: Mapping[str, Task], crew: Sequence[WorkerRow] | None, now: int
) -> StepView:
    record, fan = run.step(name), run.step(name).fan
    at = task_of(run, name) if step.call else None
    task = tasks.get(at.task_id) if at else None
    done, total = 0, 0
    if fan:
        size = packed(step, fan) or 1
        done, total = sum(min(end * size, fan.items) - start * size for start, end in fan.ended), fan.items
    state = _state(run, record, task, done)
    error = record.error or record.undo_error or (task.error if task and state in {"ready", "running"} else None)
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
        error=_text_of(error),
        reason=_reason(step, record, state, task, crew, now),
    )


def _state(run: RunRecord, record: StepRecord, task: Task | None, done: int) -> StepState:
    if record.state == "idle":
        return "cancelled" if never_began(run, record) else "waiting"
    if record.state == "due":
        return "ready" if task is not None and task.state == "pending" and not done else "running"
    return _STATES[record.state]


def _started(step: Step, record: StepRecord, task: Task | None) -> int:
    """Return the start of the step's task; of a step without one task, or whose task was not read, when it became runnable."""
    if record.state in {"idle", "skipped"}:
        return 0
    return task.started if step.kind == "task" and task is not None else record.due


def _text_of(error: ErrorInfo | None) -> str:
    return f"{error.type}: {error.message}" if error else ""


def _reason(
    step: Step, record: StepRecord, state: StepState, task: Task | None, crew: Sequence[WorkerRow] | None, now: int
) -> str:
    if record.fan is not None and record.fan.errors and not record.error:
        first = record.fan.errors[0]
        allowed = ", which is allowed" if step.allow_failures else ""
        return f"{counted(len(record.fan.errors), 'item')} failed{allowed}, such as {first.index}: {first.message}"
    if state not in {"ready", "running"}:
        return ""
    if step.kind in {"wait", "sleep"}:
        left = f"{duration(in_seconds(max(record.until - now, 0)))} left" if record.until else ""
        return ", ".join(filter(None, (f"waits for {step.signal!r}" if step.signal else "", left)))
    if state != "ready" or task is None or step.call is None:
        return ""
    if task.due > now:
        return f"runs again in {duration(in_seconds(task.due - now))}"
    sessions = [worker.session for worker in crew or () if worker.alive]
    if crew is None or any(task.queue in session.queues and task.name in session.names for session in sessions):
        return ""
    return f"no live worker has a handler for {task.name!r}"
