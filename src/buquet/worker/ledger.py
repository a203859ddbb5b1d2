"""What is known of the items of a pack: the row of those to run, results, failures; and how that is stored."""

from __future__ import annotations

import threading
from collections import deque
from heapq import heappush
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from buquet.errors import InvalidPayload, InvalidResult
from buquet.printing import counted
from buquet.queue.packing import read_state
from buquet.queue.payloads import LARGEST
from buquet.records import ErrorInfo, ItemFailure, PackItems, PackState, Task

if TYPE_CHECKING:
    from buquet.queue.payloads import Values

TRACES = 10
"""Failed items of a pack whose traceback is kept."""
LONGEST_TRACE = 4000
LONGEST_MESSAGE = 500
ROOM = LARGEST - (8 << 20)
"""The most bytes of a pack's results: failures must find room beside them."""

_items = msgspec.json.Decoder(PackItems)
_encoder = msgspec.json.Encoder()


class Ledger:
    """One claim's account of a pack. Results may be entered from several threads, all else from the event loop's."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.items: list[Raw] = []
        self.ready: deque[int] = deque()
        """The items to run now."""
        self.later: list[tuple[int, int]] = []
        """A heap of when, milliseconds since 1970, which item comes back."""
        self.tries: dict[int, int] = {}
        """Failures so far of the items that are not settled."""
        self.results: list[bytes | Raw | None] = []
        self.failed: dict[int, ItemFailure] = {}
        self.done = 0
        self.bytes = 0
        self.version = 0
        """Rises with every change that is worth a checkpoint."""
        self.traces_left = TRACES
        self.lock = threading.Lock()

    @property
    def settled(self) -> int:
        """How many items have their outcome."""
        return self.done + len(self.failed)

    @property
    def left(self) -> int:
        """How many items have none."""
        return len(self.items) - self.done - len(self.failed)

    async def load(self, values: Values) -> None:
        """Read the items and the last checkpoint. Raises InvalidPayload, UnreadableRecord, EncryptionKeyMissing."""
        task = self.task
        args = await values.args(task)
        body = await values.checkpoint(task)
        try:
            self.items = _items.decode(args).items
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidPayload(f"task {task.id} is no pack as buquet makes them ({error}). Submit the batch anew") from None
        if len(self.items) != task.pack:
            msg = f"task {task.id} should hold {counted(task.pack, 'item')} and holds {len(self.items)}. Submit the batch anew"
            raise InvalidPayload(msg)
        self._restore(read_state(task, body))

    def _restore(self, state: PackState) -> None:
        self.results = [None] * len(self.items)
        places = (at for start, end in state.done for at in range(start, end))
        for at, result in zip(places, state.results, strict=True):
            self.results[at] = result
            self.done += 1
            self.bytes += len(bytes(result)) + 1
        again = state.started != self.task.started
        if not again:
            for each in state.failed:
                self.failed[each.index] = each
                self.traces_left -= bool(each.traceback)
            for index, failures, due in state.waiting:
                if failures:
                    self.tries[index] = failures
                if due:
                    heappush(self.later, (due, index))
        waiting = {index for _, index in self.later}
        self.ready.extend(
            at for at, result in enumerate(self.results) if result is None and at not in self.failed and at not in waiting
        )

    def enter(self, index: int, body: bytes) -> None:
        """Enter a result, the lock being held. Raises InvalidResult when the pack's results grow too large."""
        if self.bytes + len(body) > ROOM:
            msg = (
                f"the result of item {index} has {len(body):,} bytes as JSON, and those of its pack would have over {ROOM:,}. "
                "Use smaller packs, or store it in an object of yours and return its key"
            )
            raise InvalidResult(msg)
        self.results[index] = body
        self.bytes += len(body) + 1
        self.done += 1
        self.version += 1

    def fail(self, index: int, info: ErrorInfo, attempts: int) -> None:
        """Enter a failure for good."""
        self.traces_left -= bool(info.traceback)
        self.failed[index] = ItemFailure(
            index=index,
            type=info.type[:200],
            message=info.message[:LONGEST_MESSAGE],
            traceback=info.traceback[-LONGEST_TRACE:],
            attempts=attempts,
        )
        self.tries.pop(index, None)
        self.version += 1

    def snapshot(self) -> tuple[int, bytes]:
        """Return the checkpoint as JSON, and the version that it is of."""
        with self.lock:
            version, results = self.version, [*self.results]
        done: list[tuple[int, int]] = []
        start = -1
        for at, result in enumerate([*results, None]):
            if result is not None and start < 0:
                start = at
            elif result is None and start >= 0:
                done.append((start, at))
                start = -1
        due = {index: at for at, index in self.later}
        waiting = [(index, self.tries.get(index, 0), due.get(index, 0)) for index in {**self.tries, **due}]
        state = PackState(
            started=self.task.started,
            done=done,
            results=[result if isinstance(result, Raw) else Raw(result) for result in results if result is not None],
            failed=[*self.failed.values()],
            waiting=waiting,
        )
        return version, _encoder.encode(state)

    def result(self) -> bytes:
        """Return the results as JSON, once all are there."""
        return b'{"results":[' + b",".join(bytes(result) for result in self.results if result is not None) + b"]}"
