"""Who may do what: signed cookies, the password, and the token that every form carries."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets  # noqa: TID251 - what must not be guessed cannot come from a clock that a simulation decides
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet.clock import Clock

LASTS = 12 * 3600
"""Seconds for which a login is good."""
WRONG = 0.5
"""Seconds that a wrong password takes, one after another."""
CROWD = 20
"""Logins that may wait for their turn."""


@dataclass(frozen=True)
class Session:
    """One browser."""

    name: str
    """A random name."""
    inside: bool
    """It gave the password."""


class Sessions:
    """Makes and checks cookies and tokens. They are good for as long as this process runs."""

    def __init__(self, clock: Clock, password: str | None) -> None:
        self.clock = clock
        self.password = password
        self._secret = secrets.token_bytes(32)
        self._turns = asyncio.Lock()
        self._waiting = 0

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
        return Session(name, inside == "1") if int(ends) > self.clock.now() else None

    def token(self, session: Session) -> str:
        """Return the token of a session's forms, which a page of another origin cannot know."""
        return self._mac("form", session.name)

    def is_token(self, session: Session, token: str) -> bool:
        """Tell whether this is the token of a session."""
        return hmac.compare_digest(self.token(session).encode(), token.encode())

    async def is_password(self, given: str) -> bool | None:
        """Check a password; a wrong one takes half a second, and one is checked after another. None: too many wait."""
        if self.password is None or self._waiting >= CROWD:
            return None
        self._waiting += 1
        try:
            async with self._turns:
                # hashes, so that the time taken tells nothing of the length either
                right = hmac.compare_digest(_hash(given), _hash(self.password))
                if not right:
                    await self.clock.sleep(WRONG)
                return right
        finally:
            self._waiting -= 1

    def sign(self, purpose: str, text: str) -> str:
        """Return a text with a signature."""
        return f"{text}.{self._mac(purpose, text)}"

    def unsign(self, purpose: str, signed: str | None) -> str | None:
        """Return the text that was signed for this purpose; None where it was not."""
        text, _, mac = (signed or "").rpartition(".")
        return text if hmac.compare_digest(self._mac(purpose, text).encode(), mac.encode()) else None

    def _mac(self, purpose: str, text: str) -> str:
        return hmac.new(self._secret, f"{purpose}\0{text}".encode(errors="replace"), hashlib.sha256).hexdigest()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()
