"""How times, lengths and numbers are written on a page."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from buquet.printing import LONGEST, in_seconds, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

OLD = 10
"""Seconds after which what a page shows is marked as old, and as too old."""
TOO_OLD = 30
EXACT = 100
"""Seconds below which their fractions are told."""

STATES = {
    "pending": "waits",
    "retrying": "bad",
    "running": "runs",
    "completed": "good",
    "failed": "bad",
    "cancelled": "off",
    "expired": "off",
    "skipped": "off",
    "paused": "waits",
    "waiting": "waits",
    "ready": "waits",
    "failing": "bad",
    "cancelling": "off",
    "stopped": "off",
    "alive": "good",
    "dead": "bad",
}
"""The class of a state's badge: its colour."""


def lasts(milliseconds: float) -> str:
    """Return a length of time as people say it.

    >>> lasts(12), lasts(1500), lasts(200_000), lasts(8_000_000)
    ('12 ms', '1.50 s', '3 min 20 s', '2 h 13 min')
    """
    seconds = in_seconds(milliseconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < EXACT:
        return f"{seconds:#.3g} s"
    for size, unit, smaller, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = int(seconds % size // smaller)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{seconds:.0f} s"


def number(value: float) -> str:
    """Return a number with separators, and a fraction where it is small.

    >>> number(12345), number(3.14), number(0.0), number(1 / 60)
    ('12,345', '3.1', '0', '0.017')
    """
    if 0 < value < 1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"  # noqa: PLR2004 - as said


def size(count: int) -> str:
    """Return bytes as people say them.

    >>> size(900), size(70_000), size(80_000_000)
    ('900 B', '68 kB', '76 MB')
    """
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1024:  # noqa: PLR2004 - the next unit
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GB"


def moment(milliseconds: int, now: int = 0) -> Markup:
    """Return a time as an element: how long ago with `now`, else the date and time; the script shows it in local time.

    What is no time is shown as the number that it is, or as `?`.
    """
    if not milliseconds:
        return Markup("")
    try:
        at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):  # a record may hold any number
        return escape(milliseconds if abs(milliseconds) < LONGEST else "?")
    whole = at.strftime("%Y-%m-%d %H:%M:%S.") + f"{milliseconds % 1000:03d}"
    if not now:
        return Markup('<time datetime="{}Z" data-show="whole">{} UTC</time>').format(whole.replace(" ", "T"), whole)
    away = now - milliseconds
    text = f"{lasts(away)} ago" if away >= 1000 else "now" if away > -1000 else f"in {lasts(-away)}"  # noqa: PLR2004 - a second
    return Markup('<time datetime="{}Z" title="{} UTC">{}</time>').format(whole.replace(" ", "T"), whole, text)


def staleness(as_of: int, now: int) -> str:
    """Return the class of a page's age: its colour.

    >>> [staleness(now - age, now) for now in [10**12] for age in (9_000, 10_000, 30_000)], staleness(0, 1)
    (['on', 'old', 'off'], 'old')
    """
    age = (now - as_of) / 1000 if as_of else OLD
    return "off" if age >= TOO_OLD else "old" if age >= OLD else "on"


def second(milliseconds: int) -> Markup:
    """Return the time of day to the second, with its zone; the script shows it in local time."""
    at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return Markup('<time datetime="{}Z" data-show="second">{:%H:%M:%S} UTC</time>').format(at.strftime("%Y-%m-%dT%H:%M:%S"), at)


def clock(milliseconds: int) -> str:
    """Return the time of day, for the axis of a chart (UTC).

    >>> clock(1_800_000_000_000)
    '08:00'
    """
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%H:%M")


def tags(values: Mapping[str, str]) -> Markup:
    """Return tags as small marks."""
    return Markup(" ").join(
        Markup('<span class="tag">{}={}</span>').format(printable(name), printable(value))
        for name, value in sorted(values.items())
    )


def badge(state: str) -> Markup:
    """Return a state as a coloured mark with its name."""
    return Markup('<span class="state {}">{}</span>').format(STATES.get(state, "off"), escape(state))
