"""Values too large for the record lie in objects of their own, under their hash."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from buquet import keys
from buquet.codec import Oversized
from buquet.errors import EncryptionKeyMissing, UnreadableRecord
from buquet.keys import LARGEST as LARGEST
from buquet.records import ABSENT, ErrorInfo
from buquet.sealing import HIDDEN
from buquet.store.base import Stored

if TYPE_CHECKING:
    from typing import Literal

    from buquet.records import Task
    from buquet.sealing import Sealer
    from buquet.store.retrying import Retrying

    What = Literal["args", "result", "checkpoint", "error"]


INLINE = 64 << 10
"""The most bytes of a value that a record holds itself."""


class Values:
    """The values of tasks at rest: in the record or in an object of their own, sealed where the App has keys."""

    def __init__(self, store: Retrying, sealer: Sealer) -> None:
        self.store = store
        self.sealer = sealer

    async def put(self, task_id: str, what: What, body: bytes) -> tuple[Raw, str]:
        """Return what a record holds of a value: the value itself, or the key of the payload that was written for it.

        Raises InvalidArgument for a value that would be taken for an encrypted one.
        """
        body = self.sealer.seal(body, context(task_id, what))
        if len(body) <= INLINE:
            return Raw(body), ""
        key = keys.payload(task_id, body)
        await self.store.put(key, body)
        return ABSENT, key

    async def get(self, task_id: str, what: What, value: Raw, key: str) -> bytes | Raw:
        """Return a value's JSON. Raises UnreadableRecord when its payload is gone or not as it was, EncryptionKeyMissing."""
        return self.sealer.open(await get_stored(self.store, value, key), context(task_id, what))

    async def args(self, task: Task) -> bytes | Raw:
        """Return a task's arguments as JSON, see `get`."""
        return await self.get(task.id, "args", task.args, task.args_at)

    async def result(self, task: Task) -> bytes | Raw:
        """Return a task's result as JSON, see `get`."""
        return await self.get(task.id, "result", task.result, task.result_at)

    async def checkpoint(self, task: Task) -> bytes | Raw:
        """Return a task's last checkpoint as JSON, empty when there is none; see `get`."""
        return await self.get(task.id, "checkpoint", task.checkpoint, task.checkpoint_at)

    async def put_of_run(self, run_id: str, what: str, body: bytes, inline: int, owner: str = "") -> tuple[Raw, str]:
        """Do what `put` does for what a run's record holds itself up to `inline` bytes; the payload is with the task `owner`."""
        body = self.sealer.seal(body, run_context(run_id, what))
        if len(body) <= inline:
            return Raw(body), ""
        key = keys.payload(owner or run_id, body)
        await self.store.put(key, body)
        return ABSENT, key

    def open_of_run(self, run_id: str, what: str, body: bytes | Raw) -> bytes | Raw:
        """Return the JSON of a value in a run's record. Raises EncryptionKeyMissing, UnreadableRecord."""
        return self.sealer.open(body, run_context(run_id, what))

    async def get_of_run(self, run_id: str, what: str, value: Raw, key: str) -> bytes | Raw:
        """Return the JSON of a value in a run's record, or of the payload that it names; see `get`."""
        return self.open_of_run(run_id, what, await get_stored(self.store, value, key))

    def hide(self, task_id: str, error: ErrorInfo) -> ErrorInfo:
        """Return an error as it may be stored: with keys, its text is sealed and only its type can be read."""
        return self._hide(error, context(task_id, "error"))

    def hide_of_run(self, run_id: str, error: ErrorInfo) -> ErrorInfo:
        """Do what `hide` does, for a run's record."""
        return self._hide(error, run_context(run_id, "error"))

    def _hide(self, error: ErrorInfo, bound_to: str) -> ErrorInfo:
        if not self.sealer.key_id or bytes(error.sealed):
            return error
        body = msgspec.json.encode([error.message, error.traceback])
        return ErrorInfo(type=error.type, message=HIDDEN, sealed=Raw(self.sealer.seal(body, bound_to)))

    def shown(self, task: Task) -> Task:
        """Return a task with its error's text, where that is sealed and a key for it is here."""
        error = task.error
        return task if error is None else replace(task, error=self._shown(error, context(task.id, "error")))

    def shown_of_run(self, run_id: str, error: ErrorInfo) -> ErrorInfo:
        """Return an error of a run's record with its text, where that is sealed and a key for it is here."""
        return self._shown(error, run_context(run_id, "error"))

    def _shown(self, error: ErrorInfo, bound_to: str) -> ErrorInfo:
        if not bytes(error.sealed):
            return error
        try:
            message, traceback = msgspec.json.decode(self.sealer.open(error.sealed, bound_to), type=tuple[str, str])
        except (EncryptionKeyMissing, UnreadableRecord, msgspec.DecodeError):
            return error
        return ErrorInfo(type=error.type, message=message, traceback=traceback)


def context(task_id: str, what: What) -> str:
    """Return what an encrypted value is bound to."""
    return f"{what} of task {task_id}"


def run_context(run_id: str, what: str) -> str:
    """Return what the encrypted values of a run are bound to: `what` is its graph or result, an error, a step's or a signal's."""
    return f"{what} of run {run_id}"


async def get_stored(store: Retrying, value: Raw, key: str) -> bytes | Raw:
    """Return a value as it is stored, sealed or not. Raises UnreadableRecord when its payload is gone."""
    if not key:
        return value
    stored = await store.get(key)
    if not isinstance(stored, Stored):
        msg = f"the payload {key} is missing: something other than buquet removed it. Restore it, or submit the task anew"
        raise UnreadableRecord(msg)
    if isinstance(stored.body, Oversized):
        msg = f"the payload {key} has {stored.body.size} bytes, more than any of buquet's. Restore it, or submit the task anew"
        raise UnreadableRecord(msg)
    return stored.body
