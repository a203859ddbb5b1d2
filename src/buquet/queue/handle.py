"""Handles of submitted tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast, overload

from buquet.codec import AGAIN, ANY, Signature, decode_stored
from buquet.errors import TaskCancelled, TaskExpired, TaskFailed, TaskNotFound
from buquet.printing import counted
from buquet.queue.attempt import inside_handler
from buquet.queue.background import blocking

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    from buquet.clock import Clock
    from buquet.queue.background import Background
    from buquet.queue.client import Client
    from buquet.queue.names import Submitted
    from buquet.records import Event, Progress, State, Task


R_co = TypeVar("R_co", covariant=True)

log = logging.getLogger("buquet")


class Home(Protocol):
    """An App, as handles and task functions use it."""

    @property
    def clock(self) -> Clock:
        """Time and randomness."""
        ...

    @property
    def client(self) -> Client:
        """The access to the store. It is made at first use."""
        ...

    @property
    def background(self) -> Background:
        """The loop of blocking calls."""
        ...

    @property
    def max_items(self) -> int | None:
        """The most items of an `each`; None: each has its own limit."""
        ...


class Handle(Generic[R_co]):
    """A submitted task: read it, wait for it, cancel or redrive it.

    Each blocking method has an async twin with an `a` before its name.

    >>> handle = resize.submit("a.png")  # doctest: +SKIP
    >>> handle.result(timeout=60)  # doctest: +SKIP
    'a-800.png'
    """

    __slots__ = ("_signature", "created", "home", "id")

    def __init__(self, home: Home, task_id: str, signature: Signature | None = None, *, created: bool = False) -> None:
        self.home = home
        self._signature = signature
        self.id = task_id
        self.created = created
        """Whether the submit that returned this handle created the task. False: its key named one that was there."""

    def __repr__(self) -> str:
        """Show the id, which the command line takes."""
        return f"<buquet task {self.id}>"

    async def arecord(self) -> Task:
        """Return the task's record as it is now. Raises TaskNotFound, UnreadableRecord."""
        return (await self.home.client.read(self.id)).record

    record = blocking(arecord)

    async def astatus(self) -> State:
        """Return the task's status: pending, running, completed, failed, cancelled, expired or pruned."""
        return (await self.arecord()).state

    status = blocking(astatus)

    async def ahistory(self) -> list[Event]:
        """Return the task's timeline: each status with its time (milliseconds since 1970), worker and reason."""
        return list((await self.arecord()).events)

    history = blocking(ahistory)

    async def aprogress(self) -> Progress | None:
        """Return the task's progress: `fraction`, from 0 to 1, and `message`, as of the worker's last heartbeat.

        The fraction of a completed task is 1. None if the task does not run, or has reported nothing. Raises TaskNotFound.
        """
        return await self.home.client.progress(await self.arecord())

    progress = blocking(aprogress)

    async def aredrive(self) -> None:
        """Run a failed, cancelled or expired task again from its first attempt. Raises Refused for any other."""
        await self.home.client.redrive(self.id)

    redrive = blocking(aredrive)

    async def acancel(self) -> Literal["cancelled", "requested"]:
        """Cancel the task. The worker of a running task gets the request within about two seconds.

        Returns "cancelled" once the record says so, else "requested". Raises Refused if the task ended another way.
        """
        return await self.home.client.cancel(self.id)

    cancel = blocking(acancel)

    async def aresult(self, timeout: float | None = None) -> R_co:  # noqa: ASYNC109 - part of the public meaning
        """Wait until the task has ended, and return its result, as the declared type if this process knows it.

        `timeout` is in seconds. Raises TaskFailed, TaskCancelled, TaskExpired, or TimeoutError (the task goes on).
        """
        attempt = inside_handler()
        if attempt:
            attempt.logger.warning(
                "task %s waits for the result of %s and holds its slot meanwhile; workflows do not", attempt.id, self.id
            )
        client = self.home.client
        task = await client.wait(self.id, timeout)
        if task.state != "completed":
            raise ending(client.values.with_error(task))
        body = await client.values.of(task, "result")
        if self._signature is not None:
            return cast("R_co", self._signature.decode_result(body))
        return cast("R_co", decode_stored(ANY, body, f"the result of task {self.id} ({task.name})", AGAIN))

    result = blocking(aresult)


def ending(task: Task) -> Exception:
    """Return the error of a task that did not complete."""
    what = f"task {task.id} ({task.name})"
    if task.state == "cancelled":
        return TaskCancelled(f"{what} was cancelled. `buquet redrive {task.id}` runs it again", task.id)
    if task.state == "expired":
        return TaskExpired(f"{what} was not started before its deadline. Run more workers, or redrive it", task.id)
    if task.state == "pruned":
        return TaskNotFound(f"{what} was pruned: its result is gone")
    error = task.error
    reason = f"{error.type}: {error.message}" if error else "no reason was recorded"
    attempts = counted(task.failures, "attempt")
    return TaskFailed(
        f"{what} failed after {attempts}: {reason}. `buquet redrive {task.id}` runs it again",
        task.id,
        error=reason,
        traceback=error.traceback if error else "",
    )


WIDTH = 16


class Handles(Sequence[Handle[R_co]]):
    """The handles of many tasks, in the order of their submits. Reads like a list: length, index, slice, iteration.

    Each access makes a new Handle.
    """

    __slots__ = ("_created", "_home", "_ids", "_signature")

    def __init__(self, home: Home, signature: Signature | None, ids: bytes = b"", created: bytes = b"") -> None:
        self._home = home
        self._signature = signature
        self._ids = bytearray(ids)
        self._created = bytearray(created)

    def add(self, submitted: Iterable[Submitted]) -> None:
        """Append a submitted task."""
        for task_id, created in submitted:
            self._ids += bytes.fromhex(task_id)
            self._created.append(created)

    @property
    def ids(self) -> list[str]:
        """The ids of the tasks."""
        return [self._ids[start : start + WIDTH].hex() for start in range(0, len(self._ids), WIDTH)]

    def __len__(self) -> int:
        """Return how many tasks there are."""
        return len(self._created)

    @overload
    def __getitem__(self, index: int) -> Handle[R_co]: ...
    @overload
    def __getitem__(self, index: slice) -> Handles[R_co]: ...

    def __getitem__(self, index: int | slice) -> Handle[R_co] | Handles[R_co]:
        """Return the handle of a place, or the handles of a slice."""
        places = range(len(self))[index]
        if isinstance(places, range):
            ids = b"".join(self._ids[place * WIDTH : (place + 1) * WIDTH] for place in places)
            return Handles(self._home, self._signature, ids, bytes(self._created[index]) if isinstance(index, slice) else b"")
        task_id = self._ids[places * WIDTH : (places + 1) * WIDTH].hex()
        return Handle(self._home, task_id, self._signature, created=bool(self._created[places]))

    def __eq__(self, other: object) -> bool:
        """Return whether these are the same tasks in the same order."""
        return self._ids == other._ids if isinstance(other, Handles) else NotImplemented  # pyright: ignore[reportUnknownMemberType]

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        """Show how many there are."""
        return f"<{counted(len(self), 'handle')} of buquet tasks>"
