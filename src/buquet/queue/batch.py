"""A batch: many items of one task, in packs. Its id names all of its packs, so any process can look at it."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import msgspec
from msgspec.structs import replace

from buquet import keys
from buquet.codec import AGAIN, decode_any, decode_stored
from buquet.concurrency import each_of
from buquet.errors import BatchFailed, FailedItem, Refused, UnreadableRecord, UsageError
from buquet.printing import counted
from buquet.queue.attempt import inside_handler
from buquet.queue.handle import ending
from buquet.queue.packing import read_state
from buquet.records import TERMINAL, PackItems, PackResults, PackState, Task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from buquet.codec import Signature
    from buquet.queue.client import Client
    from buquet.queue.handle import Home

R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")

AT_ONCE = 16
"""Packs of a batch that are read side by side."""

_ID = re.compile(r"([0-9a-f]{32})\.([0-9]{1,12})\.([0-9]{1,12})")
_results = msgspec.json.Decoder(PackResults)
_items = msgspec.json.Decoder(PackItems)


class BatchProgress(NamedTuple):
    """How far a batch is, in items."""

    done: int
    failed: int
    """Failed for good; `redrive()` runs them again."""
    left: int
    """Not begun, running, or waiting for another attempt."""


class Batch(Generic[R_co]):
    """Many items of one task: look at them, wait for them, run what failed again. Blocking methods have async twins with an a.

    >>> batch = resize.batch(paths)  # doctest: +SKIP
    >>> batch.results(timeout=600)  # doctest: +SKIP
    ['a-800.png', 'b-800.png']
    """

    __slots__ = ("_home", "_packs", "_signature", "_token", "_whole", "id")

    def __init__(self, home: Home, signature: Signature, batch_id: str) -> None:
        found = _ID.fullmatch(batch_id)
        if found is None:
            raise UsageError(f"{batch_id[:100]!r} is no batch's id. Take the one of `batch(...).id`")
        self._home = home
        self._signature = signature
        self._token = found[1]
        self._packs = int(found[2])
        self._whole: dict[int, int] = {}
        """Packs that were seen to be completed, which they stay, and how many items they have."""
        self.id = batch_id

    def __repr__(self) -> str:
        """Show the id, which `get_batch` takes."""
        return f"<buquet batch {self.id}>"

    def __len__(self) -> int:
        """Return how many items there are."""
        return int(self.id.rpartition(".")[2])

    @property
    def task_ids(self) -> list[str]:
        """The ids of the packs, which are tasks."""
        return [keys.pack_id(self._token, index) for index in range(self._packs)]

    async def aresults(self, timeout: float | None = None) -> list[R_co]:  # noqa: ASYNC109 - part of the public meaning
        """Wait until every item has its outcome, and return the results in the order of the items.

        `timeout` is in seconds. Raises BatchFailed, which lists the items that have no result, or TimeoutError (it then goes on).
        """
        attempt = inside_handler()
        if attempt:
            attempt.logger.warning(
                "task %s waits for the results of batch %s and holds its slot meanwhile; workflows do not", attempt.id, self.id
            )
        clock = self._home.client.clock
        until = None if timeout is None else clock.monotonic() + timeout

        async def outcome(index: int) -> list[Any] | _Unwell:
            left = None if until is None else max(until - clock.monotonic(), 0)
            try:
                task = await self._home.client.wait(keys.pack_id(self._token, index), left)
            except TimeoutError:
                msg = f"batch {self.id} is not over after {timeout:g} s and goes on; progress() says how far it is"
                raise TimeoutError(msg) from None
            if task.state != "completed":
                return await self._unwell(task)
            body = await self._home.client.value_of(task)
            results = decode_stored(_results, body, f"the results of {_pack(task, self._of)}", AGAIN).results
            return [self._signature.decode_result(each) for each in results]

        outcomes = await self._each(outcome)
        failed = _located(outcomes)
        if failed:
            raise self._failure(failed)
        return [result for each in outcomes if not isinstance(each, _Unwell) for result in each]

    async def afailed(self) -> list[FailedItem]:
        """Return the items that have failed for good until now, with why, in their order."""

        async def look(index: int) -> int | _Unwell:
            if index in self._whole:
                return self._whole[index]
            task = await self._read(index)
            if task.state in {"pending", "completed"} and not bytes(task.checkpoint) and not task.checkpoint_at:
                return task.pack
            return await self._unwell(task)

        return _located(await self._each(look))

    async def aprogress(self) -> BatchProgress:
        """Count the items that are done, failed and left. One read for each pack that was not completed when last asked."""

        async def look(index: int) -> tuple[int, int, int]:
            if index in self._whole:
                return self._whole[index], 0, 0
            task = await self._read(index)
            if task.state == "completed":
                return task.pack, 0, 0
            state = await _state_of(self._home.client, task, self._of)
            done = sum(end - start for start, end in state.done)
            failed = task.pack - done if task.state in TERMINAL else len(state.failed)
            return done, failed, task.pack - done - failed

        counts = await self._each(look)
        done, failed, left = (sum(each[place] for each in counts) for place in range(3))
        return BatchProgress(done, failed, left)

    async def aredrive(self) -> int:
        """Run the items again that have no result, of every pack that has ended; return how many packs that concerns."""

        async def again(index: int) -> bool:
            if index in self._whole:
                return False
            with suppress(Refused):
                await self._home.client.redrive(keys.pack_id(self._token, index))
                return True
            return False

        return sum(await self._each(again))

    async def acancel(self) -> int:
        """Cancel what is not over; return how many packs that concerns. Results that are stored stay."""

        async def stop(index: int) -> bool:
            if index in self._whole:
                return False
            with suppress(Refused):
                await self._home.client.cancel(keys.pack_id(self._token, index))
                return True
            return False

        return sum(await self._each(stop))

    def results(self, timeout: float | None = None) -> list[R_co]:
        """Block and do what `aresults` does."""
        return self._home.background.run(lambda: self.aresults(timeout), "results")

    def failed(self) -> list[FailedItem]:
        """Block and do what `afailed` does."""
        return self._home.background.run(self.afailed, "failed")

    def progress(self) -> BatchProgress:
        """Block and do what `aprogress` does."""
        return self._home.background.run(self.aprogress, "progress")

    def redrive(self) -> int:
        """Block and do what `aredrive` does."""
        return self._home.background.run(self.aredrive, "redrive")

    def cancel(self) -> int:
        """Block and do what `acancel` does."""
        return self._home.background.run(self.acancel, "cancel")

    # ------------------------------------------------------------------ packs

    @property
    def _of(self) -> str:
        return f"batch {self.id}"

    async def _each(self, work: Callable[[int], Awaitable[T]]) -> list[T]:
        """Do something for each pack, a few side by side; the answers come in their order."""
        return await each_of(range(self._packs), work, AT_ONCE)

    async def _read(self, index: int) -> Task:
        task = (await self._home.client.read(keys.pack_id(self._token, index))).record
        if task.state == "completed":
            self._whole[index] = task.pack
        if task.state == "pruned":
            raise ending(task)
        return task

    async def _unwell(self, task: Task) -> _Unwell:
        """Return the failed items of a pack that is not completed."""
        if task.state == "pruned":
            raise ending(task)
        return _Unwell(task.pack, await failed_items(self._home.client, task, self._of))

    def _failure(self, failed: list[FailedItem]) -> BatchFailed:
        shown = "; ".join(f"item {each.index}: {each.error[:200]}" for each in failed[:3])
        more = f"; and {len(failed) - 3:,} more" if len(failed) > 3 else ""  # noqa: PLR2004 - as many as are shown
        msg = (
            f"batch {self.id}: {len(failed):,} of {counted(len(self), 'item')} without a result: {shown}{more}. "
            "`.failed` lists them; redrive() runs them again"
        )
        return BatchFailed(msg, failed[0].task_id, failed=failed)


def _pack(task: Task, of: str) -> str:
    return f"task {task.id}, a pack of {of or (f'run {task.run}' if task.run else f'batch {task.batch}')},"


async def failed_items(client: Client, task: Task, of: str = "") -> list[FailedItem]:
    """Return the items of a pack that have failed, by their places in it; once it has ended, all that have no result.

    `of` says in errors what it is a pack of.

    Raises UnreadableRecord, EncryptionKeyMissing.
    """
    task = client.values.shown(task)
    state = await _state_of(client, task, of)
    stored = {each.index: each for each in state.failed}
    items: list[msgspec.Raw] = []
    if stored or task.state in TERMINAL:
        items = decode_stored(_items, await client.values.args(task), f"the items of {_pack(task, of)}", AGAIN).items
        if len(items) != task.pack:
            msg = f"the items of {_pack(task, of)} are {len(items):,}, and it should hold {task.pack:,}. {AGAIN}"
            raise UnreadableRecord(msg)
    failed = [
        FailedItem(at, decode_any(items[at]), f"{each.type}: {each.message}", each.traceback, each.attempts, task.id)
        for at, each in stored.items()
    ]
    if task.state in TERMINAL:
        error = task.error if task.state == "failed" else None
        why = f"{error.type}: {error.message}" if error else f"{task.state} with its pack"
        done = {at for start, end in state.done for at in range(start, end)}
        rest = [at for at in range(task.pack) if at not in done and at not in stored]
        failed += [FailedItem(at, decode_any(items[at]), why, task_id=task.id) for at in rest]
    return sorted(failed, key=lambda each: each.index)


async def _state_of(client: Client, task: Task, of: str) -> PackState:
    """Return what is stored of a pack's items; nothing of failures that a redrive has put behind."""
    for _ in range(3):
        if not bytes(task.checkpoint) and not task.checkpoint_at:
            return PackState(started=task.started)
        try:
            body = await client.values.checkpoint(task)
        except UnreadableRecord:  # the pack has stored a later one, and removed this
            task = (await client.read(task.id)).record
            continue
        state = read_state(task, body, f"the items of {_pack(task, of)}")
        return state if state.started == task.started else replace(state, started=task.started, failed=[], waiting=[])
    return PackState(started=task.started)


class _Unwell(NamedTuple):
    """A pack that has failed items, or may have."""

    pack: int
    failed: list[FailedItem]


def _located(outcomes: list[Any]) -> list[FailedItem]:
    """Return the failed items with their places in the batch instead of those in their packs."""
    found: list[FailedItem] = []
    offset = 0
    for each in outcomes:
        if isinstance(each, _Unwell):
            found += [FailedItem(offset + f.index, f.item, f.error, f.traceback, f.attempts, f.task_id) for f in each.failed]
            offset += each.pack
        else:
            offset += each if isinstance(each, int) else len(cast("list[Any]", each))
    return found
