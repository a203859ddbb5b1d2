"""Commands that show what happens: stats, errors, tail, and the dashboard, ui."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from typer import Argument, Option

from buquet import keys
from buquet.app import App
from buquet.cli.apps import command, lacks_store, load_app, open_app, run
from buquet.cli.output import (
    COLOURS,
    beginning,
    coloured,
    log_to,
    moment,
    print_json,
    print_table,
    print_unreadable,
    say,
    scan_progress,
    to_stderr,
)
from buquet.cli.parameters import MONITOR, Json, Name, Queue, Url, cli, status_option
from buquet.cli.workers import print_refused, refused
from buquet.errors import UsageError, install
from buquet.insights import fleet, tasks
from buquet.insights.journal import ErrorGroup, Journal, Spread, Summary
from buquet.insights.scan import Scan
from buquet.insights.tail import EVENTS, Tail, TailEvent
from buquet.printing import counted, duration, printable

if TYPE_CHECKING:
    from collections.abc import Collection


@command(cli, panel=MONITOR)
async def stats(
    app: App,
    json: bool,
    scan: Annotated[bool, Option("--scan", help="Count more than 10,000 tasks by status, too: a GET for each.")] = False,
) -> None:
    """Count tasks: ready, delayed, retrying and running by queue, and by status."""
    reader = Scan(app.client, scan_progress())
    workers = await fleet.workers(app.client, reader)
    listed = await Scan(app.client).keys(keys.TASKS, keys.task_id_of)
    exact = scan or len(listed) <= tasks.CHEAP
    counts = await tasks.count(reader, listed) if exact else None
    journal = Journal(app.client, time=reader.time)
    await journal.refresh()
    retrying = counts.retrying if counts else journal.retrying().keys()
    queues = await fleet.waiting(app.client, workers, reader, counts.running if counts else None, retrying)
    last_hour = journal.by_queue()
    if json:
        value: dict[str, Any] = {
            "queues": [queue.plain() for queue in queues],
            "last_hour": last_hour,
            "since": journal.since,
            "records": len(listed),
            "statuses": counts.statuses if counts else None,
            "states": counts.by_state() if counts else None,
            "unreadable": reader.unreadable,
        }
        print_json(msgspec.to_builtins(value))
        return
    _print_queues(queues)
    if last_hour:
        _print_last_hour(last_hour, journal.since)
    if counts:
        print_table(("status", "tasks"), sorted(counts.statuses.items()), "no task yet")
    else:
        print(f"{counted(len(listed), 'task')} in all; --scan counts them by status, with a request for each")
    print_unreadable(reader.unreadable)


def _print_queues(queues: list[fleet.QueueRow]) -> None:
    rows = [
        (
            queue.name,
            "paused" if queue.paused else "",
            queue.ready,
            ", ".join(f"p{priority}: {count}" for priority, count in sorted(queue.priorities.items())),
            queue.later,
            queue.retrying or "",
            queue.running,
            queue.workers,
            moment(queue.next_due),
        )
        for queue in queues
    ]
    columns = ("queue", "", "ready", "by priority", "delayed", "retrying", "running", "workers", "next due")
    print_table(columns, rows, "no queue yet")
    for queue in queues:
        for name, count, handled in sorted(queue.names):
            if not handled:
                tasks_named = f"{counted(count, 'pending task')} named {name!r}"
                say(f"queue {queue.name!r} has {tasks_named}, and no live worker handles that name")


def _print_last_hour(queues: dict[str, Summary], since: int) -> None:
    def spread(times: Spread) -> str:
        return f"{duration(times.p50 / 1000)}, {duration(times.p99 / 1000)}" if times.count else ""

    rows = [
        (
            queue,
            ended.count,
            f"{ended.per_minute:.1f}",
            ended.failed,
            ended.failed_attempts,
            spread(ended.duration),
            spread(ended.delay),
        )
        for queue, ended in queues.items()
    ]
    print(f"since {moment(since)}:")
    columns = ("queue", "ended", "per minute", "failed", "attempts retried", "duration (p50, p99)", "delay (p50, p99)")
    print_table(columns, rows)


@command(cli, panel=MONITOR)
async def errors(
    app: App,
    json: bool,
    hours: Annotated[float, Option("--hours", metavar="H", min=0.01, help="How far back to look.")] = 1.0,
    queue: Queue = None,
    name: Name = None,
) -> None:
    """Group recent failures by task, type of error, and the function that raised it. Reads the journal.

    It counts the tasks that failed for good, and the attempts that failed and are retried.
    """
    journal = Journal(app.client, hours=hours)
    await journal.refresh()
    groups = journal.errors(queue=queue, name=name)
    sessions = refused(await fleet.workers(app.client))
    if json:
        requests = [{"worker": row.id, "host": row.host, "at": row.refused_at, "message": row.refused} for row in sessions]
        print_json({"since": journal.since, "groups": msgspec.to_builtins(groups), "refused": requests})
        return
    rows = [
        (
            group.count,
            group.retried,
            group.name,
            group.queue,
            beginning(f"{group.type}: {group.message}"),
            moment(group.first),
            moment(group.last),
            next_attempt(group, app.clock.now_ms()),
            group.example,
        )
        for group in groups
    ]
    columns = ("failed", "attempts retried", "task", "queue", "last error", "first", "last", "next", "example")
    print_table(columns, rows, f"nothing failed since {moment(journal.since)}, according to the journal")
    print_refused(sessions)
    if journal.unreadable:
        to_stderr(f"left out {counted(journal.unreadable, 'unreadable line')} of the journal")


def next_attempt(group: ErrorGroup, now: int) -> str:
    """Return which attempt failed last, and when the next is due unless that time has passed."""
    attempt = f"attempt {group.attempt} of {group.max_attempts}" if group.max_attempts else ""
    return f"{attempt}, next {moment(group.due)}" if group.due > now else attempt


@command(cli, panel=MONITOR, creates=True)
async def tail(
    app: App,
    json: bool,
    queue: Queue = None,
    name: Name = None,
    status: Annotated[str | None, status_option(EVENTS, "events of this kind", "EVENT")] = None,
    interval: Annotated[float, Option("--interval", metavar="S", min=0.2, help="Seconds between two polls.")] = 2.0,
) -> None:
    """Print events as they happen, until Ctrl-C. A poll costs 3 LISTs, and a GET for each thing that changed."""
    if problem := await lacks_store(app):
        to_stderr(f"note: {problem}")
    events = Tail(app.client, queue=queue, name=name, event=status)
    await events.poll()
    to_stderr("watching; Ctrl-C ends it")
    with suppress(asyncio.CancelledError):  # Ctrl-C
        while True:
            await app.clock.sleep(interval)
            for event in await events.poll():
                if json:
                    print_json(event)
                else:
                    print(_line(event), flush=True)


def _line(event: TailEvent) -> str:
    word = coloured(f"{event.event:9}", COLOURS.get(event.event))
    parts = [moment(event.at), word, event.id, printable(f"{event.name} ({event.queue})")]
    if event.attempt > 1:
        parts.append(f"attempt {event.attempt}")
    if event.ran:
        parts.append(f"in {duration(event.ran / 1000)}")
    if event.detail:
        parts.append(printable(event.detail.splitlines()[0][:200]))
    return "  ".join(parts)


Host = Annotated[str, Option("--host", help="The address to listen on.")]
Port = Annotated[int, Option("--port", min=0, max=65535, help="The port to listen on; 0 takes any.")]


@cli.command(rich_help_panel=MONITOR)
def ui(
    target: Annotated[str | None, Argument(metavar="MODULE:APP", help="Show the store of this App.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    password: Annotated[
        str | None,
        Option(
            "--password",
            envvar="BUQUET_UI_PASSWORD",
            show_envvar=True,
            help="Ask each browser for this password. Other users of this machine can read it in the command's arguments.",
        ),
    ] = None,
    password_file: Annotated[
        Path | None,
        Option(
            "--password-file",
            metavar="FILE",
            envvar="BUQUET_UI_PASSWORD_FILE",
            show_envvar=True,
            help="Ask each browser for the password in the first line of this file.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        Option("--allow-host", metavar="NAME", help="Without a password, also serve under this name. Repeatable."),
    ] = None,
    read_only: Annotated[bool, Option("--read-only", help="Show everything, change nothing.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Serve the dashboard until stopped; on this machine only, unless --host says otherwise."""
    need_ui()
    from buquet.dashboard.guard import is_loopback  # noqa: PLC0415 - needs the extra `ui`

    if password_file is not None:
        password = _read_password(password_file, password)
    if password is not None and not password:
        raise UsageError("the password is empty: give one, or leave --password, --password-file and their variables out")
    if not is_loopback(host):
        if password is None and not read_only:
            msg = (
                f"on {host} others can reach this dashboard, and could cancel and redrive tasks. "
                "Give it a password (--password-file, BUQUET_UI_PASSWORD or --password), or --read-only"
            )
            raise UsageError(msg)
        risk = (
            "the password and every page travel unencrypted, unless a proxy adds TLS"
            if password
            else "anybody who reaches it can read everything"
        )
        to_stderr(f"warning: this dashboard listens on {host}: {risk}")
    app = load_app(target, url) if target else open_app(url)
    log_to(sys.stderr)
    serve(app, host, port, password, read_only, hosts=allow_host or (), json=json)


def _read_password(file: Path, other: str | None) -> str:
    """Return the password in a file. Raises UsageError if the file cannot be read, or if there is another password."""
    if other is not None:
        msg = "there are two passwords: one in --password (or BUQUET_UI_PASSWORD), and one in --password-file. Leave one out"
        raise UsageError(msg)
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the password cannot be read from {file}: {error}") from None


def serve(
    app: App, host: str, port: int, password: str | None, read_only: bool, *, hosts: Collection[str] = (), json: bool
) -> None:
    """Serve the dashboard until stopped, and print its address."""
    from buquet.dashboard.serve import listen, make_server  # noqa: PLC0415 - needs the extra `ui`

    sock, address = listen(host, port)

    async def work() -> None:
        server = make_server(app, password=password, read_only=read_only, host=host, hosts=hosts)
        if json:
            print_json({"address": address, "url": app.url, "pid": os.getpid()})
        else:
            say(f"dashboard of {app.url}: {address}")
        await server.serve(sockets=[sock])

    run(app, work)


def need_ui() -> None:
    """Raise UsageError if the dashboard's dependencies are not installed."""
    missing = [name for name in ("itsdangerous", "jinja2", "starlette", "uvicorn", "watchfiles") if find_spec(name) is None]
    if missing:
        raise UsageError(f"the dashboard needs {', '.join(missing)}, which this Python does not have: {install('ui')}")
