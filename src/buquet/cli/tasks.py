"""Commands about tasks: submit, get, ls, history, cancel, redrive."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import msgspec
import typer
from typer import Argument, Option

from buquet.app import App
from buquet.cli.apps import command
from buquet.cli.output import act_on, beginning, moment, print_json, print_table, print_unreadable, scan_progress, to_stderr
from buquet.cli.parameters import TASKS, Args, DryRun, Kwargs, Limit, Name, NewTag, Queue, Status, Tag, Target, cli
from buquet.codec import AGAIN, ANY, decode_stored
from buquet.errors import EncryptionKeyMissing, FailedItem, InvalidArgument, UnreadableRecord, UsageError
from buquet.insights.scan import Scan
from buquet.insights.tasks import Filter, find, status_of
from buquet.insights.taskview import failed_in_pack
from buquet.printing import counted, duration, in_seconds, indented, printable
from buquet.queue.client import Client
from buquet.queue.handle import ending
from buquet.records import ABSENT, Progress, State, Task
from buquet.sealing import HIDDEN
from buquet.workflow.events import START

Id = Annotated[str, Argument(metavar="ID", help="The task's id.")]
SHOWN = 2000
"""Characters of a value that are shown to people; --json prints all of it."""
SHOWN_ITEMS = 20
"""Failed items of a pack that are shown to people."""


@command(cli, panel=TASKS, creates=True)
async def submit(
    app: App,
    json: bool,
    target: Target,
    name: Annotated[str, Argument(metavar="NAME", help="The task's name.")],
    args: Args = "[]",
    kwargs: Kwargs = "{}",
    key: Annotated[str | None, Option("--key", help="Submit only once with this key.")] = None,
    delay: Annotated[float | None, Option("--delay", metavar="S", help="Start no sooner than in this many seconds.")] = None,
    priority: Annotated[int | None, Option("--priority", help="0 (first) to 9.")] = None,
    expires: Annotated[float | None, Option("--expires", metavar="S", help="Expire unless started by then, in seconds.")] = None,
    tag: NewTag = None,
    wait: Annotated[bool, Option("--wait", help="Wait for the end. Exit status 1 unless the task completes.")] = False,
) -> None:
    """Submit a task and print its id; with --wait, its result."""
    function = app.tasks.get(name)
    if function is None:
        raise UsageError(f"{target} has no task {name!r}; it has {', '.join(sorted(app.tasks)) or 'none'}")
    task = function.options(key=key, delay=delay, priority=priority, expires=expires, tags=dict(tag or ()))
    try:
        prepared = task.prepare(args, kwargs)
    except (TypeError, InvalidArgument) as error:
        raise UsageError(f"{name}{function.signature.signature}: {error}") from None
    submitted = await app.client.submit(*prepared)
    if not wait:
        print_json(submitted._asdict()) if json else print(submitted.id)
        return
    if not json:
        to_stderr(submitted.id)
    record = await app.client.wait(submitted.id, None)
    view = submitted._asdict() | {"status": record.state, "state": record.state}
    if record.state != "completed":
        if json:
            print_json(view | {"error": msgspec.json.decode(msgspec.json.encode(record.error))})
        raise ending(record)
    result = decode_stored(ANY, await app.client.values.of(record, "result"), f"the result of task {record.id}", AGAIN)
    print_json(view | {"result": result} if json else result)


@command(cli, panel=TASKS)
async def get(app: App, json: bool, task_id: Id) -> None:
    """Show a task: its record, arguments, and result or error."""
    record = (await app.client.read(task_id)).record
    failed = await failed_in_pack(app.client, record)
    task = await _with_values(app.client, record)
    progress = await app.client.progress(task)
    if json:
        items = {"failed_items": [asdict(item) for item in failed]} if task.pack else {}
        print_json(_fields(task) | {"progress": msgspec.to_builtins(progress)} | items)
        return
    _print_task(task, progress)
    _print_failed_items(task, failed)
    if task.name == START:
        to_stderr(f"this task starts a run of workflow {task.step!r}: `buquet run get {task.run}` shows the run")


async def _with_values(client: Client, task: Task) -> Task:
    """Put values from payload objects, and encrypted values whose key is known, into the record."""
    task = client.values.with_error(task)
    values: dict[str, msgspec.Raw] = {}
    for name in ("args", "checkpoint", "result"):
        try:
            if body := bytes(await client.values.of(task, name)):
                decode_stored(ANY, body, f"the {name} of task {task.id}", AGAIN)
                values[name] = msgspec.Raw(body)
        except EncryptionKeyMissing:
            values[name] = msgspec.Raw(msgspec.json.encode(HIDDEN))
        except UnreadableRecord as error:
            values[name] = ABSENT
            to_stderr(str(error))
    return msgspec.structs.replace(task, **values)


def _fields(task: Task) -> dict[str, Any]:
    """Return a record as JSON values, with every field; absent values are null."""
    fields = {"status": status_of(task)} | {name: getattr(task, name) for name in task.__struct_fields__}
    # by way of JSON, since values lie in the record as JSON, also within its error
    return msgspec.json.decode(msgspec.json.encode({name: None if value == ABSENT else value for name, value in fields.items()}))


def short(value: bytes | msgspec.Raw, place: str = "") -> str:
    """Return the beginning of a value for people; without a value, its place."""
    text = printable(bytes(value).decode())
    return f"{text[:SHOWN]}… ({len(text):,} characters; --json shows all)" if len(text) > SHOWN else text or place


def _print_task(task: Task, progress: Progress | None) -> None:
    lost = f", {task.losses} lost with their workers" if task.losses else ""
    running = task.state == "running"
    rows: list[tuple[str, object]] = [
        ("id", task.id),
        ("task", task.name),
        ("queue", task.queue),
        ("status", status_of(task)),
        ("attempt", f"{task.attempt} of {task.max_attempts}{lost}"),
        ("priority", str(task.priority)),
        ("created", moment(task.created)),
        ("key", task.key),
        ("tags", ", ".join(f"{name}={value}" for name, value in task.tags.items())),
        ("due", moment(task.due)),
        ("deadline", moment(task.deadline)),
        ("started", moment(task.started)),
        ("finished", moment(task.finished)),
        ("progress", f"{progress.fraction:.0%} {progress.message}" if progress and running else ""),
        ("worker", task.worker if running else ""),
        ("cancel", "requested" if task.cancel_requested and running else ""),
        ("arguments", short(task.args, task.args_at)),
        ("checkpoint", "" if task.pack else short(task.checkpoint, task.checkpoint_at)),
        ("result", short(task.result, task.result_at)),
        ("error", f"{task.error.type}: {task.error.message}" if task.error else ""),
    ]
    print_table(("field", "value"), [row for row in rows if row[1]])
    if task.error and task.error.traceback:
        print(f"    {indented(task.error.traceback.rstrip())}")


def _print_failed_items(task: Task, failed: list[FailedItem]) -> None:
    if failed:
        print(f"failed: {len(failed):,} of {counted(task.pack, 'item')}")
    for item in failed[:SHOWN_ITEMS]:
        print(f"  item {item.index}, {short(msgspec.json.encode(item.item))}: {printable(item.error)}")
        if item.traceback:
            print(f"    {indented(item.traceback.rstrip())}")
    if len(failed) > SHOWN_ITEMS:
        print(f"  and {len(failed) - SHOWN_ITEMS:,} more: --json shows all")


@command(cli, panel=TASKS)
async def ls(
    app: App, json: bool, status: Status = None, queue: Queue = None, name: Name = None, tag: Tag = None, limit: Limit = 20
) -> None:
    """List tasks, the last changed first."""
    scan = Scan(app.client, scan_progress())
    tasks = await find(_filter(status, queue, name, tag), limit, scan)
    if json:
        print_json([_fields(task) for task in tasks])
    else:
        rows = [
            (task.id, task.name, task.queue, status_of(task), task.attempt or "", moment(task.created), _remark(task))
            for task in tasks
        ]
        print_table(("id", "task", "queue", "status", "attempt", "created", ""), rows, "no task matches")
    print_unreadable(scan.unreadable)


def _filter(status: Status, queue: str | None, name: str | None, tag: list[Any] | None) -> Filter:
    return Filter((status,) if status else (), queue, name, dict(tag or ()))


def _remark(task: Task) -> str:
    error = beginning(f"{task.error.type}: {task.error.message}") if task.error else ""
    due = f"due {moment(task.due)}" if task.state == "pending" and task.due else ""
    if status_of(task) == "retrying":
        parts = (f"attempt {task.attempt} of {task.max_attempts} failed", f"next {due}" if due else "", error)
        return ", ".join(filter(None, parts))
    return due or error or task.key


@command(cli, panel=TASKS)
async def history(
    app: App,
    json: bool,
    task_id: Id,
    versions: Annotated[bool, Option("--versions", help="Show every version of the record that the store keeps.")] = False,
) -> None:
    """Show the history of a task: every change of its status."""
    if versions:
        kept = [(stored.version, stored.record) async for stored in app.client.versions(task_id)]
        if json:
            print_json([{"version": version, **_fields(task)} for version, task in kept])
        else:
            rows = [(task.rev, status_of(task), task.attempt, task.worker, version) for version, task in kept]
            print_table(("rev", "status", "attempt", "worker", "version"), rows)
        return
    task = (await app.client.read(task_id)).record
    if json:
        print_json([{"status": event.state} | msgspec.to_builtins(event) for event in task.events])
        return
    since = task.events[0].at if task.events else 0
    lines = [
        (
            moment(event.at),
            f"+{duration(in_seconds(event.at - since))}",
            event.state,
            event.why,
            event.attempt or "",
            event.worker,
            event.detail,
        )
        for event in task.events
    ]
    print_table(("when", "after", "status", "why", "attempt", "worker", "detail"), lines)
    if task.dropped:
        print(f"({counted(task.dropped, 'line')} dropped after the first)")


@dataclass(frozen=True)
class _Change:
    """What a command does to tasks."""

    verb: str
    done: str
    fitting: tuple[State, ...]
    """States of tasks that allow it."""
    act: Callable[[App, str], Awaitable[str]]
    """Changes the task with an id, and returns its new status."""


def _change_command(change: _Change, text: str) -> None:
    """Make the command of a change; cancel and redrive take the same options."""

    @command(cli, change.verb, panel=TASKS, text=text)
    async def call(
        app: App,
        json: bool,
        ids: Annotated[list[str] | None, Argument(metavar="ID…", help="Ids of tasks.")] = None,
        status: Status = None,
        queue: Queue = None,
        name: Name = None,
        tag: Tag = None,
        limit: Annotated[int | None, Option("--limit", "-l", min=1, help="Change at most this many that match.")] = None,
        dry_run: DryRun = False,
        yes: Annotated[bool, Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    ) -> bool:
        wanted = _filter(status, queue, name, tag)
        if bool(ids) == (wanted != Filter()):
            msg = f"{change.verb} takes either ids or a filter (--status, --queue, --name, --tag); --dry-run shows what matches"
            raise UsageError(msg)
        if status and ("pending" if status == "retrying" else status) not in change.fitting:
            fitting = " or ".join(change.fitting)
            raise UsageError(f"a {status} task cannot be {change.done}, only one that is {fitting}")
        if not ids:
            scan = Scan(app.client, scan_progress())
            tasks = await find(replace(wanted, statuses=wanted.statuses or change.fitting), limit, scan)
            print_unreadable(scan.unreadable)
            ids = [task.id for task in tasks]
            asks = bool(ids) and not dry_run and not yes and sys.stdin.isatty()
            if asks and not typer.confirm(f"{change.verb} {counted(len(ids), 'task')}?", err=True):
                return False

        async def act(task_id: str) -> str:
            if not dry_run:
                return await change.act(app, task_id)
            task = (await app.client.read(task_id)).record
            if task.state not in change.fitting:
                raise UsageError(f"task {task_id} is {task.state} and cannot be {change.done}")
            return f"would be {change.done}"

        return await act_on("id", ids, act, json)


async def _cancel(app: App, task_id: str) -> str:
    return await app.client.cancel(task_id)


async def _redrive(app: App, task_id: str) -> str:
    await app.client.redrive(task_id)
    return "pending"


_change_command(
    _Change("cancel", "cancelled", ("pending", "running"), _cancel),
    "Cancel tasks by id, or all pending and running tasks that match a filter. Exit status 1 if one was refused.",
)
_change_command(
    _Change("redrive", "redriven", ("failed", "cancelled", "expired"), _redrive),
    "Run tasks again by id, or all failed, cancelled and expired tasks that match a filter. Exit status 1 if one was refused.",
)
