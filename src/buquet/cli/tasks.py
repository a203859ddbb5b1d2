"""Commands that submit and show tasks: submit, get, history, ls."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from buquet.cli.base import Json, Name, Queue, Status, Tag, Target, Url, cli, from_json, load, open_app, run
from buquet.cli.output import beginning, duration, in_seconds, moment, print_json, print_table, scan_progress, to_stderr
from buquet.cli.selecting import selection, tags_of
from buquet.codec import AGAIN, ANY, decode_stored
from buquet.errors import EncryptionKeyMissing, InvalidArgument, UnreadableRecord, UsageError
from buquet.insights.scan import Scan
from buquet.insights.tasks import find, status_of
from buquet.insights.taskview import failed_in_pack
from buquet.printing import counted, indented, printable
from buquet.queue.client import Client
from buquet.queue.handle import ending
from buquet.records import ABSENT, Progress, Task
from buquet.sealing import HIDDEN
from buquet.workflow.events import START

if TYPE_CHECKING:
    from buquet.errors import FailedItem

Id = Annotated[str, typer.Argument(metavar="ID", help="A task's id.")]
SHOWN = 2000
"""Characters of a value that people are shown; --json gives all of it."""
SHOWN_ITEMS = 20
"""Failed items of a pack that people are shown."""


@cli.command()
def submit(
    target: Target,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")],
    args: Annotated[str, typer.Option("--args", metavar="JSON", help="Positional arguments, a JSON array.")] = "[]",
    kwargs: Annotated[str, typer.Option("--kwargs", metavar="JSON", help="Arguments by name, a JSON object.")] = "{}",
    key: Annotated[str | None, typer.Option("--key", help="Submit only once under this key.")] = None,
    delay: Annotated[float | None, typer.Option("--delay", metavar="S", help="Not before so many seconds from now.")] = None,
    priority: Annotated[int | None, typer.Option("--priority", help="0 (first) to 9.")] = None,
    expires: Annotated[
        float | None, typer.Option("--expires", metavar="S", help="Drop it unless started within so many seconds.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="K=V", help="A tag of the task; may be given again.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the task's end; status 1 unless it completes.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Submit a task. Prints its id, and with --wait its result."""
    app = load(target, url)
    function = app.tasks.get(name)
    if function is None:
        raise UsageError(f"{target} has no task {name!r}; it has {', '.join(sorted(app.tasks)) or 'none'}")
    positional, by_name = from_json(args, list[Any], "--args", "array"), from_json(kwargs, dict[str, Any], "--kwargs", "object")
    task = function.options(key=key, delay=delay, priority=priority, expires=expires, tags=tags_of(tag))

    async def work() -> None:
        try:
            prepared = task.prepare(tuple(positional), by_name)
        except (TypeError, InvalidArgument) as error:
            raise UsageError(f"{name}{function.signature.signature}: {error}") from None
        submitted = await app.client.submit(*prepared)
        if not wait:
            print_json(submitted._asdict()) if json else print(submitted.id)
            return
        if not json:
            to_stderr(submitted.id)
        record = await app.client.wait(submitted.id, None)
        if record.state != "completed":
            if json:
                error = msgspec.json.decode(msgspec.json.encode(record.error))
                print_json(submitted._asdict() | {"status": record.state, "state": record.state, "error": error})
            raise ending(record)
        result = decode_stored(ANY, await app.client.value_of(record), f"the result of task {record.id}", AGAIN)
        print_json(submitted._asdict() | {"status": record.state, "state": record.state, "result": result} if json else result)

    run(app, work, creates=True)


@cli.command()
def get(task_id: Id, url: Url = None, json: Json = False) -> None:
    """Show a task: its record, arguments, result or error."""
    app = open_app(url)

    async def work() -> None:
        record = (await app.client.read(task_id)).record
        failed = await failed_in_pack(app.client, record)
        task = await _with_values(app.client, record)
        progress = await app.client.progress(task)
        if json:
            items = {"failed_items": [asdict(each) for each in failed]} if task.pack else {}
            print_json(_plain(task) | {"progress": msgspec.to_builtins(progress)} | items)
        else:
            _show(task, progress)
            _show_items(task, failed)
            if task.name == START:
                to_stderr(f"it starts a run of workflow {task.step!r}: `buquet run get {task.run}` shows that")

    run(app, work)


async def _with_values(client: Client, task: Task) -> Task:
    """Put the values that lie in payload objects, or are encrypted under a key that is here, into the record."""
    task = client.values.with_error(task)
    values: dict[str, msgspec.Raw] = {}
    for name in ("args", "checkpoint", "result"):
        try:
            if body := bytes(await client.values.of(task, name)):  # what is not there stays the default, which encoders leave out
                decode_stored(ANY, body, f"the {name} of task {task.id}", AGAIN)
                values[name] = msgspec.Raw(body)
        except EncryptionKeyMissing:
            values[name] = msgspec.Raw(msgspec.json.encode(HIDDEN))
        except UnreadableRecord as error:
            values[name] = ABSENT
            to_stderr(str(error))
    return msgspec.structs.replace(task, **values)


def _plain(task: Task) -> dict[str, Any]:
    """Return a record as JSON values, with every field; a value that is not there is null."""
    fields = {"status": status_of(task)} | {name: getattr(task, name) for name in task.__struct_fields__}
    # by way of JSON: values lie in the record as JSON, also within its error
    return msgspec.json.decode(msgspec.json.encode({name: None if value == ABSENT else value for name, value in fields.items()}))


def short(value: bytes | msgspec.Raw, at: str = "") -> str:
    """Return a value as people are shown it: its beginning, or else where it is."""
    text = printable(bytes(value).decode())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters; --json shows all)" if text else at


def _show(task: Task, progress: Progress | None) -> None:
    lost = f", {task.losses} lost with their workers" if task.losses else ""
    rows: list[tuple[str, object]] = [
        ("id", task.id),
        ("task", task.name),
        ("queue", task.queue),
        ("status", status_of(task)),
        ("attempt", f"{task.attempt} of {task.max_attempts}{lost}"),
        ("priority", task.priority),
        ("created", moment(task.created)),
    ]
    optional: list[tuple[str, object]] = [
        ("key", task.key),
        ("tags", ", ".join(f"{name}={value}" for name, value in task.tags.items())),
        ("due", moment(task.due)),
        ("deadline", moment(task.deadline)),
        ("started", moment(task.started)),
        ("finished", moment(task.finished)),
        ("progress", f"{progress.fraction:.0%} {progress.message}" if progress and task.state == "running" else ""),
        ("worker", task.worker if task.state == "running" else ""),
        ("cancel", "requested" if task.cancel_requested and task.state == "running" else ""),
        ("arguments", short(task.args, task.args_at)),
        ("checkpoint", "" if task.pack else short(task.checkpoint, task.checkpoint_at)),
        ("result", short(task.result, task.result_at)),
        ("error", f"{task.error.type}: {task.error.message}" if task.error else ""),
    ]
    print_table(("field", "value"), [*rows, *(row for row in optional if row[1])])
    if task.error and task.error.traceback:
        print(f"    {indented(task.error.traceback.rstrip())}")


def _show_items(task: Task, failed: list[FailedItem]) -> None:
    """Print the items of a pack that failed, with their tracebacks where there are."""
    if failed:
        print(f"failed: {len(failed):,} of {counted(task.pack, 'item')}")
    for each in failed[:SHOWN_ITEMS]:
        print(f"  item {each.index}, {short(msgspec.json.encode(each.item))}: {printable(each.error)}")
        if each.traceback:
            print(f"    {indented(each.traceback.rstrip())}")
    if len(failed) > SHOWN_ITEMS:
        print(f"  and {len(failed) - SHOWN_ITEMS:,} more: --json shows all")


@cli.command()
def history(
    task_id: Id,
    versions: Annotated[bool, typer.Option("--versions", help="Every version of the record that is still kept.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Show every status that a task went through."""
    app = open_app(url)

    async def work() -> None:
        if versions:
            kept = [held async for held in app.client.versions(task_id)]
            if json:
                print_json([{"version": held.version, **_plain(held.record)} for held in kept])
            else:
                columns = ("rev", "status", "attempt", "worker", "version")
                print_table(
                    columns, [(task.rev, status_of(task), task.attempt, task.worker, version) for _, task, _, version in kept]
                )
            return
        task = (await app.client.read(task_id)).record
        if json:
            print_json([{"status": event.state} | msgspec.to_builtins(event) for event in task.events])
            return
        since = task.events[0].at if task.events else 0
        rows = [
            (moment(at.at), f"+{duration(in_seconds(at.at - since))}", at.state, at.why, at.attempt or "", at.worker, at.detail)
            for at in task.events
        ]
        print_table(("when", "after", "status", "why", "attempt", "worker", "detail"), rows)
        if task.dropped:
            print(f"(dropped between the first and the rest: {counted(task.dropped, 'line')})")

    run(app, work)


@cli.command()
def ls(
    status: Status = None,
    queue: Queue = None,
    name: Name = None,
    tag: Tag = None,
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, help="At most so many, the last changed first.")] = 20,
    url: Url = None,
    json: Json = False,
) -> None:
    """List tasks, the last changed first."""
    app = open_app(url)
    wanted = selection(status, queue, name, tag)

    async def work() -> None:
        scan = Scan(app.client, scan_progress())
        found = await find(app.client, wanted, limit, scan)
        if json:
            print_json([_plain(task) for task in found])
        else:
            rows = [
                (each.id, each.name, each.queue, status_of(each), each.attempt or "", moment(each.created), _remark(each))
                for each in found
            ]
            print_table(("id", "task", "queue", "status", "attempt", "created", ""), rows, "no task fits")
        for problem in scan.unreadable:
            to_stderr(f"unreadable: {problem}")

    run(app, work)


def _remark(task: Task) -> str:
    error = beginning(f"{task.error.type}: {task.error.message}") if task.error else ""
    due = f"due {moment(task.due)}" if task.state == "pending" and task.due else ""
    if status_of(task) == "retrying":
        which = f"attempt {task.attempt} of {task.max_attempts} failed"
        return ", ".join(filter(None, (which, f"next {due}" if due else "", error)))
    return due or error or task.key
