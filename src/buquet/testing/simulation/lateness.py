"""How late tasks start, as an invariant: a worker with a free slot begins a due task within a bound.

The bound counts from when all of these hold: the task is pending and due, the store answers every request, and one worker that
serves the queue is up, has a free slot, and is not paused.

An `Outage` tries to make tasks late: the store refuses one kind of request just when an idle worker looks for work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from buquet.testing.simulation.play import Play
    from buquet.testing.simulation.world import Machine, World

    Call = Callable[[str], Coroutine[Any, Any, object]]

PROMPT_BOUND = 20.0
"""Seconds for a task that the bell announced, or whose due time is known: two waits of 7.5 s before a request is sent again."""
OTHER_BOUND = 60.0
"""Seconds for any other task: the next rescan finds it."""
SETTLED = 90.0
"""Seconds after a clock jumped until the cursors are right again."""
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
"""The requests by which a worker looks for work."""
LONGEST = 16.0
"""Seconds of an outage."""
LONG_AGO = 700.0
"""Seconds after which a rescan no longer reaches an entry."""


class Lateness:
    """Looks at the world every second, and reports each task that starts too late."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.prompt: set[str] = set()
        """Tasks that were submitted in good weather, so that workers saw the bell."""
        self.paused: set[str] = set()
        """Names of the processes and queues that are paused."""
        self.jumped = -SETTLED
        """When a clock last jumped."""
        self._store_well = 0.0
        """Since when the store answers every request."""
        self._pending: dict[str, tuple[int, float]] = {}
        """The rev of each pending task, and since when the task has had it."""
        self._free: dict[tuple[str, str], float] = {}
        """Since when a process could take a task of a queue."""

    def look(self) -> None:
        """Report the tasks that have waited too long."""
        now, weather = self.world.loop.elapsed, self.world.network.weather
        if weather.faults or weather.slow or weather.lag or now < max(weather.away, weather.refused_until):
            self._store_well = now
        able = {
            (machine.name, queue)
            for machine in self.world.machines
            for queue in ("default", "side")
            if self._able(machine, queue)
        }
        self._free = {pair: self._free.get(pair, now) for pair in sorted(able)}
        pending = {task_id: task for task_id, task in self.world.auditor.tasks.items() if task["state"] == "pending"}
        self._pending = {
            task_id: known
            if (known := self._pending.get(task_id)) and known[0] == task.get("rev", 0)
            else (task.get("rev", 0), now)
            for task_id, task in pending.items()
        }
        for task_id, task in pending.items():
            lane = str(task["entry"]).split("/")
            if lane[0] == "ready" and lane[2] != "5":
                continue  # workers must first learn of this priority
            bound = PROMPT_BOUND if task_id in self.prompt else OTHER_BOUND
            due = now - (self.world.bucket.clock.now() - due_ms(task) / 1000)
            free = min((since for (_, queue), since in self._free.items() if queue == lane[1]), default=now)
            begun = max(self._pending[task_id][1], due, self._store_well, free, self.jumped + SETTLED)
            if now - begun > bound:
                self.world.auditor.report(f"late: {task['name']} {task_id} is not begun {bound:g} s after it could be")
                self.prompt.discard(task_id)

    def _able(self, machine: Machine, queue: str) -> bool:
        worker = machine.own_worker
        if worker is None or machine.process.state != "up" or machine.stopping or not worker.free or queue not in worker.queues:
            return False
        return machine.holds_its_session() and not {machine.name, queue} & self.paused


def due_ms(task: dict[str, object]) -> int:
    """Return when a task is due, in milliseconds: if a wrong clock released the task too early, at its entry's time."""
    lane, _, name = str(task.get("entry", "")).rpartition("/")
    return max(int(str(task.get("due", 0))), int(name[:13]) if lane.startswith("later/") else 0)


class Outage:
    """The act in which the store refuses one kind of request. It comes after the calm, when workers are idle."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.world = play.world
        self.random = play.random
        self.lateness = play.lateness
        self.ids: list[str] = []

    async def run(self) -> None:
        """Refuse requests during one kind of look for work, and wait until all tasks have begun."""
        acts: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            *(self.due, self.due, self.hint, self.unrung, self.reaped),
            *(self.queue_resumed, self.queue_resumed, self.worker_resumed, self.worker_resumed),
        )
        self.play.some("w")
        await self.random.choice(acts)()
        until = self.world.loop.elapsed + LONGEST + 70
        while self.waiting() and self.world.loop.elapsed < until and not self.world.auditor.findings:
            await self.play.pause(1)
        await self.play.until_done("the workers of an outage")

    def waiting(self) -> bool:
        tasks = self.world.auditor.tasks
        return any(task_id not in tasks or tasks[task_id]["state"] == "pending" for task_id in self.ids)

    def refuse(self, likely: tuple[str, str] | None = None) -> None:
        """Refuse one kind of request for some seconds: `likely` in half of all cases, else any read."""
        which = likely if likely and self.random.random() < 0.5 else self.random.choice(READS)
        self.world.network.refuse(which, self.random.uniform(2, LONGEST))

    def trap(self, op: str, prefix: str) -> None:
        """Start to refuse requests now, or once a worker has sent a certain request."""
        if self.random.random() < 0.5:
            self.refuse((op, prefix))
        else:
            self.world.network.trap = (op, prefix, self.refuse)

    async def submit(self, machine: Machine, name: str, args: tuple[object, ...], delay: float = 0) -> None:
        handle = await machine.tasks[name].options(delay=delay or None).asubmit(*args)
        self.world.auditor.told_submitted(handle.id)
        self.lateness.prompt.add(handle.id)
        self.ids.append(handle.id)

    def caller(self) -> Machine:
        """Start a caller whose clock is nearly right."""
        return self.play.machine("c", self.random.uniform(-1, 1))

    def some(self) -> None:
        machine = self.caller()
        for _ in range(self.random.randrange(1, 4)):
            self.play.callers.start(machine, self.submit, "echo", (self.random.randrange(1000),))

    # ------------------------------------------------------------------ the looks

    async def due(self) -> None:
        delay = self.random.uniform(2, 25)
        self.play.callers.start(self.caller(), self.submit, "echo", (1,), delay)
        await self.play.pause(delay - self.random.uniform(0, 1))
        self.refuse(("list", "later/"))

    async def hint(self) -> None:
        self.refuse(("get", "bell/"))
        await self.play.pause(self.random.random())
        self.some()

    async def unrung(self) -> None:
        """Let a caller die before it rings the bell, so that a rescan must find its task."""
        machine = self.caller()
        self.world.network.refuse(("write", "bell/"), 2)
        self.play.callers.start(machine, self.submit, "echo", (1,))
        await self.play.pause(1)
        machine.crash()
        self.lateness.prompt.difference_update(self.ids)
        self.trap("list", "ready/")

    async def reaped(self) -> None:
        self.play.callers.start(self.caller(), self.submit, "slow", (1, 30.0))
        await self.play.pause(8)
        self.trap("create", "workers/")
        self.play.callers.start(self.caller(), self.play.callers.reap)
        await self.play.pause(10)

    async def queue_resumed(self) -> None:
        """Pause a queue and resume it, perhaps so late that only a full rescan finds its tasks."""
        machine = self.caller()
        await self._resumed(machine, {"default": "default"}, machine.apause_queue, machine.aresume_queue, "queues/")

    async def worker_resumed(self) -> None:
        """Pause and resume all workers in the same way."""
        machine = self.caller()
        workers = {worker.name: worker.own_worker.id for worker in self.play.living("w") if worker.own_worker}
        await self._resumed(machine, workers, machine.apause_worker, machine.aresume_worker, "control/")

    async def _resumed(self, machine: Machine, ids: dict[str, str], pause: Call, resume: Call, prefix: str) -> None:
        """Pause queues or workers, submit tasks, and resume. `ids` are by the names that Lateness knows."""
        self.lateness.paused.update(ids)

        async def pause_all(_node: Machine) -> None:
            for one in ids.values():
                await pause(one)

        async def resume_all(_node: Machine) -> None:
            for name, one in ids.items():
                await resume(one)
                self.lateness.paused.discard(name)
            self.trap("get", prefix)

        self.play.callers.start(machine, pause_all)
        await self.play.pause(8)
        self.some()
        await self.play.pause(self.random.choice((20.0, LONG_AGO)))
        self.play.callers.start(machine, resume_all)
        await self.play.pause(1)
