"""One task for a page: its values as text, its earlier versions, and how two of them differ."""

from __future__ import annotations

import asyncio
import difflib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from buquet.errors import EncryptionKeyMissing, StoreError, UnreadableRecord
from buquet.insights.pace import ANSWER
from buquet.queue.batch import failed_items
from buquet.queue.values import of_run, of_task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from msgspec import Raw

    from buquet.errors import FailedItem
    from buquet.queue.client import Client
    from buquet.records import Task
    from buquet.store.register import Held
    from buquet.workflow.records import RunRecord

SHOWN = 64 << 10
"""Characters of a value that are shown."""
VERSIONS = 200
"""Versions that are read back at most."""

NOISE = frozenset({"rev", "op", "ops", "prev", "v"})
"""Fields that differ between any two versions, and say nothing about the task."""


@dataclass(frozen=True)
class Value:
    """An argument, result or checkpoint as text."""

    text: str
    size: int
    """Bytes of it as JSON."""
    problem: str = ""

    @property
    def cut(self) -> bool:
        """Whether this is only its beginning."""
        return len(self.text) == SHOWN


@dataclass(frozen=True)
class Line:
    """A line of a difference."""

    kind: Literal["same", "old", "new", "gap"]
    text: str


async def values(client: Client, task: Task) -> dict[str, Value]:
    """Return the task's arguments, checkpoint and result, those that it has. One GET for each that lies outside of the record."""
    wanted: dict[str, Awaitable[bytes | Raw]] = {}
    if task.args_at or bytes(task.args):
        wanted["arguments"] = client.values.of(task, "args")
    if task.checkpoint_at or bytes(task.checkpoint):
        wanted["checkpoint"] = client.values.of(task, "checkpoint")
    if task.result_at or bytes(task.result):
        wanted["result"] = client.values.of(task, "result")
    return await _read(wanted)


async def failed_in_pack(client: Client, task: Task) -> list[FailedItem]:
    """Return the items of a pack that have failed; none where that cannot be read, which `values` tells of the checkpoint."""
    with suppress(EncryptionKeyMissing, UnreadableRecord, StoreError, TimeoutError):
        async with asyncio.timeout(ANSWER):
            return await failed_items(client, task) if task.pack and task.state != "completed" else []
    return []


async def run_values(client: Client, run: RunRecord) -> dict[str, Value]:
    """Return a run's arguments and result, those that it has. One GET for each that lies outside of the record."""
    wanted: dict[str, Awaitable[bytes | Raw]] = {}
    if run.args_at or bytes(run.args):
        wanted["arguments"] = client.values.get(of_task(run.id, "args"), run.args, run.args_at)
    if run.output_at or bytes(run.output):
        wanted["result"] = client.values.get(of_run(run.id, "result"), run.output, run.output_at)
    return await _read(wanted)


async def _read(wanted: Mapping[str, Awaitable[bytes | Raw]]) -> dict[str, Value]:
    """Read values side by side. One that cannot be read, or not in time, says why and hides no other."""

    async def read(value: Awaitable[bytes | Raw]) -> Value:
        try:
            async with asyncio.timeout(ANSWER):
                return _value(bytes(await value))
        except TimeoutError:
            return Value("", 0, f"the store did not answer within {ANSWER:g} s: this value was not read")
        except (UnreadableRecord, EncryptionKeyMissing, StoreError) as error:
            return Value("", 0, str(error))

    return dict(zip(wanted, await asyncio.gather(*map(read, wanted.values())), strict=True))


def _value(body: bytes) -> Value:
    try:
        text = msgspec.json.format(body, indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="replace")
    return Value(text[:SHOWN], len(body))


async def versions(client: Client, task_id: str, progress: Callable[[int, int], None] | None = None) -> list[Held[Task]]:
    """Return the versions of a task's record that the store still has, the newest first: one GET for each."""
    found: list[Held[Task]] = []
    async for held in client.versions(task_id):
        found.append(held)
        if progress:
            progress(len(found), VERSIONS)
        if len(found) == VERSIONS:
            break
    return found


def difference(old: Task, new: Task, around: int = 2) -> list[Line]:
    """Return how a later version of a record differs from an earlier one, with some lines around each change."""
    before, after = _lines(old), _lines(new)
    found: list[Line] = []
    for group in difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(around):
        if found or group[0][1] > 0:
            found.append(Line("gap", "…"))
        for what, a, b, c, d in group:
            if what == "equal":
                found += [Line("same", text) for text in before[a:b]]
            else:
                found += [Line("old", text) for text in before[a:b]] + [Line("new", text) for text in after[c:d]]
    return found


def _lines(task: Task) -> list[str]:
    fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(task))
    told = {name: value for name, value in fields.items() if name not in NOISE}
    return msgspec.json.format(msgspec.json.encode(told), indent=2).decode().splitlines()
