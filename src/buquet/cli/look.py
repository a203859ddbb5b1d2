"""Commands that look at the whole: stats and workers."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from buquet.cli.base import Json, Url, cli, open_app, run
from buquet.cli.output import duration, moment, print_json, print_table, scan_progress, to_stderr
from buquet.insights import fleet, tasks
from buquet.insights.scan import Scan, records


@cli.command()
def stats(
    scan: Annotated[bool, typer.Option("--scan", help="Count tasks by state however many there are: a GET for each.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Count what waits, runs, has finished and failed."""
    app = open_app(url)

    async def work() -> None:
        reader = Scan(app.client, scan_progress())
        crew = await fleet.workers(app.client, reader)
        listed = await records(app.client)
        counted = scan or len(listed) <= tasks.CHEAP
        states = await tasks.states(reader, listed) if counted else None
        queues = await fleet.waiting(app.client, crew, reader, states.running if states else None)
        if json:
            value: dict[str, Any] = {
                "queues": queues,
                "records": len(listed),
                "states": states.counts if states else None,
                "unreadable": reader.unreadable,
            }
            print_json(msgspec.to_builtins(value))
            return
        _show(queues)
        if states:
            print_table(("state", "tasks"), sorted(states.counts.items()), "no task yet")
        else:
            print(f"{len(listed):,} tasks in all; --scan counts them by state, with a request for each")
        for problem in reader.unreadable:
            to_stderr(f"unreadable: {problem}")

    run(app, work)


def _show(queues: list[fleet.Waiting]) -> None:
    rows = [
        (
            each.queue,
            "paused" if each.paused else "",
            each.ready,
            ", ".join(f"p{priority}: {count}" for priority, count in sorted(each.priorities.items())),
            each.later,
            each.running,
            each.workers,
            moment(each.next_due),
        )
        for each in queues
    ]
    print_table(("queue", "", "ready", "by priority", "later", "running", "workers", "next due"), rows, "no queue yet")
    for each in queues:
        for name in each.unhandled:
            print(f"in queue {each.queue!r} {each.names[name]:,} of the name {name!r} wait, and no live worker handles that name")


@cli.command()
def workers(url: Url = None, json: Json = False) -> None:
    """Show the workers: where they run, what they serve, how they are."""
    app = open_app(url)

    async def work() -> None:
        reader = Scan(app.client)
        crew = await fleet.workers(app.client, reader)
        for problem in reader.unreadable:
            to_stderr(f"unreadable: {problem}")
        if json:
            print_json(msgspec.to_builtins(crew))
            return
        rows = [
            (
                each.id,
                "dead" if not each.alive else "draining" if each.draining else "alive",
                each.host,
                each.pid,
                ", ".join(each.queues),
                f"{len(each.running)} of {each.concurrency}",
                each.completed,
                each.failed,
                each.abandoned or "",
                duration(each.beat_age),
                f"{each.rss / 2**20:.0f} MB",
            )
            for each in crew
        ]
        columns = ("worker", "", "host", "pid", "queues", "running", "completed", "failed", "abandoned", "last beat", "memory")
        print_table(columns, rows, "no worker is running")

    run(app, work)
