"""Commands about schedules: schedule ls, trigger, pause, resume."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from buquet.cli.base import Json, Url, cli, open_app, run
from buquet.cli.control import each_of
from buquet.cli.output import moment, print_json, print_table, to_stderr
from buquet.insights.scan import Scan
from buquet.insights.schedules import list_schedules

schedule = typer.Typer(name="schedule", help="Look at recurring tasks, trigger, pause and resume them.", no_args_is_help=True)
cli.add_typer(schedule)

Names = Annotated[list[str], typer.Argument(metavar="NAME…", help="Names of schedules.")]


@schedule.command()
def ls(url: Url = None, json: Json = False) -> None:
    """Show the schedules: their rules, what fires next, what fired last."""
    app = open_app(url)

    async def work() -> None:
        scan = Scan(app.client)
        found = await list_schedules(app.client, scan)
        for problem in scan.unreadable:
            to_stderr(f"unreadable: {problem}")
        if json:
            print_json(msgspec.to_builtins(found))
            return
        rows = [
            (
                each.name,
                "paused" if each.paused else "" if each.keepers else "no worker keeps it",
                each.rule,
                each.tz,
                each.task,
                each.queue,
                ", ".join(moment(fire).replace(".000 ", " ") for fire in each.next) or each.problem,
                moment(each.last).removesuffix(".000"),
                each.last_task,
            )
            for each in found
        ]
        columns = ("schedule", "", "rule", "zone", "task", "queue", "next (local time)", "last", "its task")
        print_table(columns, rows, "no schedule yet: a worker of the App that declares one writes it down")

    run(app, work)


@schedule.command()
def trigger(names: Names, url: Url = None, json: Json = False) -> None:
    """Submit what schedules submit, now and beside their rules. Prints the ids of the tasks."""
    app = open_app(url)

    async def one(name: str) -> str:
        return (await app.atrigger_schedule(name)).id

    each_of(app, "schedule", names, one, json=json)


@schedule.command()
def pause(names: Names, url: Url = None, json: Json = False) -> None:
    """Let schedules fire no more until they are resumed."""
    app = open_app(url)

    async def one(name: str) -> str:
        return "paused" if await app.apause_schedule(name) else "was paused already"

    each_of(app, "schedule", names, one, json=json)


@schedule.command()
def resume(names: Names, url: Url = None, json: Json = False) -> None:
    """Let schedules fire again. What passed meanwhile is not caught up."""
    app = open_app(url)

    async def one(name: str) -> str:
        return "resumed" if await app.aresume_schedule(name) else "was not paused"

    each_of(app, "schedule", names, one, json=json)
