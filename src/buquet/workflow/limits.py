"""How many tasks a run may have, and how many signals and errors it keeps, so that neither grows without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet.errors import UnreadableRecord, UsageError
from buquet.printing import counted

if TYPE_CHECKING:
    from buquet.workflow.graph import Graph
    from buquet.workflow.records import RunRecord

KEPT_ERRORS = 100
"""Items of an `each` that failed and are told of one by one, in a graph with up to ten of them; in all a thousand."""
MOST_KEPT = 1000
"""Signals of one name that wait in a run for a step to take them."""
MOST_APPLIED = 10_000
"""Signals, and other events of its own, that a run takes in its life: it remembers each, so that none counts twice."""
MOST_TASKS = 10**8
MOST_FANNED = 10_000
"""Tasks of an `each` that does not say how many items it may run over."""


def check_tasks(run: RunRecord) -> None:
    """Raise UnreadableRecord for a record that names more tasks than any run has: somebody may have put any number there."""
    named = run.gen + sum(record.gen * (record.fan.tasks if record.fan else 1) for record in run.steps.values())
    if named > MOST_TASKS:
        msg = f"the record of run {run.id[:80]!r} names {min(named, 10**18):,} tasks; it is left as it is. Restore an older one"
        raise UnreadableRecord(msg)


def check_max_items(max_items: object) -> None:
    """Raise UsageError for what is no number of items of an `each`."""
    if max_items is not None and (
        isinstance(max_items, bool) or not isinstance(max_items, int) or not 1 <= max_items < MOST_TASKS
    ):
        raise UsageError(f"max_items is the most items of an `each`, 1 to {MOST_TASKS - 1:,}, not {max_items!r}")


def too_many(size: int, pack: int, max_items: int, allowed: int | None) -> str:
    """Tell what is wrong with the number of items of an `each`, if so. `max_items`: 0 for none; `allowed`: what the App says.

    >>> too_many(20_000, 0, 0, None)
    'each would run over 20,000 items, and the most is 10,000: say each(..., pack=50) or max_items=20000'
    >>> too_many(20_000, 50, 0, None), too_many(20_000, 0, 30_000, None)
    ('', '')
    """
    most = max_items or allowed or MOST_FANNED * (pack or 1)
    if allowed is not None and most > allowed:
        most = allowed
    if size <= most:
        return ""
    told = f"each would run over {counted(size, 'item')}, and the most is {most:,}"
    if most == allowed:
        return f"{told} (max_items of the App)"
    return f"{told}: say each(..., pack=50) or max_items={size}"


def takes_no_more(run: RunRecord, signal: str) -> str:
    """Tell why a run takes no more signals of this name, if so."""
    if len(run.applied) >= MOST_APPLIED:
        return f"it has taken {MOST_APPLIED:,} signals, and takes no more"
    if len(run.inbox.get(signal, ())) >= MOST_KEPT:
        return f"{MOST_KEPT:,} of them are there that no step has taken yet"
    return ""


def kept_errors(graph: Graph) -> int:
    """Return how many items that failed are told of one by one for each `each` of a graph."""
    fans = sum(step.kind == "each" for step in graph.steps.values())
    return min(KEPT_ERRORS, max(3, 10 * KEPT_ERRORS // fans))
