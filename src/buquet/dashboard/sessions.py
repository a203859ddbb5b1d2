"""Who is logged in: the cookie of a browser's session, the password, and whose turn it is to try one."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets  # noqa: TID251 - secrets cannot come from a clock that a simulation decides
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import URL
from starlette.middleware.sessions import SessionMiddleware

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from buquet.clock import Clock

LASTS = 12 * 3600
"""Seconds until a login ends."""
WRONG = 0.5
"""Seconds that a wrong password takes. One password is checked at a time."""
CROWD = 20
"""Logins that may wait for their turn. One more, and the oldest is refused."""


@dataclass
class SessionCookies:
    """Starlette's sessions, in a cookie of each dashboard: browsers share cookies between the ports of a host."""

    app: ASGIApp
    store: str
    secret: str = field(default_factory=secrets.token_hex)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request its session."""
        app = self.app
        if scope["type"] == "http":
            url = URL(scope=scope)
            name = cookie_name(self.store, url)
            secure = url.scheme == "https"
            app = SessionMiddleware(app, self.secret, name, max_age=None, same_site="strict", https_only=secure)
        await app(scope, receive, send)


def cookie_name(store: str, url: URL) -> str:
    """Return the name of the session's cookie of one dashboard.

    >>> cookie_name("memory:", URL("http://localhost:8000/tasks"))
    'buquet_session_b656fafe_8000'
    """
    return f"buquet_session_{hashlib.sha256(store.encode()).hexdigest()[:8]}_{url.port or url.scheme}"


def form_token(request: Request) -> str:
    """Return the token that each form of a session carries, which a page of another site cannot know. Begins a session."""
    if "token" not in request.session:
        request.session.update(id=secrets.token_urlsafe(16), token=secrets.token_hex())
    return request.session["token"]


def who(request: Request) -> str:
    """Return the address and the session of a request, for the log.

    All people give the same password, so that their names are not known. The first characters of the session's id tell which
    lines belong together.
    """
    return f"{request.client.host if request.client else 'unknown'}, session {request.session.get('id', '')[:8]}"


@dataclass
class Logins:
    """The password, which sessions have given it, and which login may try one next."""

    clock: Clock
    password: str | None
    _ended: dict[str, float] = field(default_factory=dict[str, float])
    """Ids of sessions that were logged out, each with the end of its login: its cookie may have been copied."""
    _waiting: list[tuple[str, asyncio.Future[bool]]] = field(default_factory=list[tuple[str, "asyncio.Future[bool]"]])
    """Logins that wait for their turn, the oldest first: an address, and whether its turn has come."""
    _busy: bool = False

    def has(self, request: Request) -> bool:
        """Return whether the request's session is logged in."""
        session = request.session
        return session.get("until", 0) > self.clock.now() and session["id"] not in self._ended

    def begin(self, request: Request) -> None:
        """Log in, with a new session: the cookies and forms of the old one are worth nothing."""
        request.session.clear()
        form_token(request)
        request.session["until"] = self.clock.now() + LASTS

    def end(self, request: Request) -> None:
        """Log out. The session's cookie is worth nothing from now on, also a copy."""
        now = self.clock.now()
        self._ended = {session: until for session, until in self._ended.items() if until > now}
        self._ended[request.session["id"]] = now + LASTS
        request.session.clear()

    async def is_password(self, given: str, origin: str) -> bool | None:
        """Check a password that comes from an address. None: too many logins came after this one.

        One password is checked at a time, and a wrong one takes half a second. The newest login is next, and before it the newest
        from another address than the last: so wrong logins in flight do not keep the right one waiting.
        """
        if self.password is None:
            return None
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting = [*self._pending(), (origin, turn)]
        if len(self._waiting) > CROWD:
            self._waiting[0][1].set_result(False)
        if not self._busy:
            self._next_turn("")
        try:
            if not await turn:
                return None
            # hashes, so that the time taken does not tell the password's length
            right = hmac.compare_digest(_hash(given), _hash(self.password))
            if not right:
                await self.clock.sleep(WRONG)
            return right
        finally:
            if not turn.cancelled() and turn.result():
                self._next_turn(origin)

    def _pending(self) -> list[tuple[str, asyncio.Future[bool]]]:
        return [login for login in self._waiting if not login[1].done()]

    def _next_turn(self, last: str) -> None:
        pending = self._pending()
        self._busy = bool(pending)
        if pending:
            others = [login for login in pending if login[0] != last]
            (others or pending)[-1][1].set_result(True)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()
