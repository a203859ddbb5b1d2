"""The password's form."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.responses import RedirectResponse

from buquet.dashboard.guard import local, who

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from buquet.dashboard.board import Board

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
