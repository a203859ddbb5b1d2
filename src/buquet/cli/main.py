"""The command `buquet`: gathers the commands, and turns errors into one line and an exit status."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from buquet import __version__
from buquet.cli import change, control, demo, dev, look, runs, schedule, store, tasks, ui, watch, worker
from buquet.cli.base import cli
from buquet.errors import BuquetError, UsageError
from buquet.printing import indented, printable

__all__ = ["change", "control", "demo", "dev", "look", "main", "runs", "schedule", "store", "tasks", "ui", "watch", "worker"]


def _version(asked: bool) -> None:
    if asked:
        print(f"buquet {__version__}")
        raise typer.Exit


@cli.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Durable task queues in a bucket: S3, or one SQLite file."""


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 the thing asked for failed, 2 wrong usage, 130 interrupted."""
    try:
        cli()
    except UsageError as error:
        _say(error)
        sys.exit(2)
    except (BuquetError, TimeoutError) as error:
        _say(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # the reader, such as `head`, has had enough; Python's own flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _say(error: Exception) -> None:
    colour, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    # the text of a UsageError is the program's own and may have several lines; other errors may quote the bucket
    text = indented(str(error)) if isinstance(error, UsageError) else printable(str(error))
    print(f"{colour}error:{plain} {text}", file=sys.stderr)
