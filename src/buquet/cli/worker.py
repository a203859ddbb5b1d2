"""The command that runs tasks."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from buquet.cli.base import Json, Target, Url, cli, load
from buquet.cli.output import print_json, to_stderr
from buquet.errors import UsageError

if TYPE_CHECKING:
    from buquet.app import App


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
    ttl: Annotated[float, typer.Option("--ttl", min=1, hidden=True)] = 30.0,
    url: Url = None,
    json: Json = False,
    parent: Annotated[str, typer.Option("--parent", hidden=True)] = "",
) -> None:
    """Run tasks until stopped. Ctrl-C or SIGTERM lets running tasks finish; a second one gives them back at once.

    With --json the log is one JSON object a line, on standard output.
    """
    app = load(target, url, quiet=True)  # its store is told below
    if not app.tasks:
        msg = f"{target} has no tasks: decorate a function with @app.task"
        raise UsageError(msg)
    _log(json)
    # made in any case: what is wrong with the options is said here, not by each child
    served = app.worker(queue, concurrency=concurrency, drain=drain, max_time=max_time, grace=grace, ttl=ttl, parent=parent)
    if not parent:
        _introduce(app, served.queues, json)
    if processes > 1:
        options = ["--concurrency", str(concurrency), "--grace", str(grace), "--ttl", str(ttl)]
        for each in queue or ():
            options += ["--queue", each]
        options += [flag for flag, wanted in (("--drain", drain), ("--json", json)) if wanted]
        raise typer.Exit(_fleet(app, [target, "--url", app.url, *options], processes, grace, max_time))
    if parent:
        from buquet.worker.processes import watch_parent  # noqa: PLC0415 - only for children

        watch_parent(served.stop)
    served.run()
    app.close()


def _fleet(app: App, arguments: list[str], count: int, grace: float, max_time: float | None) -> int:
    from buquet.worker.processes import Processes  # noqa: PLC0415 - only for parents

    fleet = Processes(app.client, arguments, count, grace=grace, max_time=max_time)
    with app:
        return fleet.run()


def _introduce(app: App, queues: tuple[str, ...], json: bool) -> None:
    """Say what was found: a task that is missing here was not imported."""
    url = app.client.store.url
    if json:
        tasks = [{"name": task.name, "queue": task.queue} for task in app.tasks.values()]
        print_json({"url": url, "tasks": tasks, "queues": queues})
        return
    names = ", ".join(f"{task.name} ({task.queue})" for task in app.tasks.values())
    to_stderr(f"{url}\ntasks: {names}\nqueues: {', '.join(queues)}")


class _Lines(logging.Formatter):
    """Makes a JSON object of each line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, object] = {
            "at": int(record.created * 1000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: vars(record)[name] for name in ("task", "task_name", "attempt") if name in vars(record)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _log(json: bool) -> None:
    """Log readable lines, unless the user's module has set up logging in its own way."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stdout if json else sys.stderr
    )
    if json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Lines())
