"""Values of tasks, runs and schedules. A large value lies in a payload, and the record holds the payload's key.

If the App has keys, every value is encrypted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from buquet import keys
from buquet.codec import Oversized
from buquet.errors import EncryptionKeyMissing, UnreadableRecord
from buquet.records import ABSENT, ErrorInfo
from buquet.sealing import HIDDEN
from buquet.store.base import Stored

if TYPE_CHECKING:
    from buquet.records import Task
    from buquet.sealing import Sealer
    from buquet.store.retrying import Retrying

INLINE = 64 << 10
"""The most bytes of a value that a record holds itself."""


class Address(NamedTuple):
    """Whose value it is, and which one. An encrypted value can be decrypted only at the address that it was encrypted for."""

    kind: Literal["task", "run", "schedule"]
    owner: str
    """The id of the task or run, or the name of the schedule."""
    what: str
    """args, result, checkpoint, error, graph, template, or a step or signal of a run."""

    def __str__(self) -> str:
        """Return the text that the cipher authenticates. Stored values depend on it."""
        return f"{self.what} of {self.kind} {self.owner}"


def of_task(task_id: str, what: Literal["args", "result", "checkpoint", "error"]) -> Address:
    """Return the address of a task's value."""
    return Address("task", task_id, what)


def of_run(run_id: str, what: str) -> Address:
    """Return the address of a run's value."""
    return Address("run", run_id, what)


class Values:
    """Reads and writes values."""

    def __init__(self, store: Retrying, sealer: Sealer) -> None:
        self.store = store
        self.sealer = sealer

    async def put(
        self, address: Address, body: bytes, *, inline: int | None = None, folder: str = "", unique: bool = False
    ) -> tuple[Raw, str]:
        """Return what the record holds of a value: the value, or else the key of the payload that was written.

        `inline`: the most bytes that the record holds. `folder`: the task whose payload it is, by default the owner's. `unique`:
        name the payload unlike any other, for a key whose earlier payloads may be about to be pruned. Raises InvalidArgument for
        a value that looks like an encrypted one.
        """
        body = self.sealer.seal(body, str(address))
        if len(body) <= (INLINE if inline is None else inline):
            return Raw(body), ""
        key = keys.payload(folder or address.owner, body)
        if unique:
            key += f".{self.store.clock.new_op()}"
        await self.store.put(key, body)
        return ABSENT, key

    async def get(self, address: Address, value: Raw, key: str) -> bytes | Raw:
        """Return a value's JSON. Raises UnreadableRecord if its payload is missing or was changed, and EncryptionKeyMissing."""
        return self.open(address, await self.stored(value, key))

    async def of(self, task: Task, what: Literal["args", "result", "checkpoint"]) -> bytes | Raw:
        """Return a task's value as JSON; empty if there is none. Raises the errors of `get`."""
        return await self.get(of_task(task.id, what), getattr(task, what), getattr(task, f"{what}_at"))

    async def stored(self, value: Raw, key: str) -> bytes | Raw:
        """Return a value as it is stored, encrypted or not. Raises UnreadableRecord if its payload is missing."""
        if not key:
            return value
        stored = await self.store.get(key)
        if not isinstance(stored, Stored):
            msg = f"the payload {key} is missing: something other than buquet removed it. Restore it, or submit the task anew"
            raise UnreadableRecord(msg)
        if isinstance(stored.body, Oversized):
            size = f"{stored.body.size} bytes, more than any of buquet's"
            raise UnreadableRecord(f"the payload {key} has {size}. Restore it, or submit the task anew")
        return stored.body

    def open(self, address: Address, body: bytes | Raw) -> bytes | Raw:
        """Return the JSON of a stored value. Raises EncryptionKeyMissing, UnreadableRecord."""
        return self.sealer.open(body, str(address))

    def seal_error(self, address: Address, error: ErrorInfo) -> ErrorInfo:
        """Return an error as it is stored: if the App has keys, all of its text but the type is encrypted."""
        if not self.sealer.key_id or bytes(error.sealed):
            return error
        body = msgspec.json.encode([error.message, error.traceback])
        return ErrorInfo(type=error.type, message=HIDDEN, sealed=Raw(self.sealer.seal(body, str(address))))

    def open_error(self, address: Address, error: ErrorInfo) -> ErrorInfo:
        """Return an error with its text, if this process has the key."""
        if not bytes(error.sealed):
            return error
        try:
            message, traceback = msgspec.json.decode(self.open(address, error.sealed), type=tuple[str, str])
        except (EncryptionKeyMissing, UnreadableRecord, msgspec.DecodeError):
            return error
        return ErrorInfo(type=error.type, message=message, traceback=traceback)

    def with_error(self, task: Task) -> Task:
        """Return a task with the text of its error, if this process has the key."""
        return replace(task, error=self.open_error(of_task(task.id, "error"), task.error)) if task.error else task
