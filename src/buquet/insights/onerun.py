"""One run, read as often as somebody looks: what cannot have changed since is not asked for again."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.errors import EncryptionKeyMissing, RunNotFound, UnreadableRecord
from buquet.insights.runview import RunView, step_view, task_of
from buquet.insights.scan import AT_ONCE
from buquet.records import TERMINAL, Task
from buquet.workflow.graph import Graph, Step
from buquet.workflow.handle import find_run, graph_of
from buquet.workflow.records import OVER, RunRecord
from buquet.workflow.values import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from buquet.insights.fleet import WorkerView
    from buquet.insights.runview import RunStatus
    from buquet.queue.client import Client
    from buquet.store.register import Held

MOST_TASKS = 200
"""Of so many steps of one run the tasks are read: those that are at work first."""


class OneRun:
    """A run by its id, its graph, and the tasks of its steps. `look` does the requests, `view` works on what is in memory.

    >>> run = OneRun("0" * 32)
    >>> await run.look(client)  # doctest: +SKIP
    >>> run.view(client).status  # doctest: +SKIP
    'running'
    """

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.held: Held[RunRecord] | None = None
        """None before the first look, and until a worker has carried out the run's start."""
        self.start: Task | None = None
        """The task that starts the run, while there is no record of the run."""
        self.graph = Graph()
        self.looked = -math.inf
        """When it was last looked at, by the monotonic clock."""
        self.read = -math.inf
        """When the last look that succeeded began, by the monotonic clock."""
        self.turn = asyncio.Lock()
        """For those who share it: one looks, and the others take what that one read."""
        self.unreadable: dict[str, str] = {}
        """Tasks that cannot be read, and why."""
        self._tasks: dict[str, Held[Task]] = {}
        self._looks = 0
        self._read_at: dict[str, int] = {}
        self._drawn = False
        """Whether `graph` is the run's: it never changes."""

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.held is not None and self.held.record.state in OVER

    @property
    def waits(self) -> bool:
        """Whether something waits for a worker: then `view` may say why."""
        return self.start is not None or any(each.record.state == "pending" for each in self._tasks.values())

    async def look(self, client: Client, most: int = MOST_TASKS) -> bool:
        """Read the run, and at most so many tasks of its steps; tell whether anything changed.

        A GET for the run, at first one for its graph where that is large, and one for each task that may have changed, those
        of steps at work first, and of them those that were read longest ago. Raises RunNotFound, UnreadableRecord, StoreError.
        """
        self._looks += 1
        began = client.clock.monotonic()
        changed = await self._look_at_run(client)
        if self.held is not None:
            changed |= await self._look_at_tasks(client, self.held.record, most)
        self.looked, self.read = client.clock.monotonic(), began
        return changed

    async def _look_at_run(self, client: Client) -> bool:
        before = self.held
        found = await client.register.reread(RunRecord, before) if before is not None else None
        if found is None:
            found = await find_run(client, self.id)
        if isinstance(found, Task):
            known, self.start = self.start, found
            await self._draw(client, found)
            return known is None or known.rev != found.rev
        await self._draw(client, found.record)
        if self.held is not before and self.held is not None and self.held.record.rev >= found.record.rev:
            return False  # another look was quicker
        self.held, self.start = found, None
        return found is not before

    async def _draw(self, client: Client, source: RunRecord | Task) -> None:
        """Read the run's graph, once; without the key of an encrypted one its steps are those that have begun."""
        if isinstance(source, RunRecord) and source.state == "pruned":
            raise RunNotFound(f"run {self.id} was pruned")
        if not self._drawn:
            graph = await read_graph(client, source)
            self.graph = graph or graph_of_begun(source)
            self._drawn = graph is not None

    async def _look_at_tasks(self, client: Client, run: RunRecord, most: int) -> bool:
        wanted: list[tuple[bool, int, str]] = []
        now: set[str] = set()
        for name, step in self.graph.steps.items():
            at = task_of(run, name) if step.call or step.kind == "task" else None
            if at is None:
                continue
            now.add(at.task_id)
            held = self._tasks.get(at.task_id)
            if held is None or held.record.state not in TERMINAL:
                wanted.append((not at.at_work, self._read_at.get(at.task_id, 0), at.task_id))
        for gone in self._tasks.keys() - now:
            del self._tasks[gone]
        # of what has ended no more are kept than one look takes
        room = MOST_TASKS - len(self._tasks)
        ids = [task_id for number, (ended, _, task_id) in enumerate(sorted(wanted)) if number < room or not ended][:most]
        changed = False
        for at_once in range(0, len(ids), AT_ONCE):
            changed |= any(await asyncio.gather(*(self._read(client, each) for each in ids[at_once : at_once + AT_ONCE])))
        return changed

    async def _read(self, client: Client, task_id: str) -> bool:
        before = self._tasks.get(task_id)
        self._read_at[task_id] = self._looks
        try:
            key = keys.task(task_id)
            fresh = await (client.register.reread(Task, before) if before else client.register.read(Task, key))
        except UnreadableRecord as error:
            self.unreadable[task_id] = str(error)
            return False
        self.unreadable.pop(task_id, None)
        if fresh is not None:
            self._tasks[task_id] = fresh
        return fresh is not before

    def view(self, client: Client, crew: Sequence[WorkerView] | None = None) -> RunView:
        """Return the run as it is shown. `crew`: the workers, where they are known. Raises RunNotFound before a look."""
        if self.held is not None:
            return view_of(client, self.held.record, self.graph, {name: held.record for name, held in self._tasks.items()}, crew)
        if self.start is not None:
            return view_of_start(client, self.start, self.graph, crew)
        raise RunNotFound(f"run {self.id} was not looked at")


async def read_graph(client: Client, source: RunRecord | Task) -> Graph | None:
    """Return the graph of a run, or of a start that is to be carried out; None without the key of an encrypted one."""
    try:
        return await graph_of(client, source)
    except EncryptionKeyMissing:
        return None


def graph_of_begun(source: RunRecord | Task) -> Graph:
    """Return what is known of a graph whose key is not here: conditions and constants are not for everybody's eyes."""
    return Graph(steps={name: Step(kind="task") for name in source.steps} if isinstance(source, RunRecord) else {})


def view_of(
    client: Client, run: RunRecord, graph: Graph, tasks: Mapping[str, Task], crew: Sequence[WorkerView] | None
) -> RunView:
    """Return a run as it is shown, with those of its steps' tasks that were read, by id."""
    run = shown(run, client.values)
    now = client.clock.now_ms()
    status: RunStatus = run.state if run.state != "pruned" else "completed"
    return RunView(
        id=run.id,
        workflow=run.workflow,
        key=run.key,
        status=status,
        paused=run.paused,
        generation=run.gen,
        created=run.created,
        started=run.created,
        ended=run.finished,
        tags=run.tags,
        error=run.error.message if run.error else "",
        steps=[step_view(run, name, graph.steps[name], tasks, crew, now) for name in graph.steps],
    )


def view_of_start(client: Client, start: Task, graph: Graph, crew: Sequence[WorkerView] | None) -> RunView:
    """Return a run that is still to begin, as the task that starts it says."""
    run = RunRecord(id=start.run, workflow=start.step, queue=start.queue, created=start.created, key=start.key, tags=start.tags)
    view = view_of(client, run, graph, {}, crew)
    served = crew is None or any(worker.alive and start.queue in worker.queues for worker in crew)
    reason = "" if served else f"no live worker serves queue {start.queue!r}"
    return msgspec.structs.replace(view, status="pending", started=0, reason=reason)
