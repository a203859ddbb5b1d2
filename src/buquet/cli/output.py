"""How commands print: tables for people, JSON for programs, colours only on a terminal."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from buquet.concurrency import each_of
from buquet.errors import BuquetError
from buquet.printing import LONGEST, counted, json_line, printable
from buquet.worker.logs import JsonLines, TaskFields, TextLines

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

UNBROKEN = 36
"""A column of words no longer than this is never narrowed: an id broken over two lines cannot be copied."""
AT_ONCE = 32
"""Names that a command acts on side by side."""
LONG_SCAN = 500
"""Records from which on a scan shows its progress."""
ANSI = {"dim": 2, "red": 31, "green": 32, "yellow": 33, "magenta": 35, "cyan": 36}
COLOURS = {
    "pending": "yellow",
    "retrying": "red",
    "retried": "yellow",
    "started": "cyan",
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "lost": "yellow",
    "cancelled": "magenta",
    "expired": "magenta",
    "pruned": "dim",
    "dead": "red",
    "draining": "yellow",
    "paused": "yellow",
    "alive": "green",
}
"""Colours of words."""


def print_json(value: Any) -> None:
    """Print one JSON value on a line of its own."""
    sys.stdout.write(json_line(value) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str = "nothing") -> None:
    """Print a table: drawn and coloured on a terminal, plain aligned columns elsewhere."""
    cells = [["" if value is None else printable(str(value)) for value in row] for row in rows]
    if not cells:
        print(empty)
        return
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - slow to import, and not needed in pipes
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, header_style="bold", pad_edge=False)
        for index, column in enumerate(columns):
            unbroken = all(len(row[index]) <= UNBROKEN and " " not in row[index] for row in cells)
            table.add_column(column, overflow="fold", no_wrap=unbroken)
        for row in cells:
            table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
        Console(highlight=False).print(table)
        return
    lines = [list(columns), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def coloured(text: str, colour: str | None, stream: TextIO | None = None) -> str:
    """Return a text in a colour of ANSI, if the stream (standard output) is a terminal."""
    if colour is None or not (stream or sys.stdout).isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{ANSI[colour]}m{text}\033[0m"


def moment(ms: int) -> str:
    """Return milliseconds since 1970 as local time, to the millisecond, with its zone.

    A number outside of the calendar, as a damaged record may hold, is returned as that number, or as `?`.
    """
    if not ms:
        return ""
    try:
        local = datetime.fromtimestamp(ms / 1000, UTC).astimezone()
        return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03d} {local:%Z}"
    except (ValueError, OverflowError, OSError):
        return str(ms) if abs(ms) < LONGEST else "?"


def beginning(text: str, most: int = 80) -> str:
    """Return a text of at most `most` characters; a longer one is cut, and marked with …."""
    return text if len(text) <= most else f"{text[:most]}…"


def say(text: str) -> None:
    """Print a line of the command's answer."""
    print(printable(text), flush=True)


def to_stderr(text: str) -> None:
    """Print a line that is not part of the command's answer."""
    print(printable(text), file=sys.stderr)


def print_unreadable(problems: Iterable[str]) -> None:
    """Name what could not be read, once each."""
    for problem in dict.fromkeys(problems):
        to_stderr(f"unreadable: {problem}")


async def act_on(
    what: str, names: Iterable[str], act: Callable[[str], Awaitable[Any]], json: bool, done: str = "", undone: str = ""
) -> bool:
    """Act on each name, and print the outcomes: `undone` for False, else `done` or the result. Return whether all worked."""

    async def one(name: str) -> dict[str, Any]:
        try:
            result = await act(name)
        except BuquetError as error:
            return {what: name, "ok": False, "outcome": str(error)}
        return {what: name, "ok": True, "outcome": undone if result is False else done or result}

    outcomes = await each_of(dict.fromkeys(names), one, AT_ONCE)
    if json:
        print_json(outcomes)
    else:
        print_table((what, "outcome"), [(outcome[what], outcome["outcome"]) for outcome in outcomes], f"no {what} matches")
    return all(outcome["ok"] for outcome in outcomes)


def scan_progress() -> Callable[[int, int], None] | None:
    """Return a function that shows the progress of a long scan; None if there is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        if total >= LONG_SCAN:
            text = "" if done == total else f"{done:,} of {counted(total, 'record')} read"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return show


def log_to(stream: TextIO, *, as_json: bool = False) -> None:
    """Log to a stream, unless the user's module has set up logging. Records name their tasks in both cases."""
    logging.basicConfig(level=logging.INFO, stream=stream)
    for handler in logging.getLogger().handlers:
        handler.addFilter(TaskFields())
        if as_json:
            handler.setFormatter(JsonLines())
        elif isinstance(handler, logging.StreamHandler) and handler.formatter and handler.formatter._fmt == logging.BASIC_FORMAT:  # noqa: SLF001
            handler.setFormatter(TextLines())
