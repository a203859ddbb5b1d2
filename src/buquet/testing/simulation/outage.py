"""The store refuses one kind of request just when a worker looks for work: at a look at everything, a look back, or a hint.

It comes after the calm, when everything is done and workers are idle. The lateness invariant finds what is late then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from buquet.testing.simulation.scenario import Play
    from buquet.testing.simulation.world import Node

READS = (
    ("get", "bell/"),
    ("get", "queues/"),
    ("get", "control/"),
    ("get", "tasks/"),
    ("list", "ready/"),
    ("list", "ready/default/5/"),
    ("list", "later/"),
    ("list", "workers/"),
)
"""What a worker asks for when it looks for work."""
LONGEST = 16.0
LONG_AGO = 700.0
"""Seconds after which a look back does not come by an entry any more."""


class Outage:
    """One outage of a play."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.world = play.world
        self.random = play.random
        self.lateness = play.lateness
        self.ids: list[str] = []

    async def run(self) -> None:
        """Let one kind of look meet refusals, and wait until what it was to find has begun."""
        acts: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            *(self.due, self.due, self.hint, self.unrung, self.reaped),
            *(self.queue_resumed, self.queue_resumed, self.worker_resumed, self.worker_resumed),
        )
        self.play.some("w")
        await self.random.choice(acts)()
        until = self.world.loop.elapsed + LONGEST + 70
        while self.waits() and self.world.loop.elapsed < until and not self.world.watch.found:
            await self.play.pause(1)
        await self.play.until_done("those who saw an outage")

    def waits(self) -> bool:
        """Tell whether something of this outage has not begun."""
        tasks = self.world.watch.tasks
        return any(task_id not in tasks or tasks[task_id]["state"] == "pending" for task_id in self.ids)

    def refuse(self, likely: tuple[str, str] | None = None) -> None:
        """Let one kind of request fail from now on, for some seconds; a likely one in half of all cases."""
        spell = likely if likely and self.random.random() < 0.5 else self.random.choice(READS)
        self.world.network.refuse(spell, self.random.uniform(2, LONGEST))

    def trap(self, op: str, prefix: str) -> None:
        """Let that begin now, or once a worker has sent a request."""
        if self.random.random() < 0.5:
            self.refuse((op, prefix))
        else:
            self.world.network.trap = (op, prefix, self.refuse)

    async def submit(self, node: Node, name: str, args: tuple[object, ...], delay: float = 0) -> None:
        """Submit a task, of which everybody hears."""
        handle = await node.tasks[name].options(delay=delay or None).asubmit(*args)
        self.world.watch.told_submitted(handle.id)
        self.lateness.prompt.add(handle.id)
        self.ids.append(handle.id)

    def caller(self) -> Node:
        """Start a process whose clock is nearly right."""
        return self.play.node("c", self.random.uniform(-1, 1))

    def some(self) -> None:
        """Submit a few tasks."""
        node = self.caller()
        for _ in range(self.random.randrange(1, 4)):
            self.play.callers.start(node, self.submit, "echo", (self.random.randrange(1000),))

    # ------------------------------------------------------------------ the looks

    async def due(self) -> None:
        """Let a task come due."""
        delay = self.random.uniform(2, 25)
        self.play.callers.start(self.caller(), self.submit, "echo", (1,), delay)
        await self.play.pause(delay - self.random.uniform(0, 1))
        self.refuse(("list", "later/"))

    async def hint(self) -> None:
        """Let workers hear of tasks."""
        self.refuse(("get", "bell/"))
        await self.play.pause(self.random.random())
        self.some()

    async def unrung(self) -> None:
        """Let a caller die before the bell rings, so that a look back must find its task."""
        node = self.caller()
        self.world.network.refuse(("write", "bell/"), 2)
        self.play.callers.start(node, self.submit, "echo", (1,))
        await self.play.pause(1)
        node.crash()
        self.lateness.prompt.difference_update(self.ids)
        self.trap("list", "ready/")

    async def reaped(self) -> None:
        """Take a worker that runs a task for dead."""
        self.play.callers.start(self.caller(), self.submit, "slow", (1, 30.0))
        await self.play.pause(8)
        self.trap("create", "workers/")
        self.play.callers.start(self.caller(), self.play.callers.reap)
        await self.play.pause(10)

    async def queue_resumed(self) -> None:
        """Pause and resume a queue, perhaps after so long that only a look at everything finds what waits."""
        node = self.caller()
        self.lateness.held.add("default")

        async def hold(node: Node) -> None:
            await node.apause_queue("default")

        self.play.callers.start(node, hold)
        await self.play.pause(8)
        self.some()
        await self.play.pause(self.random.choice((20.0, LONG_AGO)))

        async def resume(node: Node) -> None:
            await node.aresume_queue("default")
            self.lateness.held.discard("default")
            self.trap("get", "queues/")

        self.play.callers.start(node, resume)
        await self.play.pause(1)

    async def worker_resumed(self) -> None:
        """Pause and resume all workers in the same way."""
        node = self.caller()
        workers = [(each.name, each.worker_here.id) for each in self.play.those("w") if each.worker_here]
        self.lateness.held.update(name for name, _ in workers)

        async def hold(node: Node) -> None:
            for _, worker in workers:
                await node.apause_worker(worker)

        self.play.callers.start(node, hold)
        await self.play.pause(8)
        self.some()
        await self.play.pause(self.random.choice((20.0, LONG_AGO)))

        async def resume(node: Node) -> None:
            for name, worker in workers:
                await node.aresume_worker(worker)
                self.lateness.held.discard(name)
            self.trap("get", "control/")

        self.play.callers.start(node, resume)
        await self.play.pause(1)
