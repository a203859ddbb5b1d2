"""Commands about the store: init, doctor, fsck, prune, bench."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from buquet.app import App
from buquet.cli.apps import command, open_app
from buquet.cli.output import coloured, print_json, print_table, say, to_stderr
from buquet.cli.parameters import STORE, DryRun, Json, Url, cli
from buquet.errors import UsageError
from buquet.printing import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.operate.bench import Measured
    from buquet.operate.doctor import Verdict

UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


@command(cli, panel=STORE, creates=True)
async def init(
    app: App,
    json: bool,
    keep_versions: Annotated[int, Option("--keep-versions", metavar="DAYS", min=1, help="Keep earlier versions this long.")] = 30,
) -> None:
    """Prepare a store: create the bucket, turn versions on, set lifecycle rules. May be repeated."""
    from buquet.operate.init import prepare  # noqa: PLC0415 - only this command needs it

    steps: list[dict[str, Any]] = []
    async for step in prepare(app.client, keep_versions_days=keep_versions):
        steps.append(step._asdict())
        if not json:
            say(f"{'ok  ' if step.done else 'note'}  {step.what}: {step.detail}")
            if step.by_hand:
                print(f"      by hand: {step.by_hand}")
    if json:
        print_json({"url": app.url, "steps": steps})


@command(cli, panel=STORE, creates=True)
async def doctor(app: App, json: bool) -> bool:
    """Test whether a store is fit for buquet: conditional writes, read-after-write, versions, clock. Exit status 1 if not."""
    from buquet.operate.doctor import examine  # noqa: PLC0415 - only this command needs it

    fit = True
    if sys.stderr.isatty():
        to_stderr("testing the store; some servers take half a minute for the races")
    async for verdict in examine(app.client.store, app.clock):
        fit = fit and verdict.ok
        if json:
            print_json(verdict._asdict())
        else:
            _print_verdict(verdict)
    if not json:
        say(f"{app.url} is {'fit' if fit else 'NOT fit'} for buquet")
    return fit


def _print_verdict(verdict: Verdict) -> None:
    """Print a check's result; its meaning on a terminal, and wherever the check has not passed."""
    mark, colour = ("FAIL", "red") if not verdict.ok else ("note", "yellow") if verdict.warning else ("ok  ", "green")
    print(f"{coloured(mark, colour)}  {verdict.name}: {printable(verdict.detail)}", flush=True)
    if mark != "ok  ":
        print(f"      {verdict.meaning}")
    elif sys.stdout.isatty():
        print(f"      {coloured(verdict.meaning, 'dim')}")


@command(cli, panel=STORE)
async def fsck(
    app: App,
    json: bool,
    repair: Annotated[bool, Option("--repair", help="Repair what can be repaired without risk.")] = False,
) -> bool:
    """Check every record against the protocol's invariants. Exit status 1 if something is left to repair."""
    from buquet.operate.fsck import fsck as check  # noqa: PLC0415 - only this command needs it

    report = await check(app.client, repair=repair, progress=_progress())
    if json:
        print_json(report)
    else:
        entries = counted(report.entries, "entry", "entries")
        to_stderr(f"checked {counted(report.records, 'record')}, {entries} and {counted(report.payloads, 'payload')}")
        rows = [
            (finding.kind, finding.key, finding.detail, "repaired" if finding.repaired else "") for finding in report.findings
        ]
        print_table(("finding", "key", "detail", ""), rows, "nothing is wrong")
        if report.left and not repair:
            to_stderr("run it again with --repair to repair what can be repaired")
    return not report.left


def seconds(age: str) -> float:
    """Return an age such as 90s, 30min, 12h or 7d in seconds. Raises UsageError."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", age.strip())
    if parts is None or parts[2] not in UNITS:
        raise UsageError(f"--older-than takes a number and one of {', '.join(UNITS)}, for instance 7d; not {age!r}")
    return float(parts[1]) * UNITS[parts[2]]


@command(cli, panel=STORE)
async def prune(
    app: App,
    json: bool,
    older_than: Annotated[
        float,
        Option("--older-than", metavar="AGE", parser=seconds, help="Prune what ended earlier, for instance 7d or 12h ago."),
    ],
    sweep: Annotated[bool, Option("--sweep/--no-sweep", help="Read all records as well as the journal.")] = True,
    dry_run: DryRun = False,
) -> None:
    """Prune ended tasks, with their values and earlier versions. A task with a key leaves a small stub.

    The journal is read first, then all records. Without the sweep, tasks that stay cost nothing.
    """
    from buquet.operate.prune import prune as remove  # noqa: PLC0415 - only this command needs it

    done = await remove(app.client, older_than, sweep=sweep, dry_run=dry_run, progress=_progress())
    if json:
        print_json(done)
        return
    would = "would be " if dry_run else ""
    print(f"{counted(done.looked, 'record')} read: {counted(done.pruned, 'task')} {would}pruned")
    objects = f"{counted(done.payloads, 'payload')} and {counted(done.journal, 'object')} of the journal"
    print(f"{counted(done.stubs, 'stub')}, {objects} {would}removed")
    if done.unreadable:
        to_stderr(f"left {counted(done.unreadable, 'unreadable object')}; `buquet fsck` names the records among them")


def _progress() -> Callable[[float, str], None] | None:
    """Return a function that shows the progress of a long command; None if there is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(fraction: float, what: str) -> None:
        print(f"\r{fraction:4.0%} {what:<20}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)

    return show


@cli.command(rich_help_panel=STORE)
def bench(
    tasks: Annotated[int, Option("--tasks", "-n", min=1, help="Tasks to submit and run.")] = 1000,
    concurrency: Annotated[int, Option("--concurrency", "-c", min=1, help="Handlers at once in the worker.")] = 64,
    samples: Annotated[int, Option("--samples", min=1, help="Tasks submitted one by one to an idle worker.")] = 50,
    url: Url = None,
    json: Json = False,
) -> None:
    """Measure a store: throughput, latency, and requests per task. The tasks are removed at the end."""
    from buquet.operate.bench import bench as measure  # noqa: PLC0415 - only this command needs it
    from buquet.queue.background import new_loop  # noqa: PLC0415 - only this command needs it

    app = open_app(url)
    with asyncio.Runner(loop_factory=new_loop) as runner:  # the event loop of workers and blocking calls
        measured: Measured = runner.run(
            measure(app.url, app.clock, tasks=tasks, concurrency=concurrency, samples=samples, on_progress=to_stderr)
        )
    if json:
        print_json(measured._asdict())
        return
    rows = [
        ("submit", f"{measured.submit_per_second:,.0f} tasks/s"),
        ("drain, one worker", f"{measured.drain_per_second:,.0f} tasks/s, {measured.concurrency} at once"),
        ("submit to start, p50", f"{measured.start_p50_ms:.1f} ms"),
        ("submit to start, p99", f"{measured.start_p99_ms:.1f} ms"),
        ("requests per submit", _requests(measured.submit_requests)),
        ("requests per run of a task", _requests(measured.run_requests)),
    ]
    print_table(("measure", "result"), rows)


def _requests(counts: dict[str, float]) -> str:
    return ", ".join(f"{count:g} {operation}" for operation, count in counts.items() if count)
