"""Commands about queues and workers as a whole: pause, resume, drain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from buquet.cli.base import Json, Url, cli, open_app, run
from buquet.cli.output import print_json, print_table
from buquet.errors import BuquetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from buquet.app import App

    One = Callable[[str], Awaitable[str]]

Queues = Annotated[list[str] | None, typer.Argument(metavar="[QUEUE…]", help="Names of queues.")]
Crew = Annotated[
    list[str] | None,
    typer.Option(
        "--worker", "-w", metavar="WORKER", help="A worker instead, by its id as `buquet workers` shows it; again for more."
    ),
]


@cli.command()
def pause(queues: Queues = None, workers: Crew = None, url: Url = None, json: Json = False) -> None:
    """Let workers claim nothing more of these queues, or these workers nothing at all. What runs goes on; submits are stored."""
    app = open_app(url)

    async def queue(name: str) -> str:
        return "paused" if await app.apause_queue(name) else "was paused already"

    async def worker(name: str) -> str:
        await app.apause_worker(name)
        return "asked to pause"

    _queues_or_workers(app, queues, queue, workers, worker, json=json)


@cli.command()
def resume(queues: Queues = None, workers: Crew = None, url: Url = None, json: Json = False) -> None:
    """Let workers claim from these queues again, or these workers again."""
    app = open_app(url)

    async def queue(name: str) -> str:
        return "resumed" if await app.aresume_queue(name) else "was not paused"

    async def worker(name: str) -> str:
        await app.aresume_worker(name)
        return "asked to go on"

    _queues_or_workers(app, queues, queue, workers, worker, json=json)


def _queues_or_workers(
    app: App, queues: list[str] | None, queue: One, workers: list[str] | None, worker: One, *, json: bool
) -> None:
    if bool(queues) == bool(workers):
        raise UsageError("name queues, or workers with --worker; not both, and not neither")
    if queues:
        each_of(app, "queue", queues, queue, json=json)
    else:
        each_of(app, "worker", workers or [], worker, json=json)


@cli.command()
def drain(
    workers: Annotated[list[str], typer.Argument(metavar="WORKER…", help="Ids of workers, as `buquet workers` shows them.")],
    url: Url = None,
    json: Json = False,
) -> None:
    """Ask workers to claim nothing more, to finish what they run, however long that takes, and to end with status 0."""
    app = open_app(url)

    async def one(worker: str) -> str:
        await app.adrain_worker(worker)
        return "asked to drain"

    each_of(app, "worker", workers, one, json=json)


def each_of(app: App, what: str, names: list[str], one: One, *, json: bool) -> None:
    """Do it to each, go on past those that refuse, print the outcomes; status 1 when any did."""

    async def work() -> list[dict[str, Any]]:
        outcomes: list[dict[str, Any]] = []
        for name in dict.fromkeys(names):
            try:
                outcomes.append({what: name, "ok": True, "outcome": await one(name)})
            except BuquetError as error:
                outcomes.append({what: name, "ok": False, "outcome": str(error)})
        return outcomes

    outcomes = run(app, work)
    if json:
        print_json(outcomes)
    else:
        print_table((what, "outcome"), [(each[what], each["outcome"]) for each in outcomes])
    if not all(each["ok"] for each in outcomes):
        raise typer.Exit(1)
