"""The runs that the dashboard shows: read from the store, and steered through their handles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from buquet.errors import UsageError
from buquet.insights.runs import RunFilter, find, read
from buquet.insights.scan import Scan
from buquet.workflow.sending import send_signal

if TYPE_CHECKING:
    from buquet.app import App
    from buquet.insights.runview import RunView

MOST = 100
"""Runs in the list."""


class StoredRuns:
    """What the dashboard asks of workflows, see dashboard.runs.RunsPort."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def recent(self) -> list[RunView]:
        """Return the open runs and those that ended lately, the last changed first."""
        return await find(self.app.client, RunFilter(), MOST, Scan(self.app.client))

    async def run(self, run_id: str) -> RunView:
        """Return a run with its steps. Raises RunNotFound."""
        return await read(self.app.client, run_id)

    async def move(self, run_id: str, move: str) -> str:
        """Cancel, pause, resume or retry a run, and return what came of it. Raises Refused."""
        run = self.app.run(run_id)
        if move == "cancel":
            return await run.acancel()
        await {"pause": run.apause, "resume": run.aresume, "retry": run.aretry}[move]()
        return "requested"

    async def signal(self, run_id: str, name: str, value: str) -> None:
        """Send a signal with a value in JSON. Raises UsageError for what is no JSON, Refused."""
        try:
            msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            msg = f"the value of signal {name!r} is no JSON ({error}): a text needs quotes"
            raise UsageError(msg) from None
        # the page names the step that waits, since two may wait for one signal
        step = (await self.app.run(run_id).agraph()).steps.get(name)
        await send_signal(self.app.client, run_id, step.signal if step else name, value.encode(), None)
