"""The handle of a run: read it, wait for it, steer it. A run is steered by event tasks, which workers deliver."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, cast

import msgspec

from buquet import keys
from buquet.codec import ANY, decode_stored
from buquet.errors import (
    BatchFailed,
    EncryptionKeyMissing,
    InvalidPayload,
    KeyConflict,
    Refused,
    RunCancelled,
    RunFailed,
    RunNotFound,
    SignalTimeout,
    StoreRefused,
    TaskError,
    TaskFailed,
    TaskNotFound,
    UnreadableRecord,
    deprecated,
)
from buquet.printing import counted
from buquet.queue.attempt import inside_handler
from buquet.queue.background import blocking
from buquet.queue.batch import failed_items
from buquet.queue.control import whoami
from buquet.queue.names import SYSTEM
from buquet.queue.values import of_run
from buquet.records import TERMINAL, Raw, Task
from buquet.store.base import Stored
from buquet.store.retrying import trusted
from buquet.workflow.engine import Engine
from buquet.workflow.events import CANCEL, PAUSE, RESUME, RETRY, SENDER, SIGNAL, START, EventArgs
from buquet.workflow.graph import RESTORE, packed, read_graph
from buquet.workflow.records import CANCELLED_UNSTARTED, CANCELLED_UNSURE, OVER, RunRecord, Sent, missing, numbers
from buquet.workflow.schemas import check
from buquet.workflow.values import of_signal, shown

if TYPE_CHECKING:
    from buquet.codec import Signature
    from buquet.queue.client import Client
    from buquet.queue.handle import Home
    from buquet.store.register import Held
    from buquet.workflow.graph import Graph, Kind, Step
    from buquet.workflow.records import ItemError, UndoState

R_co = TypeVar("R_co", covariant=True)

Status: TypeAlias = Literal["pending", "running", "paused", "failing", "cancelling", "completed", "failed", "cancelled", "pruned"]
StepStatus: TypeAlias = Literal["waiting", "ready", "running", "completed", "failed", "skipped", "stopped", "cancelled"]

_STATUS: dict[str, StepStatus] = {
    "idle": "waiting",
    "due": "running",
    "done": "completed",
    "failed": "failed",
    "skipped": "skipped",
    CANCELLED_UNSTARTED: "stopped",
    CANCELLED_UNSURE: "stopped",
}
DELIVERED_WITHIN = 10.0
"""Seconds that a sender waits for a worker, where only a worker can record the event."""
homes: weakref.WeakSet[Home] = weakref.WeakSet()
"""The Apps of this process that have workflows."""


class StepInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a run. Times are milliseconds since 1970; 0: not yet.

    >>> StepInfo(name="charge", status="completed", started=1000, ended=3500).seconds(now=9000)
    2.5
    """

    name: str
    kind: Kind = "task"
    status: StepStatus = "waiting"
    """`ready`: its task waits for a worker; `stopped`: the end of its run interrupted it; `cancelled`: the run ended before."""
    task: str = ""
    """The name of its task function; empty for a wait or a sleep."""
    queue: str = ""
    task_id: str = ""
    """Its task; of an `each` the first task that has not ended. Empty before it begins."""
    needs: tuple[str, ...] = ()
    """The steps that must end before it."""
    condition: str = ""
    """Decides whether it runs, such as `ok.granted == true`."""
    gen: int = 1
    due: int = 0
    """When it could begin."""
    until: int = 0
    """When its timer fires."""
    started: int = 0
    ended: int = 0
    attempts: int = 0
    """The number of the task's present or last attempt."""
    done: int = 0
    """Items of an `each` that have ended."""
    total: int = 0
    """All items of an `each`; 0: not known yet."""
    error: str = ""
    errors: tuple[ItemError, ...] = ()
    """The first hundred items of an `each` that failed."""
    undo: UndoState = ""
    """due, done or failed, if it is undone. `done` includes that there was nothing to undo."""
    undo_error: str = ""
    reason: str = ""
    """Why it makes no progress, such as "no live worker has a handler for 'ship'"."""

    @property
    def state(self) -> StepStatus:
        """The older name of `status`. Deprecated."""
        deprecated("StepInfo.state", "StepInfo.status")
        return self.status

    @property
    def depends(self) -> tuple[str, ...]:
        """The older name of `needs`. Deprecated."""
        deprecated("StepInfo.depends", "StepInfo.needs")
        return self.needs

    def seconds(self, now: int) -> float | None:
        """Return how long it has run at `now` (milliseconds since 1970), or ran; None before its start."""
        return max((self.ended or now) - self.started, 0) / 1000 if self.started else None


class SignalInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A signal that was sent to a run."""

    name: str
    value: Any
    """As plain builtins; None if `problem` is set."""
    step: str
    """The wait that took it; empty while the run keeps it for a later wait."""
    sender: str
    """User and host; empty if unknown."""
    sent: int
    """When it was sent, in milliseconds since 1970 by the sender's clock; 0: unknown."""
    task_id: str
    """The event task that delivered it."""
    problem: str = ""
    """Why the value is not shown."""


class Run(Generic[R_co]):
    """One execution of a workflow: read it, wait for it, steer it. Each blocking method has an async twin with the prefix `a`.

    >>> run = order.start("o-1", key="o-1")  # doctest: +SKIP
    >>> run.result(timeout=60)  # doctest: +SKIP
    'shipped'
    """

    __slots__ = ("_signature", "created", "home", "id")

    def __init__(self, home: Home, run_id: str, signature: Signature | None = None, *, created: bool = False) -> None:
        self.home = home
        self._signature = signature
        self.id = run_id
        self.created = created
        """Whether the start that returned this handle created the run. False: a run with its key existed."""

    def __repr__(self) -> str:
        return f"<buquet run {self.id}>"

    async def arecord(self) -> RunRecord | None:
        """Return the run's record; None while no worker has delivered its start.

        Raises RunNotFound, UnreadableRecord.
        """
        run = await read_run(self.home.client, self.id)
        return run and shown(run, self.home.client.values)

    record = blocking(arecord)

    async def astatus(self) -> Status:
        """Return the run's status: pending, running, paused, failing, cancelling, completed, failed, cancelled or pruned."""
        run = await self.arecord()
        if run is None:
            return "pending"
        return "paused" if run.paused and run.state == "running" else run.state

    status = blocking(astatus)

    async def agraph(self) -> Graph:
        """Return the run's graph, which never changes: its steps by name, each after the steps that it needs.

        Raises RunNotFound, UnreadableRecord, EncryptionKeyMissing.
        """
        stored = await find_run(self.home.client, self.id)
        return await graph_of(self.home.client, stored if isinstance(stored, Task) else stored.record)

    graph = blocking(agraph)

    async def asteps(self) -> list[StepInfo]:
        """Return the run's steps, each after the steps that it needs.

        Raises RunNotFound, UnreadableRecord, EncryptionKeyMissing.
        """
        client = self.home.client
        stored = await find_run(client, self.id)
        if isinstance(stored, Task):
            run = RunRecord(id=self.id, workflow="", queue=stored.queue, created=0)
            graph = await graph_of(client, stored)
        else:
            run = shown(stored.record, client.values)
            graph = await graph_of(client, run)
        return [step_info(run, name, step) for name, step in graph.steps.items()]

    steps = blocking(asteps)

    async def asignals(self) -> list[SignalInfo]:
        """Return the signals that the run has taken, or keeps for a later wait, in the order in which they were sent.

        Raises RunNotFound, UnreadableRecord, EncryptionKeyMissing.
        """
        run = await read_run(self.home.client, self.id)
        return await signals_of(self.home.client, run, await graph_of(self.home.client, run)) if run else []

    signals = blocking(asignals)

    async def acancel(self, *, undo: bool = True) -> Literal["cancelled", "requested"]:
        """Cancel the run: waiting steps never start, running steps are asked to stop. `undo`: finished steps are then undone.

        The cancel is recorded when this returns, even if no worker is running. Returns "cancelled" if the run has ended,
        "requested" if steps have yet to be stopped or undone. Raises Refused if the run has ended otherwise, and TimeoutError as
        `aretry` does.
        """
        run = await read_run(self.home.client, self.id)
        while run is None or run.state == "running":  # again if a retry reopened it
            gen = run.gen if run is not None else 1
            task_id = keys.run_task_id(self.id, "cancel", "", int(undo), gen)
            run = await self._send_recorded(run, CANCEL, task_id, EventArgs(undo=undo), gen)
        if run.state not in {"cancelled", "cancelling"}:
            raise Refused(f"run {self.id} is {run.state} already: there is nothing to cancel")
        return "cancelled" if run.state == "cancelled" else "requested"

    cancel = blocking(acancel)

    async def apause(self) -> None:
        """Start no more steps until a resume; running steps go on. Recorded when this returns.

        Has no effect on a paused run. Raises Refused if the run has ended, and TimeoutError as `aretry` does.
        """
        await self._set_paused(paused=True)

    pause = blocking(apause)

    async def aresume(self) -> None:
        """Go on after a pause. Recorded when this returns.

        Has no effect on a run that is not paused. Raises Refused if the run has ended, and TimeoutError as `aretry` does.
        """
        await self._set_paused(paused=False)

    resume = blocking(aresume)

    async def _set_paused(self, *, paused: bool) -> None:
        """Send a pause or resume even if the run has that status: an earlier event may still be on its way."""
        run = await read_run(self.home.client, self.id)
        _check_pause(run, paused=paused)
        number = run.pause[0] + 1 if run is not None else 1
        name, task_id = PAUSE if paused else RESUME, self.home.client.clock.new_id()
        _check_pause(await self._send_recorded(run, name, task_id, EventArgs(number=number)), paused=paused)

    async def aretry(self) -> None:
        """Continue a failed or cancelled run: finished steps are kept, the others run again, with the code as it is now.

        Recorded when this returns: `aresult` then waits for the new end, and signals and a cancel are accepted. Raises Refused
        for any other run. A process that may not write runs, or lacks their encryption key, waits until a worker records the
        retry: TimeoutError after 10 seconds. The retry stays sent.
        """
        run = await read_run(self.home.client, self.id)
        state = "not started yet" if run is None else run.state
        if run is None or run.state not in {"failed", "cancelled"}:
            raise Refused(f"run {self.id} is {state}: only one that failed or was cancelled is retried")
        await self._send_recorded(run, RETRY, keys.run_task_id(self.id, "retry", "", 0, run.gen), EventArgs(), run.gen)

    retry = blocking(aretry)

    async def _send_recorded(self, run: RunRecord | None, name: str, task_id: str, args: EventArgs, gen: int = 0) -> RunRecord:
        """Send an event, record it in the run, and return the run. The caller's next read shows the event.

        The sender records the event itself, after it submitted the event task. The worker that delivers the task finds the event
        recorded and carries out the actions. So no worker need be running. A sender that may not write runs, or cannot read this
        one, waits for a worker instead. Raises TimeoutError if none delivers the event.
        """
        client = self.home.client
        task, created = await _submit_event(client, self.id, run, name, task_id, args, gen=gen)
        offset = await _clock_offset(client, task) if created else 0
        engine = Engine(client.register, client.clock, lambda: client.clock.now_ms() + offset, client.sealer, client.max_items)
        try:
            recorded = await engine.record(task)
        except (StoreRefused, UnreadableRecord, EncryptionKeyMissing):
            try:
                await client.wait(task.id, DELIVERED_WITHIN)
            except TimeoutError:
                what = task.name.removeprefix(SYSTEM)
                msg = (
                    f"the {what} of run {self.id} was sent, and no worker has recorded it after {DELIVERED_WITHIN:g} s: the next "
                    f"one that serves queue {task.queue!r} will. `buquet run get {self.id}` shows the run"
                )
                raise TimeoutError(msg) from None
            recorded = await read_run(client, self.id)
        finally:
            await engine.close()
        if recorded is None:
            raise RunNotFound(f"run {self.id} was removed from the store meanwhile")
        return recorded

    async def aresult(self, timeout: float | None = None) -> R_co:  # noqa: ASYNC109 - part of the public meaning
        """Wait until the run has ended and return the workflow's return value, as its declared type if this process knows it.

        `timeout` is in seconds. Raises RunFailed, RunCancelled, or TimeoutError (the run goes on). InvalidPayload: the run
        completed, but its output is not of the type that the workflow declares in this process.
        """
        attempt = inside_handler()
        if attempt:
            attempt.logger.warning(
                "task %s waits for run %s and holds its slot meanwhile; a workflow called in a workflow does not",
                attempt.id,
                self.id,
            )
        client = self.home.client
        await read_run(client, self.id)
        stored = await client.waiting.until(
            RunRecord, keys.run(self.id), self.id, lambda run: run.state in OVER, timeout, f"run {self.id}"
        )
        run = stored.record
        if run.state != "completed":
            raise await _error_of(client, shown(run, client.values))
        body = await client.values.get(of_run(self.id, "result"), run.output, run.output_at)
        if self._signature is None:
            return cast("R_co", decode_stored(ANY, body, f"the result of run {self.id} ({run.workflow})", RESTORE))
        try:
            return cast("R_co", self._signature.decode_result(body))
        except InvalidPayload as error:
            msg = f"run {self.id} ({run.workflow}) completed, but {error}. `buquet run get {self.id}` shows the value"
            raise InvalidPayload(msg) from None

    result = blocking(aresult)


# ---------------------------------------------------------------------- reading


async def read_run(client: Client, run_id: str) -> RunRecord | None:
    """GET a run's record; None while no worker has delivered its start. Raises RunNotFound, UnreadableRecord."""
    stored = await find_run(client, run_id)
    return None if isinstance(stored, Task) else stored.record


async def find_run(client: Client, run_id: str) -> Held[RunRecord] | Task:
    """GET a run's record, or else its start task. Raises RunNotFound, UnreadableRecord."""
    if keys.is_id(run_id):
        run = await client.register.read(RunRecord, keys.run(run_id))
        if run is not None:
            return run
        start = await client.register.read(Task, keys.task(run_id))
        if start is not None and start.record.name == START:
            if start.record.state not in TERMINAL:
                return start.record
            # delivered between the two reads; or an old task of a run that was pruned
            run = await client.register.read(RunRecord, keys.run(run_id))
            if run is not None:
                return run
    msg = f"there is no run {run_id[:80]!r} in {client.store.url}. Its id may be from another store, or it was pruned"
    raise RunNotFound(msg)


async def graph_of(client: Client, source: RunRecord | Task) -> Graph:
    """Return the graph of a run, or of its start task. Raises UnreadableRecord, EncryptionKeyMissing."""
    return read_graph(source.id, await client.values.get(of_run(source.id, "graph"), source.graph, source.graph_at))


def step_info(run: RunRecord, name: str, step: Step) -> StepInfo:
    """Return a step as the run's record shows it."""
    record = run.step(name)
    fan, error, undo_error = record.fan, record.error, record.undo_error
    began = record.state not in {"idle", "skipped"}
    index = next(missing(fan.ended, fan.tasks), 0) if fan else 0
    size = packed(step, fan) or 1 if fan else 0
    return StepInfo(
        name=name,
        kind=step.kind,
        status="cancelled" if record.state == "idle" and run.state in OVER else _STATUS[record.state],
        task=step.call.task if step.call else "",
        queue=step.call.queue if step.call else run.queue,
        task_id=keys.run_task_id(run.id, "step", name, index, record.gen) if began and step.call else "",
        needs=step.needs,
        condition=step.condition,
        gen=record.gen,
        due=record.due,
        until=record.until,
        started=record.due if began else 0,
        ended=record.at if record.state != "skipped" else 0,
        done=sum(min(end * size, fan.items) - start * size for start, end in fan.ended) if fan else 0,
        total=fan.items if fan else 0,
        error=f"{error.type}: {error.message}" if error else "",
        errors=fan.errors if fan else (),
        undo=record.undo,
        undo_error=f"{undo_error.type}: {undo_error.message}" if undo_error else "",
    )


async def signals_of(client: Client, run: RunRecord, graph: Graph, *, inline: bool = False) -> list[SignalInfo]:
    """Return the signals that a run has taken, or keeps for a later wait, in the order in which they were sent.

    One GET for each value outside the record; `inline` leaves such values out.
    """
    signals = [
        (graph.steps[name].signal, name, record.taken())
        for name, record in run.steps.items()
        if record.signal and name in graph.steps
    ]
    signals += [(name, "", sent) for name, kept in run.inbox.items() for sent in kept]
    signals.sort(key=lambda signal: signal[2].sent)
    return [await _signal_info(client, run.id, *signal, inline=inline) for signal in signals]


async def _signal_info(client: Client, run_id: str, name: str, step: str, sent: Sent, *, inline: bool) -> SignalInfo:
    value, problem = None, ""
    try:
        if inline and sent.value_at:
            problem = f"it is large: `buquet get {sent.event}` shows it"
        else:
            body = await client.values.get(of_run(run_id, of_signal(name)), sent.value, sent.value_at)
            value = decode_stored(ANY, body, f"a signal {name!r} of run {run_id}", RESTORE)
    except (EncryptionKeyMissing, UnreadableRecord) as error:
        problem = str(error)
    return SignalInfo(name=name, value=value, problem=problem, step=step, sender=sent.sender, sent=sent.sent, task_id=sent.event)


# ---------------------------------------------------------------------- sending events


async def send_signal(client: Client, run_id: str, name: str, value: bytes, key: str | None, via: str = "") -> None:
    """Send a signal to a run. `via` names the means, which is shown beside user and host.

    Raises RunNotFound, Refused if the run has ended or accepts no more signals, KeyConflict for a key sent with another value,
    and InvalidArgument for a value that fits no wait of this name.
    """
    stored = await find_run(client, run_id)
    run = None if isinstance(stored, Task) else stored.record
    if run is not None and run.state != "running":
        raise Refused(f"run {run_id} is {run.state}: signal {name!r} was not sent")
    task_id = client.clock.new_id() if key is None else keys.run_task_id(run_id, f"signal {key}", name, 0, 0)
    if run is not None and task_id not in run.applied and (reason := run.rejects(name)):
        raise Refused(f"signal {name!r} was not sent to run {run_id}: {reason}")
    with suppress(EncryptionKeyMissing, UnreadableRecord):  # the sender may know more than this process
        steps = (await graph_of(client, run or cast("Task", stored))).steps.values()
        waits = [step.schema for step in steps if step.kind == "wait" and step.signal == name]
        check(waits, value, f"the value of signal {name!r} of run {run_id}")
    sender = f"{whoami()}{via and f', {via}'}"[:200]
    args = EventArgs(signal=name, value=Raw(value))
    try:
        await _submit_event(client, run_id, run, SIGNAL, task_id, args, key=key or "", tags={SENDER: sender})
    except KeyConflict:
        msg = (
            f"signal {name!r} was sent to run {run_id} before with key {key!r} and another value; that one stands. "
            "Use another key for another message"
        )
        raise KeyConflict(msg) from None


def _check_pause(run: RunRecord | None, *, paused: bool) -> None:
    if run is not None and run.state in OVER:
        raise Refused(f"run {run.id} is {run.state}: there is nothing to {'pause' if paused else 'resume'}")
    if run is not None and paused and run.state != "running":
        raise Refused(f"run {run.id} is {run.state}, so it can no longer be paused")


async def _submit_event(
    client: Client, run_id: str, run: RunRecord | None, name: str, task_id: str, args: EventArgs, **fields: Any
) -> tuple[Task, bool]:
    """Submit an event task; return it, and whether it was created."""
    queue = run.queue if run is not None else (await client.read(run_id)).record.queue
    now = client.clock.now_ms()
    task = Task(id=task_id, queue=queue, name=name, state="pending", created=now, priority=0, run=run_id, **fields)
    body = msgspec.json.encode(args)
    submitted = await client.submit(task, body)
    return msgspec.structs.replace(task, args=Raw(body)), submitted.created


async def _clock_offset(client: Client, task: Task) -> int:
    """Return the store's clock minus ours, in milliseconds, from a record that was written just now."""
    if client.store.can_wait:  # it is on this machine
        return 0
    stored = await client.reads.get(keys.task(task.id))
    ahead = stored.modified - client.clock.now() if isinstance(stored, Stored) else 0.0
    return int(trusted(ahead) * 1000)


# ---------------------------------------------------------------------- how a run failed


async def _error_of(client: Client, run: RunRecord) -> Exception:
    """Return the error that says how a run ended. A failed run's error has that of its failed step as its cause."""
    what = f"run {run.id} ({run.workflow})"
    if run.state == "pruned":
        return TaskNotFound(f"{what} was pruned: its result is gone")
    again = f"`buquet run retry {run.id}` continues it"
    if run.state == "cancelled":
        return RunCancelled(f"{what} was cancelled. {again}", run.id)
    reason = run.error.message if run.error else "no reason was recorded"
    cause = None
    with suppress(UnreadableRecord, EncryptionKeyMissing):  # the run's own error says most of it
        cause = await _cause(client, run) if run.failed else None
    traceback = ""
    if isinstance(cause, TaskFailed):
        traceback = cause.traceback
    elif isinstance(cause, BatchFailed):
        traceback = next((item.traceback for item in cause.failed if item.traceback), "")
    if cause and traceback:
        cause.add_note(f"In its worker:\n{traceback.rstrip()}")
    error = RunFailed(f"{what} failed: {reason}. {again}", run.id, error=reason, traceback=traceback, step=run.failed)
    error.__cause__ = cause
    return error


async def _cause(client: Client, run: RunRecord) -> TaskError | None:
    """Return the error of the task that a run failed by, as the task's record has it; of a wait its timeout."""
    record = run.step(run.failed)
    if record.error is not None and record.error.type == SignalTimeout.__name__:
        return SignalTimeout(record.error.message, run.id, error=record.error.message)
    index = next(iter(numbers(record.fan.failed)), 0) if record.fan else 0
    stored = await client.register.read(Task, keys.task(keys.run_task_id(run.id, "step", run.failed, index, record.gen)))
    if stored is None or stored.record.state != "failed" or stored.record.error is None:
        return None
    task = client.values.with_error(stored.record)
    if task.pack:
        step = (await graph_of(client, run)).steps[run.failed]
        size = packed(step, record.fan) if record.fan else 0
        failed = [replace(item, index=task.index * size + item.index) for item in await failed_items(client, task)]
        first = "; ".join(f"item {item.index}: {item.error[:200]}" for item in failed[:3])
        items = f"{len(failed):,} of {counted(task.pack, 'item')}"
        return BatchFailed(f"{items} in task {task.id} ({task.name}) without a result: {first}", task.id, failed=failed)
    error = task.error or stored.record.error
    reason = f"{error.type}: {error.message}"
    return TaskFailed(f"task {task.id} ({task.name}) failed: {reason}", task.id, error=reason, traceback=error.traceback)
