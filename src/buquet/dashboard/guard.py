"""What every request goes through: who may come in, where a form may come from, and the headers of every answer.

- A session is a signed cookie, HttpOnly and SameSite=Strict. With a password, only one that has given it sees anything.
- A POST must come from a page of this server (Origin) and carry its session's token. Read-only, none is taken but the login.
- Without a password, only known names are served: a page elsewhere whose name is made to point here (DNS rebinding) is refused.
  On a loopback address these are the names of this machine, else also every address and the names that `hosts` adds.
- What the page of another site asks for is refused (Sec-Fetch-Site). Where somebody follows a link from there, the dashboard
  opens itself again, or by a press where that costs many requests: only then does the browser send the session's cookie.
- No script, style, frame or form from anywhere else: the Content-Security-Policy allows this server's own files only.
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

from markupsafe import Markup, escape
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.datastructures import URL
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from buquet.dashboard.sessions import Session, Sessions

LARGEST = 1 << 20
"""Bytes of a form: a signal's value is in one."""
SLOWEST = 10.0
"""Seconds in which the whole of a form must have come."""
OPEN = ("/login", "/static/")
"""What may be seen without the password."""
COSTLY = {"all", "key", "tag"}
"""Fields of a search that reads every record."""
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


class Guard:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, *, sessions: Sessions, read_only: bool, loopback: bool, hosts: Collection[str]) -> None:
        self.app = app
        self.sessions = sessions
        self.read_only = read_only
        self.loopback = loopback
        self.hosts = {each.lower() for each in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        session = self.sessions.read(request.cookies.get(self.sessions.cookie_name("session", request.url)))
        fresh = session is None
        session = session or self.sessions.new()
        request.state.session = session

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "max-age=3600" if request.url.path.startswith("/static/") else "no-store")
                # with what comes from another site a browser sends no cookie, though it may have one
                gives = fresh and not is_foreign(request) and not request.url.path.startswith("/static/")
                if gives and "set-cookie" not in headers:
                    headers.append("set-cookie", self.cookie(session, request.url))
            await send(message)

        refusal = await self._refusal(request, session)
        await (refusal or self.app)(scope, receive, answer)

    def cookie(self, session: Session, url: URL) -> str:
        """Return the header that gives a browser its session."""
        pair = f"{self.sessions.cookie_name('session', url)}={self.sessions.cookie(session)}"
        return f"{pair}; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if url.scheme == "https" else "")

    async def _refusal(self, request: Request, session: Session) -> Response | None:
        path = request.url.path
        if self.sessions.password is None and not self._is_ours(request.headers.get("host", "")):
            return _no(421, "this dashboard is not known by this name: open it by its address, or start it with --allow-host")
        if is_foreign(request):
            return _from_elsewhere(request)
        if self.sessions.password is not None and not session.inside and not path.startswith(OPEN):
            if request.method == "GET" and path != "/events":
                back = path + (f"?{request.url.query}" if request.url.query else "")
                return RedirectResponse(f"/login?back={quote(back, safe='')}", 303)
            return _no(401, "log in first: this dashboard has a password")
        if request.method == "POST":
            return await self._refused_form(request, session)
        return None

    def _is_ours(self, host: str) -> bool:
        """Tell whether a Host header names this dashboard."""
        name = _name_in(host)
        if name in self.hosts or "*" in self.hosts or is_here(host):
            return True
        return not self.loopback and _address(name) is not None

    async def _refused_form(self, request: Request, session: Session) -> Response | None:
        """Read the form, and check where it comes from."""
        if self.read_only and request.url.path not in {"/login", "/logout"}:
            return _no(403, "this dashboard was started with --read-only: nothing can be changed through it")
        origin = request.headers.get("origin", "")
        if origin.partition("://")[2] != request.headers.get("host"):
            return _no(
                403, "this form comes from another site (or your browser does not say from which), and was not carried out"
            )
        body = b""
        try:
            async with asyncio.timeout(SLOWEST):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > LARGEST:
                        return _no(413, f"a form has at most {LARGEST:,} bytes")
        except TimeoutError:
            return _no(408, f"the form did not come within {SLOWEST:g} s")
        try:
            form = parse_qs(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=100)
        except ValueError:
            return _no(400, "this is no form of this dashboard")
        request.state.form = {name: each[-1] for name, each in form.items()}
        if not self.sessions.is_token(session, request.state.form.get("token", "")):
            return _no(403, "this page is too old, and nothing was done: go back, load it again, and try once more")
        return None


def is_here(host: str) -> bool:
    """Tell whether a Host header names this machine from its own point of view.

    >>> is_here("localhost:8000"), is_here("[::1]:8000"), is_here("rebound.example:8000")
    (True, True, False)
    """
    name = _name_in(host)
    return name.endswith(".localhost") or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches an address."""
    found = _address(address)
    return address == "localhost" or (found is not None and found.is_loopback)


def is_foreign(request: Request) -> bool:
    """Tell whether a browser says that another site asks for this; another port of this machine is another site."""
    return request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}


def _from_elsewhere(request: Request) -> Response:
    """Refuse what another site's page asks for; where a person follows a link, let this server's own page open the address."""
    headers = request.headers
    opened = (request.method, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("GET", "navigate", "document")
    if not opened:
        return _no(403, "a page of another site asked for this, and was refused: open the dashboard itself")
    address = escape(local(request.url.path + (f"?{request.url.query}" if request.url.query else "")))
    costly = request.url.path.endswith("/versions") or not COSTLY.isdisjoint(request.query_params)
    again = "" if costly else Markup('<meta http-equiv="refresh" content="0; url={}">').format(address)
    page = Markup('<!doctype html><meta charset="utf-8"><title>buquet</title>{}<p><a href="{}">Open the dashboard</a>')
    return HTMLResponse(page.format(again, address))


def local(path: str | None) -> str:
    """Return the path on this server to go back to; the first page where it leads elsewhere.

    >>> local("/tasks?page=2"), local("//evil.example"), local("https://evil.example"), local(None)
    ('/tasks?page=2', '/', '/', '/')
    """
    if path is None or not path.startswith("/") or path.startswith(("//", "/\\")) or not path.isprintable():
        return "/"
    return path


def who(request: Request) -> str:
    """Return from where a request comes and in which session, for the log.

    Names of people are not known: all give one password. A session's part is enough to see which lines belong together.
    """
    return f"{request.client.host if request.client else 'unknown'}, session {request.state.session.name[:8]}"


def _name_in(host: str) -> str:
    """Return the name or address in a Host header, in small letters."""
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
