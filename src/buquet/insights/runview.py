"""A workflow run as people see it: what `buquet run`, the dashboard and the drawings show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import msgspec

from buquet import keys
from buquet.errors import renamed
from buquet.printing import counted, duration, in_seconds
from buquet.workflow.graph import Graph, Step
from buquet.workflow.handle import StepInfo, step_info
from buquet.workflow.records import RunRecord, missing
from buquet.workflow.values import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from buquet.insights.fleet import WorkerRow
    from buquet.queue.client import Client
    from buquet.records import Task
    from buquet.workflow.handle import StepStatus

RunStatus: TypeAlias = Literal["pending", "running", "failing", "cancelling", "completed", "failed", "cancelled"]

ENDED: frozenset[RunStatus] = frozenset({"completed", "failed", "cancelled"})


class RunView(msgspec.Struct, kw_only=True, frozen=True):
    """A run and its steps, in the order of the workflow. Times are milliseconds since 1970; 0 is "not yet".

    >>> run = RunView(id="0" * 32, workflow="order", steps=[StepInfo(name="charge")])
    >>> run.step("charge").status
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
    steps: list[StepInfo] = msgspec.field(default_factory=list[StepInfo])

    @property
    def over(self) -> bool:
        return self.status in ENDED

    @property
    def done(self) -> int:
        return sum(step.status == "completed" for step in self.steps)

    def step(self, name: str) -> StepInfo:
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def seconds(self, now: int) -> float | None:
        """Return for how long it ran, or has run at `now` (milliseconds); None before its start."""
        return in_seconds(max((self.ended or now) - self.started, 0)) if self.started else None


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
        steps=[_step_of(run, name, step, tasks, crew, now) for name, step in graph.steps.items()],
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


def _step_of(
    run: RunRecord, name: str, step: Step, tasks: Mapping[str, Task], crew: Sequence[WorkerRow] | None, now: int
) -> StepInfo:
    """Return a step with what its task adds to the run's record."""
    info = step_info(run, name, step)
    task = tasks.get(info.task_id)
    status, started, error = info.status, info.started, info.error or info.undo_error
    if task is not None:
        if status == "running" and task.state == "pending" and not info.done:
            status = "ready"
        if step.kind == "task":
            started = task.started
        if not error and task.error and status in {"ready", "running"}:
            error = f"{task.error.type}: {task.error.message}"
    return msgspec.structs.replace(
        info,
        status=status,
        started=started,
        attempts=task.attempt if task else 0,
        error=error,
        reason=_reason(info, step, status, task, crew, now),
    )


def _reason(info: StepInfo, step: Step, status: StepStatus, task: Task | None, crew: Sequence[WorkerRow] | None, now: int) -> str:
    if info.errors and not info.error:
        first = info.errors[0]
        allowed = ", which is allowed" if step.allow_failures else ""
        return f"{counted(len(info.errors), 'item')} failed{allowed}, such as {first.index}: {first.message}"
    if status not in {"ready", "running"}:
        return ""
    if step.kind in {"wait", "sleep"}:
        left = f"{duration(in_seconds(max(info.until - now, 0)))} left" if info.until else ""
        return ", ".join(filter(None, (f"waits for {step.signal!r}" if step.signal else "", left)))
    if status != "ready" or task is None:
        return ""
    if task.due > now:
        return f"runs again in {duration(in_seconds(task.due - now))}"
    sessions = [worker.session for worker in crew or () if worker.alive]
    if crew is None or any(task.queue in session.queues and task.name in session.names for session in sessions):
        return ""
    return f"no live worker has a handler for {task.name!r}"


def __getattr__(name: str) -> object:
    """Return the class that replaced `StepView`, of earlier versions."""
    return renamed(__name__, {"StepView": StepInfo}, name)
