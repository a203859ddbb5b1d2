"""Commands about workers and queues: worker, workers, pause, resume, drain."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from typer import Argument, Option

from buquet.app import App
from buquet.cli.apps import command, load_app
from buquet.cli.output import act_on, log_to, moment, print_json, print_table, print_unreadable, say, to_stderr
from buquet.cli.parameters import FLEET, Json, Target, Url, cli
from buquet.errors import UsageError
from buquet.insights import fleet
from buquet.insights.scan import Scan
from buquet.printing import duration

if TYPE_CHECKING:
    from buquet.clock import Clock
    from buquet.operate.bench import CountingStore
    from buquet.records import Session
    from buquet.worker.worker import Worker

log = logging.getLogger("buquet.worker")


@cli.command(rich_help_panel=FLEET)
def worker(
    target: Target,
    queue: Annotated[
        list[str] | None,
        Option("--queue", "-q", help="Serve this queue; by default those of all tasks. Repeatable."),
    ] = None,
    concurrency: Annotated[int, Option("--concurrency", "-c", min=1, help="Handlers at once in each process.")] = 16,
    processes: Annotated[int, Option("--processes", "-p", min=1, help="Processes. One that dies is replaced.")] = 1,
    drain: Annotated[bool, Option("--drain", help="Exit with status 0 when nothing is left to do.")] = False,
    max_time: Annotated[float | None, Option("--max-time", metavar="S", help="Exit after this many seconds.")] = None,
    grace: Annotated[float, Option("--grace", metavar="S", min=0, help="Seconds that running tasks get to end.")] = 30.0,
    metrics_port: Annotated[
        int | None,
        Option("--metrics-port", metavar="N", min=1, max=65535, help="Serve Prometheus metrics; process i at N + i."),
    ] = None,
    metrics_host: Annotated[str, Option("--metrics-host", metavar="HOST", help="Serve metrics here.")] = "127.0.0.1",
    log_format: Annotated[
        Literal["text", "json"] | None,
        Option("--log-format", help="The form of log lines; by default text, or json with --json."),
    ] = None,
    ttl: Annotated[float, Option("--ttl", min=1, hidden=True)] = 30.0,
    url: Url = None,
    json: Json = False,
    parent: Annotated[str, Option("--parent", hidden=True)] = "",
    report: Annotated[Path | None, Option("--report-modules", hidden=True)] = None,
) -> None:
    """Run tasks until stopped. Ctrl-C or SIGTERM lets running tasks finish; a second one returns them to the queue.

    With --json the log is one JSON object per line, on standard output.
    """
    app = load_app(target, url, quiet=True)  # `_introduce` names the store
    if not app.tasks:
        raise UsageError(f"{target} has no tasks: decorate a function with @app.task")
    log_to(sys.stdout if json else sys.stderr, as_json=json if log_format is None else log_format == "json")
    counting = None
    if metrics_port is not None and processes == 1:
        from buquet.operate.bench import CountingStore  # noqa: PLC0415 - only with metrics

        counting = app.wrap_store(CountingStore)
    # also made by the parent of several processes, so that wrong options are reported once and not by each child
    served = app.worker(queue, concurrency=concurrency, drain=drain, max_time=max_time, grace=grace, ttl=ttl, parent=parent)
    if not parent:
        _introduce(app, served.queues, json)
        _warn_of_unknown(app, queue or ())
    if processes > 1:
        from buquet.worker.processes import Processes  # noqa: PLC0415 - only for parents

        options = ["--concurrency", str(concurrency), "--grace", str(grace), "--ttl", str(ttl)]
        for name in queue or ():
            options += ["--queue", name]
        options += [flag for flag, wanted in (("--drain", drain), ("--json", json)) if wanted]
        options += ["--log-format", log_format] if log_format else []

        def own_options(number: int) -> list[str]:
            return [] if metrics_port is None else ["--metrics-port", str(metrics_port + number), "--metrics-host", metrics_host]

        children = Processes(
            app.client, [target, "--url", app.url, *options], processes, grace=grace, max_time=max_time, each=own_options
        )
        with app:
            raise typer.Exit(children.run())
    if report is not None:
        report_modules(report, app.clock)
    if parent:
        from buquet.worker.processes import watch_parent  # noqa: PLC0415 - only for children

        watch_parent(served.stop)
    with ExitStack() as stack:
        if counting and metrics_port:
            stack.callback(_serve_metrics(served, counting, metrics_host, metrics_port))
        served.run()
    app.close()


def _serve_metrics(served: Worker, counting: CountingStore, host: str, port: int) -> Callable[[], None]:
    from buquet.operate.metrics import Metrics, serve  # noqa: PLC0415 - its package is optional

    metrics = Metrics(served, counting)
    served.observers.watchers.append(metrics)
    stop = serve(metrics, host, port)
    to_stderr(f"metrics: http://{host}:{port}/metrics")
    return stop


def _introduce(app: App, queues: tuple[str, ...], json: bool) -> None:
    """Print the store, tasks and queues: a task that is missing here was not imported."""
    url = app.client.store.url
    if json:
        tasks = [{"name": task.name, "queue": task.queue} for task in app.tasks.values()]
        print_json({"url": url, "tasks": tasks, "queues": queues})
        return
    names = ", ".join(f"{task.name} ({task.queue})" for task in app.tasks.values())
    for line in (url, f"tasks: {names}", f"queues: {', '.join(queues)}"):
        to_stderr(line)


def _warn_of_unknown(app: App, queues: Sequence[str]) -> None:
    """Warn of queues for which this App has no task: most likely a typing error."""
    own = {declared.queue for declared in (*app.tasks.values(), *app.workflows.values())}
    for queue in dict.fromkeys(queues):
        if queue not in own:
            log.warning("no task here is in queue %r; this App's queues are %s", queue, ", ".join(sorted(own)))


@command(cli, panel=FLEET)
async def workers(app: App, json: bool) -> None:
    """List the workers: where they run, what they serve, and their status."""
    scan = Scan(app.client)
    rows = await fleet.workers(app.client, scan)
    print_unreadable(scan.unreadable)
    if json:
        print_json(msgspec.to_builtins([row.plain() for row in rows]))
        return
    cells = [
        (
            session.id,
            _status(row),
            session.host,
            session.pid,
            ", ".join(session.queues),
            f"{len(session.claims)} of {session.concurrency}",
            session.completed,
            session.failed,
            session.abandoned or "",
            duration(row.age),
            f"{session.rss / 2**20:.0f} MB",
            session.version,
        )
        for row in rows
        for session in [row.session]
    ]
    columns = (
        *("worker", "status", "host", "pid", "queues", "running", "completed", "failed", "abandoned"),
        *("heartbeat", "memory", "buquet"),
    )
    print_table(columns, cells, "no worker is running")
    print_refused(refused(rows))


def refused(rows: list[fleet.WorkerRow]) -> list[Session]:
    """Return the sessions of the live workers that had a request refused by the store lately."""
    return [row.session for row in rows if row.alive and row.session.refused]


def print_refused(sessions: list[Session]) -> None:
    """Print the last refused request of each worker."""
    for session in sessions:
        worker = f"worker {session.id} on {session.host}"
        say(f"the store refused a request of {worker}, {moment(session.refused_at)}: {session.refused}")


def _status(row: fleet.WorkerRow) -> str:
    if not row.alive:
        return "dead"
    return "draining" if row.session.draining else "paused" if row.session.paused else "alive"


Queues = Annotated[list[str] | None, Argument(metavar="QUEUE…", help="Names of queues.")]
WorkerIds = Annotated[
    list[str] | None,
    Option("--worker", "-w", metavar="WORKER", help="The id of a worker, from `buquet workers`. Repeatable."),
]


@command(cli, panel=FLEET)
async def pause(app: App, json: bool, queues: Queues = None, workers: WorkerIds = None) -> bool:
    """Pause queues, or workers with --worker: no new task starts. Running tasks go on, and submits are stored."""
    if _means_queues(queues, workers):
        return await act_on("queue", queues or (), app.apause_queue, json, "paused", "was paused already")
    return await act_on("worker", workers or (), app.apause_worker, json, "asked to pause")


@command(cli, panel=FLEET)
async def resume(app: App, json: bool, queues: Queues = None, workers: WorkerIds = None) -> bool:
    """Resume paused queues, or workers with --worker."""
    if _means_queues(queues, workers):
        return await act_on("queue", queues or (), app.aresume_queue, json, "resumed", "was not paused")
    return await act_on("worker", workers or (), app.aresume_worker, json, "asked to resume")


def _means_queues(queues: list[str] | None, workers: list[str] | None) -> bool:
    if bool(queues) == bool(workers):
        raise UsageError("name either queues, or workers with --worker")
    return bool(queues)


@command(cli, panel=FLEET)
async def drain(
    app: App,
    json: bool,
    workers: Annotated[list[str], Argument(metavar="WORKER…", help="Ids of workers, from `buquet workers`.")],
) -> bool:
    """Drain workers: they claim no new task, finish their running tasks, and exit with status 0."""
    return await act_on("worker", workers, app.adrain_worker, json, "asked to drain")


def report_modules(report: Path, clock: Clock) -> None:
    """Write the files of all imported modules to `report`, and again whenever more were imported, for `buquet dev`."""

    def write() -> int:
        count = len(sys.modules)
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        fresh = report.with_suffix(".new")
        fresh.write_text("\n".join(sorted(str(Path(file).resolve()) for file in files if file)), encoding="utf-8")
        fresh.replace(report)
        return count

    def keep_writing(count: int) -> None:
        with suppress(FileNotFoundError):  # the command has ended and removed its folder
            while True:
                clock.block(0.5)
                count = write() if len(sys.modules) != count else count

    threading.Thread(target=keep_writing, args=(write(),), daemon=True).start()
