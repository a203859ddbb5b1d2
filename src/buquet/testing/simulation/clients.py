"""What the simulated callers do: submit, wait, cancel, redrive, prune, repair; and what they are told is told to the auditor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buquet.errors import BuquetError, KeyConflict, Refused, StoreError, SubmitInterrupted, TaskError, TaskNotFound
from buquet.operate.fsck import fsck
from buquet.operate.prune import prune
from buquet.testing.simulation.workload import draw
from buquet.worker.fleet import Reaper

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from buquet.queue.handle import Handle
    from buquet.testing.simulation.world import Node, World

ENDS = {"failed", "cancelled", "expired"}


class Callers:
    """Everything that callers can ask for, each in the process of a node."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.watch = world.watch
        self.random = world.random
        self.keyed: list[tuple[str, str, tuple[Any, ...]]] = []

    def start(self, node: Node, call: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Start a call in a process; only an answer that a caller may get is in order."""
        node.process.spawn(self._guarded(node, call, args))

    async def _guarded(self, node: Node, call: Callable[..., Coroutine[Any, Any, None]], args: tuple[Any, ...]) -> None:
        try:
            await call(node, *args)
        except (StoreError, TaskError, TaskNotFound, Refused, KeyConflict, SubmitInterrupted, TimeoutError):
            pass
        except BuquetError as error:
            self.watch.say(f"{node.name} got {type(error).__name__}: {error}")

    # ------------------------------------------------------------------ submits

    async def submit(self, node: Node, wait: bool = False) -> None:
        """Submit a task drawn at random, and perhaps wait for what comes of it."""
        random = self.random
        name, args = draw(node)
        options: dict[str, Any] = {}
        if random.random() < 0.3:
            key = f"k{random.randrange(4)}"
            options["key"] = key
            for known, its_name, its_args in self.keyed:
                if known == key and random.random() < 0.9:
                    name, args = its_name, its_args
            self.keyed.append((key, name, args))
        if random.random() < 0.15:
            options["delay"] = round(random.random() * 20, 3)
        if random.random() < 0.2:
            options["priority"] = random.randrange(10)
        if random.random() < 0.1:
            options["expires"] = 1 + random.random() * 20
        handle = await node.tasks[name].options(**options).asubmit(*args)
        self.watch.told_submitted(handle.id)
        if wait:
            await self._wait(handle)

    async def _wait(self, handle: Handle[Any]) -> None:
        await handle.aresult(timeout=self.random.random() * 60)
        self.watch.told_ended(handle.id, "completed")

    async def many(self, node: Node) -> None:
        """Submit several at once."""
        calls = [(self.random.randrange(1000),) for _ in range(self.random.randrange(2, 9))]
        for handle in await node.tasks["echo"].asubmit_many(calls):
            self.watch.told_submitted(handle.id)

    async def batch(self, node: Node) -> None:
        """Submit a batch."""
        items = [self.random.randrange(40) for _ in range(self.random.randrange(1, 8))]
        batch = await node.tasks["item"].abatch(items, pack=3)
        for task in batch.task_ids:
            self.watch.told_submitted(task)

    async def probe(self, node: Node, ids: list[str]) -> None:
        """Submit a small task in good weather, and note its id."""
        handle = await node.tasks["echo"].asubmit(self.random.randrange(1000))
        self.watch.told_submitted(handle.id)
        ids.append(handle.id)

    # ------------------------------------------------------------------ the rest

    def some_task(self, states: set[str] | None = None) -> str | None:
        """Return the id of some task that is in one of these states."""
        there = [
            task for task, now in self.watch.tasks.items() if (states is None or now["state"] in states) and not now.get("run")
        ]
        return self.random.choice(there) if there else None

    async def cancel(self, node: Node) -> None:
        """Cancel some task."""
        task = self.some_task({"pending", "running"} if self.random.random() < 0.9 else None)
        if task is not None:
            self.watch.requested.add(task)
            if await node.acancel(task) == "cancelled":
                self.watch.told_ended(task, "cancelled")

    async def redrive(self, node: Node) -> None:
        """Redrive some task."""
        task = self.some_task(ENDS if self.random.random() < 0.9 else None)
        if task is not None:
            self.watch.release(task)
            await node.aredrive(task)

    async def waver(self, node: Node) -> None:
        """Cancel a task that runs, redrive it, and cancel another: the worker meets its old note again beside the new one."""
        task = self.some_task({"running"})
        if task is None:
            return
        self.watch.requested.add(task)
        await node.acancel(task)
        await node.clock.sleep(self.random.random() * 6)
        self.watch.release(task)
        await node.aredrive(task)
        await node.clock.sleep(self.random.random() * 3)
        await self.cancel(node)

    async def prune(self, node: Node) -> None:
        """Prune what ended an hour ago."""
        await prune(node.client, 3600)

    async def reap(self, node: Node) -> None:
        """Take a worker for dead that may well live, as a parent does that has lost sight of it: any session may be reaped."""
        sessions = self.watch.sessions
        there = sorted(worker for worker, session in sessions.items() if session.get("claims")) or sorted(sessions)
        if there:
            worker = self.random.choice(there)
            beat = sessions[worker]["beat"]
            for _ in range(100):  # right after one: it is long until it hears of it. A dead one has no other
                if sessions.get(worker, {}).get("beat") != beat:
                    break
                await node.clock.sleep(0.03)
            await Reaper(node.client.register, node.client.clock, node.client.added, lambda _: None).reap(worker)

    async def mend(self, node: Node) -> None:
        """Let fsck mend what it finds, and find nothing afterwards but payloads, which prune removes."""
        await fsck(node.client, repair=True)
        for each in (await fsck(node.client)).findings:
            if each.kind != "orphaned payload":
                self.watch.say(f"fsck: {each.kind} after a repair: {each.key}: {each.detail}")

    async def fsck(self, node: Node) -> None:
        """Check the bucket while others work on it: it must find nothing, and break nothing."""
        report = await fsck(node.client, repair=self.random.random() < 0.5)
        wrong = [each for each in report.findings if each.kind.endswith("missing") or each.kind == "unreadable record"]
        for each in wrong:
            if each.key.startswith("runs/"):
                continue  # the entry of a run that is opened again follows its record, by whoever carries the retry
            self.watch.say(f"fsck: {each.kind}: {each.key}: {each.detail}")
