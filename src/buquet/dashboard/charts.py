"""Charts as SVG, drawn here: no script needs to run for them. Colours are classes, so that they follow the theme."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import TYPE_CHECKING

from markupsafe import Markup

from buquet.dashboard.wording import clock, lasts, number
from buquet.insights.journal import MINUTE
from buquet.insights.overview import BARS
from buquet.printing import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from buquet.insights.journal import Minute
    from buquet.insights.overview import Percentiles, Window

WIDE, HIGH = 600, 100


def round_up(value: float) -> float:
    """Return the next number above that is easy to read: 1, 2 or 5 and zeros.

    >>> round_up(3), round_up(120), round_up(0)
    (5.0, 200.0, 1.0)
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


def throughput(minutes: Sequence[Minute], seen: Window) -> Markup:
    """Draw what ended in each part of a window, and the attempts that failed and are retried, on top of each other."""
    top = round_up(max((each.completed + each.failed + each.other + each.retried for each in minutes), default=0))
    step = WIDE / max(len(minutes), 1)
    bars: list[Markup] = []
    for index, minute in enumerate(minutes):
        base = float(HIGH)
        parts = (("good", minute.completed), ("bad", minute.failed), ("waits", minute.retried), ("off", minute.other))
        for kind, count in parts:
            if count:
                high = max(count / top * HIGH, 1.0)
                base -= high
                bars.append(
                    Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                        kind, index * step + step * 0.1, base, step * 0.8, high
                    )
                )
        told = (
            f"{clock(minute.at)} UTC: {minute.completed} completed, {minute.failed} failed, "
            f"{counted(minute.retried, 'attempt')} retried, {counted(minute.other, 'other')}"
        )
        bars.append(
            Markup('<rect class="hover" x="{:.1f}" y="0" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                index * step, step, HIGH, told
            )
        )
    total = sum(each.completed + each.failed + each.other for each in minutes)
    return _framed(Markup("").join(bars), number(top), f"{counted(total, 'task')} ended in {seen.hours} h", _ago(seen))


def percentiles(points: Sequence[Percentiles], seen: Window, what: str) -> Markup:
    """Draw the middle and the slowest hundredth over a window, on a logarithmic scale."""
    if not points:
        return _empty(f"no {what} in {seen.label}")
    most = max(10.0, *(each.p99 for each in points))
    top = 10.0 ** ceil(log10(most) - 1e-9)
    decades = log10(top)
    wide = seen.hours * MINUTE
    first = seen.now - BARS * wide

    def place(at: int, value: float) -> tuple[float, float]:
        return ((at + wide / 2 - first) / (BARS * wide) * WIDE, HIGH - log10(max(value, 1.0)) / decades * HIGH)

    parts = [
        Markup('<line class="grid" x1="0" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(WIDE, y=HIGH - mark / decades * HIGH)
        for mark in range(1, ceil(decades))
    ]
    for name in ("p99", "p50"):
        parts += _curve([place(each.at, getattr(each, name)) for each in points], name)
    for each in points:
        x, _ = place(each.at, 1)
        told = f"{clock(each.at)} UTC: p50 {lasts(each.p50)}, p99 {lasts(each.p99)}"
        parts.append(
            Markup('<rect class="hover" x="{:.1f}" y="0" width="10" height="{}"><title>{}</title></rect>').format(
                x - 5, HIGH, told
            )
        )
    last = points[-1]
    return _framed(Markup("").join(parts), lasts(top), f"{what}: lately p50 {lasts(last.p50)}, p99 {lasts(last.p99)}", _ago(seen))


def load(samples: Sequence[tuple[int, int, int]]) -> Markup:
    """Draw how many tasks were ready and how many ran while somebody looked."""
    samples = samples[-240:]
    if len(samples) < 2:  # noqa: PLR2004 - a line has two ends
        return _empty("drawn from now on, while this page is open")
    top = round_up(max(max(ready, ran) for _, ready, ran in samples))
    first, last = samples[0][0], samples[-1][0]

    def line(pick: Callable[[tuple[int, int, int]], int]) -> list[tuple[float, float]]:
        return [((each[0] - first) / max(last - first, 1) * WIDE, HIGH - pick(each) / top * HIGH) for each in samples]

    parts = [*_curve(line(lambda each: each[1]), "ready"), *_curve(line(lambda each: each[2]), "ran")]
    ready, ran = samples[-1][1:]
    told = f"{ready:,} ready and {ran:,} running now; over the last {lasts(last - first)}"
    return _framed(Markup("").join(parts), number(top), told, lasts(last - first) + " ago")


def share(parts: Sequence[tuple[str, int]]) -> Markup:
    """Draw a thin bar whose parts are as long as their numbers."""
    total = sum(count for _, count in parts) or 1
    at = 0.0
    drawn: list[Markup] = []
    for kind, count in parts:
        wide = count / total * 100
        drawn.append(Markup('<rect class="{}" x="{:.2f}" y="0" width="{:.2f}" height="4"/>').format(kind, at, wide))
        at += wide
    told = ", ".join(f"{count:,} {kind}" for kind, count in parts)
    return Markup('<svg class="share" viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>').format(
        told, Markup("").join(drawn)
    )


def _curve(points: Sequence[tuple[float, float]], kind: str) -> list[Markup]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if len(points) == 1:
        x, y = points[0]
        return [Markup('<rect class="{} dot" x="{:.1f}" y="{:.1f}" width="4" height="3"/>').format(kind, x - 2, y - 1.5)]
    return [Markup('<polyline class="{}" points="{}"/>').format(kind, path)]


def _ago(seen: Window) -> str:
    return f"{seen.hours} h ago"


def _empty(told: str) -> Markup:
    return Markup('<div class="chart"><p class="nothing">{}</p></div>').format(told)


def _framed(drawing: Markup, top: str, told: str, left: str) -> Markup:
    """Put a drawing into its frame: the scale, the axis of time from `left` to now, and what it shows in words."""
    svg = Markup('<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>').format(
        WIDE, HIGH, told, drawing
    )
    return Markup('<div class="chart"><span class="top">{}</span>{}<span class="axis"><i>{}</i><i>now</i></span></div>').format(
        top, svg, left
    )
