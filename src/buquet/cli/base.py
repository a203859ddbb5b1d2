"""What all commands share: the typer application, the common options, and how a coroutine is run for a command."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer

from buquet import keys
from buquet.app import App
from buquet.cli.output import to_stderr
from buquet.errors import BucketMissing, StoreUnavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

PATIENCE = 15.0
"""Seconds: a person at a terminal wants to know sooner than a program that the store does not answer."""

cli = typer.Typer(
    name="buquet",
    help="Durable task queues in a bucket: S3, or one SQLite file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The store: sqlite:PATH or s3://BUCKET/PREFIX?endpoint=…  [default: BUQUET_URL, or sqlite:.buquet/buquet.db]",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Status = Annotated[
    str | None,
    typer.Option("--status", "-s", help="Only tasks of this status; also: retrying."),
]
Queue = Annotated[str | None, typer.Option("--queue", "-q", help="Only tasks of this queue.")]
Name = Annotated[str | None, typer.Option("--name", "-n", help="Only tasks of this name.")]
Tag = Annotated[list[str] | None, typer.Option("--tag", metavar="K=V", help="Only tasks with this tag; may be given again.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID…", help="Ids of tasks.")]
Target = Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the App is, such as tasks:app in the current folder.")]


def open_app(url: str | None) -> App:
    """Return an App without tasks on the store that the command is about."""
    app = App(url)
    app.patience = PATIENCE
    tell_default(app, url)
    return app


async def lacks_store(app: App) -> str:
    """Return what to say where nothing was ever stored; empty where something was. A look creates no store.

    Raises StoreUnavailable after 15 s: of a server that accepts connections and is silent, a request takes longer to fail.
    """
    reads = app.client.reads
    try:
        async with asyncio.timeout(PATIENCE):
            if await reads.get(keys.LAYOUT) is not None or await reads.list(keys.TASKS, limit=1):
                return ""
    except TimeoutError:
        raise StoreUnavailable(f"{app.url} did not answer within {PATIENCE:g} s") from None
    return f"there is no store at {app.url}: nothing was ever submitted there. `buquet init` or the first submit creates it"


def tell_default(app: App, url: str | None) -> None:
    """Say on stderr which store is used where nobody has named one."""
    if url is None and not app.named and not os.environ.get("BUQUET_URL"):
        to_stderr(f"store: {app.url}")


def run(app: App, work: Callable[[], Coroutine[Any, Any, T]], *, creates: bool = False) -> T:
    """Run a command's coroutine, and close the App after it. Raises BucketMissing where no store is, unless it `creates` one."""

    async def whole() -> T:
        async with app:
            if not creates and (problem := await lacks_store(app)):
                raise BucketMissing(problem)
            return await work()

    return asyncio.run(whole())


def load(target: str, url: str | None, *, quiet: bool = False) -> App:
    """Import MODULE:APP from the current folder or the path, and put it on `url` where that is given. Raises UsageError."""
    from buquet.cli.load import find_app  # noqa: PLC0415 - only for commands that import a user's module

    app = find_app(target, Path.cwd())
    if url is not None:
        app.use(url)
    if not quiet:
        tell_default(app, url)
    return app


def from_json(text: str, kind: Any, option: str, what: str) -> Any:
    """Return what an option says as JSON. Raises UsageError."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise UsageError(f"{option} takes a JSON {what}, and this is none: {text[:200]!r} ({error})") from None
