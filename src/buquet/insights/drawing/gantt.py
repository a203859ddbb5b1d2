"""A run as an SVG chart of time: a bar a step, in the order of their starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet.insights.drawing import words
from buquet.insights.drawing.order import order_of
from buquet.insights.drawing.paint import hooked, picture, tag, write
from buquet.insights.duration import duration, in_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.insights.runview import RunView, StepView

WIDTH = 1000.0
"""All lengths are pixels."""
LABELS = 210.0
RIGHT = 90.0
ROW = 24.0
TOP = 34.0
BAR = 14.0
NAME = 26
TICKS = 8
STEPS = (
    *(base * 10**power for power in range(-3, 1) for base in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400, 172_800, 604_800),
)
"""Distances between ticks, in seconds, that people can read."""


def as_gantt(run: RunView, now: int, link: Callable[[StepView], str] | None = None) -> str:
    """Return when each step ran, as an SVG document that can also be put into a page.

    `now` (milliseconds) is where what still runs ends; `link` gives the address that a step's row leads to, "" for none.
    Steps that have not begun stand at the end, without a bar.

    >>> from buquet.insights.runview import RunView, StepView
    >>> "data-step" in as_gantt(RunView(id="1", workflow="w", steps=[StepView(name="a", started=1, ended=2)]), 0)
    True
    """
    steps = list(order_of(run.steps).steps.values())
    begun = sorted((step for step in steps if step.started), key=lambda step: step.started)
    rows = [*begun, *(step for step in steps if not step.started)]
    first = begun[0].started if begun else now
    last = max((step.ended or now for step in begun), default=first)
    whole = in_seconds(max(last - first, 1))
    scale = (WIDTH - LABELS - RIGHT) / whole
    height = TOP + ROW * len(rows) + 12
    drawn = _axis(whole, scale, height) if begun else []
    for index, step in enumerate(rows):
        drawn.append(hooked(step, link, _row(step, TOP + ROW * index, first, now, scale), now))
    return picture(WIDTH, height, words.headline(run, now), drawn)


def _axis(whole: float, scale: float, height: float) -> list[str]:
    distance = next((each for each in STEPS if whole / each <= TICKS), whole / TICKS)
    parts: list[str] = []
    for index in range(int(whole / distance) + 1):
        x = LABELS + index * distance * scale
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=TOP - 6, y2=height - 8).around())
        parts.append(
            write(
                x,
                TOP - 12,
                duration(index * distance).replace(".0 ", " ") if index else "0",
                class_="faint",
                text_anchor="middle",
            )
        )
    return parts


def _row(step: StepView, y: float, first: int, now: int, scale: float) -> list[str]:
    middle = y + ROW / 2 + 4
    parts = [
        # the whole row can be met with a pointer
        tag("rect", class_="paper", x=0.0, y=y, width=WIDTH, height=ROW, fill_opacity=0).around(),
        write(12, middle, words.MARKS[step.state], class_="mark"),
        write(32, middle, words.cut(step.name, NAME), class_="name"),
    ]
    if not step.started:
        return [*parts, write(LABELS + 4, middle, step.state, class_="faint")]
    start = LABELS + in_seconds(step.started - first) * scale
    length = max((step.seconds(now) or 0) * scale, 2.0)
    idle = "bar idle" if step.kind in {"wait", "sleep"} else "bar"
    bar = tag("rect", class_=idle, x=start, y=y + (ROW - BAR) / 2, width=length, height=BAR, rx=3.0)
    said = " · ".join(each for each in (words.time(step, now), words.items(step)) if each)
    return [*parts, bar.around(), write(start + length + 6, middle, said, class_="faint")]
