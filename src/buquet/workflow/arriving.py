"""Signals that were sent and are not recorded in their runs yet: a wait's timer asks for them before it takes effect."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import UnreadableRecord
from buquet.records import Task
from buquet.workflow.events import SIGNAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.store.register import Register

AT_ONCE = 32
"""Tasks read side by side."""


class Arriving:
    """Finds the tasks that carry signals. All timers share its LISTs, and each signal's task is read once."""

    def __init__(self, register: Register, now: Callable[[], int]) -> None:
        self.register = register
        self.now = now
        self._lanes: dict[str, tuple[int, dict[str, str]]] = {}
        """Of each queue: when it was last listed, and the run that each signal there is for."""
        self._listing = asyncio.Lock()

    async def of(self, queue: str, run_id: str, until: int) -> list[str]:
        """Return the tasks that carry signals to a run, all that were sent before `until`, which is past."""
        async with self._listing:
            listed, runs = self._lanes.get(queue, (0, {}))
            if listed <= until:
                listed, runs = self._lanes[queue] = (self.now(), await self._list(queue, runs))
        return [task for task, run in runs.items() if run == run_id]

    async def _list(self, queue: str, known: dict[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        async for page in self.register.reads.pages(keys.ready_lane(queue, 0)):
            entries = (keys.parse_entry(each.key) for each in page)
            tasks = [entry.task for entry in entries if entry is not None and entry.name == SIGNAL]
            found.update((task, known[task]) for task in tasks if known.get(task))
            unknown = [task for task in tasks if task not in found]
            for start in range(0, len(unknown), AT_ONCE):
                part = unknown[start : start + AT_ONCE]
                found.update(zip(part, await asyncio.gather(*map(self._run_of, part)), strict=True))
        return found

    async def _run_of(self, task_id: str) -> str:
        try:
            held = await self.register.read(Task, keys.task(task_id))
        except UnreadableRecord:
            return ""  # its carrier reports it; no timer waits until somebody has repaired it
        return held.record.run if held is not None else ""
