"""Schedules: what fires when, and what came of it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.errors import UsageError
from buquet.insights.fleet import workers
from buquet.insights.scan import AT_ONCE, Scan
from buquet.queue.schedules import rule_in
from buquet.records import Schedule
from buquet.workflow.events import START

if TYPE_CHECKING:
    from buquet.queue.client import Client
    from buquet.store.base import Listed

AHEAD = 3
"""Fires to come that are shown."""


class ScheduleView(msgspec.Struct, kw_only=True):
    """A schedule as its record says. Times are milliseconds since 1970, 0 for none."""

    name: str
    rule: str
    """The cron expression, or `every N s`."""
    tz: str
    task: str
    """The name of the task, or of the workflow."""
    queue: str
    catch_up: str
    paused: bool
    next: list[int]
    """The next few fires; none while it is paused."""
    last: int
    """The last fire that was submitted."""
    last_task: str
    """The id of its task."""
    dropped: int
    """Missed fires that were not caught up, in all."""
    keepers: int
    """Live workers that keep it."""
    workflow: bool = False
    """Whether each fire starts a run; `last_task` is its id, too."""
    problem: str = ""
    """Why its rule is not understood here."""


async def list_schedules(client: Client, scan: Scan | None = None) -> list[ScheduleView]:
    """Return all schedules by name. Records that cannot be read are named in `scan.unreadable`."""
    scan = scan or Scan(client)
    listed: list[Listed] = [each async for page in client.reads.pages(keys.SCHEDULES) for each in page]
    found: list[Schedule] = []
    for start in range(0, len(listed), AT_ONCE):
        found += [record for _, record in await scan.many(Schedule, listed[start : start + AT_ONCE])]
    if not found:
        return []
    now = int(await client.store_now() * 1000)
    kept = [name for worker in await workers(client, scan) if worker.alive for name in worker.schedules]
    return [view_of(schedule, now, kept.count(schedule.name)) for schedule in sorted(found, key=lambda each: each.name)]


def view_of(schedule: Schedule, now: int, keepers: int) -> ScheduleView:
    """Return a schedule as it is shown at `now` (milliseconds), with the number of live workers that keep it."""
    starts = schedule.template.name == START
    ahead: list[int] = []
    problem = ""
    try:
        rule = rule_in(schedule)
        shown = str(rule)
        if not schedule.paused:
            ahead = list(islice(rule.after(max(now, schedule.handled)), AHEAD))
    except UsageError as error:
        shown, problem = schedule.cron, str(error)
    return ScheduleView(
        name=schedule.name,
        rule=shown,
        tz=schedule.tz,
        task=schedule.template.step if starts else schedule.template.name,
        workflow=starts,
        queue=schedule.template.queue,
        catch_up=schedule.catch_up,
        paused=schedule.paused,
        next=ahead,
        last=schedule.last,
        last_task=schedule.last_task,
        dropped=schedule.dropped,
        keepers=keepers,
        problem=problem,
    )
