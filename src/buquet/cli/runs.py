"""Commands about runs of workflows: `buquet run …`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec
import typer
from typer import Argument, Option

from buquet.app import App
from buquet.cli.apps import command
from buquet.cli.output import beginning, moment, print_json, print_table, print_unreadable, scan_progress, to_stderr
from buquet.cli.parameters import RUNS, Args, Kwargs, Limit, NewTag, Tag, Target, cli, json_option, status_option
from buquet.cli.tasks import short
from buquet.codec import ANY, decode_stored
from buquet.errors import EncryptionKeyMissing, InvalidPayload, UnreadableRecord, UsageError
from buquet.insights import runs
from buquet.insights.drawing import as_gantt, as_mermaid, as_svg, as_text, labels
from buquet.insights.runview import RunStatus, RunView
from buquet.insights.scan import Scan
from buquet.printing import counted, duration
from buquet.queue.client import Client
from buquet.queue.values import of_run
from buquet.workflow.graph import RESTORE
from buquet.workflow.handle import Run, SignalInfo, read_run, send_signal

if TYPE_CHECKING:
    from rich.text import Text

POLL = 0.5
"""Seconds between two reads of a run that is followed. The start of a step shows in the step's task, not in the run."""

group = typer.Typer(name="run", help="Start, show and control runs of workflows.", no_args_is_help=True)
cli.add_typer(group, rich_help_panel=RUNS)

STATUSES = (*get_args(RunStatus), "paused")
RunId = Annotated[str, Argument(metavar="RUN", help="The run's id.")]


@command(group, creates=True)
async def start(
    app: App,
    json: bool,
    target: Target,
    name: Annotated[str, Argument(metavar="NAME", help="The workflow's name.")],
    args: Args = "[]",
    kwargs: Kwargs = "{}",
    key: Annotated[str | None, Option("--key", help="Start only one run with this key.")] = None,
    tag: NewTag = None,
    wait: Annotated[bool, Option("--wait", help="Wait until the run ends. Exit status 1 unless it completes.")] = False,
) -> None:
    """Start a run of a workflow and print its id; with --wait, its result."""
    workflow = app.workflows.get(name)
    if workflow is None:
        raise UsageError(f"{target} has no workflow {name!r}; it has {', '.join(sorted(app.workflows)) or 'none'}")
    signature = workflow.signature
    try:
        # the workflow is built with its declared types, as if it were started in Python
        typed, named = signature.decode(signature.encode(signature.bind(args, kwargs)))
    except (TypeError, InvalidPayload) as error:
        raise UsageError(f"{name}{signature.signature}: {error}") from None
    run = await workflow.options(key=key, tags=dict(tag or ())).astart(*typed, **named)
    view = {"id": run.id, "created": run.created}
    if not wait:
        print_json(view) if json else print(run.id)
        return
    if not json:
        to_stderr(run.id)
    result = await Run[Any](app, run.id).aresult()  # without a type: JSON's own values are printed
    print_json(view | {"status": "completed", "result": result} if json else result)


@command(group)
async def get(
    app: App,
    json: bool,
    run_id: RunId,
    watch: Annotated[bool, Option("--watch", "-w", help="Follow the run until it ends.")] = False,
) -> None:
    """Show a run: its steps in order, their status, and errors. With --json --watch: one line per change."""
    if watch:
        await _follow(app.client, run_id, json)
        return
    view = await _read(app.client, run_id)
    signals: list[SignalInfo] = []
    result: bytes | None = None
    with _naming_unreadable():
        signals = await Run[Any](app, run_id).asignals()
    with _naming_unreadable():
        result = await _result_of(app.client, view)
    if json:
        print_json(_plain(view) | {"signals": signals} | ({} if result is None else {"result": msgspec.Raw(result)}))
        return
    _print_run(view, app.clock.now_ms())
    for signal in signals:
        value = signal.problem or short(msgspec.json.encode(signal.value))
        taken = f"taken by step {signal.step}" if signal.step else "not taken yet"
        print(f"signal {signal.name}: {value} from {signal.sender or '?'} at {moment(signal.sent) or '?'}, {taken}")
    if result is not None:
        print(f"result: {short(result)}")


async def _read(client: Client, run_id: str) -> RunView:
    scan = Scan(client)
    view = await runs.read(client, run_id, scan)
    print_unreadable(scan.unreadable)
    return view


@contextmanager
def _naming_unreadable() -> Generator[None]:
    """Name a value that cannot be read, and go on without it."""
    try:
        yield
    except (EncryptionKeyMissing, UnreadableRecord) as error:
        to_stderr(str(error))


async def _result_of(client: Client, view: RunView) -> bytes | None:
    """Return the result of a completed run as JSON; None if the run has none."""
    record = await read_run(client, view.id) if view.status == "completed" else None
    if record is None:
        return None
    body = bytes(await client.values.get(of_run(record.id, "result"), record.output, record.output_at))
    decode_stored(ANY, body, f"the result of run {record.id}", RESTORE)
    return body


def _plain(view: RunView) -> dict[str, Any]:
    """Return a run as JSON values. A step also has the older names `state` and `depends`."""
    value: dict[str, Any] = msgspec.to_builtins(view)
    value["steps"] = [{"state": step["status"], "depends": step["needs"], **step} for step in value["steps"]]
    return value


def _text(view: RunView, now: int, width: int = 0) -> str:
    width = width or shutil.get_terminal_size().columns
    return "".join("".join(text for text, _ in line) + "\n" for line in as_text(view, now, width))


def _print_run(view: RunView, now: int) -> None:
    """Print a run: coloured on a terminal; plain elsewhere, with lines of at least 120 characters."""
    if not sys.stdout.isatty():
        print(_text(view, now, max(shutil.get_terminal_size().columns, 120)), end="")
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, and not needed in pipes

    Console(highlight=False).print(_rich(view, now))


def _rich(view: RunView, now: int, most: int | None = None) -> Text:
    """Return a run in colours, at most `most` lines of it."""
    from rich.text import Text  # noqa: PLC0415 - slow to import

    lines = as_text(view, now, shutil.get_terminal_size().columns)
    if most is not None and len(lines) > most:
        rest = counted(len(lines) - most + 1, "more line")
        lines = [*lines[: most - 1], [(f"… {rest}: `buquet run get {view.id}` shows all", "dim")]]
    return Text("\n", no_wrap=True).join(Text.assemble(*line) for line in lines)


async def _follow(client: Client, run_id: str, json: bool) -> None:
    """Print a run until it ends: redrawn on a terminal, a line per change elsewhere, a JSON value per change for programs."""
    scan = Scan(client)
    if json:
        async for view in _views(client, run_id, scan):
            print_json(_plain(view))
    elif sys.stdout.isatty():
        await _redraw(client, run_id, scan)
    else:
        printed: dict[str, str] = {}
        async for view in _views(client, run_id, scan):
            for name, line in _lines(view, client.clock.now_ms()).items():
                if printed.get(name) != line:
                    printed[name] = line
                    print(line, flush=True)
    print_unreadable(scan.unreadable)


async def _redraw(client: Client, run_id: str, scan: Scan) -> None:
    from rich.live import Live  # noqa: PLC0415 - slow to import

    last: RunView | None = None
    with Live(auto_refresh=False, transient=True) as live:
        async for view in _views(client, run_id, scan, changes_only=False):
            last = view
            live.update(_rich(view, client.clock.now_ms(), shutil.get_terminal_size().lines - 1), refresh=True)
    if last is not None:
        _print_run(last, client.clock.now_ms())


async def _views(client: Client, run_id: str, scan: Scan, *, changes_only: bool = True) -> AsyncIterator[RunView]:
    """Yield the run again and again until it has ended."""
    before: RunView | None = None
    while True:
        view = await runs.read(client, run_id, scan)
        if view != before or not changes_only:
            yield view
        if view.over:
            return
        before = view
        await client.clock.sleep(POLL)


def _lines(view: RunView, now: int) -> dict[str, str]:
    """Return a line for the run and for each step that has started, with what does not change by itself."""
    status = "paused" if view.paused and not view.over else view.status
    whole = {"": labels.plain(f"{view.workflow}: {status}{f', {view.error}' if view.error else ''}")}
    lines: dict[str, str] = {}
    for step in view.steps:
        if step.status in {"waiting", "cancelled"}:
            continue
        took = labels.time(step, now) if step.ended else ""
        parts = (step.status, took, labels.items(step), labels.UNDONE[step.undo], step.error)
        lines[step.name] = labels.plain(f"{step.name}: {', '.join(filter(None, parts))}")
    return lines | whole if view.over else whole | lines


@command(group)
async def ls(
    app: App,
    json: bool,
    status: Annotated[Literal[RunStatus, "paused"] | None, status_option(STATUSES)] = None,
    workflow: Annotated[str | None, Option("--workflow", "-n", help="Only runs of this workflow.")] = None,
    tag: Tag = None,
    limit: Limit = 20,
) -> None:
    """List runs, the last changed first."""
    statuses = () if status is None or status == "paused" else (status,)
    wanted = runs.RunFilter(statuses, status == "paused", workflow, dict(tag or ()))
    scan = Scan(app.client, scan_progress())
    views = await runs.find(wanted, limit, scan)
    now = app.clock.now_ms()
    if json:
        print_json([_plain(view) for view in views])
    else:
        columns = ("id", "workflow", "status", "steps", "created", "took", "")
        print_table(columns, [_row(view, now) for view in views], "no run matches")
    print_unreadable(scan.unreadable)


def _row(view: RunView, now: int) -> tuple[object, ...]:
    seconds = view.seconds(now)
    done = sum(step.status in {"completed", "skipped"} for step in view.steps)
    return (
        view.id,
        view.workflow,
        "paused" if view.paused else view.status,
        f"{done}/{len(view.steps)}",
        moment(view.created),
        "" if seconds is None else duration(seconds),
        beginning(view.error or view.reason or view.key),
    )


@command(group)
async def signal(
    app: App,
    json: bool,
    run_id: RunId,
    name: Annotated[str, Argument(metavar="NAME", help="The signal's name.")],
    value: Annotated[Any, json_option("--value", Any, "value", "The signal's value.")] = "null",
    key: Annotated[str | None, Option("--key", help="Send only one signal with this key.")] = None,
) -> None:
    """Send a signal to a run. The next wait for this signal takes it."""
    await _check_signal(Run[Any](app, run_id), name)
    await send_signal(app.client, run_id, name, msgspec.json.encode(value), key)
    _print_outcome(run_id, "sent", json)


async def _check_signal(run: Run[Any], name: str) -> None:
    """Raise UsageError for a signal that no step of a run waits for: it would be stored, and never taken."""
    try:
        graph = await run.agraph()
    except (EncryptionKeyMissing, UnreadableRecord):
        return  # the names are not known here
    names = sorted({step.signal for step in graph.steps.values() if step.kind == "wait"})
    if name not in names:
        msg = f"run {run.id} has no step that waits for a signal {name!r}; its signals are: {', '.join(names) or 'none'}"
        raise UsageError(msg)


@command(group)
async def cancel(
    app: App,
    json: bool,
    run_id: RunId,
    undo: Annotated[bool, Option("--undo/--no-undo", help="Undo completed steps that have an undo.")] = True,
) -> None:
    """Cancel a run: waiting steps never start, running steps are asked to stop, and completed steps are undone."""
    _print_outcome(run_id, await Run[Any](app, run_id).acancel(undo=undo), json)


@command(group)
async def pause(app: App, json: bool, run_id: RunId) -> None:
    """Pause a run: no new step starts, and running steps go on."""
    await Run[Any](app, run_id).apause()
    _print_outcome(run_id, "paused", json)


@command(group)
async def resume(app: App, json: bool, run_id: RunId) -> None:
    """Resume a paused run."""
    await Run[Any](app, run_id).aresume()
    _print_outcome(run_id, "resumed", json)


@command(group)
async def retry(app: App, json: bool, run_id: RunId) -> None:
    """Retry a failed or cancelled run: completed steps are kept, the others run again."""
    await Run[Any](app, run_id).aretry()
    _print_outcome(run_id, "retried", json)


def _print_outcome(run_id: str, outcome: str, json: bool) -> None:
    """Print what has been recorded: after "requested", steps may still be running or be undone."""
    print_json({"id": run_id, "outcome": outcome}) if json else print(outcome)


DRAWINGS: dict[str, Callable[[RunView, int], str]] = {"text": _text, "mermaid": as_mermaid, "svg": as_svg, "gantt": as_gantt}


@command(group)
async def graph(
    app: App,
    json: bool,
    run_id: RunId,
    form: Annotated[
        Literal["text", "mermaid", "svg", "gantt"],
        Option("--format", "-f", help="mermaid is for Markdown; svg is a picture; gantt is a picture of when steps ran."),
    ] = "text",
    output: Annotated[Path | None, Option("--output", "-o", metavar="FILE", help="Write the drawing to a file.")] = None,
) -> None:
    """Draw a run: its steps, their order and their status."""
    view = await _read(app.client, run_id)
    now = app.clock.now_ms()
    text = DRAWINGS[form](view, now)
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {output}: {error.strerror}") from None
        text = str(output)
    if json:
        print_json({"id": run_id, "format": form, "file" if output else "drawing": text})
    elif output is None and form == "text":
        _print_run(view, now)
    else:
        print(text.rstrip("\n"))
