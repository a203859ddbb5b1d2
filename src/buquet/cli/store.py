"""Commands about the store: init, doctor, fsck, prune, bench."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from buquet.cli.base import Json, Url, cli, open_app, run
from buquet.cli.output import print_json, print_table, to_stderr
from buquet.cli.tasks import scan_progress
from buquet.errors import UsageError

if TYPE_CHECKING:
    from buquet.operate.bench import Result

UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


@cli.command()
def init(
    keep_versions: Annotated[int, typer.Option("--keep-versions", metavar="DAYS", min=1, help="Days that earlier versions are kept.")] = 30,
    url: Url = None,
    json: Json = False,
) -> None:
    """Prepare a store: create the bucket, turn versions on, set lifecycle rules. May be run again."""
    from buquet.operate.init import prepare  # noqa: PLC0415 - boto3 is slow to import

    app = open_app(url)

    async def work() -> bool:
        steps = [step async for step in prepare(app.url, app.clock, keep_versions_days=keep_versions)]
        if json:
            print_json([step._asdict() for step in steps])
        else:
            print_table(("step", "", "detail"), [(step.what, "ok" if step.ok else "not ok", step.detail) for step in steps])
        return all(step.ok for step in steps)

    if not run(app, work):
        raise typer.Exit(1)


@cli.command()
def doctor(url: Url = None, json: Json = False) -> None:
    """Prove that a store is fit: races of conditional writes, read-after-write, versions, clock. Status 1 when it is not."""
    from buquet.operate.doctor import examine  # noqa: PLC0415

    app = open_app(url)

    async def work() -> bool:
        fit = True
        async for verdict in examine(app.client.store, app.clock):
            fit = fit and (verdict.ok or not verdict.needed)
            if json:
                print_json(verdict._asdict())
            else:
                mark = "ok  " if verdict.ok else "FAIL" if verdict.needed else "note"
                print(f"{mark}  {verdict.name}: {verdict.detail}", flush=True)
        if not json:
            print(f"{app.url} is {'fit' if fit else 'not fit'} for buquet")
        return fit

    if not run(app, work):
        raise typer.Exit(1)


@cli.command()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Check every record against the protocol's invariants. Status 1 when something is left to mend."""
    from buquet.operate.fsck import check  # noqa: PLC0415

    app = open_app(url)

    async def work() -> bool:
        found = [each async for each in check(app.client, repair=repair, progress=scan_progress())]
        if json:
            print_json([each._asdict() for each in found])
        else:
            rows = [(each.what, each.key, "repaired" if each.repaired else "") for each in found]
            print_table(("finding", "key", ""), rows, "nothing is wrong")
        return all(each.repaired for each in found)

    if not run(app, work):
        raise typer.Exit(1)


@cli.command()
def prune(
    older_than: Annotated[str, typer.Option("--older-than", metavar="AGE", help="Finished longer ago than this, for instance 7d or 12h.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, and remove nothing.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Remove finished tasks, their values and their earlier versions."""
    from buquet.operate.prune import prune as remove  # noqa: PLC0415

    age = seconds(older_than)
    app = open_app(url)
    shown = sys.stderr.isatty()

    def progress(done: int) -> None:
        print(f"\r{done:,} records", end="", file=sys.stderr, flush=True)

    async def work() -> None:
        pruned = await remove(app.client, age, dry_run=dry_run, progress=progress if shown else None)
        if shown:
            to_stderr("")
        if json:
            print_json(pruned._asdict())
        else:
            would = "would be " if dry_run else ""
            print(f"{pruned.tasks:,} tasks {would}pruned, {pruned.stubs:,} stubs and {pruned.payloads:,} payloads {would}removed")

    run(app, work)


def seconds(age: str) -> float:
    """Read an age such as 90s, 30min, 12h, 7d. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", age.strip())
    if found is None or found[2] not in UNITS:
        msg = f"--older-than takes a number and one of {', '.join(UNITS)}, for instance 7d; not {age!r}"
        raise UsageError(msg)
    return float(found[1]) * UNITS[found[2]]


@cli.command()
def bench(
    tasks: Annotated[int, typer.Option("--tasks", "-n", min=1, help="Tasks to submit and drain.")] = 1000,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Handlers at once in the worker.")] = 64,
    latency: Annotated[int, typer.Option("--latency", min=0, help="Tasks submitted one by one to an idle worker.")] = 50,
    url: Url = None,
    json: Json = False,
) -> None:
    """Measure throughput, latency and requests a task on a store. Its tasks are removed at the end."""
    from buquet.operate.bench import measure  # noqa: PLC0415

    app = open_app(url)
    result: Result = asyncio.run(measure(app.url, app.clock, tasks, concurrency, latency, to_stderr))
    if json:
        print_json(msgspec.to_builtins(result))
        return
    rows: list[tuple[str, Any]] = [
        ("submit", f"{result.submit_per_second:,.0f} tasks/s"),
        ("drain", f"{result.drain_per_second:,.0f} tasks/s, one worker process"),
        ("submit to start, p50", f"{result.start_p50_ms:.1f} ms"),
        ("submit to start, p99", f"{result.start_p99_ms:.1f} ms"),
        *((f"{kind} a task", f"{number:.3f}") for kind, number in result.requests_per_task.items()),
    ]
    print_table(("measure", "result"), rows)
