"""How times, numbers, sizes and statuses are written on a page."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from buquet.printing import LONGEST, duration, in_seconds, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

OLD = 10
"""Seconds after which a page is marked as old."""
TOO_OLD = 30
"""Seconds after which a page is marked as too old."""

COLOURS = {
    "pending": "waits",
    "retrying": "bad",
    "running": "runs",
    "completed": "good",
    "failed": "bad",
    "paused": "waits",
    "waiting": "waits",
    "ready": "waits",
    "failing": "bad",
    "alive": "good",
    "dead": "bad",
}
"""The class of a status, which is its colour. All others are `off`."""


def lasts(milliseconds: float) -> str:
    """Return a length of time for people."""
    return duration(in_seconds(milliseconds))


def number(value: float) -> str:
    """Return a number with separators, and with decimals if it is small.

    >>> number(12345), number(3.14), number(0.0), number(1 / 60)
    ('12,345', '3.1', '0', '0.017')
    """
    if 0 < value < 1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"  # noqa: PLR2004 - three digits


def size(count: int) -> str:
    """Return a number of bytes for people.

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
    """Return a time as an element: how long ago if `now` is given, else date and time. The script shows local time.

    A number outside of the calendar, as a damaged record may hold, is shown as that number, or as `?`.
    """
    if not milliseconds:
        return Markup("")
    try:
        at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return escape(milliseconds if abs(milliseconds) < LONGEST else "?")
    whole = at.strftime("%Y-%m-%d %H:%M:%S.") + f"{milliseconds % 1000:03d}"
    if not now:
        return Markup('<time datetime="{}Z" data-show="whole">{} UTC</time>').format(whole.replace(" ", "T"), whole)
    age = now - milliseconds
    text = f"{lasts(age)} ago" if age >= 1000 else "now" if age > -1000 else f"in {lasts(-age)}"  # noqa: PLR2004 - a second
    return Markup('<time datetime="{}Z" title="{} UTC">{}</time>').format(whole.replace(" ", "T"), whole, text)


def staleness(as_of: int, now: int) -> str:
    """Return the class of a page's age, which is its colour.

    >>> [staleness(now - age, now) for now in [10**12] for age in (9_000, 10_000, 30_000)], staleness(0, 1)
    (['on', 'old', 'off'], 'old')
    """
    age = (now - as_of) / 1000 if as_of else OLD
    return "off" if age >= TOO_OLD else "old" if age >= OLD else "on"


def second(milliseconds: int) -> Markup:
    """Return the time of day to the second, with its zone. The script shows local time."""
    at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return Markup('<time datetime="{}Z" data-show="second">{:%H:%M:%S} UTC</time>').format(at.strftime("%Y-%m-%dT%H:%M:%S"), at)


def clock(milliseconds: int) -> str:
    """Return the time of day in UTC, for a chart.

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


def badge(status: str) -> Markup:
    """Return a status as a coloured mark with its name."""
    return Markup('<span class="state {}">{}</span>').format(COLOURS.get(status, "off"), escape(status))
