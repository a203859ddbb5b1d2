"""The options and arguments that commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer
from typer import Argument, Option
from typer.core import TyperGroup

from buquet.errors import UsageError
from buquet.insights import tasks

TASKS, RUNS, FLEET, MONITOR, STORE, START = PANELS = (
    "Tasks",
    "Workflows and schedules",
    "Workers and queues",
    "Monitoring",
    "The store",
    "Getting started",
)
"""The groups of commands in `buquet --help`."""


class _InPanels(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: PANELS.index(vars(self.commands[name])["rich_help_panel"]))


cli = typer.Typer(
    name="buquet",
    cls=_InPanels,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def status_option(words: Sequence[str], only: str = "what has this status", metavar: str = "STATUS") -> Any:
    """Return the option --status, which takes one of some words."""

    def parse(text: str) -> str:
        if text not in words:
            raise UsageError(f"--status is one of {', '.join(words)}, not {text!r}")
        return text

    return Option("--status", "-s", metavar=metavar, parser=parse, help=f"Only {only}: {', '.join(words)}.")


def _tag(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"--tag takes NAME=VALUE, not {text!r}")
    return name, value


def json_option(name: str, kind: Any, what: str, text: str) -> Any:
    """Return an option that takes JSON of a type."""

    def parse(value: str) -> Any:
        try:
            return msgspec.json.decode(value, type=kind)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise UsageError(f"{name} takes a JSON {what}, not {value[:200]!r} ({error})") from None

    return Option(name, metavar="JSON", parser=parse, help=text)


Url = Annotated[
    str | None,
    Option(
        "--url",
        metavar="URL",
        help="The store: sqlite:PATH or s3://BUCKET/PREFIX?endpoint=…; by default BUQUET_URL, or sqlite:.buquet/buquet.db.",
    ),
]
Json = Annotated[bool, Option("--json", help="Print JSON, for programs.")]
Target = Annotated[str, Argument(metavar="MODULE:APP", help="The App, such as tasks:app for `app` in ./tasks.py.")]
Args = Annotated[Any, json_option("--args", tuple[Any, ...], "array", "Positional arguments, as a JSON array.")]
Kwargs = Annotated[Any, json_option("--kwargs", dict[str, Any], "object", "Keyword arguments, as a JSON object.")]
Status = Annotated[tasks.Status | None, status_option(tasks.STATUSES)]
Queue = Annotated[str | None, Option("--queue", "-q", help="Only tasks in this queue.")]
Name = Annotated[str | None, Option("--name", "-n", help="Only tasks with this name.")]
Tag = Annotated[list[Any] | None, Option("--tag", metavar="K=V", parser=_tag, help="Only with this tag. Repeatable.")]
NewTag = Annotated[list[Any] | None, Option("--tag", metavar="K=V", parser=_tag, help="Add this tag. Repeatable.")]
Limit = Annotated[int, Option("--limit", "-l", min=1, help="List at most this many, the last changed first.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would be done, and change nothing.")]
