"""Who may do what: signed cookies, the password, the token that every form carries, and whose turn to log in it is."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets  # noqa: TID251 - what must not be guessed cannot come from a clock that a simulation decides
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.responses import RedirectResponse

from buquet.dashboard.guard import local, who

if TYPE_CHECKING:
    from starlette.datastructures import URL
    from starlette.requests import Request
    from starlette.responses import Response

    from buquet.clock import Clock
    from buquet.dashboard.board import Board


LASTS = 12 * 3600
"""Seconds for which a login is good."""
WRONG = 0.5
"""Seconds that a wrong password takes, one after another."""
CROWD = 20
"""Logins that may wait for their turn; one more, and the one that has waited longest is refused."""


@dataclass(frozen=True)
class Session:
    """One browser."""

    name: str
    """A random name."""
    inside: bool
    """It gave the password."""


class Sessions:
    """Makes and checks cookies and tokens. They are good for as long as this process runs."""

    def __init__(self, clock: Clock, password: str | None, store: str = "") -> None:
        self.clock = clock
        self.password = password
        self._mark = hashlib.sha256(store.encode()).hexdigest()[:8]
        self._secret = secrets.token_bytes(32)
        self._revoked: dict[str, float] = {}
        """The sessions that were logged out, and until when their cookies would be good."""
        self._waiting: list[tuple[str, asyncio.Future[bool]]] = []
        """Logins that wait for their turn, and from where they come; the oldest first."""
        self._served: str | None = None
        """From where the login comes whose turn it is."""

    def cookie_name(self, what: str, url: URL) -> str:
        """Return a cookie's name. Browsers share cookies between the ports of a host, and so between the dashboards on it.

        >>> from buquet.clock import Clock
        >>> from starlette.datastructures import URL
        >>> Sessions(Clock(), None, "memory:").cookie_name("session", URL("http://localhost:8000/tasks"))
        'buquet_session_b656fafe_8000'
        """
        return f"buquet_{what}_{self._mark}_{url.port or url.scheme}"

    def new(self, *, inside: bool = False) -> Session:
        """Return a session for a browser that has none."""
        return Session(secrets.token_urlsafe(16), inside)

    def cookie(self, session: Session) -> str:
        """Return the cookie that names a session."""
        ends = int(self.clock.now()) + LASTS
        return self.sign("session", f"{session.name}.{int(session.inside)}.{ends}")

    def read(self, cookie: str | None) -> Session | None:
        """Return the session that a cookie names; None where it is missing, forged or too old."""
        text = self.unsign("session", cookie)
        if text is None:
            return None
        name, inside, ends = text.split(".")
        return Session(name, inside == "1") if int(ends) > self.clock.now() and name not in self._revoked else None

    def revoke(self, session: Session) -> None:
        """Let a session's cookie be worth nothing from now on, wherever it was copied to."""
        now = self.clock.now()
        self._revoked = {name: ends for name, ends in self._revoked.items() if ends > now} | {session.name: now + LASTS}

    def token(self, session: Session) -> str:
        """Return the token of a session's forms, which a page of another origin cannot know."""
        return self._mac("form", session.name)

    def is_token(self, session: Session, token: str) -> bool:
        """Tell whether this is the token of a session."""
        return hmac.compare_digest(self.token(session).encode(), token.encode())

    async def is_password(self, given: str, origin: str) -> bool | None:
        """Check a password that comes from `origin`. A wrong one takes half a second, and one is checked after another.

        The newest goes first, and before it one from elsewhere than the last: wrong ones in flight keep no right one waiting.
        None: too many came after it.
        """
        if self.password is None:
            return None
        if len(self._waiting) >= CROWD:
            _tell(self._waiting.pop(0)[1], turn=False)
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((origin, turn))
        if self._served is None:
            self._serve_next("")
        try:
            if not await turn:
                return None
        except asyncio.CancelledError:
            self._waiting = [each for each in self._waiting if each[1] is not turn]
            if turn.done() and not turn.cancelled() and turn.result():
                self._serve_next(origin)
            raise
        try:
            # hashes, so that the time taken tells nothing of the length either
            right = hmac.compare_digest(_hash(given), _hash(self.password))
            if not right:
                await self.clock.sleep(WRONG)
            return right
        finally:
            self._serve_next(origin)

    def _serve_next(self, last: str) -> None:
        """Let the next login have its turn."""
        self._served = None
        while self._waiting:
            index = max(range(len(self._waiting)), key=lambda at: (self._waiting[at][0] != last, at))
            origin, turn = self._waiting.pop(index)
            if _tell(turn, turn=True):
                self._served = origin
                return

    def sign(self, purpose: str, text: str) -> str:
        """Return a text with a signature."""
        return f"{text}.{self._mac(purpose, text)}"

    def unsign(self, purpose: str, signed: str | None) -> str | None:
        """Return the text that was signed for this purpose; None where it was not."""
        text, _, mac = (signed or "").rpartition(".")
        return text if hmac.compare_digest(self._mac(purpose, text).encode(), mac.encode()) else None

    def _mac(self, purpose: str, text: str) -> str:
        return hmac.new(self._secret, f"{purpose}\0{text}".encode(errors="replace"), hashlib.sha256).hexdigest()


def _tell(waiter: asyncio.Future[bool], *, turn: bool) -> bool:
    """Tell a login that it has its turn, or never will; False where nobody waits for that any more."""
    if waiter.done():
        return False
    waiter.set_result(turn)
    return True


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


log = logging.getLogger("buquet.dashboard")


async def login_form(board: Board, request: Request) -> Response:
    """Show the form; who is inside, or needs no password, goes on."""
    back = local(request.query_params.get("back"))
    if board.sessions.password is None or request.state.session.inside:
        return RedirectResponse(back, 303)
    return board.page(request, "login.html", topic="", back=back, wrong="")


async def login(board: Board, request: Request) -> Response:
    """Check the password. A right one makes a new session: what was signed before it is worth nothing."""
    form: dict[str, str] = request.state.form
    back = local(form.get("back"))
    right = await board.sessions.is_password(form.get("password", ""), request.client.host if request.client else "")
    log.info("%s: %s", "login" if right else "refused login" if right is None else "login with a wrong password", who(request))
    if not right:
        wrong = "Too many try at once. Wait a moment." if right is None else "That is not the password."
        return board.page(request, "login.html", 429 if right is None else 401, topic="", back=back, wrong=wrong)
    return _with_session(board, request, RedirectResponse(back, 303), inside=True)


async def logout(board: Board, request: Request) -> Response:
    """Forget the browser, and let its cookie open nothing any more."""
    log.info("logout: %s", who(request))
    board.sessions.revoke(request.state.session)
    return _with_session(board, request, RedirectResponse("/", 303), inside=False)


def _with_session(board: Board, request: Request, response: Response, *, inside: bool) -> Response:
    cookie = board.sessions.cookie(board.sessions.new(inside=inside))
    name = board.sessions.cookie_name("session", request.url)
    response.set_cookie(name, cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response
