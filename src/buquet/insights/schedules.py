"""Schedules: when they fire, and what their fires submitted."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.errors import UsageError
from buquet.insights.fleet import workers
from buquet.insights.scan import Folder, Scan, is_json
from buquet.queue.schedules import rule_in
from buquet.records import Schedule
from buquet.workflow.events import START

if TYPE_CHECKING:
    from collections.abc import Iterable

    from buquet.insights.fleet import WorkerRow
    from buquet.queue.client import Client

AHEAD = 3
"""Future fires that are shown."""


class ScheduleView(msgspec.Struct, kw_only=True):
    """A schedule. Times are milliseconds since 1970, 0 for none."""

    name: str
    rule: str
    """The cron expression, or `every N s`."""
    tz: str
    task: str
    """The name of the task or workflow."""
    queue: str
    catch_up: str
    paused: bool
    next: list[int]
    """The next few fires; none while it is paused."""
    last: int
    """The last fire that was submitted."""
    last_task: str
    dropped: int
    """Missed fires that were not caught up, in total."""
    keepers: int
    """Live workers that declare it."""
    workflow: bool = False
    """Whether each fire starts a run; then `last_task` is also the run's id."""
    problem: str = ""
    """Why this version of buquet cannot read its rule."""


async def list_schedules(client: Client, scan: Scan | None = None) -> list[ScheduleView]:
    """Return all schedules by name. Records that cannot be read are named in `scan.unreadable`."""
    scan = scan or Scan(client)
    folder = Folder(client, keys.SCHEDULES, Schedule, is_json)
    await folder.look()
    scan.unreadable += folder.unreadable.values()
    if not folder.records:
        return []
    await scan.time.learn()
    return views_of(folder.records.values(), await workers(client, scan), scan.time.now_ms())


def views_of(schedules: Iterable[Schedule], crew: Iterable[WorkerRow], now: int) -> list[ScheduleView]:
    """Return the views of schedules at `now` (milliseconds), by name."""
    declared = Counter(name for worker in crew if worker.alive for name in worker.session.schedules)
    return [_view_of(schedule, now, declared[schedule.name]) for schedule in sorted(schedules, key=lambda record: record.name)]


def _view_of(schedule: Schedule, now: int, keepers: int) -> ScheduleView:
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
