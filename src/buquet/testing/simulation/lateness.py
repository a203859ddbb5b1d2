"""How late work starts, as an invariant of its own: a worker with a free slot begins what is due within a bound.

The bound counts from when all of this holds: the task is pending and due, the store answers every request, and one worker that
serves the queue is up, at ease, and not paused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet.testing.simulation.world import Node, World

PROMPT = 20.0
"""Seconds for a task that was rung for, or whose due time is known: two waits of 7.5 s before a request is sent again."""
AT_LAST = 60.0
"""Seconds for any other task: the next look back finds it."""
SETTLED = 90.0
"""Seconds after a jump of a clock until cursors are where they should be."""


class Lateness:
    """Looks at the world now and then, and tells the auditor of every task that starts too late."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.prompt: set[str] = set()
        """Tasks that were submitted in good weather, so that the ring was heard."""
        self.held: set[str] = set()
        """Names of processes and of queues that somebody paused."""
        self.jumped = -SETTLED
        """When a clock last jumped."""
        self._clear = 0.0
        """Since when the store answers every request."""
        self._pending: dict[str, tuple[int, float]] = {}
        """The rev of each pending task, and since when it has that."""
        self._free: dict[tuple[str, str], float] = {}
        """Since when a process could take a task of a queue."""

    def look(self) -> None:
        """Judge how long every task has waited by now."""
        now, weather = self.world.loop.elapsed, self.world.network.weather
        if weather.faults or weather.slow or weather.lag or now < max(weather.away, weather.spell_until):
            self._clear = now
        able = {(node.name, queue) for node in self.world.nodes for queue in ("default", "side") if self._able(node, queue)}
        self._free = {pair: self._free.get(pair, now) for pair in sorted(able)}
        pending = {task_id: task for task_id, task in self.world.watch.tasks.items() if task["state"] == "pending"}
        self._pending = {
            task_id: known
            if (known := self._pending.get(task_id)) and known[0] == task.get("rev", 0)
            else (task.get("rev", 0), now)
            for task_id, task in pending.items()
        }
        for task_id, task in pending.items():
            lane = str(task["entry"]).split("/")
            if lane[0] == "ready" and lane[2] != "5":
                continue  # a priority that workers have to learn of
            bound = PROMPT if task_id in self.prompt else AT_LAST
            due = now - (self.world.bucket.clock.now() - due_ms(task) / 1000)
            free = min((since for (_, queue), since in self._free.items() if queue == lane[1]), default=now)
            begun = max(self._pending[task_id][1], due, self._clear, free, self.jumped + SETTLED)
            if now - begun > bound:
                self.world.watch.say(f"late: {task['name']} {task_id} is not begun {bound:g} s after it could be")
                self.prompt.discard(task_id)

    def _able(self, node: Node, queue: str) -> bool:
        worker = node.worker_here
        if worker is None or node.process.state != "up" or node.leaving or not worker.free or queue not in worker.queues:
            return False
        return node.holds_its_session() and not {node.name, queue} & self.held


def due_ms(task: dict[str, object]) -> int:
    """Return when a task's time comes, in milliseconds: one that ran too early, by a wrong clock, is met again only then."""
    lane, _, name = str(task.get("entry", "")).rpartition("/")
    return max(int(str(task.get("due", 0))), int(name[:13]) if lane.startswith("later/") else 0)
