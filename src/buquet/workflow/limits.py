"""How many signals and errors a run keeps, so that its record does not grow without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet.errors import UnreadableRecord

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


def check_tasks(run: RunRecord) -> None:
    """Raise UnreadableRecord for a record that names more tasks than any run has: somebody may have put any number there."""
    named = run.gen + sum(record.gen * (record.fan.tasks if record.fan else 1) for record in run.steps.values())
    if named > MOST_TASKS:
        msg = f"the record of run {run.id[:80]!r} names {min(named, 10**18):,} tasks; it is left as it is. Restore an older one"
        raise UnreadableRecord(msg)


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
