"""One simulated world: a bucket, a network, processes with the real queue and worker in them, and the auditor that watches."""

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
from buquet.testing.simulation.wire import Bucket, GroupingWire, Network, Wire
from buquet.testing.virtual import Process, VirtualClock, VirtualLoop
from buquet.testing.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from buquet.queue.attempt import Attempt
    from buquet.worker.worker import Worker

KEPT_LINES = 60
"""Lines of the trace that are kept to be shown with a finding, unless all are wanted."""
ROUNDS = 50
"""How often what was dropped is cancelled at the end; each time it may ask for one thing more before it gives in."""
DEFECT = "a defect of buquet"


class InlineThreads:
    """Stands in for the worker's threads: a plain function runs on the loop, some time after it was handed over."""

    inline = False

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call a function later, and answer still later."""
        return asyncio.ensure_future(self._call(function))

    async def _call(self, function: Callable[[], Any]) -> Any:
        await self.clock.sleep(0.2 * self.clock.random.random())
        result = function()
        await self.clock.sleep(0.5 * self.clock.random.random())
        return result

    def close(self) -> None:
        """Do nothing: there is no thread to end."""


class Node(App):
    """A process with an App of its own, over its own way to the bucket and with its own idea of the time."""

    def __init__(self, world: World, name: str, skew: float) -> None:
        self.world = world
        self.name = name
        self.process = Process(world.loop, name)
        seed = f"{world.seed}/{name}".encode()
        self.sim_clock = VirtualClock(world.loop, seed, skew, base=world.random.random() * 1e6)
        way = GroupingWire if world.bucket.grouping else Wire
        self.wire = way(world.network, name, self._sent)
        super().__init__(store=self.wire, clock=self.sim_clock)
        self.background = Background(world.loop)
        self.worker_here: Worker | None = None
        self.leaving = False
        """Whether its worker was asked to end."""
        self.order: Any = None
        """Its workflow, where there are runs."""
        self._way = Client(self.wire, self.clock, self.background, patience=60)
        self._countdown = 0
        self._then: Callable[[], None] = lambda: None
        world.nodes.append(self)

    @property
    def client(self) -> Client:
        """The way to the store; no thread and no exit handler goes with it."""
        return self._way

    @property
    def alive(self) -> bool:
        """Whether it runs, or is only stalled."""
        return self.process.state != "dead"

    def _sent(self) -> None:
        if self._countdown:
            self._countdown -= 1
            if not self._countdown:
                self._then()

    def after_requests(self, count: int, then: Callable[[], None]) -> None:
        """Do something just when the process has sent so many more requests."""
        self._countdown, self._then = count, then

    def work(self, **options: Any) -> None:
        """Start a worker in this process."""
        worker = self.worker_here = self.worker(heartbeat_thread=False, **options)
        worker.executor.threads = InlineThreads(self.clock)  # type: ignore[assignment]
        self.process.spawn(self._worked(worker))

    async def _worked(self, worker: Worker) -> None:
        try:
            await worker.arun()
        except (StoreFull, StoreUnavailable) as error:
            if worker.keeper.held is not None:  # at its very start a worker may say that it cannot be
                self.world.watch.say(f"the worker of {self.name} ended with {error}")
        except Exception as error:  # noqa: BLE001 - a worker must survive everything
            self.world.watch.say(f"the worker of {self.name} ended with {type(error).__name__}: {error}")
        self.world.tell(self.name, "the worker has ended")
        self.process.kill()

    @contextmanager
    def at_work(self, attempt: Attempt) -> Generator[None]:
        """Note that an attempt runs, and judge that no other does whose worker nobody has called dead."""
        at_work, working, task = self.world.at_work, self.world.watch.working, attempt.id
        worker = self.worker_here
        assert worker is not None
        claims = {token for token, run in worker.running.items() if run.attempt is attempt}
        other = at_work.get(task)
        if other is not None and other.holds_its_session() and self.holds_its_session():
            self.world.watch.say(f"I9: {self.name} and {other.name} both run {task}, and both sessions are alive")
        at_work[task] = self
        working |= claims
        try:
            yield
        finally:
            working -= claims
            if at_work.get(task) is self:
                del at_work[task]

    def holds_its_session(self) -> bool:
        """Tell whether its worker is alive, and so by its stored session."""
        if not self.alive or self.worker_here is None or self.worker_here.keeper.lost:
            return False
        session = self.world.watch.sessions.get(self.worker_here.id)
        return session is not None and not session.get("reaped")

    def stop_worker(self) -> None:
        """Ask its worker to end, as SIGTERM does."""
        if self.worker_here is not None:
            self.leaving = True
            self.world.tell(self.name, "is asked to stop")
            self.worker_here.stop()

    def crash(self) -> None:
        """Die here and now."""
        if self.alive:
            self.world.tell(self.name, "CRASHES")
            self.process.kill()

    def stall(self, seconds: float) -> None:
        """Stand still for a while."""
        if self.process.state == "up":
            self.world.tell(self.name, f"STALLS for {seconds:.1f} s")
            self.process.stall()
            self.world.network.at(seconds, self.wake)

    def wake(self) -> None:
        """Go on."""
        if self.process.state == "stalled":
            self.world.tell(self.name, "WAKES")
            self.process.wake()


class World:
    """Everything of one seed. `lines` are kept in full where `keep` is set."""

    def __init__(self, seed: int, *, keep: bool = False) -> None:
        self.seed = seed
        self.clock = Clock(f"world {seed}".encode())
        self.random = self.clock.random
        self.loop = VirtualLoop()
        self.watch = Watch()
        self.nodes: list[Node] = []
        self.hash = hashlib.blake2b(digest_size=8)
        self.lines: deque[str] = deque(maxlen=None if keep else KEPT_LINES)
        self.told = 0
        store_clock = VirtualClock(self.loop, b"store", 0.0, 0.0)
        random = self.random
        self.bucket = Bucket(
            store_clock,
            versioned=random.random() < 0.5,
            can_wait=random.random() < 0.7,
            grouping=random.random() < 0.3,
            whole_seconds=random.random() < 0.5,
        )
        self.network = Network(self.loop, self.bucket, Clock(f"network {seed}".encode()))
        self.network.trace = self.tell
        self.bucket.landed = self.watch.landed
        self.loop.set_exception_handler(self._unhandled)
        self.ending = False
        self.ttl = 6.0
        """The workers' time-to-live, seconds; stalls are a few of it."""
        self.cruel = False
        """Whether poison kills."""
        self.killed: dict[str, int] = {}
        """How many processes each poisonous task has killed."""
        self.at_work: dict[str, Node] = {}
        """Where an attempt of a task runs."""
        self.ran: set[str] = set()
        """Tasks of runs whose handlers came to their end, wherever."""

    def tell(self, who: str, what: str) -> None:
        """Add a line to the trace."""
        line = f"{self.loop.elapsed:10.3f} {who:8} {what}"
        self.hash.update(line.encode())
        self.lines.append(line)
        self.told += 1

    def _unhandled(self, _loop: Any, context: dict[str, Any]) -> None:
        if not self.ending:
            self.watch.say(f"nobody handled: {context.get('message')}: {context.get('exception')!r}")

    def close(self) -> None:
        """Close every coroutine that was dropped; nothing of it reaches the bucket any more."""
        self.ending = self.network.over = True
        for node in self.nodes:
            node.process.close()
        for _ in range(ROUNDS):
            left = asyncio.all_tasks(self.loop)
            if not left:
                break
            for task in left:
                task.cancel()
            self.loop.call_soon(self.loop.run_out)
            self.loop.run_forever()
        self.loop.close()


class Defects(logging.Handler):
    """Makes a finding of every line that the code itself calls a defect."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        """See logging."""
        text = record.getMessage()
        if DEFECT in text and not self.world.ending:
            cause = record.exc_info[1] if record.exc_info else None
            self.world.watch.say(f"{text}: {cause!r}")
