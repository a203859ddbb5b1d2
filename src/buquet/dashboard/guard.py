"""What every request goes through: who may come in, where a form may come from, and the headers of every answer.

- A session is a signed cookie, HttpOnly and SameSite=Strict. With a password, only one that has given it sees anything.
- A POST must come from a page of this server (Origin) and carry its session's token. Read-only, none is taken but the login.
- Without a password on a loopback address, only names of this machine are served: a page elsewhere whose name is made to point
  here (DNS rebinding) is refused.
- No script, style, frame or form from anywhere else: the Content-Security-Policy allows this server's own files only.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from buquet.dashboard.sessions import Session, Sessions

COOKIE = "buquet_session"
LARGEST = 1 << 20
"""Bytes of a form: a signal's value is in one."""
OPEN = ("/login", "/static/")
"""What may be seen without the password."""
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

    def __init__(self, app: ASGIApp, *, sessions: Sessions, read_only: bool, loopback: bool) -> None:
        self.app = app
        self.sessions = sessions
        self.read_only = read_only
        self.loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        session = self.sessions.read(request.cookies.get(COOKIE))
        fresh = session is None
        session = session or self.sessions.new()
        request.state.session = session

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "max-age=3600" if request.url.path.startswith("/static/") else "no-store")
                if fresh and "set-cookie" not in headers and not request.url.path.startswith("/static/"):
                    headers.append("set-cookie", self.cookie(session, secure=request.url.scheme == "https"))
            await send(message)

        refusal = await self._refusal(request, session)
        await (refusal or self.app)(scope, receive, answer)

    def cookie(self, session: Session, *, secure: bool) -> str:
        """Return the header that gives a browser its session."""
        return f"{COOKIE}={self.sessions.cookie(session)}; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")

    async def _refusal(self, request: Request, session: Session) -> Response | None:
        path = request.url.path
        if self.loopback and self.sessions.password is None and not is_here(request.headers.get("host", "")):
            return _no(421, "this name is not one of this machine's: open it as http://127.0.0.1, or start it with --password")
        if self.sessions.password is not None and not session.inside and not path.startswith(OPEN):
            if request.method == "GET" and path != "/events":
                back = path + (f"?{request.url.query}" if request.url.query else "")
                return RedirectResponse(f"/login?back={quote(back, safe='')}", 303)
            return _no(401, "log in first: this dashboard has a password")
        if request.method == "POST":
            return await self._refused_form(request, session)
        return None

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
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST:
                return _no(413, f"a form has at most {LARGEST:,} bytes")
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
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _no(status: int, text: str) -> Response:
    return PlainTextResponse(text + "\n", status)
