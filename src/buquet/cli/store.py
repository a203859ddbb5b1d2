"""Commands about the store: init, doctor, fsck, prune, bench."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buquet.cli.base import Json, Url, cli, open_app, run
from buquet.cli.output import print_json, print_table, say, to_stderr
from buquet.errors import UsageError
from buquet.printing import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.operate.bench import Measured
    from buquet.operate.doctor import Verdict
    from buquet.operate.fsck import Report

UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


@cli.command()
def init(
    keep_versions: Annotated[
        int, typer.Option("--keep-versions", metavar="DAYS", min=1, help="Days that earlier versions are kept.")
    ] = 30,
    url: Url = None,
    json: Json = False,
) -> None:
    """Prepare a store: create the bucket, turn versions on, set lifecycle rules. May be run again."""
    from buquet.operate.init import prepare  # noqa: PLC0415 - only this command needs it

    app = open_app(url)

    async def work() -> None:
        steps: list[dict[str, Any]] = []
        async for step in prepare(app.client, keep_versions_days=keep_versions):
            steps.append(step._asdict())
            if not json:
                say(f"{'ok  ' if step.done else 'note'}  {step.what}: {step.detail}")
                if step.by_hand:
                    print(f"      by hand: {step.by_hand}")
        if json:
            print_json({"url": app.url, "steps": steps})

    run(app, work, creates=True)


@cli.command()
def doctor(url: Url = None, json: Json = False) -> None:
    """Prove that a store is fit: races of conditional writes, read-after-write, versions, clock. Status 1 when it is not."""
    from buquet.operate.doctor import examine  # noqa: PLC0415 - only this command needs it

    app = open_app(url)

    async def work() -> bool:
        verdicts: list[Verdict] = []
        if sys.stderr.isatty():
            to_stderr("trying the store out; some servers take half a minute for the races")
        async for verdict in examine(app.client.store, app.clock):
            verdicts.append(verdict)
            if json:
                print_json(verdict._asdict())
            else:
                _show(verdict)
        fit = all(verdict.ok for verdict in verdicts)
        if not json:
            say(f"{app.url} is {'fit' if fit else 'NOT fit'} for buquet")
        return fit

    if not run(app, work, creates=True):
        raise typer.Exit(1)


def _show(verdict: Verdict) -> None:
    """Print a verdict; what it means is told where it is not well, and always on a terminal."""
    mark, colour = ("FAIL", "31") if not verdict.ok else ("note", "33") if verdict.warning else ("ok  ", "32")
    terminal = sys.stdout.isatty()
    shown = f"\033[{colour}m{mark}\033[0m" if terminal else mark
    print(f"{shown}  {verdict.name}: {printable(verdict.detail)}", flush=True)
    if mark != "ok  ":
        print(f"      {verdict.meaning}")
    elif terminal:
        print(f"      \033[2m{verdict.meaning}\033[0m")


@cli.command()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended without a risk.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Check every record against the protocol's invariants. Status 1 when something is left to mend."""
    from buquet.operate.fsck import fsck as check  # noqa: PLC0415 - only this command needs it

    app = open_app(url)

    async def work() -> Report:
        return await check(app.client, repair=repair, progress=_progress())

    report = run(app, work)
    if json:
        print_json(report)
    else:
        entries = counted(report.entries, "entry", "entries")
        to_stderr(f"checked {counted(report.records, 'record')}, {entries} and {counted(report.payloads, 'payload')}")
        rows = [(each.kind, each.key, each.detail, "repaired" if each.repaired else "") for each in report.findings]
        print_table(("finding", "key", "what it is", ""), rows, "nothing is wrong")
        if report.left and not repair:
            to_stderr("run it again with --repair to mend what can be mended")
    if report.left:
        raise typer.Exit(1)


@cli.command()
def prune(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Ended longer ago than this, for instance 7d or 12h.")
    ],
    sweep: Annotated[
        bool, typer.Option("--sweep/--no-sweep", help="Go over all records, too, for what the journal does not know.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, and remove nothing.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Remove tasks that ended, with their values and earlier versions. A task with a key leaves a small stub.

    First by the journal, then by a sweep over all records. Without the sweep it costs nothing for tasks that stay.
    """
    from buquet.operate.prune import prune as remove  # noqa: PLC0415 - only this command needs it

    age = seconds(older_than)
    app = open_app(url)
    done = run(app, lambda: remove(app.client, age, sweep=sweep, dry_run=dry_run, progress=_progress()))
    if json:
        print_json(done)
        return
    would = "would be " if dry_run else ""
    print(f"{counted(done.looked, 'record')} looked at: {counted(done.pruned, 'task')} {would}pruned")
    objects = f"{counted(done.payloads, 'payload')} and {counted(done.journal, 'object')} of the journal"
    print(f"{counted(done.stubs, 'stub')}, {objects} {would}removed")
    if done.unreadable:
        to_stderr(f"left {counted(done.unreadable, 'object')} that cannot be read; `buquet fsck` names records among them")


def seconds(age: str) -> float:
    """Read an age such as 90s, 30min, 12h, 7d. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", age.strip())
    if found is None or found[2] not in UNITS:
        raise UsageError(f"--older-than takes a number and one of {', '.join(UNITS)}, for instance 7d; not {age!r}")
    return float(found[1]) * UNITS[found[2]]


def _progress() -> Callable[[float, str], None] | None:
    """Return what shows on a terminal how far a long look is."""
    if not sys.stderr.isatty():
        return None

    def show(fraction: float, what: str) -> None:
        print(f"\r{fraction:4.0%} {what:<20}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)

    return show


@cli.command()
def bench(
    tasks: Annotated[int, typer.Option("--tasks", "-n", min=1, help="Tasks to submit and drain.")] = 1000,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Handlers at once in the worker.")] = 64,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Tasks submitted one by one to an idle worker.")] = 50,
    url: Url = None,
    json: Json = False,
) -> None:
    """Measure throughput, latency and requests a task on a store. Its tasks are removed at the end."""
    from buquet.operate.bench import bench as measure  # noqa: PLC0415 - only this command needs it
    from buquet.queue.background import new_loop  # noqa: PLC0415 - the same

    app = open_app(url)
    with asyncio.Runner(loop_factory=new_loop) as runner:  # the loop that workers and blocking calls run on
        measured: Measured = runner.run(
            measure(app.url, app.clock, tasks=tasks, concurrency=concurrency, samples=samples, on_progress=to_stderr)
        )
    if json:
        print_json(measured._asdict())
        return
    rows: list[tuple[str, str]] = [
        ("submit", f"{measured.submit_per_second:,.0f} tasks/s"),
        ("drain, one worker", f"{measured.drain_per_second:,.0f} tasks/s, {measured.concurrency} at once"),
        ("submit to start, p50", f"{measured.start_p50_ms:.1f} ms"),
        ("submit to start, p99", f"{measured.start_p99_ms:.1f} ms"),
        ("requests a submit", _requests(measured.submit_requests)),
        ("requests a run", _requests(measured.run_requests)),
    ]
    print_table(("measure", "result"), rows)


def _requests(each: dict[str, float]) -> str:
    return ", ".join(f"{number:g} {kind}" for kind, number in each.items() if number)
