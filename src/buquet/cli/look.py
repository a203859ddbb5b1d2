"""Commands that look at the whole: stats and workers."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from buquet.cli.base import Json, Url, cli, open_app, run
from buquet.cli.output import duration, moment, print_json, print_table, say, scan_progress, to_stderr
from buquet.insights import fleet, tasks
from buquet.insights.journal import Journal, Spread, Summary
from buquet.insights.scan import Scan, records
from buquet.printing import counted


@cli.command()
def stats(
    scan: Annotated[bool, typer.Option("--scan", help="Count tasks by status however many there are: a GET for each.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Count what waits, runs, is retried, has finished and failed."""
    app = open_app(url)

    async def work() -> None:
        reader = Scan(app.client, scan_progress())
        crew = await fleet.workers(app.client, reader)
        listed = await records(app.client)
        exact = scan or len(listed) <= tasks.CHEAP
        states = await tasks.states(reader, listed) if exact else None
        journal = Journal(app.client)
        await journal.refresh()
        retrying = states.retrying if states else journal.retrying().keys()
        queues = await fleet.waiting(app.client, crew, reader, states.running if states else None, retrying)
        last_hour = journal.by_queue()
        if json:
            value: dict[str, Any] = {
                "queues": queues,
                "last_hour": last_hour,
                "since": journal.since,
                "records": len(listed),
                "statuses": states.counts if states else None,
                "states": states.by_state() if states else None,
                "unreadable": reader.unreadable,
            }
            print_json(msgspec.to_builtins(value))
            return
        _show(queues)
        if last_hour:
            _show_last_hour(last_hour, journal.since)
        if states:
            print_table(("status", "tasks"), sorted(states.counts.items()), "no task yet")
        else:
            print(f"{counted(len(listed), 'task')} in all; --scan counts them by status, with a request for each")
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
            each.retrying or "",
            each.running,
            each.workers,
            moment(each.next_due),
        )
        for each in queues
    ]
    print_table(
        ("queue", "", "ready", "by priority", "later", "retrying", "running", "workers", "next due"), rows, "no queue yet"
    )
    for each in queues:
        for name in each.unhandled:
            say(f"in queue {each.queue!r} {each.names[name]:,} of the name {name!r} wait, and no live worker handles that name")


def _show_last_hour(queues: dict[str, Summary], since: int) -> None:
    def spread(times: Spread) -> str:
        return f"{duration(times.p50 / 1000)}, {duration(times.p99 / 1000)}" if times.count else ""

    rows = [
        (
            queue,
            each.count,
            f"{each.per_minute:.1f}",
            each.failed,
            each.failed_attempts,
            spread(each.duration),
            spread(each.delay),
        )
        for queue, each in queues.items()
    ]
    print(f"since {moment(since)}:")
    columns = ("queue", "ended", "a minute", "failed", "attempts retried", "ran (p50, p99)", "waited (p50, p99)")
    print_table(columns, rows)


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
                _word(each),
                each.host,
                each.pid,
                ", ".join(each.queues),
                f"{len(each.running)} of {each.concurrency}",
                each.completed,
                each.failed,
                each.abandoned or "",
                duration(each.beat_age),
                f"{each.rss / 2**20:.0f} MB",
                each.version,
            )
            for each in crew
        ]
        columns = (
            "worker",
            "",
            "host",
            "pid",
            "queues",
            "running",
            "completed",
            "failed",
            "abandoned",
            "last beat",
            "memory",
            "buquet",
        )
        print_table(columns, rows, "no worker is running")
        print_refused([each for each in crew if each.alive and each.refused])

    run(app, work)


def print_refused(crew: list[fleet.WorkerView]) -> None:
    """Say what the store lately refused these workers."""
    for each in crew:
        say(f"worker {each.id} on {each.host} was refused a request, {moment(each.refused_at)}: {each.refused}")


def _word(worker: fleet.WorkerView) -> str:
    if not worker.alive:
        return "dead"
    return "draining" if worker.draining else "paused" if worker.paused else "alive"
