"""The command that serves the dashboard."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from buquet.cli.apps import load_app, open_app, run
from buquet.cli.output import log_to, print_json, say, to_stderr
from buquet.cli.parameters import MONITOR, Json, Url, cli
from buquet.errors import UsageError, install

if TYPE_CHECKING:
    from collections.abc import Collection

    from buquet.app import App

Host = Annotated[str, Option("--host", help="The address to listen on.")]
Port = Annotated[int, Option("--port", min=0, max=65535, help="The port to listen on; 0 takes any.")]


@cli.command(rich_help_panel=MONITOR)
def ui(
    target: Annotated[str | None, Argument(metavar="MODULE:APP", help="Show the store of this App.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    password: Annotated[
        str | None,
        Option(
            "--password",
            envvar="BUQUET_UI_PASSWORD",
            show_envvar=True,
            help="Ask each browser for this password. Other users of this machine can read it in the command's arguments.",
        ),
    ] = None,
    password_file: Annotated[
        Path | None,
        Option(
            "--password-file",
            metavar="FILE",
            envvar="BUQUET_UI_PASSWORD_FILE",
            show_envvar=True,
            help="Ask each browser for the password in the first line of this file.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        Option("--allow-host", metavar="NAME", help="Without a password, also serve under this name. Repeatable."),
    ] = None,
    read_only: Annotated[bool, Option("--read-only", help="Show everything, change nothing.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Serve the dashboard until stopped; on this machine only, unless --host says otherwise."""
    need_ui()
    from buquet.dashboard.guard import is_loopback  # noqa: PLC0415 - needs the extra `ui`

    if password_file is not None:
        password = _read_password(password_file, password)
    if password is not None and not password:
        raise UsageError("the password is empty: give one, or leave --password, --password-file and their variables out")
    if not is_loopback(host):
        if password is None and not read_only:
            msg = (
                f"on {host} others can reach this dashboard, and could cancel and redrive tasks. "
                "Give it a password (--password-file, BUQUET_UI_PASSWORD or --password), or --read-only"
            )
            raise UsageError(msg)
        risk = (
            "the password and every page travel unencrypted, unless a proxy adds TLS"
            if password
            else "anybody who reaches it can read everything"
        )
        to_stderr(f"warning: this dashboard listens on {host}: {risk}")
    app = load_app(target, url) if target else open_app(url)
    log_to(sys.stderr)
    serve(app, host, port, password, read_only, hosts=allow_host or (), json=json)


def _read_password(file: Path, other: str | None) -> str:
    """Return the password in a file. Raises UsageError if the file cannot be read, or if there is another password."""
    if other is not None:
        msg = "there are two passwords: one in --password (or BUQUET_UI_PASSWORD), and one in --password-file. Leave one out"
        raise UsageError(msg)
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the password cannot be read from {file}: {error}") from None


def serve(
    app: App, host: str, port: int, password: str | None, read_only: bool, *, hosts: Collection[str] = (), json: bool
) -> None:
    """Serve the dashboard until stopped, and print its address."""
    from buquet.dashboard.serve import listen, make_server  # noqa: PLC0415 - needs the extra `ui`

    sock, address = listen(host, port)

    async def work() -> None:
        server = make_server(app, password=password, read_only=read_only, host=host, hosts=hosts)
        if json:
            print_json({"address": address, "url": app.url, "pid": os.getpid()})
        else:
            say(f"dashboard of {app.url}: {address}")
        await server.serve(sockets=[sock])

    run(app, work)


def need_ui() -> None:
    """Raise UsageError if the dashboard's dependencies are not installed."""
    missing = [name for name in ("itsdangerous", "jinja2", "starlette", "uvicorn", "watchfiles") if find_spec(name) is None]
    if missing:
        raise UsageError(f"the dashboard needs {', '.join(missing)}, which this Python does not have: {install('ui')}")
