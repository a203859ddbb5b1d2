"""One task for a page: its values as text, its earlier versions, and how two versions differ."""

from __future__ import annotations

import asyncio
import difflib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from buquet.concurrency import each_of
from buquet.errors import EncryptionKeyMissing, StoreError, UnreadableRecord
from buquet.insights.feed import ANSWER
from buquet.queue.batch import failed_items
from buquet.queue.values import of_run, of_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from msgspec import Raw

    from buquet.errors import FailedItem
    from buquet.queue.client import Client
    from buquet.queue.values import Address
    from buquet.records import Task
    from buquet.store.register import Held
    from buquet.workflow.records import RunRecord

SHOWN = 64 << 10
"""Characters of a value that are shown."""
VERSIONS = 200
"""Versions that are read at most."""
NOISE = frozenset({"rev", "op", "ops", "prev", "v"})
"""Fields that differ between any two versions and mean nothing to people."""


@dataclass(frozen=True)
class Value:
    """A value as text, which may be only its beginning."""

    text: str
    size: int
    """Its bytes as JSON."""
    problem: str = ""

    @property
    def cut(self) -> bool:
        return len(self.text) == SHOWN


@dataclass(frozen=True)
class Line:
    """A line of a difference."""

    kind: Literal["same", "old", "new", "gap"]
    text: str


async def values(client: Client, task: Task) -> dict[str, Value]:
    """Return the arguments, checkpoint and result of a task, as far as it has them. A value outside the record costs a GET."""
    return await _read(
        client,
        arguments=(of_task(task.id, "args"), task.args, task.args_at),
        checkpoint=(of_task(task.id, "checkpoint"), task.checkpoint, task.checkpoint_at),
        result=(of_task(task.id, "result"), task.result, task.result_at),
    )


async def run_values(client: Client, run: RunRecord) -> dict[str, Value]:
    """Return the arguments and the result of a run, as far as it has them. A value outside the record costs a GET."""
    return await _read(
        client,
        arguments=(of_task(run.id, "args"), run.args, run.args_at),
        result=(of_run(run.id, "result"), run.output, run.output_at),
    )


async def _read(client: Client, **places: tuple[Address, Raw, str]) -> dict[str, Value]:
    """Read values at once. A value that cannot be read, or not in time, becomes a problem of its own."""

    async def read(place: tuple[Address, Raw, str]) -> Value:
        try:
            async with asyncio.timeout(ANSWER):
                return _value(bytes(await client.values.get(*place)))
        except TimeoutError:
            return Value("", 0, f"the store did not answer within {ANSWER:g} s: this value was not read")
        except (UnreadableRecord, EncryptionKeyMissing, StoreError) as error:
            return Value("", 0, str(error))

    present = {name: place for name, place in places.items() if bytes(place[1]) or place[2]}
    return dict(zip(present, await each_of(present.values(), read, len(places)), strict=True))


async def failed_in_pack(client: Client, task: Task) -> list[FailedItem]:
    """Return the items of a pack that failed; none where the checkpoint cannot be read, which `values` reports."""
    with suppress(EncryptionKeyMissing, UnreadableRecord, StoreError, TimeoutError):
        async with asyncio.timeout(ANSWER):
            return await failed_items(client, task) if task.pack and task.state != "completed" else []
    return []


def _value(body: bytes) -> Value:
    try:
        text = msgspec.json.format(body, indent=2).decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="replace")
    return Value(text[:SHOWN], len(body))


async def versions(client: Client, task_id: str, progress: Callable[[int, int], None] | None = None) -> list[Held[Task]]:
    """Return the versions of a task's record that the store still has, the newest first. Each costs a GET."""
    kept: list[Held[Task]] = []
    async for held in client.versions(task_id):
        kept.append(held)
        if progress:
            progress(len(kept), VERSIONS)
        if len(kept) == VERSIONS:
            break
    return kept


def difference(old: Task, new: Task, around: int = 2) -> list[Line]:
    """Return how a later version of a record differs from an earlier version, with `around` lines of context."""
    before, after = _lines(old), _lines(new)
    lines: list[Line] = []
    for group in difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(around):
        if lines or group[0][1] > 0:
            lines.append(Line("gap", "…"))
        for what, a, b, c, d in group:
            if what == "equal":
                lines += [Line("same", text) for text in before[a:b]]
            else:
                lines += [Line("old", text) for text in before[a:b]] + [Line("new", text) for text in after[c:d]]
    return lines


def _lines(task: Task) -> list[str]:
    fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(task))
    shown = {name: value for name, value in fields.items() if name not in NOISE}
    return msgspec.json.format(msgspec.json.encode(shown), indent=2).decode().splitlines()
