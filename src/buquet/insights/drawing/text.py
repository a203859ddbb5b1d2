"""A run as lines for a terminal, in the manner of `git log --graph`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from buquet.insights.drawing import words
from buquet.insights.drawing.order import Order, order_of

if TYPE_CHECKING:
    from buquet.insights.runview import RunView, StepState, StepView

Span: TypeAlias = tuple[str, str]
"""A piece of a line, and its style as rich names it; "" for none."""
Line: TypeAlias = list[Span]

STYLES: dict[StepState, str] = {
    "waiting": "dim",
    "ready": "yellow",
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "skipped": "dim",
    "stopped": "yellow",
    "cancelled": "magenta",
}
NAME = 32
"""Most columns of a name."""
LANES = 10
"""With more lanes than this side by side, layers are listed instead: nobody follows so many lines."""


def as_text(run: RunView, now: int, width: int = 80) -> list[Line]:
    """Return a run as lines of at most `width` columns: what it is, then a line a step, joined by what comes before what.

    `now` (milliseconds) is for the times of what still runs. Plain text is the spans of each line, put together:

    >>> from buquet.insights.runview import RunView, StepView
    >>> steps = [StepView(name="a"), StepView(name="b", depends=("a",)), StepView(name="c", depends=("a",))]
    >>> for line in as_text(RunView(id="1", workflow="w", steps=steps), 0):
    ...     print("".join(text for text, _ in line))
    w 1: pending
    ○    a  waiting
    ├─╮
    ○ │  b  waiting
      ○  c  waiting
    """
    order = order_of(run.steps)
    graph = _Lanes(order).drawn()
    if max((len(cells) for cells, _ in graph), default=0) > 2 * LANES:
        graph = _listed(order)
    lines: list[Line] = [[(words.cut(words.headline(run, now), width), "bold")]]
    if run.error:
        lines.append([(words.cut(run.error, width), "red")])
    left = max((len(cells.rstrip()) for cells, _ in graph), default=0)
    names = min(max((words.columns(words.plain(words.title(step))) for step in run.steps), default=0), NAME)
    for cells, name in graph:
        if name:
            step = order.steps[name]
            text = cells.rstrip()
            mark = text.index(words.MARKS[step.state])
            drawing = [(text[:mark], "dim"), (text[mark], STYLES[step.state]), (text[mark + 1 :].ljust(left - mark - 1), "dim")]
            lines.append([*(span for span in drawing if span[0]), *_said(step, now, names, width - left - 2)])
        else:
            lines.append([(cells.rstrip(), "dim")])
    return lines


def _said(step: StepView, now: int, names: int, room: int) -> Line:
    """Return what stands beside the mark of a step."""
    style = STYLES[step.state]
    name = words.cut(words.title(step), min(names, room))
    state = f"{step.state:<9}  {words.time(step, now):>9}"
    left = room - names - 2 - len(state)
    remarks = words.cut(" · ".join(words.remarks(step)), left - 2) if left > NAME // 2 else ""
    padding = " " * (names - words.columns(name) + 2)
    spans = [
        ("  ", ""),
        (name, "dim" if step.state == "skipped" else ""),
        (padding, ""),
        (state if remarks else state.rstrip(), style),
    ]
    if remarks:
        spans.append((f"  {remarks}", "red" if step.error else ""))
    return spans


@dataclass
class _Lanes:
    """Draws steps from the top down. A lane leads to a step that is still to come; all that lead to one share it."""

    order: Order
    lanes: list[str | None] = field(default_factory=list[str | None])
    rows: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """The drawing's columns, and the step on the row or ""."""

    def drawn(self) -> list[tuple[str, str]]:
        """Return the rows."""
        done: set[str] = set()
        while len(done) < len(self.order.steps):
            name = self._next(done)
            if name not in self.lanes:
                self._begin(name)
            here = self.lanes.index(name)
            self.rows.append((self._row(here, words.MARKS[self.order.steps[name].state]), name))
            self._lead_on(name, here)
            done.add(name)
        return self.rows

    def _next(self, done: set[str]) -> str:
        """Return the step to draw next: what a lane leads to before what stands for itself."""
        for name in self.lanes:
            if name is not None and done.issuperset(self.order.before[name]):
                return name
        return next(name for name in self.order.steps if name not in done and name not in self.lanes)

    def _begin(self, name: str) -> None:
        """Give a lane to a step that nothing leads to, so that it does not stand right below one that it has no tie to."""
        if self.rows and not any(self.lanes):
            self.rows.append(("", ""))
        above = self.rows[-1][0] if self.rows else ""
        for index, lane in enumerate(self.lanes):
            if lane is None and above[2 * index : 2 * index + 1] in {"", " "}:
                self.lanes[index] = name
                return
        self.lanes.append(name)

    def _take(self, name: str, near: int) -> int:
        """Give a step a free lane, to the right of `near` where there is one."""
        for index in (*range(near, len(self.lanes)), *range(near)):
            if self.lanes[index] is None:
                self.lanes[index] = name
                return index
        self.lanes.append(name)
        return len(self.lanes) - 1

    def _row(self, here: int, mark: str) -> str:
        return " ".join(mark if index == here else " " if lane is None else "│" for index, lane in enumerate(self.lanes))

    def _lead_on(self, name: str, here: int) -> None:
        """Open lanes from a step to what waits for it, or join those that others opened."""
        before = list(self.lanes)
        targets = self.order.after[name]
        fresh = [each for each in targets if each not in self.lanes]
        joined = [self.lanes.index(each) for each in targets if each in self.lanes]
        self.lanes[here] = fresh[0] if fresh else None
        opened = [self._take(each, here) for each in fresh[1:]]
        if joined or opened:
            self.rows.append((self._connector(here, joined, opened, before), ""))
        while self.lanes and self.lanes[-1] is None:
            self.lanes.pop()

    def _connector(self, here: int, joined: list[int], opened: list[int], before: list[str | None]) -> str:
        """Return a row on which `here` is tied to lanes that go on and to new ones. A lane that is passed stays whole: `─│─`."""
        ends = [here, *joined, *opened]
        first, last = min(ends), max(ends)
        cells: list[str] = []
        for index in range(len(self.lanes)):
            up = index == here or (index < len(before) and before[index] is not None)
            down = self.lanes[index] is not None
            tied = index in ends
            left, right = tied and index > first, tied and index < last
            passed = first < index < last and not tied
            cells.append(_CORNERS[up, down, left, right] if tied else "│" if up and down else "─" if passed else " ")
            cells.append("─" if first <= index < last else " ")
        return "".join(cells)


_CORNERS = {
    (up, down, left, right): sign
    for (up, down, left, right), sign in zip(
        (
            (up, down, left, right)
            for up in (False, True)
            for down in (False, True)
            for left in (False, True)
            for right in (False, True)
        ),
        " ╶╴─╷╭╮┬╵╰╯┴│├┤┼",
        strict=True,
    )
}
"""A box character by where lines leave it: up, down, left, right."""


def _listed(order: Order) -> list[tuple[str, str]]:
    """Return layer under layer; what can run side by side is bracketed."""
    rows: list[tuple[str, str]] = []
    for layer in order.layers():
        for index, name in enumerate(layer):
            bracket = "─" if len(layer) == 1 else "┌" if index == 0 else "└" if index == len(layer) - 1 else "│"
            rows.append((f"{bracket} {words.MARKS[order.steps[name].state]}", name))
    return rows
