"""The words and marks on drawings: what a step's line or box says, made safe and cut to size."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from buquet.printing import JOINERS, duration, printable

if TYPE_CHECKING:
    from buquet.insights.runview import RunView
    from buquet.workflow.handle import StepInfo, StepStatus

MARKS: dict[StepStatus, str] = {
    "waiting": "○",
    "ready": "◎",
    "running": "●",
    "completed": "✓",
    "failed": "✗",
    "skipped": "»",
    "stopped": "■",
    "cancelled": "⊘",
}
"""A sign for each status, one column wide in every terminal."""
UNDONE = {"": "", "due": "to be undone", "done": "undone", "failed": "undo failed"}


def plain(text: str) -> str:
    """Return a text as one line of printable characters: anybody may have written names and errors."""
    return " ".join(printable(text, mark=lambda _: " ").split())


def columns(text: str) -> int:
    """Return how many columns a text takes in a terminal."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character) or character in JOINERS:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def cut(text: str, most: int) -> str:
    """Return a text as one printable line of at most `most` columns.

    >>> cut("validate the order", 9)
    'validate…'
    """
    text = plain(text)
    if columns(text) <= most:
        return text
    kept, room = "", most - 1
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept += character
    return kept.rstrip() + "…" if most > 0 else ""


def title(step: StepInfo) -> str:
    """Return a step's name, and its task's name where that is another."""
    return f"{step.name} ({step.task})" if step.task not in {"", step.name} else step.name


def items(step: StepInfo) -> str:
    """Return the progress of a fan-out."""
    return f"{step.done:,}/{step.total:,}" if step.kind == "each" and step.total else ""


def kind(step: StepInfo) -> str:
    """Return the kind of a step that is no plain task."""
    return {"wait": "signal", "sleep": "sleep"}.get(step.kind, "") if step.kind != step.name else ""


def time(step: StepInfo, now: int) -> str:
    """Return for how long a step ran."""
    seconds = step.seconds(now)
    return "" if seconds is None or (not step.ended and step.status not in {"running", "ready"}) else duration(seconds)


def remarks(step: StepInfo) -> list[str]:
    """Return the other facts about a step, the most important first."""
    facts = (
        step.error,
        UNDONE[step.undo],
        step.reason,
        items(step),
        f"attempt {step.attempts}" if step.attempts > 1 else "",
        f"if {step.condition}" if step.condition else "",
        kind(step),
    )
    return [plain(fact) for fact in facts if fact]


def headline(run: RunView, now: int) -> str:
    """Return a run in one line."""
    seconds, retries = run.seconds(now), run.generation - 1
    facts = (
        run.status + (", paused" if run.paused else ""),
        "" if seconds is None else duration(seconds),
        f"retried {retries} times" if retries > 1 else "retried once" if retries == 1 else "",
        f"key {run.key}" if run.key else "",
        run.reason,
    )
    return plain(f"{run.workflow} {run.id}: {', '.join(filter(None, facts))}")
