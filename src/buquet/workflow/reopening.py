"""What a retry of a run does again, and what it keeps. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from buquet.workflow import ranges
from buquet.workflow.expression import Fields, steps_of
from buquet.workflow.records import Fan

if TYPE_CHECKING:
    from buquet.workflow.expression import Expr
    from buquet.workflow.plan import Plan
    from buquet.workflow.records import RunRecord

MISFITS = {"InvalidPayload", "buquet.errors.InvalidPayload"}
"""Types of the errors that say that a value does not fit: of a handler's arguments, and of what `advance` works out."""


class Again(NamedTuple):
    """The steps that run again."""

    steps: set[str]
    own: set[str]
    """Those without a good outcome of their own; the others take the value of one that runs again."""
    asked: set[str]
    """Waits whose signal is not put back: its value did not fit, so another one is waited for."""


def opened(run: RunRecord, by: str) -> RunRecord:
    """Return a run that is over as one that goes on under the next generation."""
    fresh = replace(run, unwinding=False, paused=False, error=None, failed="", finished=0)
    return replace(fresh, state="running", gen=run.gen + 1, by=by)


def again(run: RunRecord, plan: Plan) -> Again:
    """Return what a retry of a run runs again."""
    asked = _misfits(run, plan)
    own = {name for name, record in run.steps.items() if record.state not in {"idle", "done", "skipped"} or record.undo} | asked
    steps = set(own)
    for name in plan.graph.steps:  # in order: each comes after what it needs
        # one that has not begun again since the last retry may keep items of an older list
        begun = run.step(name).state != "idle" or run.step(name).fan is not None
        if begun and not steps.isdisjoint(plan.needs[name]):
            steps.add(name)
    return Again(steps, own, asked)


def _misfits(run: RunRecord, plan: Plan) -> set[str]:
    """Return the waits whose signal made the run fail: its value does not fit what took it."""
    exprs: list[Expr] = []
    for name, record in run.steps.items():
        if record.state == "failed" and record.error is not None and record.error.type in MISFITS:
            args = plan.graph.steps[name].args
            place = re.search(r"at `\$\.(\w+)", record.error.message)
            if isinstance(args, Fields) and place and place[1] in args.fields:
                exprs.append(args.fields[place[1]])  # the other arguments fit
            else:
                exprs += [*(guard for guard, _ in plan.graph.steps[name].guards), *plan.inputs[name]]
    if run.error is not None and run.error.type == "InvalidResult":
        exprs.append(plan.graph.output)
    return {name for expr in exprs for name in steps_of(expr) if run.step(name).signal}


def well_ended(fan: Fan) -> Fan:
    """Return an `each` with those of its tasks only that ended well; what comes later outranks what is in a chunk."""
    bad = {*ranges.numbers(fan.failed), *ranges.numbers(fan.stopped), *ranges.numbers(fan.untried)}
    ended: ranges.Ranges = ()
    for index in ranges.numbers(fan.ended):
        if index not in bad:
            ended = ranges.add(ended, index)
    results = {index: each for index, each in fan.results.items() if index not in bad}
    return Fan(tasks=fan.tasks, items=fan.items, pack=fan.pack, ended=ended, results=results, chunks=fan.chunks)
