"""Commands about tasks: submit, get, history, cancel, redrive, ls."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from buquet.cli.base import Ids, Json, Target, Url, cli, load, open_app, run
from buquet.cli.output import duration, moment, print_json, print_table, to_stderr
from buquet.errors import BuquetError, UsageError
from buquet.insights import Filter, Scan, find
from buquet.queue.handle import ending
from buquet.records import STATES, Task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from buquet.app import App

Id = Annotated[str, typer.Argument(metavar="ID", help="A task's id.")]
Status = Annotated[str | None, typer.Option("--status", "-s", help="Only tasks in this state.")]
Queue = Annotated[str | None, typer.Option("--queue", "-q", help="Only tasks of this queue.")]
Name = Annotated[str | None, typer.Option("--name", "-n", help="Only tasks of this name.")]
Tag = Annotated[list[str] | None, typer.Option("--tag", metavar="K=V", help="Only tasks with this tag; may be given again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


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
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the task's end; status 1 unless it completes.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Submit a task. Prints its id, and with --wait its result."""
    app = load(target, url)
    function = app.tasks.get(name)
    if function is None:
        msg = f"{target} has no task {name!r}; it has {', '.join(sorted(app.tasks)) or 'none'}"
        raise UsageError(msg)
    positional, by_name = _parse(args, list[Any], "--args", "array"), _parse(kwargs, dict[str, Any], "--kwargs", "object")
    task = function.options(key=key, delay=delay, priority=priority, expires=expires)

    async def work() -> None:
        try:
            handle = await task.asubmit(*positional, **by_name)
        except TypeError as error:
            msg = f"{name}{function.signature.signature}: {error}"
            raise UsageError(msg) from None
        if not wait:
            print_json({"id": handle.id, "created": handle.created}) if json else print(handle.id)
            return
        record = await app.client.wait(handle.id, None)
        if record.state != "completed":
            if json:
                print_json(_plain(record))
            raise ending(record)
        result = msgspec.json.decode(await app.client.value_of(record))
        if json:
            print_json({"id": handle.id, "created": handle.created, "state": record.state, "result": result})
        else:
            to_stderr(handle.id)
            print_json(result)

    run(app, work)


def _parse(text: str, kind: type[Any], option: str, what: str) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        msg = f"{option} takes a JSON {what}, and this is none: {text!r} ({error})"
        raise UsageError(msg) from None


@cli.command()
def get(task_id: Id, url: Url = None, json: Json = False) -> None:
    """Show a task: its record, arguments, result or error."""
    app = open_app(url)

    async def work() -> None:
        task = (await app.client.read(task_id)).record
        if json:
            print_json(_plain(task))
        else:
            _show(task)

    run(app, work)


def _plain(task: Task) -> dict[str, Any]:
    """Return a record as JSON values, with what is absent left out."""
    return msgspec.json.decode(msgspec.json.encode(task))


def _show(task: Task) -> None:
    lost = f", {task.losses} lost with their workers" if task.losses else ""
    rows: list[tuple[str, object]] = [
        ("id", task.id),
        ("task", task.name),
        ("queue", task.queue),
        ("state", task.state),
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
        ("worker", task.worker if task.state == "running" else ""),
        ("cancel", "requested" if task.cancel_requested and task.state == "running" else ""),
        ("arguments", bytes(task.args).decode()[:2000] or task.args_at),
        ("checkpoint", bytes(task.checkpoint).decode()[:2000] or task.checkpoint_at),
        ("result", bytes(task.result).decode()[:2000] or task.result_at),
        ("error", f"{task.error.type}: {task.error.message}" if task.error else ""),
    ]
    print_table(("field", "value"), [*rows, *(row for row in optional if row[1])])
    if task.error and task.error.traceback:
        print(task.error.traceback.rstrip())


@cli.command()
def history(
    task_id: Id,
    versions: Annotated[bool, typer.Option("--versions", help="Every version of the record that is still kept.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Show every state that a task went through."""
    app = open_app(url)

    async def work() -> None:
        if versions:
            kept = [held async for held in app.client.versions(task_id)]
            if json:
                print_json([{"version": held.version, **_plain(held.record)} for held in kept])
            else:
                columns = ("rev", "state", "attempt", "worker", "version")
                print_table(columns, [(task.rev, task.state, task.attempt, task.worker, version) for _, task, _, version in kept])
            return
        task = (await app.client.read(task_id)).record
        if json:
            print_json(_plain(task).get("events", []))
            return
        since = task.events[0].at if task.events else 0
        rows = [
            (moment(at.at), f"+{duration((at.at - since) / 1000)}", at.state, at.why, at.attempt or "", at.worker, at.detail)
            for at in task.events
        ]
        print_table(("when", "after", "state", "why", "attempt", "worker", "detail"), rows)
        if task.dropped:
            print(f"({task.dropped} lines between the first and the rest were dropped)")

    run(app, work)


@cli.command()
def cancel(
    ids: Ids = None,
    status: Status = None,
    queue: Queue = None,
    name: Name = None,
    tag: Tag = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Cancel tasks by id, or all that a filter takes."""
    app = open_app(url)
    wanted = _filter(status, queue, name, tag)
    _many(app, ids, wanted, ("pending", "running"), app.client.cancel, dry_run, yes, json)


@cli.command()
def redrive(
    ids: Ids = None,
    status: Status = None,
    queue: Queue = None,
    name: Name = None,
    tag: Tag = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Run failed, cancelled or expired tasks again: by id, or all that a filter takes."""
    app = open_app(url)

    async def again(task_id: str) -> str:
        await app.client.redrive(task_id)
        return "pending"

    wanted = _filter(status, queue, name, tag)
    _many(app, ids, wanted, ("failed", "cancelled", "expired"), again, dry_run, yes, json)


def _filter(status: str | None, queue: str | None, name: str | None, tag: list[str] | None) -> Filter:
    if status is not None and status not in STATES:
        msg = f"--status is one of {', '.join(STATES)}, not {status!r}"
        raise UsageError(msg)
    tags: dict[str, str] = {}
    for each in tag or ():
        left, equals, right = each.partition("=")
        if not equals:
            msg = f"--tag takes NAME=VALUE, not {each!r}"
            raise UsageError(msg)
        tags[left] = right
    return Filter(status, queue, name, tags)


def _many(
    app: App,
    ids: list[str] | None,
    wanted: Filter,
    fitting: tuple[str, ...],
    act: Callable[[str], Awaitable[str]],
    dry_run: bool,
    yes: bool,
    json: bool,
) -> None:
    """Do something to each of many tasks, and go on past those that refuse; status 1 when any did."""
    filtered = wanted != Filter()
    if bool(ids) == filtered:
        msg = "name either ids or a filter (--status, --queue, --name, --tag); --dry-run shows what a filter takes"
        raise UsageError(msg)

    async def work() -> bool:
        chosen = list(ids or ())
        if filtered:
            found = await find(app.client, wanted, None, Scan(app.client, scan_progress()))
            chosen = [task.id for task in found if task.state in fitting]
            if not dry_run and not yes and sys.stdin.isatty() and not typer.confirm(f"{len(chosen)} tasks?"):
                raise typer.Exit(1)
        outcomes = [await _one(task_id, act, dry_run) for task_id in chosen]
        if json:
            print_json(outcomes)
        else:
            print_table(("id", "outcome"), [(each["id"], each["outcome"]) for each in outcomes], "no task fits")
        return all(each["ok"] for each in outcomes)

    if not run(app, work):
        raise typer.Exit(1)


async def _one(task_id: str, act: Callable[[str], Awaitable[str]], dry_run: bool) -> dict[str, Any]:
    try:
        return {"id": task_id, "ok": True, "outcome": "would be done" if dry_run else await act(task_id)}
    except BuquetError as error:
        return {"id": task_id, "ok": False, "outcome": str(error)}


def scan_progress() -> Callable[[int, int], None] | None:
    """Return what shows how far a long scan is, on a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, whole: int) -> None:
        end = "\n" if done == whole else ""
        print(f"\r{done:,} of {whole:,} records", end=end, file=sys.stderr, flush=True)

    return show


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
    wanted = _filter(status, queue, name, tag)

    async def work() -> None:
        scan = Scan(app.client, scan_progress())
        found = await find(app.client, wanted, limit, scan)
        if json:
            print_json([_plain(task) for task in found])
        else:
            rows = [
                (each.id, each.name, each.queue, each.state, each.attempt or "", moment(each.created), _remark(each))
                for each in found
            ]
            print_table(("id", "task", "queue", "state", "attempt", "created", ""), rows, "no task fits")
        for problem in scan.unreadable:
            to_stderr(f"unreadable: {problem}")

    run(app, work)


def _remark(task: Task) -> str:
    if task.state == "pending" and task.due:
        return f"due {moment(task.due)}"
    if task.error is not None:
        return f"{task.error.type}: {task.error.message}"[:80]
    return task.key
