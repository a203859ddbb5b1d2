"""A run as text: lines for a terminal, in the manner of `git log --graph`, and a Mermaid flowchart for Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

from buquet.insights.drawing import labels
from buquet.insights.drawing.layout import Order, order_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from buquet.insights.runview import RunView
    from buquet.workflow.graph import Kind
    from buquet.workflow.handle import StepInfo, StepStatus

Span: TypeAlias = tuple[str, str]
"""A piece of a line, and its style as rich names it; "" for none."""
Line: TypeAlias = list[Span]

STYLES: dict[StepStatus, str] = {
    "waiting": "dim",
    "ready": "yellow",
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "skipped": "dim",
    "stopped": "yellow",
    "cancelled": "magenta",
}
STATUS = 20
"""Columns of a status and its time."""
NAME = 32
"""Most columns of a name."""
LANES = 10
"""With more parallel lanes than this, nobody could follow the lines: layers are listed instead."""

SHAPES: dict[Kind, tuple[str, str]] = {
    "task": ("[", "]"),
    "each": ("[[", "]]"),
    "wait": ("{{", "}}"),
    "sleep": ("([", "])"),
}
CLASSES: dict[str, str] = {
    "waiting": "fill:#eaeef2,stroke:#6e7781,color:#1f2328",
    "ready": "fill:#fff8c5,stroke:#9a6700,color:#1f2328",
    "running": "fill:#ddf4ff,stroke:#0969da,color:#1f2328",
    "completed": "fill:#dafbe1,stroke:#1a7f37,color:#1f2328",
    "failed": "fill:#ffebe9,stroke:#cf222e,color:#1f2328",
    "skipped": "fill:#f6f8fa,stroke:#8c959f,color:#6e7781,stroke-dasharray:4 3",
    "stopped": "fill:#fff1e5,stroke:#bc4c00,color:#1f2328",
    "cancelled": "fill:#fbefff,stroke:#8250df,color:#1f2328",
}
SAFE = frozenset(" _,/=.():")
LABEL = 60
"""Most columns of a label in Mermaid."""


def as_text(run: RunView, now: int, width: int = 80) -> list[Line]:
    """Return a run as lines of at most `width` columns: a headline, then a line for each step, joined by its dependencies.

    `now` (milliseconds) is for the times of running steps. A line is a list of spans; their texts together are plain text:

    >>> from buquet.insights.runview import RunView
    >>> from buquet.workflow.handle import StepInfo
    >>> steps = [StepInfo(name="a"), StepInfo(name="b", needs=("a",)), StepInfo(name="c", needs=("a",))]
    >>> for line in as_text(RunView(id="1", workflow="w", steps=steps), 0):
    ...     print("".join(text for text, _ in line))
    w 1: pending
    ○    a  waiting
    ├─╮
    ○ │  b  waiting
      ○  c  waiting
    """
    order = order_of(run.steps)
    rows = _Lanes(order, min(LANES, width // 7)).drawn() or _listed(order)
    lines: list[Line] = [[(labels.cut(labels.headline(run, now), width), "bold")]]
    if run.error:
        lines.append([(labels.cut(run.error, width), "red")])
    left = max((len(cells.rstrip()) for cells, _ in rows), default=0)
    longest = max((labels.columns(labels.plain(labels.title(step))) for step in run.steps), default=0)
    names = min(longest, NAME, max(width - left - 2 - STATUS - 2, STATUS // 2))
    for cells, name in rows:
        text = cells.rstrip()
        if not name:
            lines.append([(text, "dim")])
            continue
        step = order.steps[name]
        before, mark, after = text.partition(labels.MARKS[step.status])
        drawing = [(before, "dim"), (mark, STYLES[step.status]), (after.ljust(left - len(before) - 1), "dim")]
        lines.append([*(span for span in drawing if span[0]), *_details(step, now, names, max(width - left - 2, 0))])
    return lines


def as_mermaid(run: RunView, now: int) -> str:
    r"""Return a run as the source of a Mermaid flowchart. `now` (milliseconds) is for the times of running steps.

    >>> from buquet.insights.runview import RunView
    >>> from buquet.workflow.handle import StepInfo
    >>> print(as_mermaid(RunView(id="1", workflow="w", steps=[StepInfo(name='say "hi"')]), 0).splitlines()[1])
      s0["say #34;hi#34;<br/>waiting"]:::waiting
    """
    order = order_of(run.steps)
    ids = {name: f"s{index}" for index, name in enumerate(order.steps)}
    lines = ["flowchart LR"]
    for name, step in order.steps.items():
        opening, closing = SHAPES[step.kind]
        details = ", ".join(filter(None, (step.status, labels.items(step), labels.time(step, now), labels.UNDONE[step.undo])))
        lines.append(f'  {ids[name]}{opening}"{_escaped(labels.title(step))}<br/>{_escaped(details)}"{closing}:::{step.status}')
    for name, step in order.steps.items():
        before = order.before[name]
        # one edge shows the condition: that from the step that the condition names
        judge = next((source for source in before if source in step.condition), before[0] if before else "")
        for source in before:
            label = f'|"{_escaped(step.condition)}"|' if step.condition and source == judge else ""
            arrow = "-.->" if "skipped" in {step.status, order.steps[source].status} else "-->"
            lines.append(f"  {ids[source]} {arrow}{label} {ids[name]}")
    statuses = dict.fromkeys(step.status for step in order.steps.values())
    lines += [f"  classDef {status} {CLASSES[status]}" for status in statuses]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Return a text for a quoted Mermaid label: letters, digits and a few signs as they are, the rest as numbers."""
    safe = "".join(char if char.isalnum() or char in SAFE else f"#{ord(char)};" for char in labels.cut(text, LABEL))
    return safe.replace(". ", "#46; ")  # "1. item" would be a list


def _details(step: StepInfo, now: int, names: int, room: int) -> Line:
    """Return the text beside the mark of a step: its name in `names` columns, its status, and remarks where they have room."""
    style = STYLES[step.status]
    name = labels.cut(labels.title(step), names)
    padding = " " * (names - labels.columns(name) + 2)
    status = f"{step.status:<9}  {labels.time(step, now):>9}"[: max(room - names - 2, 0)]
    left = room - names - 2 - len(status)
    remarks = labels.cut(" · ".join(labels.remarks(step)), left - 2) if left > NAME // 2 else ""
    line = [("  ", ""), (name, "dim" if step.status == "skipped" else ""), (padding, "")]
    if not remarks:
        return [*line, (status.rstrip(), style)]
    return [*line, (status, style), (f"  {remarks}", "red" if step.error else "")]


@dataclass
class _Lanes:
    """Draws steps from the top down. A lane leads to a step that is not drawn yet; all edges to a step share its lane."""

    order: Order
    most: int
    lanes: list[str | None] = field(default_factory=list[str | None])
    rows: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """The drawing's columns, and the step on the row or ""."""

    def drawn(self) -> list[tuple[str, str]]:
        """Return the rows; none where they need more than `most` lanes."""
        done: set[str] = set()
        while len(done) < len(self.order.steps):
            name = self._next(done)
            if name not in self.lanes:
                self._begin(name)
            here = self.lanes.index(name)
            mark = labels.MARKS[self.order.steps[name].status]
            cells = (mark if index == here else " " if lane is None else "│" for index, lane in enumerate(self.lanes))
            self.rows.append((" ".join(cells), name))
            self._lead_on(name, here)
            if len(self.lanes) > self.most:
                return []
            done.add(name)
        return self.rows

    def _next(self, done: set[str]) -> str:
        """Return the step to draw next: steps that a lane leads to come first."""
        for name in self.lanes:
            if name is not None and done.issuperset(self.order.before[name]):
                return name
        return next(name for name in self.order.steps if name not in done and name not in self.lanes)

    def _begin(self, name: str) -> None:
        """Give a lane to a step that nothing leads to. It must not stand right below a step that it has no edge to."""
        if self.rows and not any(self.lanes):
            self.rows.append(("", ""))
        above = self.rows[-1][0] if self.rows else ""
        self._take(name, (index for index in range(len(self.lanes)) if above[2 * index : 2 * index + 1] in {"", " "}))

    def _take(self, name: str, places: Iterable[int]) -> int:
        """Give a step the first free lane of `places`, or a new lane."""
        place = next((index for index in places if self.lanes[index] is None), len(self.lanes))
        self.lanes[place : place + 1] = [name]
        return place

    def _lead_on(self, name: str, here: int) -> None:
        """Open lanes from a step to the steps that depend on it, or join the lanes that other steps opened."""
        before = list(self.lanes)
        targets = self.order.after[name]
        fresh = [target for target in targets if target not in self.lanes]
        joined = [self.lanes.index(target) for target in targets if target in self.lanes]
        self.lanes[here] = fresh[0] if fresh else None
        # to the right of `here` where there is a free lane
        opened = [self._take(target, (*range(here, len(self.lanes)), *range(here))) for target in fresh[1:]]
        if joined or opened:
            self.rows.append((self._connector(here, joined + opened, before), ""))
        while self.lanes and self.lanes[-1] is None:
            self.lanes.pop()

    def _connector(self, here: int, others: list[int], before: list[str | None]) -> str:
        """Return a row that ties `here` to other lanes. A lane that the row passes stays whole: `─│─`."""
        ends = [here, *others]
        first, last = min(ends), max(ends)
        cells: list[str] = []
        for index in range(len(self.lanes)):
            up = index == here or (index < len(before) and before[index] is not None)
            down = self.lanes[index] is not None
            tied = index in ends
            passed = first < index < last and not tied
            corner = _CORNERS[up, down, tied and index > first, tied and index < last]
            cells.append(corner if tied else "│" if up and down else "─" if passed else " ")
            cells.append("─" if first <= index < last else " ")
        return "".join(cells)


_CORNERS = dict(zip(product((False, True), repeat=4), " ╶╴─╷╭╮┬╵╰╯┴│├┤┼", strict=True))
"""A box character by the sides where lines leave it: up, down, left, right."""


def _listed(order: Order) -> list[tuple[str, str]]:
    """Return layer after layer. The steps of one layer, which can run in parallel, are bracketed."""
    rows: list[tuple[str, str]] = []
    for layer in order.layers():
        for index, name in enumerate(layer):
            bracket = "─" if len(layer) == 1 else "┌" if index == 0 else "└" if index == len(layer) - 1 else "│"
            rows.append((f"{bracket} {labels.MARKS[order.steps[name].status]}", name))
    return rows
