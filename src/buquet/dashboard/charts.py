"""Charts as SVG, which need no script. Colours are classes, so that they follow the theme."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import TYPE_CHECKING

from markupsafe import Markup

from buquet.dashboard.wording import clock, lasts, number
from buquet.insights.journal import MINUTE
from buquet.insights.overview import BARS
from buquet.printing import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from buquet.insights.journal import Minute
    from buquet.insights.overview import Percentiles, Window

WIDE, HIGH = 600, 100
LOAD = 240
"""Samples that the chart of the load shows."""


def round_up(value: float) -> float:
    """Return the next number above that is easy to read: 1, 2 or 5 and zeros.

    >>> round_up(3), round_up(120), round_up(0)
    (5.0, 200.0, 1.0)
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


def throughput(minutes: Sequence[Minute], window: Window) -> Markup:
    """Draw what ended in each part of a window, and the attempts that failed and are retried, as stacked bars."""
    top = round_up(max((minute.completed + minute.failed + minute.other + minute.retried for minute in minutes), default=0))
    step = WIDE / max(len(minutes), 1)
    parts: list[Markup] = []
    for index, minute in enumerate(minutes):
        base = float(HIGH)
        counts = {"good": minute.completed, "bad": minute.failed, "waits": minute.retried, "off": minute.other}
        for kind, count in counts.items():
            if count:
                high = max(count / top * HIGH, 1.0)
                base -= high
                parts.append(_rect(kind, index * step + step * 0.1, base, step * 0.8, high))
        title = (
            f"{clock(minute.at)} UTC: {minute.completed} completed, {minute.failed} failed, "
            f"{counted(minute.retried, 'attempt')} retried, {counted(minute.other, 'other')}"
        )
        parts.append(_rect("hover", index * step, 0, step, HIGH, title))
    total = sum(minute.completed + minute.failed + minute.other for minute in minutes)
    return _chart(parts, number(top), f"{counted(total, 'task')} ended in {window.hours} h", f"{window.hours} h ago")


def percentiles(points: Sequence[Percentiles], window: Window, what: str) -> Markup:
    """Draw the median and the 99th percentile over a window, on a logarithmic scale."""
    if not points:
        return _empty(f"no {what} in {window.label}")
    decades = ceil(log10(max(10.0, *(point.p99 for point in points))) - 1e-9)
    part = window.hours * MINUTE
    first = window.now - BARS * part

    def x_of(point: Percentiles) -> float:
        return (point.at + part / 2 - first) / (BARS * part) * WIDE

    def y_of(value: float) -> float:
        return HIGH - log10(max(value, 1.0)) / decades * HIGH

    parts = [
        Markup('<line class="grid" x1="0" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(WIDE, y=HIGH - mark / decades * HIGH)
        for mark in range(1, decades)
    ]
    parts.append(_curve([(x_of(point), y_of(point.p99)) for point in points], "p99"))
    parts.append(_curve([(x_of(point), y_of(point.p50)) for point in points], "p50"))
    for point in points:
        title = f"{clock(point.at)} UTC: p50 {lasts(point.p50)}, p99 {lasts(point.p99)}"
        parts.append(_rect("hover", x_of(point) - 5, 0, 10, HIGH, title))
    last = points[-1]
    label = f"{what}: lately p50 {lasts(last.p50)}, p99 {lasts(last.p99)}"
    return _chart(parts, lasts(10.0**decades), label, f"{window.hours} h ago")


def load(samples: Sequence[tuple[int, int, int]]) -> Markup:
    """Draw how many tasks were due and running while the page was open: samples of a time and two counts."""
    samples = samples[-LOAD:]
    if len(samples) < 2:  # noqa: PLR2004 - a line has two ends
        return _empty("drawn from now on, while this page is open")
    top = round_up(max(max(ready, ran) for _, ready, ran in samples))
    first, last = samples[0][0], samples[-1][0]

    def curve(index: int, kind: str) -> Markup:
        points = ((sample[0] - first, sample[index]) for sample in samples)
        return _curve([(x / max(last - first, 1) * WIDE, HIGH - count / top * HIGH) for x, count in points], kind)

    _, ready, ran = samples[-1]
    label = f"{ready:,} ready and {ran:,} running now; over the last {lasts(last - first)}"
    return _chart([curve(1, "ready"), curve(2, "ran")], number(top), label, f"{lasts(last - first)} ago")


def share(parts: Sequence[tuple[str, int]]) -> Markup:
    """Draw a thin bar whose parts are as long as their numbers."""
    total = sum(count for _, count in parts) or 1
    at = 0.0
    drawn: list[Markup] = []
    for kind, count in parts:
        drawn.append(_rect(kind, at, 0, count / total * 100, 4))
        at += count / total * 100
    label = ", ".join(f"{count:,} {kind}" for kind, count in parts)
    return Markup('<svg class="share" viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>').format(
        label, Markup("").join(drawn)
    )


def _rect(kind: str, x: float, y: float, width: float, height: float, title: str = "") -> Markup:
    return Markup('<rect class="{}" x="{:.2f}" y="{:.1f}" width="{:.2f}" height="{:.1f}">{}</rect>').format(
        kind, x, y, width, height, Markup("<title>{}</title>").format(title) if title else ""
    )


def _curve(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    if len(points) == 1:
        x, y = points[0]
        return _rect(f"{kind} dot", x - 2, y - 1.5, 4, 3)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, path)


def _empty(text: str) -> Markup:
    return Markup('<div class="chart"><p class="nothing">{}</p></div>').format(text)


def _chart(parts: Iterable[Markup], top: str, label: str, left: str) -> Markup:
    """Frame a drawing: its scale, its axis of time from `left` to now, and what it shows in words."""
    svg = Markup('<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>').format(
        WIDE, HIGH, label, Markup("").join(parts)
    )
    return Markup('<div class="chart"><span class="top">{}</span>{}<span class="axis"><i>{}</i><i>now</i></span></div>').format(
        top, svg, left
    )
