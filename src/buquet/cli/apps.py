"""How a command gets its App, by MODULE:APP or by the URL of a store, and runs on it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import typer

from buquet import keys
from buquet.app import App
from buquet.cli.output import to_stderr
from buquet.cli.parameters import Json, Url
from buquet.errors import BucketMissing, StoreUnavailable, UsageError

if TYPE_CHECKING:
    from types import ModuleType

P = ParamSpec("P")
T = TypeVar("T")
Answer: TypeAlias = Coroutine[Any, Any, bool | None]

PATIENCE = 15.0
"""Seconds to wait for a store that does not answer: a person at a terminal wants to know sooner than a program."""


def command(
    group: typer.Typer, name: str | None = None, *, panel: str | None = None, text: str | None = None, creates: bool = False
) -> Callable[[Callable[Concatenate[App, bool, P], Answer]], Callable[Concatenate[App, bool, P], Answer]]:
    """Make a command of a coroutine function. It takes an open App, whether to print JSON, and the options of its own.

    The command also has --url and --json. A `target` option names the module of the App; without one the App has no tasks.
    A command that returns False ends with exit status 1. Unless it `creates` a store, it raises BucketMissing without one.
    """

    def register(work: Callable[Concatenate[App, bool, P], Answer]) -> Callable[Concatenate[App, bool, P], Answer]:
        def call(*, url: str | None, json: bool, **options: Any) -> None:
            app = load_app(options["target"], url) if "target" in options else open_app(url)
            if run(app, lambda: anyhow(app, json, **options), creates=creates) is False:
                raise typer.Exit(1)

        anyhow: Callable[..., Answer] = work  # its options are known at run time only
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = list(inspect.signature(work, eval_str=True).parameters.values())[2:]
        shared = [
            inspect.Parameter("url", keyword, default=None, annotation=Url),
            inspect.Parameter("json", keyword, default=False, annotation=Json),
        ]
        parameters = [*(parameter.replace(kind=keyword) for parameter in own), *shared]
        # typer reads the options from these
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        group.command(name or work.__name__, help=text or work.__doc__, rich_help_panel=panel)(call)
        return work

    return register


def run(app: App, work: Callable[[], Coroutine[Any, Any, T]], *, creates: bool = False) -> T:
    """Run a command's coroutine on an open App. Raises BucketMissing without a store, unless the command `creates` one."""

    async def main() -> T:
        async with app:
            if not creates and (problem := await lacks_store(app)):
                raise BucketMissing(problem)
            return await work()

    return asyncio.run(main())


async def lacks_store(app: App) -> str:
    """Return a message if nothing was ever stored, else nothing. Reading commands create no store.

    Raises StoreUnavailable after 15 s. A request to a server that accepts connections and sends nothing takes longer to fail.
    """
    reads = app.client.reads
    try:
        async with asyncio.timeout(PATIENCE):
            if await reads.get(keys.LAYOUT) is not None or await reads.list(keys.TASKS, limit=1):
                return ""
    except TimeoutError:
        raise StoreUnavailable(f"{app.url} did not answer within {PATIENCE:g} s") from None
    return f"there is no store at {app.url}: nothing was ever submitted there. `buquet init` or the first submit creates it"


def open_app(url: str | None) -> App:
    """Return an App without tasks on the store of a URL, or on the default store."""
    app = App(url)
    app.patience = PATIENCE
    name_default(app, url)
    return app


def load_app(target: str, url: str | None, *, quiet: bool = False) -> App:
    """Import MODULE:APP, and use the store of `url` if there is one. Raises UsageError."""
    app = find_app(target, Path.cwd())
    if url is not None:
        app.use(url)
    if not quiet:
        name_default(app, url)
    return app


def name_default(app: App, url: str | None) -> None:
    """Print the store to stderr if neither the user nor the App has named one."""
    if url is None and not app.named and not os.environ.get("BUQUET_URL"):
        to_stderr(f"store: {app.url}")


def find_app(target: str, folder: Path) -> App:
    """Import `module:app` with `folder` on the path. Raises UsageError that says what is missing, and where it was expected."""
    name, _, attribute = target.partition(":")
    if not name or not attribute:
        msg = f"{target!r} does not name an App: write MODULE:APP, for instance tasks:app for `app = App()` in tasks.py"
        raise UsageError(msg)
    module = _import(name, folder)
    value: object = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if isinstance(value, App):
        return value
    apps = [f"{name}:{attribute}" for attribute, member in vars(module).items() if isinstance(member, App)]
    choice = f"it has {', '.join(apps)}" if apps else "it has no App; make one with `app = buquet.App()`"
    problem = f"has no {attribute!r}" if value is None else f"has a {type(value).__name__} named {attribute!r}, not an App"
    raise UsageError(f"module {name} {problem}: {choice}")


def _import(name: str, folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            msg = f"there is no module {name!r} in {folder} or on Python's path. Go to the folder that holds it, or install it"
            raise UsageError(msg) from None
        raise UsageError(f"module {name} does not import: it needs {error.name!r}, which is not installed here") from None
    except SystemExit as error:
        msg = (
            f"module {name} ends the program when it is imported (exit {error.code}). Put that under `if __name__ == '__main__':`"
        )
        raise UsageError(msg) from None
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything
        lines = traceback.format_exception(error)
        raise UsageError(f"module {name} does not import. It raised:\n{''.join(lines[-3:]).rstrip()}") from None
