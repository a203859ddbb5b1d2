"""A run as a Mermaid flowchart, for Markdown pages and merge requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet.insights.drawing import words
from buquet.insights.drawing.order import order_of

if TYPE_CHECKING:
    from buquet.insights.runview import RunView, StepKind, StepView

SHAPES: dict[StepKind, tuple[str, str]] = {
    "task": ("[", "]"),
    "each": ("[[", "]]"),
    "wait": ("{{", "}}"),
    "sleep": ("([", "])"),
    "value": ("(", ")"),
}
STYLES = {
    "waiting": "fill:#eaeef2,stroke:#6e7781,color:#1f2328",
    "ready": "fill:#fff8c5,stroke:#9a6700,color:#1f2328",
    "running": "fill:#ddf4ff,stroke:#0969da,color:#1f2328",
    "completed": "fill:#dafbe1,stroke:#1a7f37,color:#1f2328",
    "failed": "fill:#ffebe9,stroke:#cf222e,color:#1f2328",
    "skipped": "fill:#f6f8fa,stroke:#8c959f,color:#6e7781,stroke-dasharray:4 3",
    "stopped": "fill:#fff1e5,stroke:#bc4c00,color:#1f2328",
    "cancelled": "fill:#fbefff,stroke:#8250df,color:#1f2328",
}
SAFE = frozenset(" _,/=")
LABEL = 60
"""Columns of a label; longer ones are cut."""


def as_mermaid(run: RunView, now: int) -> str:
    r"""Return a run as the source of a Mermaid flowchart. `now` (milliseconds) is for the times of what still runs.

    >>> from buquet.insights.runview import RunView, StepView
    >>> print(as_mermaid(RunView(id="1", workflow="w", steps=[StepView(name='say "hi"')]), 0).splitlines()[1])
      s0["say #34;hi#34;<br/>waiting"]:::waiting
    """
    order = order_of(run.steps)
    ids = {name: f"s{index}" for index, name in enumerate(order.steps)}
    lines = ["flowchart LR"]
    for name, step in order.steps.items():
        opening, closing = SHAPES[step.kind]
        lines.append(f'  {ids[name]}{opening}"{_label(step, now)}"{closing}:::{step.state}')
    for name, step in order.steps.items():
        for index, source in enumerate(order.before[name]):
            said = f'|"{escaped(step.condition)}"|' if step.condition and not index else ""
            arrow = "-.->" if "skipped" in {step.state, order.steps[source].state} else "-->"
            lines.append(f"  {ids[source]} {arrow}{said} {ids[name]}")
    used = dict.fromkeys(step.state for step in order.steps.values())
    lines += [f"  classDef {state} {STYLES[state]}" for state in used]
    return "\n".join(lines) + "\n"


def _label(step: StepView, now: int) -> str:
    said = (step.state, words.items(step), words.time(step, now), words.UNDONE[step.undo])
    return f"{escaped(words.title(step))}<br/>{escaped(', '.join(each for each in said if each))}"


def escaped(text: str) -> str:
    """Return a text for a quoted Mermaid label: letters, digits and a few signs as they are, the rest as numbers."""
    return "".join(each if each.isalnum() or each in SAFE else f"#{ord(each)};" for each in words.cut(text, LABEL))
