"""The command that serves the dashboard."""

from __future__ import annotations

import asyncio
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from buquet.cli.base import Json, Url, cli, load, open_app
from buquet.cli.output import print_json, say, to_stderr
from buquet.errors import UsageError

if TYPE_CHECKING:
    from buquet.app import App

Host = Annotated[str, typer.Option("--host", help="The address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="The port to listen on; 0 takes any.")]


@cli.command()
def ui(
    target: Annotated[str | None, typer.Argument(metavar="[MODULE:APP]", help="An App whose store is shown.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    password: Annotated[
        str | None,
        typer.Option("--password", envvar="BUQUET_UI_PASSWORD", show_envvar=True, help="Ask each browser for this password."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Show everything, change nothing.")] = False,
    url: Url = None,
    json: Json = False,
) -> None:
    """Serve the dashboard until stopped, on this machine only unless --host says otherwise."""
    need_ui()
    from buquet.dashboard.guard import is_loopback  # noqa: PLC0415 - needs the extra `ui`

    if password is not None and not password:
        msg = "the password is empty: give one, or leave --password (and BUQUET_UI_PASSWORD) out"
        raise UsageError(msg)
    if not is_loopback(host):
        if password is None and not read_only:
            msg = (
                f"on {host} others can reach this dashboard, and could cancel and redrive tasks. "
                "Give it --password (or BUQUET_UI_PASSWORD), or --read-only"
            )
            raise UsageError(msg)
        risk = (
            "the password and all that is shown travel unencrypted, unless a proxy adds TLS"
            if password
            else "anybody who reaches it can read everything"
        )
        to_stderr(f"warning: this dashboard listens on {host}: {risk}")
    app = load(target, url) if target else open_app(url)
    serve(app, host, port, password, read_only, json=json)


def serve(app: App, host: str, port: int, password: str | None, read_only: bool, *, json: bool) -> None:
    """Listen, say where, and serve until stopped."""
    from buquet.dashboard.serve import listen, make_server  # noqa: PLC0415 - needs the extra `ui`

    sock, address = listen(host, port)

    async def work() -> None:
        async with app:
            await app.client.open()
            server = make_server(app, password=password, read_only=read_only, host=host)
            if json:
                print_json({"address": address, "url": app.url, "pid": os.getpid()})
            else:
                say(f"dashboard of {app.url}: {address}")
            await server.serve(sockets=[sock])

    asyncio.run(work())


def need_ui() -> None:
    """Raise UsageError where the dashboard's dependencies are not installed."""
    missing = [name for name in ("jinja2", "starlette", "uvicorn", "watchfiles") if find_spec(name) is None]
    if missing:
        msg = f"the dashboard needs {', '.join(missing)}, which this Python does not have: pip install 'buquet[ui]'"
        raise UsageError(msg)
