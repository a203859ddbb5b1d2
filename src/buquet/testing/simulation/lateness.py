"""How late tasks start, as an invariant: a worker with a free slot begins a due task within a bound.

The bound counts from when all of these hold: the task is pending and due, the store answers every request, and one worker that
serves the queue is up, has a free slot, and is not paused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet.testing.simulation.world import Machine, World

PROMPT_BOUND = 20.0
"""Seconds for a task that the bell announced, or whose due time is known: two waits of 7.5 s before a request is sent again."""
OTHER_BOUND = 60.0
"""Seconds for any other task: the next rescan finds it."""
SETTLED = 90.0
"""Seconds after a clock jumped until the cursors are right again."""


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
