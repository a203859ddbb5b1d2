"""What every request passes: who may come in, where a form may come from, and the headers of every answer.

- With a password, only a logged-in session sees anything.
- A POST must come from a page of this server (Origin) and carry its session's token. Read-only, only the login takes one.
- Without a password, only known names are served: a page elsewhere could have its own name resolve to this address (DNS
  rebinding). On a loopback address, the known names are those of this machine. Elsewhere, addresses and `hosts` are known, too.
- Requests from pages of other sites are refused (Sec-Fetch-Site). If a person follows a link there, the dashboard opens itself
  again, at once or after a click where that costs many requests: only then does the browser send the session's cookie.
- The Content-Security-Policy allows only this server's own scripts, styles, frames and forms.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

from markupsafe import Markup, escape
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from buquet.dashboard.sessions import form_token

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from buquet.dashboard.sessions import Logins

MOST_BYTES = 1 << 20
"""Bytes of a form, which may hold the value of a signal."""
SLOWEST = 10.0
"""Seconds within which a whole form must arrive."""
OPEN = ("/login", "/static/")
"""Paths that need no password."""
COSTLY = {"all", "key", "tag"}
"""Fields of searches that read every record."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # not "no-referrer": browsers would send `Origin: null` with our own forms
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass
class Guard:
    """Middleware: refuses requests, and adds headers to answers."""

    app: ASGIApp
    logins: Logins
    read_only: bool
    loopback: bool
    hosts: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("cache-control", "max-age=3600" if request.url.path.startswith("/static/") else "no-store")
            await send(message)

        refusal = await self._refusal(request)
        await (refusal or self.app)(scope, receive, answer)

    async def _refusal(self, request: Request) -> Response | None:
        protected = self.logins.password is not None
        if not protected and not self._is_ours(request.headers.get("host", "")):
            return _no(421, "this dashboard is not known by this name: open it by its address, or start it with --allow-host")
        # another port of this machine is another site
        if request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
            return _from_elsewhere(request)
        if protected and not request.url.path.startswith(OPEN) and not self.logins.has(request):
            if request.method == "GET" and request.url.path != "/events":
                return RedirectResponse(f"/login?back={quote(address_of(request), safe='')}", 303)
            return _no(401, "log in first: this dashboard has a password")
        return await self._refused_form(request) if request.method == "POST" else None

    def _is_ours(self, host: str) -> bool:
        """Return whether a Host header names this dashboard."""
        name = _name_in(host)
        if name in self.hosts or "*" in self.hosts or is_loopback(name) or name.endswith(".localhost"):
            return True
        return not self.loopback and _address(name) is not None

    async def _refused_form(self, request: Request) -> Response | None:
        """Read a form, and check where it comes from."""
        if self.read_only and request.url.path not in {"/login", "/logout"}:
            return _no(403, "this dashboard was started with --read-only: nothing can be changed through it")
        origin = request.headers.get("origin", "")
        if origin.partition("://")[2] != request.headers.get("host"):
            return _no(403, "this form comes from another site, or the browser does not say from which: nothing was done")
        body = b""
        try:
            async with asyncio.timeout(SLOWEST):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        return _no(413, f"a form has at most {MOST_BYTES:,} bytes")
        except TimeoutError:
            return _no(408, f"the form did not arrive within {SLOWEST:g} s")
        try:
            form = parse_qs(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=100)
        except ValueError:
            return _no(400, "this is no form of this dashboard")
        request.state.form = {name: values[-1] for name, values in form.items()}
        if not hmac.compare_digest(form_token(request).encode(), request.state.form.get("token", "").encode()):
            return _no(403, "this page is too old, and nothing was done: go back, load it again, and try once more")
        return None


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address.

    >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("192.0.2.1")
    (True, True, False)
    """
    ip = _address(address)
    return address == "localhost" or (ip is not None and ip.is_loopback)


def _name_in(host: str) -> str:
    """Return the name or address in a Host header, in lower case."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _no(status: int, text: str) -> Response:
    return PlainTextResponse(text + "\n", status)


def _from_elsewhere(request: Request) -> Response:
    """Refuse a request from a page of another site. For a person who followed a link, load the address from here."""
    headers = request.headers
    followed = (request.method, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("GET", "navigate", "document")
    if not followed:
        return _no(403, "a page of another site asked for this, and was refused: open the dashboard itself")
    address = escape(local(address_of(request)))
    costly = request.url.path.endswith("/versions") or not COSTLY.isdisjoint(request.query_params)
    again = "" if costly else Markup('<meta http-equiv="refresh" content="0; url={}">').format(address)
    page = Markup('<!doctype html><meta charset="utf-8"><title>buquet</title>{}<p><a href="{}">Open the dashboard</a>')
    return HTMLResponse(page.format(again, address))


def address_of(request: Request) -> str:
    """Return a request's path and query."""
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def local(path: str | None) -> str:
    """Return the path on this server to go back to; the first page if the path leads elsewhere.

    >>> local("/tasks?page=2"), local("//evil.example"), local("https://evil.example"), local(None)
    ('/tasks?page=2', '/', '/', '/')
    """
    if path is None or not path.startswith("/") or path.startswith(("//", "/\\")) or not path.isprintable():
        return "/"
    return path
