"""Many tasks at once: tasks submitted in chunks, and batches, whose items lie in packs. A batch's id names all of its packs."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sized
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace as replace_record

from buquet import keys
from buquet.codec import AGAIN, decode_any, decode_stored, encode_value
from buquet.concurrency import each_of
from buquet.errors import (
    BatchFailed,
    FailedItem,
    InvalidArgument,
    KeyConflict,
    Refused,
    SubmitInterrupted,
    UnreadableRecord,
    UsageError,
)
from buquet.printing import counted
from buquet.queue.attempt import inside_handler
from buquet.queue.background import blocking
from buquet.queue.handle import Handles, ending
from buquet.queue.names import Prepared, Submitted
from buquet.records import MOST_ITEMS, TERMINAL, PackItems, PackResults, PackState, Session, Task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from typing import Literal

    from buquet.codec import Signature
    from buquet.queue.client import Client
    from buquet.queue.handle import Home
    from buquet.store.base import Listed

R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")

CHUNK = 256
"""The most tasks of a chunk."""
CHUNK_BYTES = 4 << 20
"""A chunk ends with the task that takes its arguments over this many bytes."""
AUTO_BYTES = 256 << 10
"""The most bytes of input of a pack with pack="auto"."""
AUTO_ITEMS = 1_000
"""Items of a pack with pack="auto", if the number of items is unknown."""
PACKS_A_WORKER = 4
KEYED_WORKERS = 16
"""Workers that a batch with a key is sized for: the same items must give the same packs when it is submitted again."""
FULL = 16 << 20
"""A pack of this many bytes is closed, however few items it has."""
FRAME = (b'{"items":[', b"]}")
LARGEST_ITEM = keys.LARGEST - len(b"".join(FRAME))
CHECKED = 100
CHECKED_BYTES = 1 << 20
"""The most items, and the most bytes, whose types are checked at once."""
AT_ONCE = 16
"""Packs of a batch that are read concurrently."""

_ID = re.compile(r"([0-9a-f]{32})\.([0-9]{1,12})\.([0-9]{1,12})")
_items = msgspec.json.Decoder(PackItems)
_results = msgspec.json.Decoder(PackResults)
_state = msgspec.json.Decoder(PackState)


class BulkSubmit(Generic[R_co]):
    """Submits many tasks, a chunk at a time. Knows at any time what is stored."""

    def __init__(self, home: Home, signature: Signature, on_progress: Callable[[int], None] | None) -> None:
        self.home = home
        self.on_progress = on_progress
        self.handles: Handles[R_co] = Handles(home, signature)
        """Those of the stored tasks."""
        self.stored = 0
        """How many tasks are stored, or how many items if the tasks are packs."""
        self.problem: Exception | None = None
        """The error that ended the iterator of tasks, rather than the store."""

    async def arun(self, tasks: Iterator[Prepared]) -> None:
        """Submit tasks, and read them on this loop. Raises what ends the iterator, once all before it is stored."""
        for chunk in self._chunks(tasks):
            try:
                self._add(chunk, await self.home.client.submit_chunk(chunk))
            except SubmitInterrupted as error:
                self._add(chunk, error)
                raise
            self._report()
        if self.problem:
            raise self.problem

    def run(self, tasks: Iterator[Prepared], name: str) -> None:
        """Submit tasks, and read them in this thread, one chunk ahead of the chunk that is being stored.

        `name` is the blocking method. Raises what ends the iterator, once all before it is stored.
        """
        background, client = self.home.background, self.home.client
        background.check_caller(name)
        in_flight: deque[tuple[list[Prepared], Future[list[Submitted]]]] = deque()

        def settle() -> None:
            chunk, future = in_flight.popleft()
            self._add(chunk, future.exception() or future.result())
            future.result()
            self._report()

        try:
            for chunk in self._chunks(tasks):
                in_flight.append((chunk, background.begin(partial(client.submit_chunk, chunk))))
                if len(in_flight) > 1:
                    settle()
            while in_flight:
                settle()
        except Exception:
            for chunk, future in in_flight:
                self._add(chunk, future.exception() or future.result())
            raise
        if self.problem:
            raise self.problem

    def _chunks(self, tasks: Iterator[Prepared]) -> Iterator[list[Prepared]]:
        chunk: list[Prepared] = []
        size = 0
        try:
            for prepared in tasks:
                chunk.append(prepared)
                size += len(prepared.args)
                if len(chunk) >= CHUNK or size >= CHUNK_BYTES:
                    yield chunk
                    chunk, size = [], 0
        except Exception as error:  # noqa: BLE001 - raised once what came before it is stored
            self.problem = error
        if chunk:
            yield chunk

    def _add(self, chunk: list[Prepared], outcome: list[Submitted] | BaseException) -> None:
        """Count what is stored of a chunk."""
        if isinstance(outcome, BaseException):
            ids = set(outcome.ids) if isinstance(outcome, SubmitInterrupted) else set[str]()
            chunk = [prepared for prepared in chunk if prepared.task.id in ids]
            outcome = [Submitted(prepared.task.id, created=True) for prepared in chunk]
        self.handles.add(outcome)
        self.stored += sum(task.pack or 1 for task, _ in chunk)

    def _report(self) -> None:
        if self.on_progress:
            self.on_progress(self.stored)


# ---------------------------------------------------------------------- submitting a batch


class Packing:
    """The submit of one batch."""

    def __init__(
        self,
        bulk: BulkSubmit[Any],
        template: Task,
        signature: Signature,
        items: Iterable[Any],
        pack: int | Literal["auto"],
    ) -> None:
        """Check the arguments. Each pack is the template with an id and items of its own. Raises UsageError."""
        signature.check_batch()
        if isinstance(items, str | bytes | bytearray):
            raise UsageError(f"items is one {type(items).__name__}, of which each character would be an item: put it in a list")
        if pack != "auto" and (isinstance(pack, bool) or not isinstance(pack, int) or not 1 <= pack <= MOST_ITEMS):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"pack is the number of items in a task, 1 to {MOST_ITEMS:,}, or 'auto', not {pack!r}")
        self.bulk = bulk
        self.client = bulk.home.client
        self.template = template
        self.signature = signature
        self.items = items if isinstance(items, Sized) else iter(items)
        key = template.key
        self.token = keys.batch_token(template.queue, template.name, key) if key else self.client.clock.new_id()
        self.size = 0 if pack == "auto" else pack
        """Items of a pack; 0: not decided yet."""
        self.most_bytes = AUTO_BYTES if pack == "auto" else FULL
        self.packs = 0
        self.read = 0

    @property
    def id(self) -> str:
        """The batch's id, once all is submitted."""
        return f"{self.token}.{self.packs}.{self.read}"

    async def arun(self) -> None:
        """Submit the batch on the running loop. Raises SubmitInterrupted."""
        await self._decide()
        try:
            await self.bulk.arun(self._tasks())
            await self._check_end()
        except Exception as error:
            raise self._interrupted(error) from error

    def run(self) -> None:
        """Submit the batch from this thread. Raises SubmitInterrupted."""
        background = self.bulk.home.background
        background.run(self._decide, "batch")
        try:
            self.bulk.run(self._tasks(), "batch")
            background.run(self._check_end, "batch")
        except Exception as error:
            raise self._interrupted(error) from error

    async def _decide(self) -> None:
        """Decide on the number of items of a pack, for pack="auto"."""
        if self.size:
            return
        if not isinstance(self.items, Sized):
            self.size = AUTO_ITEMS
            return
        workers = KEYED_WORKERS if self.template.key else max(1, await live_workers(self.client, self.template.queue))
        self.size = min(MOST_ITEMS, max(1, len(self.items) // (PACKS_A_WORKER * workers)))

    def _tasks(self) -> Generator[Prepared]:
        """Read the items and put them into packs."""
        bodies: list[bytes] = []
        size = 0
        try:
            for body in self._bodies():
                if bodies and size + len(body) > self.most_bytes:
                    yield self._pack(bodies)
                    bodies, size = [], 0
                bodies.append(body)
                size += len(body) + 1
                self.read += 1
                if len(bodies) >= self.size:
                    yield self._pack(bodies)
                    bodies, size = [], 0
        except Exception:
            if not self.template.key:
                if bodies:
                    yield self._pack(bodies)
            else:  # submitted again under its key, this pack will be a full one: half of it must not take its place
                self.read -= len(bodies)
            raise
        if bodies:
            yield self._pack(bodies)

    def _pack(self, bodies: list[bytes]) -> Prepared:
        task_id = keys.pack_id(self.token, self.packs)
        self.packs += 1
        now = self.client.clock.now_ms()
        task = replace_record(self.template, id=task_id, created=now, pack=len(bodies), batch=self.token)
        return Prepared(task, FRAME[0] + b",".join(bodies) + FRAME[1])

    def _bodies(self) -> Iterator[bytes]:
        """Encode the items. Items that are not of plain types are checked many at once; those before a bad item come first."""
        safe, most = self.signature.safe_items, min(CHECKED, self.size)
        block: list[Any] = []
        bodies: list[bytes] = []
        size = 0
        try:
            for item in self.items:
                body = self._encode(item, bodies)
                if not block and type(item) in safe:
                    yield body
                    continue
                block.append(item)
                bodies.append(body)
                size += len(body)
                if len(block) >= most or size >= CHECKED_BYTES:
                    yield from self._checked(block, bodies)
                    size = 0
        finally:  # also if the items end with an error
            yield from self._checked(block, bodies)

    def _checked(self, block: list[Any], bodies: list[bytes]) -> Iterator[bytes]:
        """Empty a block. Raises InvalidArgument at the first item that would not arrive unchanged."""
        bad = self.signature.check_items(block, bodies) if block else None
        place, good = self.read, bodies[: bad[0]] if bad else bodies[:]
        block.clear()
        bodies.clear()
        yield from good
        if bad:
            raise InvalidArgument(f"item {place + bad[0]} of the batch is no argument of {self.template.name}: {bad[1]}")

    def _encode(self, item: Any, before: list[bytes]) -> bytes:
        place = self.read + len(before)
        try:
            body = encode_value(item, "it")
        except InvalidArgument as error:
            raise InvalidArgument(f"item {place} of the batch is no argument of {self.template.name}: {error}") from None
        if len(body) > LARGEST_ITEM:
            most = f"the most is {keys.LARGEST:,}. Store it in an object of yours and pass its key"
            raise InvalidArgument(f"item {place} of the batch has {len(body):,} bytes as JSON; {most}")
        return body

    async def _check_end(self) -> None:
        """Raise KeyConflict if the key's batch was submitted before with more items."""
        if not self.template.key:
            return
        held = await self.client.register.read(Task, keys.task(keys.pack_id(self.token, self.packs)))
        if held is not None and held.record.state not in {"tombstone", "pruned"}:
            msg = (
                f"key {self.template.key!r} of a batch of {self.template.name!r} was submitted before with more items, which "
                "stand. Use another key for other work"
            )
            raise KeyConflict(msg)

    def _interrupted(self, error: Exception) -> SubmitInterrupted:
        """Return the error that says what was submitted of a batch that could not be submitted whole."""
        ids = self.bulk.handles.ids
        usable = error is self.bulk.problem  # all packs before the bad item are stored, and the id names them
        conflict = isinstance(error, KeyConflict) or isinstance(error.__cause__, KeyConflict)
        known = f"; as a batch they are {self.id}" if usable else ""
        again = "; submit the batch again under its key to go on" if self.template.key and not conflict else ""
        stored = "before anything was stored" + again
        if ids:
            packs = counted(len(ids), "pack, which is", "packs, which are")
            stored = f"after {counted(self.bulk.stored, 'item')} in {packs} stored and will run "
            stored += f"(their ids in `.ids`{known}{again})"
        msg = f"the batch of {self.template.name} stopped {stored}: {error}"
        return SubmitInterrupted(msg, ids, batch_id=self.id if usable else "")


async def live_workers(client: Client, queue: str) -> int:
    """Count the workers of a queue that seem alive. One session is read for each set of queues that workers serve."""
    groups: dict[str, list[Listed]] = {}
    async for page in client.reads.pages(keys.WORKERS):
        for listed in page:
            worker = keys.session_of(listed.key)
            if worker is not None:
                groups.setdefault(keys.queues_hash_of(worker), []).append(listed)
    count = 0
    for sessions in groups.values():
        try:
            held = await client.register.read(Session, sessions[-1].key)
        except UnreadableRecord:
            continue
        if held is not None and queue in held.record.queues:
            since = client.clock.now() - held.record.ttl
            count += sum(session.modified >= since for session in sessions)
    return count


# ---------------------------------------------------------------------- a submitted batch


class BatchProgress(NamedTuple):
    """The progress of a batch, in items."""

    done: int
    failed: int
    """Failed for good; `redrive()` runs them again."""
    left: int
    """Not begun, running, or waiting for another attempt."""


class Batch(Generic[R_co]):
    """A submitted batch: wait for its results, read its progress, run what failed again.

    Every blocking method has an async twin, whose name begins with an a.

    >>> batch = resize.batch(paths)  # doctest: +SKIP
    >>> batch.results(timeout=600)  # doctest: +SKIP
    ['a-800.png', 'b-800.png']
    """

    __slots__ = ("_completed", "_packs", "_signature", "_token", "home", "id")

    def __init__(self, home: Home, signature: Signature, batch_id: str) -> None:
        match = _ID.fullmatch(batch_id)
        if match is None:
            raise UsageError(f"{batch_id[:100]!r} is no batch's id. Take the one of `batch(...).id`")
        self.home = home
        self._signature = signature
        self._token = match[1]
        self._packs = int(match[2])
        self._completed: dict[int, int] = {}
        """Items of each pack that was seen completed: it stays so, and is not read again."""
        self.id = batch_id

    def __repr__(self) -> str:
        """Show the id, which `get_batch` takes."""
        return f"<buquet batch {self.id}>"

    def __len__(self) -> int:
        """Return the number of items."""
        return int(self.id.rpartition(".")[2])

    @property
    def task_ids(self) -> list[str]:
        """The task ids of the packs."""
        return [keys.pack_id(self._token, index) for index in range(self._packs)]

    async def aresults(self, timeout: float | None = None) -> list[R_co]:  # noqa: ASYNC109 - part of the public meaning
        """Wait until every item has ended, and return the results in the order of the items.

        `timeout` is in seconds. Raises BatchFailed, which lists the items without a result, or TimeoutError; the batch then goes
        on.
        """
        attempt = inside_handler()
        if attempt:
            attempt.logger.warning(
                "task %s waits for the results of batch %s and holds its slot meanwhile; workflows do not", attempt.id, self.id
            )
        client = self.home.client
        until = None if timeout is None else client.clock.monotonic() + timeout

        async def outcome(index: int) -> _Outcome:
            left = None if until is None else max(until - client.clock.monotonic(), 0)
            try:
                task = await client.wait(keys.pack_id(self._token, index), left)
            except TimeoutError:
                msg = f"batch {self.id} is not over after {timeout:g} s and goes on; progress() says how far it is"
                raise TimeoutError(msg) from None
            if task.state != "completed":
                return await self._failures(task)
            body = await client.values.of(task, "result")
            results = decode_stored(_results, body, f"the results of {_pack_of(task, self._name)}", AGAIN).results
            return _Outcome(len(results), [self._signature.decode_result(result) for result in results])

        outcomes = await self._each_pack(outcome)
        failed = _failed_of(outcomes)
        if failed:
            raise self._error(failed)
        return [result for outcome in outcomes for result in outcome.results]

    results = blocking(aresults)

    async def afailed(self) -> list[FailedItem]:
        """Return the items that have failed for good until now, in their order."""

        async def outcome(index: int) -> _Outcome:
            if index in self._completed:
                return _Outcome(self._completed[index])
            task = await self._read(index)
            if task.state in {"pending", "completed"} and not bytes(task.checkpoint) and not task.checkpoint_at:
                return _Outcome(task.pack)
            return await self._failures(task)

        return _failed_of(await self._each_pack(outcome))

    failed = blocking(afailed)

    async def aprogress(self) -> BatchProgress:
        """Count the items that are done, failed and left. Packs that were seen completed are not read again."""

        async def count(index: int) -> BatchProgress:
            if index in self._completed:
                return BatchProgress(self._completed[index], 0, 0)
            task = await self._read(index)
            if task.state == "completed":
                return BatchProgress(task.pack, 0, 0)
            state = await _state_of(self.home.client, task, self._name)
            done = sum(end - start for start, end in state.done)
            failed = task.pack - done if task.state in TERMINAL else len(state.failed)
            return BatchProgress(done, failed, task.pack - done - failed)

        counts = await self._each_pack(count)
        return BatchProgress(*(sum(pack[place] for pack in counts) for place in range(3)))

    progress = blocking(aprogress)

    async def aredrive(self) -> int:
        """Run the items without a result again, in every pack that has ended. Return the number of these packs."""
        return await self._change(self.home.client.redrive)

    redrive = blocking(aredrive)

    async def acancel(self) -> int:
        """Cancel every pack that has not ended. Return the number of these packs. Stored results stay."""
        return await self._change(self.home.client.cancel)

    cancel = blocking(acancel)

    # ------------------------------------------------------------------ packs

    @property
    def _name(self) -> str:
        return f"batch {self.id}"

    async def _each_pack(self, work: Callable[[int], Awaitable[T]]) -> list[T]:
        return await each_of(range(self._packs), work, AT_ONCE)

    async def _change(self, change: Callable[[str], Awaitable[object]]) -> int:
        """Change every pack that was not seen completed. Return how many did not refuse."""

        async def accepted(index: int) -> bool:
            if index not in self._completed:
                with suppress(Refused):
                    await change(keys.pack_id(self._token, index))
                    return True
            return False

        return sum(await self._each_pack(accepted))

    async def _read(self, index: int) -> Task:
        task = (await self.home.client.read(keys.pack_id(self._token, index))).record
        if task.state == "completed":
            self._completed[index] = task.pack
        if task.state == "pruned":
            raise ending(task)
        return task

    async def _failures(self, task: Task) -> _Outcome:
        """Return the failed items of a pack that is not completed."""
        if task.state == "pruned":
            raise ending(task)
        return _Outcome(task.pack, failed=await failed_items(self.home.client, task, self._name))

    def _error(self, failed: list[FailedItem]) -> BatchFailed:
        shown = "; ".join(f"item {item.index}: {item.error[:200]}" for item in failed[:3])
        more = f"; and {len(failed) - 3:,} more" if len(failed) > 3 else ""  # noqa: PLR2004 - as many as are shown
        msg = (
            f"batch {self.id}: {len(failed):,} of {counted(len(self), 'item')} without a result: {shown}{more}. "
            "`.failed` lists them; redrive() runs them again"
        )
        return BatchFailed(msg, failed[0].task_id, failed=failed)


class _Outcome(NamedTuple):
    """The outcome of a pack: its number of items, and their results or the failed ones."""

    items: int
    results: Sequence[Any] = ()
    failed: Sequence[FailedItem] = ()


def _failed_of(outcomes: list[_Outcome]) -> list[FailedItem]:
    """Return the failed items of all packs, with their places in the batch."""
    failed: list[FailedItem] = []
    first = 0
    for outcome in outcomes:
        failed += [replace(item, index=first + item.index) for item in outcome.failed]
        first += outcome.items
    return failed


def read_state(task: Task, body: bytes | msgspec.Raw, name: str = "") -> PackState:
    """Decode the checkpoint of a pack. `name` says in errors which pack. Raises UnreadableRecord if no such pack can have it."""
    if not bytes(body):
        return PackState(started=task.started)
    pack = f"task {task.id} ({task.name}), a pack of {counted(task.pack, 'item')},"
    what = f"the checkpoint of {name or pack}"
    state = decode_stored(_state, body, what, AGAIN)
    if not state.fits(task.pack):
        raise UnreadableRecord(f"{what} names items that the pack does not have. {AGAIN}")
    return state


async def failed_items(client: Client, task: Task, whole: str = "") -> list[FailedItem]:
    """Return the failed items of a pack, with their places in it. If it has ended, these are all items without a result.

    `whole` says in errors what the pack is a part of. Raises UnreadableRecord, EncryptionKeyMissing.
    """
    task = client.values.with_error(task)
    state = await _state_of(client, task, whole)
    failures = {failure.index: failure for failure in state.failed}
    items: list[msgspec.Raw] = []
    if failures or task.state in TERMINAL:
        items = decode_stored(_items, await client.values.of(task, "args"), f"the items of {_pack_of(task, whole)}", AGAIN).items
        if len(items) != task.pack:
            msg = f"the items of {_pack_of(task, whole)} are {len(items):,}, and it should hold {task.pack:,}. {AGAIN}"
            raise UnreadableRecord(msg)
    failed = [
        FailedItem(at, decode_any(items[at]), f"{failure.type}: {failure.message}", failure.traceback, failure.attempts, task.id)
        for at, failure in failures.items()
    ]
    if task.state in TERMINAL:
        error = task.error if task.state == "failed" else None
        why = f"{error.type}: {error.message}" if error else f"{task.state} with its pack"
        done = {at for start, end in state.done for at in range(start, end)}
        rest = [at for at in range(task.pack) if at not in done and at not in failures]
        failed += [FailedItem(at, decode_any(items[at]), why, task_id=task.id) for at in rest]
    return sorted(failed, key=lambda item: item.index)


async def _state_of(client: Client, task: Task, whole: str) -> PackState:
    """Return the state of a pack's items, without the failures from before a redrive."""
    for _ in range(3):
        if not bytes(task.checkpoint) and not task.checkpoint_at:
            break
        try:
            body = await client.values.of(task, "checkpoint")
        except UnreadableRecord:  # the pack has stored a later checkpoint, and removed this one
            task = (await client.read(task.id)).record
            continue
        state = read_state(task, body, f"the items of {_pack_of(task, whole)}")
        if state.started != task.started:
            return replace_record(state, started=task.started, failed=[], waiting=[])
        return state
    return PackState(started=task.started)


def _pack_of(task: Task, whole: str) -> str:
    return f"task {task.id}, a pack of {whole or (f'run {task.run}' if task.run else f'batch {task.batch}')},"
