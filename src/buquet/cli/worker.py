"""The command that runs tasks."""

from __future__ import annotations

import enum
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buquet.cli.base import Json, Target, Url, cli, load
from buquet.cli.output import log_to, print_json, to_stderr
from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from buquet.app import App
    from buquet.operate.bench import CountingStore
    from buquet.store.base import Store
    from buquet.worker.worker import Worker

log = logging.getLogger("buquet.worker")


class LogFormat(enum.StrEnum):
    """How a line of the log looks."""

    text = "text"
    json = "json"


@cli.command()
def worker(
    target: Target,
    queue: Annotated[
        list[str] | None,
        typer.Option("--queue", "-q", help="A queue to serve; may be given again. [default: those of all tasks]"),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Handlers at once in each process.")] = 16,
    processes: Annotated[int, typer.Option("--processes", "-p", min=1, help="Processes; one that dies is replaced.")] = 1,
    drain: Annotated[bool, typer.Option("--drain", help="End, with status 0, when nothing is left to do.")] = False,
    max_time: Annotated[float | None, typer.Option("--max-time", metavar="S", help="End after so many seconds.")] = None,
    grace: Annotated[float, typer.Option("--grace", metavar="S", min=0, help="Seconds for running tasks at the end.")] = 30.0,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", metavar="N", min=1, max=65535, help="Serve metrics for Prometheus; process i at N + i."),
    ] = None,
    metrics_host: Annotated[str, typer.Option("--metrics-host", metavar="HOST", help="Where they are served.")] = "127.0.0.1",
    log_format: Annotated[
        LogFormat | None, typer.Option("--log-format", help="How the log's lines look. [default: text, with --json json]")
    ] = None,
    ttl: Annotated[float, typer.Option("--ttl", min=1, hidden=True)] = 30.0,
    url: Url = None,
    json: Json = False,
    parent: Annotated[str, typer.Option("--parent", hidden=True)] = "",
    report: Annotated[Path | None, typer.Option("--report-modules", hidden=True)] = None,
) -> None:
    """Run tasks until stopped. Ctrl-C or SIGTERM lets running tasks finish; a second one gives them back at once.

    With --json the log is one JSON object a line, on standard output.
    """
    app = load(target, url, quiet=True)  # its store is told below
    if not app.tasks:
        raise UsageError(f"{target} has no tasks: decorate a function with @app.task")
    lines = log_format or (LogFormat.json if json else LogFormat.text)
    log_to(sys.stdout if json else sys.stderr, as_json=lines is LogFormat.json)
    counting = _counting(app) if metrics_port is not None and processes == 1 else None
    # made in any case: what is wrong with the options is said here, not by each child
    served = app.worker(queue, concurrency=concurrency, drain=drain, max_time=max_time, grace=grace, ttl=ttl, parent=parent)
    if not parent:
        _introduce(app, served.queues, json)
        _tell_empty(app, queue or ())
    if processes > 1:
        from buquet.worker.processes import Processes  # noqa: PLC0415 - only for parents

        options = ["--concurrency", str(concurrency), "--grace", str(grace), "--ttl", str(ttl)]
        for each in queue or ():
            options += ["--queue", each]
        options += [flag for flag, wanted in (("--drain", drain), ("--json", json)) if wanted]
        options += ["--log-format", log_format.value] if log_format else []

        def own_options(number: int) -> list[str]:
            return [] if metrics_port is None else ["--metrics-port", str(metrics_port + number), "--metrics-host", metrics_host]

        fleet = Processes(
            app.client, [target, "--url", app.url, *options], processes, grace=grace, max_time=max_time, each=own_options
        )
        with app:
            raise typer.Exit(fleet.run())
    if report is not None:
        from buquet.cli.dev import report_modules  # noqa: PLC0415 - only for its worker

        report_modules(report, app.clock)
    if parent:
        from buquet.worker.processes import watch_parent  # noqa: PLC0415 - only for children

        watch_parent(served.stop)
    stop_serving = _serve_metrics(served, counting, metrics_host, metrics_port) if counting and metrics_port else None
    try:
        served.run()
    finally:
        if stop_serving:
            stop_serving()
    app.close()


def _counting(app: App) -> CountingStore:
    """Have the App's requests counted."""
    from buquet.operate.bench import CountingStore  # noqa: PLC0415 - only with metrics

    made: list[CountingStore] = []

    def wrap(store: Store) -> Store:
        made.append(CountingStore(store))
        return made[0]

    app.wrap_store(wrap)
    return made[0]


def _serve_metrics(served: Worker, counting: CountingStore, host: str, port: int) -> Callable[[], None]:
    from buquet.operate.metrics import Metrics, serve  # noqa: PLC0415 - its package is optional

    metrics = Metrics(served, counting)
    served.telling.watchers.append(metrics)
    stop = serve(metrics, host, port)
    to_stderr(f"metrics: http://{host}:{port}/metrics")
    return stop


def _introduce(app: App, queues: tuple[str, ...], json: bool) -> None:
    """Say what was found: a task that is missing here was not imported."""
    url = app.client.store.url
    if json:
        tasks = [{"name": task.name, "queue": task.queue} for task in app.tasks.values()]
        print_json({"url": url, "tasks": tasks, "queues": queues})
        return
    names = ", ".join(f"{task.name} ({task.queue})" for task in app.tasks.values())
    for line in (url, f"tasks: {names}", f"queues: {', '.join(queues)}"):
        to_stderr(line)


def _tell_empty(app: App, named: Sequence[str]) -> None:
    """Warn of queues that were named and hold no task of this App: most likely a slip of the pen."""
    own = {each.queue for each in (*app.tasks.values(), *app.workflows.values())}
    for queue in dict.fromkeys(named):
        if queue not in own:
            log.warning("no task here is in queue %r; this App's queues are %s", queue, ", ".join(sorted(own)))
