"""Commands about schedules: `buquet schedule …`."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from typer import Argument

from buquet.app import App
from buquet.cli.apps import command
from buquet.cli.output import act_on, moment, print_json, print_table, print_unreadable
from buquet.cli.parameters import RUNS, cli
from buquet.insights.scan import Scan
from buquet.insights.schedules import list_schedules

group = typer.Typer(name="schedule", help="List, trigger, pause and resume schedules.", no_args_is_help=True)
cli.add_typer(group, rich_help_panel=RUNS)

Names = Annotated[list[str], Argument(metavar="NAME…", help="Names of schedules.")]


@command(group)
async def ls(app: App, json: bool) -> None:
    """List the schedules: their rules, next and last fires."""
    scan = Scan(app.client)
    schedules = await list_schedules(app.client, scan)
    print_unreadable(scan.unreadable)
    if json:
        print_json(msgspec.to_builtins(schedules))
        return
    rows = [
        (
            schedule.name,
            "paused" if schedule.paused else "" if schedule.keepers else "no live worker declares it",
            schedule.rule,
            schedule.tz,
            schedule.task,
            schedule.queue,
            ", ".join(moment(fire).replace(".000 ", " ") for fire in schedule.next) or schedule.problem,
            moment(schedule.last).replace(".000 ", " "),
            schedule.last_task,
        )
        for schedule in schedules
    ]
    columns = ("schedule", "", "rule", "zone", "task", "queue", "next (local time)", "last", "last task")
    print_table(columns, rows, "no schedule yet: a worker stores the schedules that its App declares")


@command(group)
async def trigger(app: App, json: bool, names: Names) -> bool:
    """Submit the tasks of schedules now, in addition to their rules, and print the tasks' ids."""

    async def trigger_schedule(name: str) -> str:
        return (await app.atrigger_schedule(name)).id

    return await act_on("schedule", names, trigger_schedule, json)


@command(group)
async def pause(app: App, json: bool, names: Names) -> bool:
    """Pause schedules: they do not fire until they are resumed."""
    return await act_on("schedule", names, app.apause_schedule, json, "paused", "was paused already")


@command(group)
async def resume(app: App, json: bool, names: Names) -> bool:
    """Resume paused schedules. Fires that were missed meanwhile are not caught up."""
    return await act_on("schedule", names, app.aresume_schedule, json, "resumed", "was not paused")
