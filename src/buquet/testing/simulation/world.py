"""One simulated world: a bucket, a network, processes that run the real queue and worker, and the live auditor."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from buquet.app import App
from buquet.clock import Clock
from buquet.errors import StoreFull, StoreUnavailable
from buquet.queue.background import Background
from buquet.queue.client import Client
from buquet.testing.simulation.live_auditor import LiveAuditor
from buquet.testing.simulation.network import GroupingWire, Network, SimulatedBucket, Wire
from buquet.testing.virtual import Process, VirtualClock, VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from buquet.queue.attempt import Attempt
    from buquet.worker.worker import Worker

KEPT_LINES = 60
"""The trace's last lines are kept to be shown with a finding."""
ROUNDS = 50
"""How often unfinished coroutines are cancelled at the end: each time they may start one more operation."""
DEFECT = "a defect of buquet"


class InlineThreads:
    """Replaces the worker's threads: a plain function runs on the loop, some time after the call."""

    inline = False

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._call(function))

    async def _call(self, function: Callable[[], Any]) -> Any:
        await self.clock.sleep(0.2 * self.clock.random.random())
        result = function()
        await self.clock.sleep(0.5 * self.clock.random.random())
        return result

    def close(self) -> None:
        pass  # there are no threads


class Machine(App):
    """A simulated process: an App with its own connection to the bucket and its own clock."""

    def __init__(self, world: World, name: str, skew: float) -> None:
        self.world = world
        self.name = name
        self.process = Process(world.loop, name)
        seed = f"{world.seed}/{name}".encode()
        self.own_clock = VirtualClock(world.loop, seed, skew, base=world.random.random() * 1e6)
        wire = (GroupingWire if world.bucket.grouping else Wire)(world.network, name, self._sent)
        super().__init__(store=wire, clock=self.own_clock)
        self.background = Background(world.loop)
        self.own_worker: Worker | None = None
        self.stopping = False
        """Whether the worker was asked to stop."""
        self.order: Any = None
        """The workflow, in seeds with runs."""
        self._own_client = Client(wire, self.clock, self.background, patience=60)
        self._countdown = 0
        self._then: Callable[[], None] = lambda: None
        world.machines.append(self)

    @property
    def client(self) -> Client:
        """The client, without the thread and the exit handler of a real App's."""
        return self._own_client

    @property
    def alive(self) -> bool:
        return self.process.state != "dead"

    def _sent(self) -> None:
        if self._countdown:
            self._countdown -= 1
            if not self._countdown:
                self._then()

    def after_requests(self, count: int, then: Callable[[], None]) -> None:
        """Call `then` right after the process has sent `count` more requests."""
        self._countdown, self._then = count, then

    def work(self, **options: Any) -> None:
        worker = self.own_worker = self.worker(heartbeat_thread=False, **options)
        worker.executor.threads = InlineThreads(self.clock)  # type: ignore[assignment]
        self.process.spawn(self._run_worker(worker))

    async def _run_worker(self, worker: Worker) -> None:
        try:
            await worker.arun()
        except (StoreFull, StoreUnavailable) as error:
            if worker.keeper.stored is not None:  # a worker that cannot start may raise
                self.world.auditor.report(f"the worker of {self.name} ended with {error}")
        except Exception as error:  # noqa: BLE001 - a worker must survive everything
            self.world.auditor.report(f"the worker of {self.name} ended with {type(error).__name__}: {error}")
        self.world.note(self.name, "the worker has ended")
        self.process.kill()

    @contextmanager
    def at_work(self, attempt: Attempt) -> Generator[None]:
        """Note that an attempt runs. Report an I9 finding if another one does whose worker has not been reaped."""
        at_work, working, task = self.world.at_work, self.world.auditor.working, attempt.id
        worker = self.own_worker
        assert worker is not None
        claims = {token for token, run in worker.running.items() if run.attempt is attempt}
        other = at_work.get(task)
        if other is not None and other.holds_its_session() and self.holds_its_session():
            self.world.auditor.report(f"I9: {self.name} and {other.name} both run {task}, and both sessions are alive")
        at_work[task] = self
        working |= claims
        try:
            yield
        finally:
            working -= claims
            if at_work.get(task) is self:
                del at_work[task]

    def holds_its_session(self) -> bool:
        """Tell whether the worker is alive, also by its stored session."""
        if not self.alive or self.own_worker is None or self.own_worker.keeper.lost:
            return False
        session = self.world.auditor.sessions.get(self.own_worker.id)
        return session is not None and not session.get("reaped")

    def stop_worker(self) -> None:
        """Ask the worker to stop, as SIGTERM does."""
        if self.own_worker is not None:
            self.stopping = True
            self.world.note(self.name, "is asked to stop")
            self.own_worker.stop()

    def crash(self) -> None:
        if self.alive:
            self.world.note(self.name, "CRASHES")
            self.process.kill()

    def stall(self, seconds: float) -> None:
        if self.process.state == "up":
            self.world.note(self.name, f"STALLS for {seconds:.1f} s")
            self.process.stall()
            self.world.network.at(seconds, self.wake)

    def wake(self) -> None:
        if self.process.state == "stalled":
            self.world.note(self.name, "WAKES")
            self.process.wake()


class World:
    """The world of one seed. With `keep`, `lines` holds the whole trace."""

    def __init__(self, seed: int, *, keep: bool = False) -> None:
        self.seed = seed
        self.clock = Clock(f"world {seed}".encode())
        self.random = self.clock.random
        self.loop = VirtualLoop()
        self.auditor = LiveAuditor()
        self.machines: list[Machine] = []
        self.hash = hashlib.blake2b(digest_size=8)
        self.lines: deque[str] = deque(maxlen=None if keep else KEPT_LINES)
        self.lines_noted = 0
        store_clock = VirtualClock(self.loop, b"store", 0.0, 0.0)
        random = self.random
        self.bucket = SimulatedBucket(
            store_clock,
            versioned=random.random() < 0.5,
            can_wait=random.random() < 0.7,
            grouping=random.random() < 0.3,
            whole_seconds=random.random() < 0.5,
        )
        self.network = Network(self.loop, self.bucket, Clock(f"network {seed}".encode()))
        self.network.trace = self.note
        self.bucket.landed = self.auditor.landed
        self.loop.set_exception_handler(self._unhandled)
        self.ending = False
        self.ttl = 6.0
        """The workers' time-to-live, seconds. A stall may last up to four times as long."""
        self.cruel = False
        """Whether the task `poison` kills its process."""
        self.killed: dict[str, int] = {}
        """How many processes each `poison` task has killed."""
        self.at_work: dict[str, Machine] = {}
        """The process in which an attempt of a task runs."""
        self.ran: set[str] = set()
        """Tasks of runs whose handlers have completed, in any process."""

    def note(self, who: str, what: str) -> None:
        line = f"{self.loop.elapsed:10.3f} {who:8} {what}"
        self.hash.update(line.encode())
        self.lines.append(line)
        self.lines_noted += 1

    def _unhandled(self, _loop: Any, context: dict[str, Any]) -> None:
        if not self.ending:
            self.auditor.report(f"nobody handled: {context.get('message')}: {context.get('exception')!r}")

    def close(self) -> None:
        """Close all unfinished coroutines, and cut their connections to the bucket."""
        self.ending = self.network.over = True
        for machine in self.machines:
            machine.process.close()
        for _ in range(ROUNDS):
            unfinished = asyncio.all_tasks(self.loop)
            if not unfinished:
                break
            for task in unfinished:
                task.cancel()
            self.loop.call_soon(self.loop.run_out)
            self.loop.run_forever()
        self.loop.close()


class Defects(logging.Handler):
    """A log handler that makes a finding of every line in which the code reports a defect."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if DEFECT in text and not self.world.ending:
            cause = record.exc_info[1] if record.exc_info else None
            self.world.auditor.report(f"{text}: {cause!r}")
