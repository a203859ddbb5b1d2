"""Commands that draw from the journal: errors and tail."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import msgspec
import typer

from buquet.cli.base import Json, Name, Queue, Url, cli, lacks_store, open_app, run
from buquet.cli.look import print_refused
from buquet.cli.output import beginning, duration, moment, print_json, print_table, to_stderr
from buquet.errors import UsageError
from buquet.insights.fleet import workers
from buquet.insights.journal import ErrorGroup, Journal
from buquet.insights.scan import Scan
from buquet.insights.tail import EVENTS, Happening, Tail
from buquet.printing import counted, printable

COLOURS = {"completed": "32", "failed": "31", "retried": "33", "lost": "33", "cancelled": "35", "expired": "35", "started": "36"}


@cli.command()
def errors(
    hours: Annotated[float, typer.Option("--hours", metavar="H", min=0.01, help="How far back to look.")] = 1.0,
    queue: Queue = None,
    name: Name = None,
    url: Url = None,
    json: Json = False,
) -> None:
    """Show what failed lately by kind: the task, the error's type, and the function that raised it. Drawn from the journal.

    It counts the tasks that failed for good, and the attempts that failed and are retried.
    """
    app = open_app(url)

    async def work() -> None:
        journal = Journal(app.client, hours=hours)
        await journal.refresh()
        found = journal.errors(queue=queue, name=name)
        reader = Scan(app.client)
        refused = [each for each in await workers(app.client, reader) if each.alive and each.refused]
        if json:
            told = [{"worker": each.id, "host": each.host, "at": each.refused_at, "message": each.refused} for each in refused]
            print_json({"since": journal.since, "groups": msgspec.to_builtins(found), "refused": told})
            return
        rows = [
            (
                each.count,
                each.retried,
                each.name,
                each.queue,
                beginning(f"{each.type}: {each.message}"),
                moment(each.first),
                moment(each.last),
                _next(each, app.clock.now_ms()),
                each.example,
            )
            for each in found
        ]
        columns = ("failed", "attempts retried", "task", "queue", "error (the last one)", "first", "last", "next", "example")
        print_table(columns, rows, f"nothing failed since {moment(journal.since)}, as far as the journal knows")
        print_refused(refused)
        if journal.unreadable:
            to_stderr(f"left out, since unreadable: {counted(journal.unreadable, 'line')} of the journal")

    run(app, work)


def _next(group: ErrorGroup, now: int) -> str:
    """Say which attempt failed last, and when its task tries again, unless that time has passed."""
    attempt = f"attempt {group.attempt} of {group.max_attempts}" if group.max_attempts else ""
    return f"{attempt}, next {moment(group.due)}" if group.due > now else attempt


@cli.command()
def tail(
    queue: Queue = None,
    name: Name = None,
    status: Annotated[
        str | None, typer.Option("--status", "-s", metavar="EVENT", help=f"Only one kind: {', '.join(EVENTS)}.")
    ] = None,
    interval: Annotated[float, typer.Option("--interval", metavar="S", min=0.2, help="Seconds between two looks.")] = 2.0,
    url: Url = None,
    json: Json = False,
) -> None:
    """Show what happens as it happens, until Ctrl-C. A look costs 3 LISTs, and a GET for each thing that changed."""
    if status is not None and status not in EVENTS:
        raise UsageError(f"--status is one of {', '.join(EVENTS)}, not {status!r}")
    app = open_app(url)

    async def work() -> None:
        if problem := await lacks_store(app):
            to_stderr(f"note: {problem}")
        events = Tail(app.client, queue=queue, name=name, event=status)
        await events.poll()
        to_stderr("watching; Ctrl-C ends it")
        while True:
            await app.clock.sleep(interval)
            for each in await events.poll():
                if json:
                    print_json(each)
                else:
                    print(_line(each), flush=True)

    with suppress(KeyboardInterrupt):
        run(app, work, creates=True)


def _line(each: Happening) -> str:
    word = f"{each.event:9}"
    if sys.stdout.isatty():
        word = f"\033[{COLOURS.get(each.event, '0')}m{word}\033[0m"
    parts = [moment(each.at), word, each.id, printable(f"{each.name} ({each.queue})")]
    if each.attempt > 1:
        parts.append(f"attempt {each.attempt}")
    if each.ran:
        parts.append(f"in {duration(each.ran / 1000)}")
    if each.detail:
        parts.append(printable(each.detail.splitlines()[0][:200]))
    return "  ".join(parts)
