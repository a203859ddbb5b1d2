"""The command `buquet`: gathers the commands, and turns errors into one line and an exit status."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer import Option

from buquet import __version__
from buquet.cli import demo, dev, monitor, runs, schedules, store, tasks, workers
from buquet.cli.output import coloured
from buquet.cli.parameters import cli
from buquet.errors import BuquetError, UsageError
from buquet.printing import indented, printable

__all__ = ["demo", "dev", "main", "monitor", "runs", "schedules", "store", "tasks", "workers"]


def _version(asked: bool) -> None:
    if asked:
        print(f"buquet {__version__}")
        raise typer.Exit


@cli.callback()
def root(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Durable task queues and workflows in a bucket: S3, or one SQLite file."""


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed or refused, 2 wrong usage, 130 interrupted."""
    try:
        cli()
    except UsageError as error:
        _print_error(indented(str(error)))  # this program's own text, which may have several lines
        sys.exit(2)
    except (BuquetError, TimeoutError) as error:
        _print_error(printable(str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # a reader such as `head` has closed the pipe; without this, Python's flush at exit would report that, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _print_error(text: str) -> None:
    print(f"{coloured('error:', 'red', sys.stderr)} {text}", file=sys.stderr)
