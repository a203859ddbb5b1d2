"""What the handlers of one dashboard share, and how they make a page of a template."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from buquet import __version__
from buquet.dashboard import charts, wording
from buquet.insights.overview import WINDOWS, Overview, Window, overview, window
from buquet.printing import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from buquet.app import App
    from buquet.dashboard.sessions import Sessions
    from buquet.insights.feed import Feed

HERE = Path(__file__).parent

NAVIGATION = (
    ("/", "Overview"),
    ("/tasks", "Tasks"),
    ("/errors", "Errors"),
    ("/workers", "Workers"),
    ("/queues", "Queues"),
    ("/runs", "Runs"),
    ("/schedules", "Schedules"),
)


def _shown(value: object) -> object:
    """Return a value as a page shows it. Markup stays as it is; so `|e` keeps the exact text, as in a form's fields."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names: tuple[Callable[..., Any], ...] = (
        wording.lasts,
        wording.number,
        counted,
        wording.size,
        wording.moment,
        wording.tags,
        wording.badge,
        wording.second,
        wording.staleness,
    )
    filters: dict[str, Any] = made.filters
    filters.update({each.__name__: each for each in names})
    for name in made.list_templates():  # compiled now: the first page need not wait for it
        made.get_template(name)
    return made


def _fingerprint() -> str:
    """Return what changes when a script or style does, so that browsers keep them until then."""
    files = sorted((HERE / "static").iterdir())
    return hashlib.sha256(b"".join(each.read_bytes() for each in files if each.is_file())).hexdigest()[:12]


@dataclass
class Board:
    """One dashboard: the App that it looks at, and how."""

    app: App
    feed: Feed
    sessions: Sessions
    read_only: bool = False
    templates: Environment = field(default_factory=_environment)
    assets: str = field(default_factory=_fingerprint)
    following: Counter[str] = field(default_factory=Counter[str])
    """How many pages follow something, by the address of their browsers."""
    _overviews: dict[str, tuple[int, Overview]] = field(default_factory=dict[str, "tuple[int, Overview]"])

    def overview(self, request: Request) -> Overview:
        """Return what the first page says, worked out once for all browsers from one state of the feed."""
        version, name = self.feed.version("overview"), self.window(request).name
        if name not in self._overviews or self._overviews[name][0] != version:
            self._overviews[name] = (version, overview(self.feed, name))
        return self._overviews[name][1]

    def window(self, request: Request) -> Window:
        """Return how far back the reader wants to look."""
        return window(self.feed, request.query_params.get("window", ""))

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Make a page. What came of the last form is told once, and not to the script that only brings a page up to date."""
        session = request.state.session
        live = "x-live" in request.headers
        cookie = self.sessions.cookie_name("said", request.url)
        said = None if live else self.sessions.unsign("said", request.cookies.get(cookie))
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        topic, seen = values.get("topic", ""), self.window(request)
        kept = {name: value for name, value in request.query_params.items() if name not in {"window", "page"}}
        now = self.app.clock.now_ms()
        text = self.templates.get_template(template).render(
            charts=charts,
            urlencode=urlencode,
            navigation=NAVIGATION,
            product_version=__version__,
            assets=self.assets,
            store=self.app.url,
            said=None if said is None else unquote(said),
            problem=self.feed.problem(topic),
            as_of=self.feed.as_of(topic),
            seen=seen,
            windows={name: urlencode(kept | {"window": name}) for name in WINDOWS},
            keep="" if seen.name == next(iter(WINDOWS)) else f"?window={seen.name}",
            read_only=self.read_only,
            can_log_out=self.sessions.password is not None and session.inside,
            token=self.sessions.token(session),
            here=here,
            path=request.url.path,
            now=now,
            **values,
        )
        response = HTMLResponse(text, status)
        if said is not None:
            response.delete_cookie(cookie, httponly=True, samesite="strict")
        return response
