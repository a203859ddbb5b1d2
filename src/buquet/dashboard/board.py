"""What the pages and actions of one dashboard share, and how a page is made of its template."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from buquet import __version__
from buquet.dashboard import charts, wording
from buquet.dashboard.guard import address_of
from buquet.dashboard.sessions import form_token
from buquet.insights.overview import WINDOWS, Overview, Window, overview, window
from buquet.printing import counted, printable

if TYPE_CHECKING:
    from starlette.requests import Request

    from buquet.app import App
    from buquet.dashboard.sessions import Logins
    from buquet.insights.feed import Feed

HERE = Path(__file__).parent

FILTERS = (
    wording.lasts,
    wording.number,
    wording.size,
    wording.moment,
    wording.tags,
    wording.badge,
    wording.second,
    wording.staleness,
    counted,
)


def _printable(value: object) -> object:
    """Make text printable. Markup stays as it is, so that `|e` keeps the exact text in a form's fields."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # a template that an upgrade replaces may need other values
    )
    filters: dict[str, Any] = made.filters
    filters.update({function.__name__: function for function in FILTERS})
    for name in made.list_templates():  # compiled before the first page is asked for
        made.get_template(name)
    return made


def _fingerprint() -> str:
    """Return a hash of the scripts and styles, so that browsers load them again when they change."""
    files = sorted((HERE / "static").iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()[:12]


@dataclass
class Board:
    """One dashboard: the App that it shows, and its settings."""

    app: App
    feed: Feed
    logins: Logins
    read_only: bool = False
    templates: Environment = field(default_factory=_environment)
    assets: str = field(default_factory=_fingerprint)
    following: Counter[str] = field(default_factory=Counter[str])
    """Open event streams, by the address of their browser."""
    _overviews: dict[str, tuple[int, Overview]] = field(default_factory=dict[str, "tuple[int, Overview]"])

    def overview(self, request: Request) -> Overview:
        """Return the overview, computed once for all browsers while the feed does not change."""
        version, name = self.feed.version("overview"), self.window(request).name
        if name not in self._overviews or self._overviews[name][0] != version:
            self._overviews[name] = (version, overview(self.feed, name))
        return self._overviews[name][1]

    def window(self, request: Request) -> Window:
        """Return how far back the reader wants to look."""
        return window(self.feed, request.query_params.get("window", ""))

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Make a page. It shows the message of the last action once, and not to the script that updates an open page."""
        topic, chosen = values["topic"], self.window(request)
        kept = {name: value for name, value in request.query_params.items() if name not in {"window", "page"}}
        token = form_token(request)
        text = self.templates.get_template(template).render(
            charts=charts,
            urlencode=urlencode,
            product_version=__version__,
            assets=self.assets,
            store=self.app.url,
            message=None if "x-live" in request.headers else request.session.pop("message", None),
            problem=self.feed.problem(topic),
            as_of=self.feed.as_of(topic),
            window=chosen,
            windows={name: urlencode(kept | {"window": name}) for name in WINDOWS},
            keep="" if chosen.name == next(iter(WINDOWS)) else f"?window={chosen.name}",
            read_only=self.read_only,
            can_log_out=self.logins.password is not None and self.logins.has(request),
            token=token,
            here=address_of(request),
            path=request.url.path,
            now=self.app.clock.now_ms(),
            **values,
        )
        return HTMLResponse(text, status)
