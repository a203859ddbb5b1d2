"""What a caller holds of a run."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast

import msgspec

from buquet import keys
from buquet.codec import ANY, decode_stored
from buquet.errors import EncryptionKeyMissing, InvalidPayload, UnreadableRecord
from buquet.queue.attempt import inside_handler
from buquet.queue.values import of_run
from buquet.workflow import records, sending
from buquet.workflow.failure import run_ending
from buquet.workflow.graph import RESTORE
from buquet.workflow.records import OVER, RunRecord
from buquet.workflow.values import of_signal, shown

if TYPE_CHECKING:
    from msgspec import Raw

    from buquet.codec import Signature
    from buquet.queue.client import Client
    from buquet.queue.handle import Home
    from buquet.workflow.graph import Graph, Kind
    from buquet.workflow.records import ItemError, StepRecord

R_co = TypeVar("R_co", covariant=True)

Status: TypeAlias = Literal["pending", "running", "paused", "failing", "cancelling", "completed", "failed", "cancelled", "pruned"]
homes: weakref.WeakSet[Home] = weakref.WeakSet()
"""The Apps of this process that have workflows."""


class StepInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A step of a run, as it is now. Times are milliseconds since 1970, 0: not yet."""

    name: str
    kind: Kind
    status: Literal["waiting", "running", "completed", "failed", "skipped", "stopped"]
    """`running`: it is due, and its task may wait for a worker; `stopped`: the run's end came before its own."""
    task: str = ""
    """The task function that it runs."""
    queue: str = ""
    task_id: str = ""
    """Its task, which `buquet get` shows; of an `each` the first one."""
    needs: tuple[str, ...] = ()
    condition: str = ""
    gen: int = 1
    due: int = 0
    until: int = 0
    """When its timer fires."""
    ended: int = 0
    total: int = 0
    """Tasks of an `each`."""
    done: int = 0
    error: str = ""
    errors: tuple[ItemError, ...] = ()
    """Items of an `each` that failed, the first hundred."""
    undo: str = ""
    """due, done or failed, where it is undone. `done` includes that there was nothing to undo."""
    undo_error: str = ""


class SignalInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A signal that was sent to a run."""

    name: str
    value: Any
    """As plain builtins; None where `problem` says why it is not shown."""
    step: str
    """The wait that took it; empty while it is kept for one to come."""
    sender: str
    """User and host; empty where its sender did not say."""
    sent: int
    """When, milliseconds since 1970 by the sender's clock; 0: not known."""
    task_id: str
    """The task that carried it."""
    problem: str = ""


class Run(Generic[R_co]):
    """One execution of a workflow: look at it, wait for it, steer it. Every blocking method has an async twin with an a.

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
        """Whether the start that returned this handle created the run. False: its key named one that was there."""

    def __repr__(self) -> str:
        """Show the id, which the command line takes."""
        return f"<buquet run {self.id}>"

    async def arecord(self) -> RunRecord | None:
        """Return the run's record as it is now; None while no worker has carried out its start.

        Raises RunNotFound, UnreadableRecord.
        """
        run = await sending.read_run(self.home.client, self.id)
        return run and shown(run, self.home.client.values)

    async def astatus(self) -> Status:
        """Return the run's state: pending, running, paused, failing, cancelling, completed, failed, cancelled or pruned."""
        run = await self.arecord()
        if run is None:
            return "pending"
        return "paused" if run.paused and run.state == "running" else run.state

    async def agraph(self) -> Graph:
        """Return the graph that the run keeps to its end: its steps by name, each after what it needs.

        Raises RunNotFound, UnreadableRecord, EncryptionKeyMissing.
        """
        run = await self.arecord()
        source = run if run is not None else (await self.home.client.read(self.id)).record
        return await sending.graph_of(self.home.client, source)

    async def asteps(self) -> list[StepInfo]:
        """Return the run's steps as they are now, each after what it needs."""
        graph = await self.agraph()
        return steps_of(await self.arecord(), self.id, graph)

    async def asignals(self) -> list[SignalInfo]:
        """Return the signals that the run has taken, or keeps for a wait to come, in the order in which they were sent.

        Raises RunNotFound, UnreadableRecord, EncryptionKeyMissing.
        """
        run = await sending.read_run(self.home.client, self.id)
        return await signals_of(self.home.client, run, await sending.graph_of(self.home.client, run)) if run else []

    async def acancel(self, *, undo: bool = True) -> Literal["cancelled", "requested"]:
        """Cancel the run: what waits never starts, what runs is asked to stop, and then, with `undo`, what is done is undone.

        Recorded when this returns, whether a worker is there or not: "cancelled" where the run has ended, "requested" where steps
        are still to be stopped or undone. Raises Refused when the run ended otherwise, and TimeoutError as `aretry` does.
        """
        return await sending.cancel(self.home.client, self.id, undo=undo)

    async def apause(self) -> None:
        """Start no more steps until a resume; running steps go on. Recorded when this returns. A paused run stays as it is.

        Raises Refused when it is over, and TimeoutError as `aretry` does.
        """
        await sending.hold(self.home.client, self.id, paused=True)

    async def aresume(self) -> None:
        """Go on after a pause. Recorded when this returns. No effect on a run that is not paused.

        Raises Refused when it is over, and TimeoutError as `aretry` does.
        """
        await sending.hold(self.home.client, self.id, paused=False)

    async def aretry(self) -> None:
        """Go on with a failed or cancelled run: finished steps are kept, the others run again, with the code as it is now.

        Recorded when this returns: `aresult` then waits for the new end, and signals and a cancel are taken. Raises Refused for
        any other run. A process that may not write runs, or lacks their encryption key, waits for a worker to record it:
        TimeoutError after 10 seconds, and it stays sent.
        """
        await sending.retry(self.home.client, self.id)

    async def aresult(self, timeout: float | None = None) -> R_co:  # noqa: ASYNC109 - part of the public meaning
        """Wait until the run is over and return what the workflow returned, as the declared type where this process knows it.

        `timeout` is in seconds. Raises RunFailed, RunCancelled, or TimeoutError (the run then goes on). InvalidPayload says that
        the run completed, and that what it came to is of another type than the workflow declares in this process.
        """
        attempt = inside_handler()
        if attempt:
            attempt.logger.warning(
                "task %s waits for run %s and holds its slot meanwhile; a workflow called in a workflow does not",
                attempt.id,
                self.id,
            )
        client = self.home.client
        await sending.read_run(client, self.id)
        held = await client.waiting.until(
            RunRecord, keys.run(self.id), self.id, lambda run: run.state in OVER, timeout, f"run {self.id}"
        )
        run = held.record
        if run.state != "completed":
            raise await run_ending(client, shown(run, client.values))
        body = await client.values.get(of_run(self.id, "result"), run.output, run.output_at)
        if self._signature is None:
            return cast("R_co", decode_stored(ANY, body, f"the result of run {self.id} ({run.workflow})", RESTORE))
        try:
            return cast("R_co", self._signature.decode_result(body))
        except InvalidPayload as error:
            msg = f"run {self.id} ({run.workflow}) completed, but {error}. `buquet run get {self.id}` shows the value"
            raise InvalidPayload(msg) from None

    def record(self) -> RunRecord | None:
        """Block and do what `arecord` does."""
        return self.home.background.run(self.arecord, "record")

    def status(self) -> Status:
        """Block and do what `astatus` does."""
        return self.home.background.run(self.astatus, "status")

    def graph(self) -> Graph:
        """Block and do what `agraph` does."""
        return self.home.background.run(self.agraph, "graph")

    def steps(self) -> list[StepInfo]:
        """Block and do what `asteps` does."""
        return self.home.background.run(self.asteps, "steps")

    def signals(self) -> list[SignalInfo]:
        """Block and do what `asignals` does."""
        return self.home.background.run(self.asignals, "signals")

    def cancel(self, *, undo: bool = True) -> Literal["cancelled", "requested"]:
        """Block and do what `acancel` does."""
        return self.home.background.run(lambda: self.acancel(undo=undo), "cancel")

    def pause(self) -> None:
        """Block and do what `apause` does."""
        self.home.background.run(self.apause, "pause")

    def resume(self) -> None:
        """Block and do what `aresume` does."""
        self.home.background.run(self.aresume, "resume")

    def retry(self) -> None:
        """Block and do what `aretry` does."""
        self.home.background.run(self.aretry, "retry")

    def result(self, timeout: float | None = None) -> R_co:
        """Block and do what `aresult` does."""
        return self.home.background.run(lambda: self.aresult(timeout), "result")


async def signals_of(client: Client, run: RunRecord, graph: Graph, *, inline: bool = False) -> list[SignalInfo]:
    """Return the signals that a run has taken or keeps for a wait to come, in the order in which they were sent.

    A GET for each value that lies outside of the record; `inline`: such values are left out.
    """
    found = [
        _Signal(graph.steps[name].signal, name, each.signal, each.result, each.result_at, each.sent, each.sender)
        for name, each in run.steps.items()
        if each.signal and name in graph.steps
    ]
    for channel, there in run.inbox.items():
        found += [_Signal(channel, "", each.event, each.value, each.value_at, each.sent, each.sender) for each in there]
    return [await _shown(client, run, each, inline=inline) for each in sorted(found, key=lambda each: each.sent)]


class _Signal(NamedTuple):
    """A signal as the run's record has it."""

    name: str
    step: str
    event: str
    value: Raw
    value_at: str
    sent: int
    sender: str


async def _shown(client: Client, run: RunRecord, signal: _Signal, *, inline: bool) -> SignalInfo:
    value, problem = None, ""
    try:
        if inline and signal.value_at:
            problem = f"it is large: `buquet get {signal.event}` shows it"
        else:
            body = await client.values.get(of_run(run.id, of_signal(signal.name)), signal.value, signal.value_at)
            value = decode_stored(ANY, body, f"a signal {signal.name!r} of run {run.id}", RESTORE)
    except (EncryptionKeyMissing, UnreadableRecord) as error:
        problem = str(error)
    return SignalInfo(
        name=signal.name,
        value=value,
        problem=problem,
        step=signal.step,
        sender=signal.sender,
        sent=signal.sent,
        task_id=signal.event,
    )


def steps_of(run: RunRecord | None, run_id: str, graph: Graph) -> list[StepInfo]:
    """Return a run's steps as its record says."""
    fresh = RunRecord(id=run_id, workflow="", queue="", created=0)
    return [_info(run or fresh, name, graph) for name in graph.steps]


def never_began(run: RunRecord, step: StepRecord) -> bool:
    """Tell whether a run was over before a step of it began, and was not skipped: only a retry may yet run it."""
    return step.state == "idle" and run.state in OVER


_STATUS: dict[str, Any] = {"idle": "waiting", "due": "running", "done": "completed", "maybe": "stopped"}


def _info(run: RunRecord, name: str, graph: Graph) -> StepInfo:
    record: StepRecord = run.step(name)
    step = graph.steps[name]
    began = record.state not in {"idle", "skipped"}
    fan = record.fan
    return StepInfo(
        name=name,
        kind=step.kind,
        status="stopped" if never_began(run, record) else _STATUS.get(record.state, record.state),
        task=step.call.task if step.call else "",
        queue=step.call.queue if step.call else run.queue,
        task_id=keys.follow_up(run.id, "step", name, 0, record.gen) if began and step.call else "",
        needs=step.needs,
        condition=step.condition,
        gen=record.gen,
        due=record.due,
        until=record.until,
        ended=record.at,
        total=fan.tasks if fan else 0,
        done=records.count(fan.ended) if fan else 0,
        error=f"{record.error.type}: {record.error.message}" if record.error else "",
        errors=fan.errors if fan else (),
        undo=record.undo,
        undo_error=f"{record.undo_error.type}: {record.undo_error.message}" if record.undo_error else "",
    )
