"""Lengths of time as people say them."""

from __future__ import annotations

MOST = 10**18


def in_seconds(ms: float) -> float:
    """Return milliseconds as seconds. They come of records, which may hold a number too large to be divided: so much is enough.

    >>> in_seconds(1500), in_seconds(10**400)
    (1.5, 1000000000000000.0)
    """
    return min(max(ms, -MOST), MOST) / 1000


def duration(seconds: float) -> str:
    """Return a length of time as people say it.

    >>> [duration(each) for each in (0.24, 12.34, 130, 7500, 201_600)]
    ['240 ms', '12.3 s', '2 min 10 s', '2 h 5 min', '2 d 8 h']
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s"
    for size, unit, smaller, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole} {unit} {rest // smaller} {name}" if rest >= smaller else f"{whole} {unit}"
    return ""
