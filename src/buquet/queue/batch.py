"""A batch: many items of one task, in packs. Its id names all of its packs, so any process can look at it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sized
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import msgspec
from msgspec.structs import replace

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
from buquet.queue.handle import ending
from buquet.queue.names import Prepared
from buquet.records import MOST_ITEMS, TERMINAL, PackItems, PackResults, PackState, Session, Task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future
    from typing import Literal

    from buquet.codec import Signature
    from buquet.queue.client import Client
    from buquet.queue.handle import Home
    from buquet.queue.names import Submitted
    from buquet.queue.task import BaseTask


AUTO_BYTES = 256 << 10
"""The most bytes of input of a pack that is sized by itself."""
AUTO_ITEMS = 1_000
"""Items of a pack that is sized by itself, where nobody knows how many there are."""
PACKS_A_WORKER = 4
KEYED_WORKERS = 16
"""Workers that a batch with a key is sized for: the same items must give the same packs when it is submitted again."""
FULL = 16 << 20
"""A pack of so many bytes is closed, however few its items are."""
FRAME = (b'{"items":[', b"]}")
LARGEST_ITEM = keys.LARGEST - len(b"".join(FRAME))
CHUNK = 256
CHECKED = 100
CHECKED_BYTES = 1 << 20
"""The most items, and the most bytes, whose types are checked at once."""
CHUNK_BYTES = 4 << 20
"""A chunk of packs that is handed over at once has at most so many bytes, and one pack more."""


_state = msgspec.json.Decoder(PackState)


def read_state(task: Task, body: bytes | msgspec.Raw, of: str = "") -> PackState:
    """Return what the checkpoint of a pack says of its items. Raises UnreadableRecord for what no such pack can have stored."""
    if not bytes(body):
        return PackState(started=task.started)
    pack = f"task {task.id} ({task.name}), a pack of {counted(task.pack, 'item')},"
    what = f"the checkpoint of {of or pack}"
    state = decode_stored(_state, body, what, AGAIN)
    if not state.fits(task.pack):
        raise UnreadableRecord(f"{what} names items that the pack does not have. {AGAIN}")
    return state


class Packing:
    """The submit of one batch: what was read of its items, and what was stored."""

    def __init__(self, function: BaseTask[Any, Any], client: Client, items: Iterable[Any], pack: int | Literal["auto"]) -> None:
        function.check_step_options()
        function.signature.check_batch()
        if isinstance(items, str | bytes | bytearray):
            raise UsageError(f"items is one {type(items).__name__}, of which each character would be an item: put it in a list")
        if pack != "auto" and (isinstance(pack, bool) or not isinstance(pack, int) or not 1 <= pack <= MOST_ITEMS):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"pack is the number of items in a task, 1 to {MOST_ITEMS:,}, or 'auto', not {pack!r}")
        key = function.submit_options.key
        self.function = function
        self.client = client
        self.items = items if isinstance(items, Sized) else iter(items)
        self.key = key or ""
        self.token = client.clock.new_id() if key is None else keys.batch_token(function.queue, function.name, key)
        self.size = 0 if pack == "auto" else pack
        """Items of a pack; 0: not decided yet."""
        self.most_bytes = AUTO_BYTES if pack == "auto" else FULL
        self.packs = 0
        self.read = 0
        self.stored_packs = 0
        self.stored_items = 0
        self.strays: list[str] = []
        """Packs that were stored of a chunk that was not stored whole."""
        self.problem: Exception | None = None
        """What the items themselves, not the store, came to an end with."""

    @property
    def id(self) -> str:
        """The batch's id, once all is submitted."""
        return f"{self.token}.{self.packs}.{self.read}"

    async def decide(self) -> None:
        """Decide on the number of items of a pack, where that was left to us."""
        if self.size:
            return
        if not isinstance(self.items, Sized):
            self.size = AUTO_ITEMS
            return
        workers = KEYED_WORKERS if self.key else max(1, await live_workers(self.client, self.function.queue))
        self.size = min(MOST_ITEMS, max(1, len(self.items) // (PACKS_A_WORKER * workers)))

    def chunks(self) -> Iterator[list[Prepared]]:
        """Read the items, a chunk of packs at a time. What was read before an error is handed over, then `problem` says it."""
        chunk: list[Prepared] = []
        size = 0
        for packed in self._pack_up():
            chunk.append(packed)
            size += len(packed.args)
            if len(chunk) >= CHUNK or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _pack_up(self) -> Generator[Prepared]:
        bodies: list[bytes] = []
        size = 0
        try:
            for body in self._bodies():
                if bodies and size + len(body) > self.most_bytes:
                    yield self._close(bodies)
                    bodies, size = [], 0
                bodies.append(body)
                size += len(body) + 1
                self.read += 1
                if len(bodies) >= self.size:
                    yield self._close(bodies)
                    bodies, size = [], 0
        except Exception as error:  # noqa: BLE001 - told once what came before it is stored
            self.problem = error
            if self.key:  # submitted again under its key, this pack will be a full one: half of it must not stand in its place
                self.read -= len(bodies)
                return
        if bodies:
            yield self._close(bodies)

    def _bodies(self) -> Iterator[bytes]:
        """Encode the items, and check those of other than plain types many at once. Those before a bad one come first."""
        safe, most = self.function.signature.safe_items, min(CHECKED, self.size)
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
                    yield from self._fitting(block, bodies)
                    size = 0
        finally:  # also where the items end with an error
            yield from self._fitting(block, bodies)

    def _fitting(self, block: list[Any], bodies: list[bytes]) -> Iterator[bytes]:
        """Empty a block. Raises InvalidArgument at the first item that would not arrive as it is."""
        bad = self.function.signature.check_items(block, bodies) if block else None
        place, found = self.read, bodies[: bad[0]] if bad else bodies[:]
        block.clear()
        bodies.clear()
        yield from found
        if bad:
            raise InvalidArgument(f"item {place + bad[0]} of the batch is no argument of {self.function.name}: {bad[1]}")

    def _encode(self, item: Any, before: list[bytes]) -> bytes:
        try:
            body = encode_value(item, "it")
        except InvalidArgument as error:
            msg = f"item {self.read + len(before)} of the batch is no argument of {self.function.name}: {error}"
            raise InvalidArgument(msg) from None
        if len(body) > LARGEST_ITEM:
            msg = (
                f"item {self.read + len(before)} of the batch has {len(body):,} bytes as JSON; the most is {keys.LARGEST:,}. "
                "Store it in an object of yours and pass its key"
            )
            raise InvalidArgument(msg)
        return body

    def _close(self, bodies: list[bytes]) -> Prepared:
        task_id = keys.pack_id(self.token, self.packs)
        self.packs += 1
        task = self.function.new_record(task_id, self.key, pack=len(bodies), batch=self.token)
        return Prepared(task, FRAME[0] + b",".join(bodies) + FRAME[1])

    async def end(self) -> None:
        """Raise what the items came to an end with, if it was an error, or KeyConflict when there were more of them before."""
        if self.problem:
            raise self.problem
        if self.key:
            held = await self.client.register.read(Task, keys.task(keys.pack_id(self.token, self.packs)))
            if held is not None and held.record.state not in {"tombstone", "pruned"}:
                msg = (
                    f"key {self.key!r} of a batch of {self.function.name!r} was submitted before with more items, which stand. "
                    "Use another key for other work"
                )
                raise KeyConflict(msg)

    def landed(self, chunk: list[Prepared], error: BaseException | None = None) -> None:
        """Note that a chunk was stored, or as much of it as the error says."""
        if error is None and not self.strays:
            self.stored_packs += len(chunk)
            self.stored_items += sum(packed.task.pack for packed in chunk)
            return
        ids = {packed.task.id for packed in chunk} if error is None else set(getattr(error, "ids", ()))
        for packed in chunk:
            if packed.task.id in ids:
                self.strays.append(packed.task.id)
                self.stored_items += packed.task.pack

    def interrupted(self, error: Exception) -> SubmitInterrupted:
        """Return the error that tells what was submitted of a batch that could not be submitted whole."""
        ids = [keys.pack_id(self.token, index) for index in range(self.stored_packs)] + self.strays
        whole = error is self.problem
        conflict = isinstance(error, KeyConflict) or isinstance(error.__cause__, KeyConflict)
        known = f"; as a batch they are {self.id}" if whole else ""
        again = "; submit the batch again under its key to go on" if self.key and not conflict else ""
        stored = "before anything was stored" + again
        if ids:
            packs = counted(len(ids), "pack, which is", "packs, which are")
            stored = f"after {counted(self.stored_items, 'item')} in {packs} stored and will run "
            stored += f"(their ids in `.ids`{known}{again})"
        msg = f"the batch of {self.function.name} stopped {stored}: {error}"
        return SubmitInterrupted(msg, ids, batch_id=self.id if whole else "")


async def submit_packs(packing: Packing, told: Callable[[int], None] | None) -> None:
    """Submit a batch on the running loop. Raises SubmitInterrupted."""
    await packing.decide()
    try:
        for chunk in packing.chunks():
            try:
                await packing.client.submit_chunk(chunk)
            except SubmitInterrupted as error:
                packing.landed(chunk, error)
                raise
            packing.landed(chunk)
            if told:
                told(packing.stored_items)
        await packing.end()
    except Exception as error:
        raise packing.interrupted(error) from error


def submit_packs_blocking(packing: Packing, home: Home, told: Callable[[int], None] | None) -> None:
    """Submit a batch from a thread: the items are read here, a chunk ahead of what is being stored. Raises SubmitInterrupted."""
    home.background.run(packing.decide, "batch")
    in_flight: list[tuple[list[Prepared], Future[list[Submitted]]]] = []

    def settle() -> None:
        chunk, future = in_flight.pop(0)
        packing.landed(chunk, future.exception())
        future.result()
        if told:
            told(packing.stored_items)

    try:
        for chunk in packing.chunks():
            submit = packing.client.submit_chunk(chunk)
            in_flight.append((chunk, asyncio.run_coroutine_threadsafe(submit, home.background.loop)))
            if len(in_flight) > 1:
                settle()
        while in_flight:
            settle()
        home.background.run(packing.end, "batch")
    except Exception as error:
        for chunk, future in in_flight:
            packing.landed(chunk, future.exception())
        raise packing.interrupted(error) from error


async def live_workers(client: Client, queue: str) -> int:
    """Count the workers that seem to live and serve a queue. All whose ids begin alike serve the same queues: one is read."""
    found: dict[str, list[float]] = {}
    one: dict[str, str] = {}
    async for page in client.reads.pages(keys.WORKERS):
        for each in page:
            worker = keys.session_of(each.key)
            if worker is None:
                continue
            kind = keys.queues_hash_of(worker)
            found.setdefault(kind, []).append(each.modified)
            one[kind] = worker
    count = 0
    for kind, modified in found.items():
        try:
            held = await client.register.read(Session, keys.session(one[kind]))
        except UnreadableRecord:
            continue
        if held is not None and queue in held.record.queues:
            since = client.clock.now() - held.record.ttl
            count += sum(each >= since for each in modified)
    return count


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
            body = await self._home.client.values.of(task, "result")
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
    task = client.values.with_error(task)
    state = await _state_of(client, task, of)
    stored = {each.index: each for each in state.failed}
    items: list[msgspec.Raw] = []
    if stored or task.state in TERMINAL:
        items = decode_stored(_items, await client.values.of(task, "args"), f"the items of {_pack(task, of)}", AGAIN).items
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
            body = await client.values.of(task, "checkpoint")
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
