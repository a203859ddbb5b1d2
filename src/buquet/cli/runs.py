"""Commands about workflow runs: `buquet run …`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import msgspec
import typer

from buquet.cli.base import Json, Tag, Target, Url, cli, from_json, load, open_app, run
from buquet.cli.output import beginning, duration, moment, print_json, print_table, scan_progress, to_stderr
from buquet.cli.selecting import tags_of
from buquet.cli.tasks import short
from buquet.cli.watching import plain, print_run, show, watch
from buquet.codec import ANY, decode_stored
from buquet.errors import EncryptionKeyMissing, InvalidPayload, UnreadableRecord, UsageError
from buquet.insights import runs
from buquet.insights.drawing import as_gantt, as_mermaid, as_svg
from buquet.insights.runview import RunStatus, RunView
from buquet.insights.scan import Scan
from buquet.queue.values import of_run
from buquet.workflow import sending
from buquet.workflow.graph import RESTORE
from buquet.workflow.handle import Run

if TYPE_CHECKING:
    from buquet.queue.client import Client
    from buquet.workflow.handle import SignalInfo

group = typer.Typer(name="run", help="Workflow runs: start, look at, steer.", no_args_is_help=True)
cli.add_typer(group)

RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id.")]


@group.command()
def start(
    target: Target,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workflow's name.")],
    args: Annotated[str, typer.Option("--args", metavar="JSON", help="Positional arguments, a JSON array.")] = "[]",
    kwargs: Annotated[str, typer.Option("--kwargs", metavar="JSON", help="Arguments by name, a JSON object.")] = "{}",
    key: Annotated[str | None, typer.Option("--key", help="Start only one run under this key.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="K=V", help="A tag of the run and its tasks.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the run's end; status 1 unless it completes.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Start a run of a workflow. Prints its id, and with --wait its result."""
    app = load(target, url)
    workflow = app.workflows.get(name)
    if workflow is None:
        raise UsageError(f"{target} has no workflow {name!r}; it has {', '.join(sorted(app.workflows)) or 'none'}")
    positional, by_name = from_json(args, list[Any], "--args", "array"), from_json(kwargs, dict[str, Any], "--kwargs", "object")
    try:
        # the workflow is traced with its declared types, as where it is started in Python
        signature = workflow.signature
        typed, named = signature.decode(signature.encode(signature.bind(tuple(positional), by_name)))
    except (TypeError, InvalidPayload) as error:
        raise UsageError(f"{name}{workflow.signature.signature}: {error}") from None

    async def work() -> None:
        begun = await workflow.options(key=key, tags=tags_of(tag)).astart(*typed, **named)
        if not wait:
            print_json({"id": begun.id, "created": begun.created}) if json else print(begun.id)
            return
        if not json:
            to_stderr(begun.id)
        # as builtins: what is printed is JSON
        result = await Run[Any](app, begun.id).aresult()
        print_json({"id": begun.id, "created": begun.created, "status": "completed", "result": result} if json else result)

    run(app, work, creates=True)


@group.command("get")
def get_run(
    run_id: RunId,
    following: Annotated[bool, typer.Option("--watch", "-w", help="Follow it until it is over.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Show a run: its steps in their order, how far they are, and what went wrong. With --json --watch: a line a change."""
    app = open_app(url)

    async def work() -> None:
        if following:
            await watch(app.client, run_id, json)
            return
        view = await _read(app.client, run_id)
        result = await _result_of(app.client, view)
        signals = await _signals_of(Run[Any](app, run_id))
        if json:
            told = {"signals": signals} | ({} if result is None else {"result": msgspec.Raw(result)})
            print_json(plain(view) | told)
            return
        print_run(view, app.client.clock.now_ms())
        for each in signals:
            value = each.problem or short(msgspec.json.encode(each.value))
            taken = f"taken by step {each.step}" if each.step else "not taken yet"
            print(f"signal {each.name}: {value} from {each.sender or '?'} at {moment(each.sent) or '?'}, {taken}")
        if result is not None:
            print(f"result: {short(result)}")

    run(app, work)


async def _signals_of(handle: Run[Any]) -> list[SignalInfo]:
    """Return a run's signals; none where the run cannot be read."""
    try:
        return await handle.asignals()
    except (EncryptionKeyMissing, UnreadableRecord) as error:
        to_stderr(str(error))
        return []


async def _result_of(client: Client, view: RunView) -> bytes | None:
    """Return what a run came to, as JSON; None where it is not completed, or that cannot be read, which is then said."""
    record = await sending.read_run(client, view.id) if view.status == "completed" else None
    if record is None:
        return None
    try:
        body = bytes(await client.values.get(of_run(record.id, "result"), record.output, record.output_at))
        decode_stored(ANY, body, f"the result of run {record.id}", RESTORE)
    except (EncryptionKeyMissing, UnreadableRecord) as error:
        to_stderr(str(error))
        return None
    return body


@group.command("ls")
def list_runs(
    status: Annotated[str | None, typer.Option("--status", "-s", help="Only runs of this status; also: paused.")] = None,
    workflow: Annotated[str | None, typer.Option("--workflow", "-n", help="Only runs of this workflow.")] = None,
    tag: Tag = None,
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, help="At most so many, the last changed first.")] = 20,
    url: Url = None,
    json: Json = False,
) -> None:
    """List runs, the last changed first."""
    app = open_app(url)
    wanted = _filter(status, workflow, tag)

    async def work() -> None:
        scan = Scan(app.client, scan_progress())
        found = await runs.find(app.client, wanted, limit, scan)
        now = app.client.clock.now_ms()
        if json:
            print_json([plain(view) for view in found])
        else:
            columns = ("id", "workflow", "status", "steps", "created", "took", "")
            print_table(columns, [_row(view, now) for view in found], "no run fits")
        for problem in scan.unreadable:
            to_stderr(f"unreadable: {problem}")

    run(app, work)


def _filter(status: str | None, workflow: str | None, tag: list[str] | None) -> runs.RunFilter:
    statuses = get_args(RunStatus)
    if status not in {None, "paused", *statuses}:
        raise UsageError(f"--status takes one of {', '.join(statuses)}, paused, and not {status!r}")
    some = (cast("RunStatus", status),) if status not in {None, "paused"} else ()
    return runs.RunFilter(some, status == "paused", workflow, tags_of(tag))


def _row(view: RunView, now: int) -> tuple[object, ...]:
    seconds = view.seconds(now)
    over = sum(1 for step in view.steps if step.state in {"completed", "skipped"})
    return (
        view.id,
        view.workflow,
        "paused" if view.paused else view.status,
        f"{over}/{len(view.steps)}",
        moment(view.created),
        "" if seconds is None else duration(seconds),
        beginning(view.error or view.reason or view.key),
    )


@group.command()
def signal(
    run_id: RunId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The signal's name.")],
    value: Annotated[str, typer.Option("--value", metavar="JSON", help="Its value.")] = "null",
    key: Annotated[str | None, typer.Option("--key", help="Sent again with this key it counts once.")] = None,
    url: Url = None,
    json: Json = False,
) -> None:
    """Send a signal to a run: the next wait of this name takes it."""
    body = msgspec.json.encode(from_json(value, Any, "--value", "value"))
    app = open_app(url)

    async def work() -> None:
        await _check_signal(Run[Any](app, run_id), name)
        await sending.send_signal(app.client, run_id, name, body, key)
        _told(run_id, "sent", json)

    run(app, work)


async def _check_signal(handle: Run[Any], name: str) -> None:
    """Raise UsageError for a signal that no step of a run waits for: it would be kept, and never be taken."""
    try:
        graph = await handle.agraph()
    except (EncryptionKeyMissing, UnreadableRecord):
        return  # as of one that was pruned: whoever sends it may know better
    names = sorted({step.signal for step in graph.steps.values() if step.kind == "wait"})
    if name not in names:
        msg = f"run {handle.id} has no step that waits for a signal {name!r}; its signals are: {', '.join(names) or 'none'}"
        raise UsageError(msg)


@group.command()
def cancel(
    run_id: RunId,
    undo: Annotated[bool, typer.Option("--undo/--no-undo", help="Undo the steps that are done, where they have an undo.")] = True,
    url: Url = None,
    json: Json = False,
) -> None:
    """Cancel a run: what waits never starts, what runs is asked to stop, and what is done is undone."""
    app = open_app(url)

    async def work() -> None:
        _told(run_id, await sending.cancel(app.client, run_id, undo=undo), json)

    run(app, work)


@group.command()
def pause(run_id: RunId, url: Url = None, json: Json = False) -> None:
    """Start no more steps of a run until it is resumed; what runs goes on."""
    app = open_app(url)

    async def work() -> None:
        await sending.hold(app.client, run_id, paused=True)
        _told(run_id, "paused", json)

    run(app, work)


@group.command()
def resume(run_id: RunId, url: Url = None, json: Json = False) -> None:
    """Let a paused run go on."""
    app = open_app(url)

    async def work() -> None:
        await sending.hold(app.client, run_id, paused=False)
        _told(run_id, "resumed", json)

    run(app, work)


@group.command()
def retry(run_id: RunId, url: Url = None, json: Json = False) -> None:
    """Go on with a failed or cancelled run: finished steps are kept, the others run again."""
    app = open_app(url)

    async def work() -> None:
        await sending.retry(app.client, run_id)
        _told(run_id, "retried", json)

    run(app, work)


def _told(run_id: str, outcome: str, json: bool) -> None:
    """Say what has been recorded. Of a cancel that is requested steps are still to be stopped or undone."""
    print_json({"id": run_id, "outcome": outcome}) if json else print(outcome)


@group.command()
def graph(
    run_id: RunId,
    drawing: Annotated[
        Literal["text", "mermaid", "svg", "gantt"],
        typer.Option(
            "--format", "-f", help="text; mermaid, for Markdown; svg, a picture; gantt, a picture of when each step ran."
        ),
    ] = "text",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there.")] = None,
    url: Url = None,
    json: Json = False,
) -> None:
    """Draw a run: its steps, what comes before what, and their states."""
    app = open_app(url)

    async def work() -> None:
        view = await _read(app.client, run_id)
        now = app.client.clock.now_ms()
        makers = {"mermaid": as_mermaid, "svg": as_svg, "gantt": as_gantt}
        text = makers[drawing](view, now) if drawing in makers else show(view, now)
        if output is not None:
            try:
                output.write_text(text, encoding="utf-8")
            except OSError as error:
                raise UsageError(f"cannot write {output}: {error.strerror}") from None
            text = str(output)
        if json:
            print_json({"id": run_id, "format": drawing, "file" if output else "drawing": text})
        elif output is None and drawing == "text":
            print_run(view, now)
        else:
            print(text.rstrip("\n"))

    run(app, work)


async def _read(client: Client, run_id: str) -> RunView:
    scan = Scan(client)
    view = await runs.read(client, run_id, scan)
    for problem in scan.unreadable:
        to_stderr(f"unreadable: {problem}")
    return view
