"""How commands print: tables for people, JSON for programs, colours only on a terminal."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from buquet.printing import counted, json_line, printable
from buquet.printing import duration as duration
from buquet.printing import in_seconds as in_seconds
from buquet.worker.logs import JsonLines, TaskFields, TextLines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LARGEST = 10**20
"""From here on a number would only fill the line."""
WHOLE = 36
"""A column of words up to this long is never narrower than they are."""
LONG = 500
"""From so many records on it is shown how far a scan is."""
COLOURS = {
    "pending": "yellow",
    "retrying": "red",
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
    "expired": "magenta",
    "pruned": "dim",
    "dead": "red",
    "draining": "yellow",
    "paused": "yellow",
    "alive": "green",
    "ok": "green",
    "not ok": "red",
}


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
            # an id that is broken over two lines cannot be copied
            whole = all(len(row[index]) <= WHOLE and " " not in row[index] for row in cells)
            table.add_column(column, overflow="fold", no_wrap=whole)
        for row in cells:
            table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
        Console(highlight=False).print(table)
        return
    widths = [max(len(row[index]) for row in [list(columns), *cells]) for index in range(len(columns))]
    for row in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def moment(ms: int) -> str:
    """Return milliseconds since 1970 as a local time, to the millisecond, with its zone.

    What is no time is returned as the number that it is, or as `?`.
    """
    if not ms:
        return ""
    try:
        local = datetime.fromtimestamp(ms / 1000, UTC).astimezone()
        return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03d} {local:%Z}"
    except (ValueError, OverflowError, OSError):  # a record may hold any number
        return str(ms) if abs(ms) < LARGEST else "?"


def beginning(text: str, most: int = 80) -> str:
    """Return a text, or its first characters and a mark that it goes on."""
    return text if len(text) <= most else f"{text[:most]}…"


def say(text: str) -> None:
    """Print a line of the command's answer."""
    print(printable(text), flush=True)


def to_stderr(text: str) -> None:
    """Print a line that is not the command's answer."""
    print(printable(text), file=sys.stderr)


def scan_progress() -> Callable[[int, int], None] | None:
    """Return what shows how far a long scan is, on a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, whole: int) -> None:
        if whole >= LONG:
            text = "" if done == whole else f"{done:,} of {counted(whole, 'record')} read"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return show


def log_to(stream: TextIO, *, as_json: bool = False) -> None:
    """Log to a stream, unless the user's module has set up logging in its own way; tasks are named in either."""
    logging.basicConfig(level=logging.INFO, stream=stream)
    for handler in logging.getLogger().handlers:
        handler.addFilter(TaskFields())
        if as_json:
            handler.setFormatter(JsonLines())
        elif isinstance(handler, logging.StreamHandler) and handler.formatter and handler.formatter._fmt == logging.BASIC_FORMAT:  # noqa: SLF001
            handler.setFormatter(TextLines())
