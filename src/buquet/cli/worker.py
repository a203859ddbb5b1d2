"""The command that runs tasks."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Annotated

import typer

from buquet.cli.base import Target, Url, cli, load
from buquet.errors import UsageError
from buquet.worker.processes import Processes


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
    url: Url = None,
    parent: Annotated[str, typer.Option("--parent", hidden=True)] = "",
) -> None:
    """Run tasks until stopped. Ctrl-C or SIGTERM lets running tasks finish; a second one gives them back at once."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    app = load(target, url)
    if not app.tasks:
        msg = f"{target} has no tasks: decorate a function with @app.task"
        raise UsageError(msg)
    if processes > 1:
        options = ["--concurrency", str(concurrency), "--grace", str(grace)]
        for each in queue or ():
            options += ["--queue", each]
        options += ["--drain"] if drain else []
        options += ["--max-time", str(max_time)] if max_time else []
        fleet = Processes(app.client, [target, "--url", app.url, *options], processes, grace=grace)
        with app:
            fleet.run()
        return
    served = app.worker(queue, concurrency=concurrency, drain=drain, max_time=max_time, grace=grace, parent=parent)
    if not parent:
        names = ", ".join(f"{task.name} ({task.queue})" for task in app.tasks.values())
        print(f"{app.url}\ntasks: {names}\nqueues: {', '.join(served.queues)}", file=sys.stderr)
    else:
        threading.Thread(target=_watch_parent, daemon=True).start()
    served.run()
    app.close()


def _watch_parent() -> None:
    """End when the parent is gone: it would not see this process die, nor stop it."""
    sys.stdin.buffer.read()  # the parent holds the other end open, and never writes
    os.kill(os.getpid(), 15)
