"""A run as an SVG graph: a box a step, in layers, from left to right or, where that is too wide, from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from buquet.insights.drawing import words
from buquet.insights.drawing.layout import Layout, Node, lay_out
from buquet.insights.drawing.order import Order, order_of
from buquet.insights.drawing.paint import hooked, picture, tag, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.insights.runview import RunView, StepView

WIDTH, HEIGHT = 196.0, 46.0
"""Of a box. All lengths are pixels."""
BESIDE = 22.0
BETWEEN = 46.0
LANE = 8.0
MARGIN = 16.0
PAGE = 1200.0
"""What is wider than this from left to right goes from top to bottom, unless that is wider still."""
LETTER = 6.2
"""Breadth of a column of small text, a little more than fonts take."""
NAME = 19
SAID = 27
CONDITION = 28
TIP = 8.0


def as_svg(run: RunView, now: int, link: Callable[[StepView], str] | None = None) -> str:
    """Return a run as an SVG document that can also be put into a page.

    `now` (milliseconds) is for the times of what still runs; `link` gives the address that a step's box leads to, "" for none.

    >>> from buquet.insights.runview import RunView, StepView
    >>> "data-step" in as_svg(RunView(id="1", workflow="w", steps=[StepView(name="a")]), 0)
    True
    """
    order = order_of(run.steps)
    across = _Plan(order, lay_out(order, HEIGHT, BESIDE, LANE), sideways=True)
    down = _Plan(order, lay_out(order, WIDTH, BESIDE, LANE), sideways=False)
    plan = (
        across
        if across.width <= max(PAGE, down.width) and across.width <= PAGE
        else down
        if down.width <= across.width
        else across
    )
    edges = [part for pair in order.edges for part in _edge(plan, *pair)]
    boxes = [hooked(step, link, _box(step, *plan.corner(name), now), now) for name, step in order.steps.items()]
    conditions = [_condition(plan, step) for step in order.steps.values() if step.condition]
    return picture(plan.width, plan.height, words.headline(run, now), [*edges, *boxes, *conditions])


@dataclass
class _Plan:
    """A layout on paper."""

    order: Order
    layout: Layout
    sideways: bool

    def __post_init__(self) -> None:
        deep = WIDTH if self.sideways else HEIGHT
        self.starts: list[float] = []
        at = MARGIN
        for index, layer in enumerate(self.layout.layers):
            at += self._gap(layer) if index else 0.0
            self.starts.append(at)
            at += deep
        self.deep = deep
        long, broad = at + MARGIN, self.layout.width + 2 * MARGIN
        if not self.layout.layers:
            long = 2 * MARGIN
        self.width, self.height = (long, broad) if self.sideways else (broad, long)
        self.depth = {node: index for index, layer in enumerate(self.layout.layers) for node in layer}

    def _gap(self, layer: list[Node]) -> float:
        """Return the room before a layer: more where conditions stand in it."""
        said = [len(condition_of(self.order.steps[name])) for name, other, _ in layer if not other]
        longest = max(said, default=0)
        if not longest:
            return BETWEEN
        return max(BETWEEN, longest * LETTER + TIP + 12) if self.sideways else BETWEEN + 14

    def span(self, node: Node) -> tuple[float, float, float]:
        """Return where a node begins and ends along the layers, and where it is across."""
        start = self.starts[self.depth[node]]
        return start, start + self.deep, self.layout.at[node] + MARGIN

    def point(self, along: float, across: float) -> tuple[float, float]:
        """Return the place on paper."""
        return (along, across) if self.sideways else (across, along)

    def corner(self, name: str) -> tuple[float, float]:
        """Return the upper left corner of a step's box."""
        start, _, middle = self.span((name, "", 0))
        return self.point(start, middle - (HEIGHT if self.sideways else WIDTH) / 2)


def condition_of(step: StepView) -> str:
    """Return a condition as it stands on an edge."""
    return words.cut(step.condition, CONDITION)


def _edge(plan: _Plan, source: str, target: str) -> tuple[str, str]:
    """Return an edge's line and its tip. Between layers it bends; through a layer it goes straight, in a lane kept free for it."""
    nodes = plan.layout.edges[source, target]
    steps = plan.order.steps
    state = "skipped" if "skipped" in {steps[source].state, steps[target].state} else ""
    if not state and steps[source].state == "completed" and steps[target].started:
        state = "taken"
    _, leaves, place = plan.span(nodes[0])
    path = ["M", *_numbers(plan.point(leaves, place))]
    for node in nodes[1:]:
        start, end, next_place = plan.span(node)
        is_last = node == nodes[-1]
        arrives = start - (TIP - 1 if is_last else 0)
        half = (leaves + arrives) / 2
        if place == next_place:
            path += ["L", *_numbers(plan.point(arrives, next_place))]
        else:
            path += ["C", *_numbers(plan.point(half, place), plan.point(half, next_place), plan.point(arrives, next_place))]
        if not is_last:
            path += ["L", *_numbers(plan.point(end, next_place))]
        leaves, place = end, next_place
    start, _, place = plan.span(nodes[-1])
    corners = (plan.point(start, place), plan.point(start - TIP, place - TIP / 2), plan.point(start - TIP, place + TIP / 2))
    tip = " ".join(["M", *_numbers(corners[0]), "L", *_numbers(*corners[1:]), "Z"])
    line = tag("path", class_=f"edge {state}".strip(), d=" ".join(path), data_from=source, data_to=target)
    return line.around(), tag("path", class_=f"tip {state}".strip(), d=tip).around()


def _numbers(*points: tuple[float, float]) -> list[str]:
    return [f"{number:.1f}".removesuffix(".0") for point in points for number in point]


def _condition(plan: _Plan, step: StepView) -> str:
    """Write a condition where the edges of its step arrive."""
    start, _, place = plan.span((step.name, "", 0))
    text = condition_of(step)
    if plan.sideways:
        return write(start - TIP - 4, place - 6, text, class_="condition", text_anchor="end")
    return write(place, start - TIP - 6, text, class_="condition", text_anchor="middle")


def _box(step: StepView, x: float, y: float, now: int) -> list[str]:
    """Draw a step: its mark and name, below it the state and what matters most."""
    round_ = HEIGHT / 2 if step.kind in {"wait", "sleep", "value"} else 7.0
    parts = [tag("rect", class_="paper", x=x, y=y, width=WIDTH, height=HEIGHT, rx=round_).around()]
    if step.kind == "each":
        stack = f"M {x + 6:.0f} {y - 0.5:.1f} v -3.5 h {WIDTH - 2:.0f} v {HEIGHT - 4:.0f} h -3.5"
        parts.append(tag("path", class_="under", d=stack).around())
    parts.append(tag("rect", class_="box", x=x, y=y, width=WIDTH, height=HEIGHT, rx=round_).around())
    inset, most = (15.0, NAME - 1) if round_ > HEIGHT / 3 else (11.0, NAME)
    parts += [
        write(x + inset, y + 20, words.MARKS[step.state], class_="mark"),
        write(x + inset + 19, y + 19.5, words.cut(step.name, most), class_="name"),
        write(x + inset + 19, y + 35.5, words.cut(_said(step, now), SAID), class_="said faint"),
    ]
    if step.kind == "each" and step.total:
        whole = WIDTH - 2 * inset
        share = min(max(step.done / step.total, 0.0), 1.0)
        parts.append(tag("rect", class_="fill", x=x + inset, y=y + HEIGHT - 5, width=whole * share, height=2.5, rx=1.2).around())
    return parts


def _said(step: StepView, now: int) -> str:
    kind = {"wait": "signal", "sleep": "sleep"}.get(step.kind, "")
    attempt = f"attempt {step.attempts}" if step.attempts > 1 else ""
    said = [
        each for each in (step.state, words.time(step, now), words.items(step), words.UNDONE[step.undo], kind, attempt) if each
    ]
    # the mark and the colour tell the state as well
    for least in (attempt, kind, step.state):
        if least in said and words.columns(" · ".join(said)) > SAID:
            said.remove(least)
    return " · ".join(said)
