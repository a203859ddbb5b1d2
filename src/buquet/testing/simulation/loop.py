"""Many processes on one loop in virtual time. Each can be stopped for a while, or for ever, between any two steps.

Which process a callback belongs to is told by a context variable, which asyncio hands on by itself to everything that a
coroutine starts. Nothing runs in a thread, and callbacks of the same moment run in the order in which they were asked for, so a
run depends on its random numbers alone.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Literal

from buquet.testing.virtual import VirtualClock, VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

BESIDE = Context()
"""The context of what belongs to no process: the network, and whoever directs the play."""

_process: ContextVar[Process | None] = ContextVar("buquet_process", default=None)


class Process:
    """One simulated process: a name, and whether its callbacks run."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.state: Literal["up", "stalled", "dead"] = "up"
        self.tasks: list[asyncio.Task[Any]] = []
        """What was started in it from outside."""
        self._deferred: list[Step | Timer] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a coroutine in this process."""
        context = copy_context()
        context.run(_process.set, self)
        task = self.loop.create_task(work, context=context)
        self.tasks.append(task)
        return task

    def stall(self) -> None:
        """Stop it, as SIGSTOP or a paused machine would: what it has sent goes on, it itself does not."""
        if self.state == "up":
            self.state = "stalled"

    def wake(self) -> None:
        """Let it go on, with everything that should have happened meanwhile at once."""
        if self.state == "stalled":
            self.state = "up"
            deferred, self._deferred = self._deferred, []
            for handle in deferred:
                self.loop.enqueue(handle)

    def kill(self) -> None:
        """Drop it where it stands."""
        self.state = "dead"

    def defer(self, handle: Step | Timer) -> None:
        """Keep what should run now until it wakes, or is buried."""
        self._deferred.append(handle)

    def bury(self) -> None:
        """At the very end: let its coroutines end, so that none is left half way. Their way to the store must be cut."""
        self.state = "stalled"
        self.wake()


class Step(asyncio.Handle):
    """A callback, its context, and its process."""

    __slots__ = ("call", "given", "inside", "process")

    def __init__(self, call: Callable[..., object], given: tuple[Any, ...], loop: SimLoop, inside: Context) -> None:
        super().__init__(call, given, loop, inside)
        self.call = call
        self.given = given
        self.inside = inside
        self.process = inside.get(_process)


class Timer(asyncio.TimerHandle):
    """The same, for later."""

    __slots__ = ("call", "given", "inside", "process")

    def __init__(self, when: float, call: Callable[..., object], given: tuple[Any, ...], loop: SimLoop, inside: Context) -> None:
        super().__init__(when, call, given, loop, inside)
        self.call = call
        self.given = given
        self.inside = inside
        self.process = inside.get(_process)


STILL = 100_000
"""Steps in which no time may pass; what goes round and round without waiting for anything takes more."""


class SimLoop(VirtualLoop):
    """A virtual loop whose callbacks belong to processes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self._moved = 0
        """The step at which the time moved on last."""
        self._soon: deque[Step | Timer] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._asked = 0

    # typeshed gives these looser types than asyncio needs; what is overridden is their scheduling

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        """See asyncio."""
        handle = Step(callback, args, self, copy_context() if context is None else context)
        self._soon.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """See asyncio. There are no threads here."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        return self.call_at(self.elapsed + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        handle = Timer(when, callback, args, self, copy_context() if context is None else context)
        self._asked += 1
        heapq.heappush(self._timers, (when, self._asked, handle))
        return handle

    def enqueue(self, handle: Step | Timer) -> None:
        """Run a callback that was deferred."""
        self._soon.append(handle)

    def run_out(self) -> None:
        """Run until nothing is left that can run without time going on, then stop."""
        if self._soon:
            self.call_soon(self.run_out, context=BESIDE)
        else:
            self.stop()

    def _run_once(self) -> None:
        """Run one callback; when none can run, move the time on to the next timer."""
        while not self._soon:
            if not self._timers:
                raise RuntimeError("nothing is scheduled, and the simulation waits: it would wait for ever")
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                self.elapsed = max(self.elapsed, when)
                self._moved = self.steps
                self._soon.append(timer)
        handle = self._soon.popleft()
        if handle.cancelled():
            return
        process = handle.process
        if process is not None and process.state != "up":
            process.defer(handle)
            return
        self.steps += 1
        if self.steps - self._moved > STILL:
            raise RuntimeError(f"{STILL} steps and no time has passed, at {handle.call!r}: this would go on for ever")
        try:
            handle.inside.run(handle.call, *handle.given)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as asyncio does
            self.call_exception_handler({"message": f"in callback {handle.call!r}", "exception": error, "handle": handle})


class SimClock(VirtualClock):
    """The clock of one process. `skew` may be changed while it runs: the wall clock jumps then."""

    def __init__(self, loop: SimLoop, seed: bytes, skew: float, base: float) -> None:
        super().__init__(loop, 0, skew)
        self.random.seed(seed)
        self.base = base

    def monotonic(self) -> float:
        """Return the seconds of a clock that began at some time of its own."""
        return self.base + self.loop.elapsed
