"""A run as SVG: a graph with a box for each step, and a chart of time with a bar for each step.

Colours are CSS variables on the root's class `bq`, so that a page can set its own (`.bq { --bq-completed: … }`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

from buquet.insights.drawing import labels
from buquet.insights.drawing.layout import Node, Order, Placement, lay_out, order_of
from buquet.printing import duration, in_seconds, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from buquet.insights.runview import RunView
    from buquet.workflow.handle import StepInfo

COLOURS = {
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#f0f6fc"),
    "faint": ("#59636e", "#9198a1"),
    "line": ("#8c959f", "#7d8590"),
    "grid": ("#d8dee4", "#2f353d"),
    "waiting": ("#8c959f", "#7d8590"),
    "ready": ("#bf8700", "#d29922"),
    "running": ("#0969da", "#58a6ff"),
    "completed": ("#1a7f37", "#3fb950"),
    "failed": ("#cf222e", "#f85149"),
    "skipped": ("#8c959f", "#7d8590"),
    "stopped": ("#bc4c00", "#f0883e"),
    "cancelled": ("#8250df", "#ab7df8"),
}
"""The light and the dark colour of each variable."""
RULES = """
.bq{color-scheme:light dark;font-family:ui-sans-serif,system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:11px}
.bq .paper{fill:var(--bq-paper)}
.bq text{fill:var(--bq-ink)}
.bq .name{font-size:13px;font-weight:600}
.bq .faint,.bq .skipped .name,.bq .waiting .name{fill:var(--bq-faint)}
.bq .box{fill:var(--c);fill-opacity:.1;stroke:var(--c);stroke-width:1.4}
.bq .under{fill:none;stroke:var(--c);stroke-width:1.4}
.bq .fill{fill:var(--c)}
.bq .mark{fill:var(--c);font-size:14px;font-weight:700}
.bq .skipped .box,.bq .edge.skipped{stroke-dasharray:5 4}
.bq .failed .said{fill:var(--c)}
.bq .edge{fill:none;stroke:var(--bq-line);stroke-width:1.4}
.bq .tip{fill:var(--bq-line)}
.bq .edge.taken{stroke:var(--bq-ink)}
.bq .tip.taken{fill:var(--bq-ink)}
.bq .condition{fill:var(--bq-faint);font-style:italic}
.bq .condition{stroke:var(--bq-paper);stroke-width:4;stroke-linejoin:round;paint-order:stroke}
.bq .grid{stroke:var(--bq-grid)}
.bq .bar{fill:var(--c)}
.bq .bar.idle{fill-opacity:.35}
.bq a:hover .box,.bq a:focus .box{fill-opacity:.25}
"""

# The graph. All lengths are pixels.
WIDTH, HEIGHT = 196.0, 46.0
"""Of a box."""
BESIDE = 22.0
BETWEEN = 46.0
LANE = 8.0
MARGIN = 16.0
PAGE = 1200.0
"""A graph that is wider than this from left to right goes from top to bottom, unless that is wider still."""
LETTER = 6.2
"""Width of a column of small text, a little more than fonts take."""
NAME = 19
DETAILS = 27
CONDITION = 28
TIP = 8.0

# The chart of time.
CHART = 1000.0
LABELS = 210.0
RIGHT = 90.0
ROW = 24.0
TOP = 34.0
BAR = 14.0
LABEL = 26
TICKS = 8
STEPS = (
    *(base * 10**power for power in range(-3, 1) for base in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400, 172_800, 604_800),
)
"""Readable distances between ticks, in seconds."""


def _style() -> str:
    light, dark = (";".join(f"--bq-{name}:{pair[index]}" for name, pair in COLOURS.items()) for index in (0, 1))
    statuses = "\n".join(f".bq .{status}{{--c:var(--bq-{status})}}" for status in labels.MARKS)
    return f":where(.bq){{{light}}}\n@media(prefers-color-scheme:dark){{:where(.bq){{{dark}}}}}{RULES}{statuses}\n"


STYLE = _style()


def as_svg(run: RunView, now: int, link: Callable[[StepInfo], str] | None = None) -> str:
    """Return a run's graph as an SVG document, which a page can also embed.

    `now` (milliseconds) is for the times of running steps. `link` returns the address that a step's box leads to, "" for none.

    >>> from buquet.insights.runview import RunView
    >>> from buquet.workflow.handle import StepInfo
    >>> "data-step" in as_svg(RunView(id="1", workflow="w", steps=[StepInfo(name="a")]), 0)
    True
    """
    order = order_of(run.steps)
    plan = _plan(order)
    edges = [part for source, target in order.edges for part in _edge(plan, source, target)]
    boxes = [_group(step, link, _box(step, *plan.corner(name), now), now) for name, step in order.steps.items()]
    conditions = [_condition(plan, step) for step in order.steps.values() if step.condition]
    return _document(plan.width, plan.height, labels.headline(run, now), [*edges, *boxes, *conditions])


def as_gantt(run: RunView, now: int, link: Callable[[StepInfo], str] | None = None) -> str:
    """Return when each step ran, in the order of their starts, as an SVG document, which a page can also embed.

    `now` (milliseconds) is where the bars of running steps end. `link` returns the address that a step's row leads to, "" for
    none. Steps that have not begun come last, without a bar.

    >>> from buquet.insights.runview import RunView
    >>> from buquet.workflow.handle import StepInfo
    >>> "data-step" in as_gantt(RunView(id="1", workflow="w", steps=[StepInfo(name="a", started=1, ended=2)]), 0)
    True
    """
    steps = list(order_of(run.steps).steps.values())
    begun = sorted((step for step in steps if step.started), key=lambda step: step.started)
    rows = [*begun, *(step for step in steps if not step.started)]
    first = begun[0].started if begun else now
    seconds = in_seconds(max(max((step.ended or now for step in begun), default=first) - first, 1))
    scale = (CHART - LABELS - RIGHT) / seconds
    height = TOP + ROW * len(rows) + 12
    parts = _axis(seconds, scale, height) if begun else []
    for index, step in enumerate(rows):
        parts.append(_group(step, link, _row(step, TOP + ROW * index, first, now, scale), now))
    return _document(CHART, height, labels.headline(run, now), parts)


# ------------------------------------------------------------------ elements


def element(name: str, *inside: str, **attributes: object) -> str:
    r"""Return an element. `class_` is `class`, an underscore is a hyphen. All values are escaped, and numbers are rounded.

    >>> element("rect", class_="box", rx=6.0, data_step='a"<b')
    '<rect class="box" rx="6" data-step=\'a"&lt;b\'/>'
    """
    opening = name + "".join(f" {key.rstrip('_').replace('_', '-')}={_quoted(value)}" for key, value in attributes.items())
    body = "".join(inside)
    return f"<{opening}>{body}</{name}>" if body else f"<{opening}/>"


def _quoted(value: object) -> str:
    return f'"{_number(value)}"' if isinstance(value, float) else quoteattr(legal(str(value)))


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def legal(text: str) -> str:
    """Return a text in which the characters that XML cannot hold are replaced."""
    return printable(text, keep="\t\n\r", mark=lambda _: "\ufffd")


def _escaped(text: str) -> str:
    return legal(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _text(x: float, y: float, text: str, **attributes: object) -> str:
    return element("text", _escaped(text), x=x, y=y, **attributes) if text else ""


def _group(step: StepInfo, link: Callable[[StepInfo], str] | None, inside: Iterable[str], now: int) -> str:
    """Return a step's group, with attributes for scripts, and inside an `<a>` where `link` returns an address."""
    lines = [
        labels.plain(labels.title(step)),
        ", ".join(filter(None, (step.status, labels.time(step, now)))),
        *labels.remarks(step),
    ]
    title = element("title", _escaped("\n".join(lines)))
    group = element("g", title, *inside, class_=f"step {step.status}", data_step=step.name, data_task=step.task_id)
    address = link(step) if link else ""
    return element("a", group, href=address) if address else group


def _document(width: float, height: float, label: str, inside: Iterable[str]) -> str:
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    return (
        element(
            "svg",
            element("style", STYLE),
            element("rect", class_="paper", **size),
            *inside,
            xmlns="http://www.w3.org/2000/svg",
            class_="bq",
            viewBox=f"0 0 {width:.0f} {height:.0f}",
            **size,
            role="img",
            aria_label=labels.plain(label),
        )
        + "\n"
    )


# ------------------------------------------------------------------ the graph


@dataclass
class _Plan:
    """A layout on paper: layers from left to right (`sideways`), or from top to bottom."""

    order: Order
    layout: Placement
    sideways: bool

    def __post_init__(self) -> None:
        self.deep = WIDTH if self.sideways else HEIGHT
        self.starts: dict[Node, float] = {}
        along = MARGIN
        for index, layer in enumerate(self.layout.layers):
            along += self._gap(layer) if index else 0.0
            self.starts.update(dict.fromkeys(layer, along))
            along += self.deep
        size = along + MARGIN, self.layout.width + 2 * MARGIN
        self.width, self.height = size if self.sideways else size[::-1]

    def _gap(self, layer: list[Node]) -> float:
        """Return the room before a layer: more where it holds conditions."""
        longest = max((len(_cut_condition(self.order.steps[name])) for name, target, _ in layer if not target), default=0)
        if not longest:
            return BETWEEN
        return max(BETWEEN, longest * LETTER + TIP + 12) if self.sideways else BETWEEN + 14

    def span(self, node: Node) -> tuple[float, float, float]:
        """Return where a node begins and ends along the layers, and where it is across."""
        return self.starts[node], self.starts[node] + self.deep, self.layout.at[node] + MARGIN

    def point(self, along: float, across: float) -> tuple[float, float]:
        """Return the place on paper."""
        return (along, across) if self.sideways else (across, along)

    def corner(self, name: str) -> tuple[float, float]:
        """Return the upper left corner of a step's box."""
        start, _, middle = self.span((name, "", 0))
        return self.point(start, middle - (HEIGHT if self.sideways else WIDTH) / 2)


def _plan(order: Order) -> _Plan:
    def plan(*, sideways: bool) -> _Plan:
        return _Plan(order, lay_out(order, HEIGHT if sideways else WIDTH, BESIDE, LANE), sideways)

    length = len(order.layers()) * (WIDTH + BETWEEN)
    if length <= PAGE and (across := plan(sideways=True)).width <= PAGE:
        return across
    down = plan(sideways=False)
    return down if down.width <= max(PAGE, length) else plan(sideways=True)


def _cut_condition(step: StepInfo) -> str:
    return labels.cut(step.condition, CONDITION)


def _edge(plan: _Plan, source: str, target: str) -> tuple[str, str]:
    """Return an edge's line and its tip. Between layers it bends. Through a layer it goes straight, in its lane."""
    nodes = plan.layout.edges[source, target]
    before, after = plan.order.steps[source], plan.order.steps[target]
    kind = "skipped" if "skipped" in {before.status, after.status} else ""
    if not kind and before.status == "completed" and after.started:
        kind = "taken"
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
    line = element("path", class_=f"edge {kind}".strip(), d=" ".join(path), data_from=source, data_to=target)
    return line, element("path", class_=f"tip {kind}".strip(), d=tip)


def _numbers(*points: tuple[float, float]) -> list[str]:
    return [_number(number) for point in points for number in point]


def _condition(plan: _Plan, step: StepInfo) -> str:
    """Write a condition where the edges of its step arrive."""
    start, _, place = plan.span((step.name, "", 0))
    text = _cut_condition(step)
    if plan.sideways:
        return _text(start - TIP - 4, place - 6, text, class_="condition", text_anchor="end")
    return _text(place, start - TIP - 6, text, class_="condition", text_anchor="middle")


def _box(step: StepInfo, x: float, y: float, now: int) -> list[str]:
    """Draw a step: its mark and name; below it the status and what matters most."""
    radius = HEIGHT / 2 if step.kind in {"wait", "sleep"} else 7.0
    parts = [element("rect", class_="paper", x=x, y=y, width=WIDTH, height=HEIGHT, rx=radius)]
    if step.kind == "each":
        stack = f"M {x + 6:.0f} {y - 0.5:.1f} v -3.5 h {WIDTH - 2:.0f} v {HEIGHT - 4:.0f} h -3.5"
        parts.append(element("path", class_="under", d=stack))
    parts.append(element("rect", class_="box", x=x, y=y, width=WIDTH, height=HEIGHT, rx=radius))
    inset, most = (15.0, NAME - 1) if radius > HEIGHT / 3 else (11.0, NAME)
    parts += [
        _text(x + inset, y + 20, labels.MARKS[step.status], class_="mark"),
        _text(x + inset + 19, y + 19.5, labels.cut(step.name, most), class_="name"),
        _text(x + inset + 19, y + 35.5, labels.cut(_details(step, now), DETAILS), class_="said faint"),
    ]
    if step.kind == "each" and step.total:
        width = (WIDTH - 2 * inset) * min(max(step.done / step.total, 0.0), 1.0)
        parts.append(element("rect", class_="fill", x=x + inset, y=y + HEIGHT - 5, width=width, height=2.5, rx=1.2))
    return parts


def _details(step: StepInfo, now: int) -> str:
    kind = labels.kind(step)
    attempt = f"attempt {step.attempts}" if step.attempts > 1 else ""
    parts = (step.status, labels.time(step, now), labels.items(step), labels.UNDONE[step.undo], kind, attempt)
    details = list(filter(None, parts))
    # the mark and the colour show the status as well
    for least in (attempt, kind, step.status):
        if least in details and labels.columns(" · ".join(details)) > DETAILS:
            details.remove(least)
    return " · ".join(details)


# ------------------------------------------------------------------ the chart of time


def _axis(seconds: float, scale: float, height: float) -> list[str]:
    distance = next((size for size in STEPS if seconds / size <= TICKS), seconds / TICKS)
    parts: list[str] = []
    for index in range(int(seconds / distance) + 1):
        x = LABELS + index * distance * scale
        label = duration(index * distance).replace(".0 ", " ") if index else "0"
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=TOP - 6, y2=height - 8))
        parts.append(_text(x, TOP - 12, label, class_="faint", text_anchor="middle"))
    return parts


def _row(step: StepInfo, y: float, first: int, now: int, scale: float) -> list[str]:
    middle = y + ROW / 2 + 4
    parts = [
        # the whole row reacts to the pointer
        element("rect", class_="paper", x=0.0, y=y, width=CHART, height=ROW, fill_opacity=0),
        _text(12, middle, labels.MARKS[step.status], class_="mark"),
        _text(32, middle, labels.cut(step.name, LABEL), class_="name"),
    ]
    if not step.started:
        return [*parts, _text(LABELS + 4, middle, step.status, class_="faint")]
    start = LABELS + in_seconds(step.started - first) * scale
    length = max((step.seconds(now) or 0) * scale, 2.0)
    bar = "bar idle" if step.kind in {"wait", "sleep"} else "bar"
    details = " · ".join(filter(None, (labels.time(step, now), labels.items(step))))
    return [
        *parts,
        element("rect", class_=bar, x=start, y=y + (ROW - BAR) / 2, width=length, height=BAR, rx=3.0),
        _text(start + length + 6, middle, details, class_="faint"),
    ]
