"""What becomes of a run when something happens to it: a pure function of its record and an event. All I/O is elsewhere.

Every event is carried by a task, whose id is the event's. What an event makes due is marked with that id: its task is over only
after what is due was submitted, and nobody else need submit it. Where somebody else must (at resume and when the run
unwinds, since the earlier carrier may have been held up), they are marked anew.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from buquet.records import ErrorInfo
from buquet.sealing import key_id_of
from buquet.workflow import records
from buquet.workflow.expression import (
    PENDING,
    SKIPPED,
    Fault,
    Fields,
    check_size,
    is_mark,
    no_condition,
    show,
    steps_of,
    strongest,
)
from buquet.workflow.graph import packed, size_of
from buquet.workflow.records import OVER, Fan, ItemError, RunRecord, Sent, StepRecord, kept_errors, takes_no_more, too_many
from buquet.workflow.values import kept

if TYPE_CHECKING:
    from buquet.workflow.expression import Expr
    from buquet.workflow.graph import Graph, Plan, Step
    from buquet.workflow.records import Event
    from buquet.workflow.values import StepValues


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
    bad = {*records.numbers(fan.failed), *records.numbers(fan.stopped), *records.numbers(fan.untried)}
    ended: records.Ranges = ()
    for index in records.numbers(fan.ended):
        if index not in bad:
            ended = records.add(ended, index)
    results = {index: each for index, each in fan.results.items() if index not in bad}
    return Fan(tasks=fan.tasks, items=fan.items, pack=fan.pack, ended=ended, results=results, chunks=fan.chunks)


LONGEST_WAIT = 10 * 366 * 86_400
LOOKS_SEALED = "has the one field that marks encrypted values. Name the field otherwise"
CANCELLED = ErrorInfo(type="TaskCancelled", message="its task was cancelled")


def advance(run: RunRecord, plan: Plan, event: Event, now: int, values: StepValues) -> RunRecord:
    """Return the run after an event; the same object when the event changes nothing. Raises Missing for values not at hand."""
    return _Advance(run, plan, event, now, values).after()


class _Advance:
    def __init__(self, run: RunRecord, plan: Plan, event: Event, now: int, values: StepValues) -> None:
        self.run = run
        self._before = run.steps
        self.plan = plan
        self.graph: Graph = plan.graph
        self.event = event
        self.now = now
        self.values = values

    def after(self) -> RunRecord:
        changed: set[str] | None = getattr(self, f"_{self.event.kind}")()
        if changed is None:
            return self.run
        self._settle(changed)
        return self.run

    # ------------------------------------------------------------------ events: each returns the steps that ended, or None

    def _start(self) -> set[str] | None:
        if self.event.id in self.run.applied:
            return None
        self._apply()
        self._look_at(self.plan.first)
        return set()

    def _step(self) -> set[str] | None:
        event = self.event
        record = self.run.step(event.step)
        if record.gen != event.gen or record.state != "due":
            return None
        if record.fan is not None:
            return self._fan(event, record, record.fan)
        if event.outcome == "done":
            return self._end(event.step, "done", result=event.result, result_at=event.result_at)
        if event.outcome == "cancelled" and self.run.unwinding:
            return self._end(event.step, "maybe" if event.tried else "stopped")
        error = event.error or CANCELLED
        self._fail(event.step, error)
        return self._end(event.step, "failed", error=error, untried=not event.tried)

    def _fan(self, event: Event, record: StepRecord, fan: Fan) -> set[str] | None:
        """Enter what a task of an `each` came to. The step ends with the last of them."""
        if records.has(fan.ended, event.item):
            return None
        step = self.graph.steps[event.step]
        if event.result_at or bytes(event.result):
            fan = replace(fan, results={**fan.results, event.item: kept(event)})
        if event.outcome != "done":
            fan = self._shortfall(event, step, fan)
        fan = replace(fan, ended=records.add(fan.ended, event.item))
        self._put(event.step, replace(record, fan=fan))
        if records.count(fan.ended) < fan.tasks:
            return set()
        if not fan.stopped and (step.allow_failures or not fan.failed):
            return self._end(event.step, "done")
        return self._end(
            event.step, "failed" if fan.failed else "maybe", error=_first(self.values, fan.errors) if fan.failed else None
        )

    def _shortfall(self, event: Event, step: Step, fan: Fan) -> Fan:
        """Enter that a task of an `each` did not end well."""
        if not event.tried:
            fan = replace(fan, untried=records.add(fan.untried, event.item))
        if event.outcome == "cancelled" and self.run.unwinding:
            return replace(fan, stopped=records.add(fan.stopped, event.item))
        error = event.error or CANCELLED
        told = event.errors or (ItemError(index=0, type=error.type, message=error.message[:500]),)
        base = event.item * (packed(step, fan) or 1)
        told = tuple(replace(each, index=base + each.index) for each in told)
        if not step.allow_failures:
            self._fail(event.step, _first(self.values, told))
        errors = (*fan.errors, *told)[: kept_errors(self.graph)]
        return replace(fan, failed=records.add(fan.failed, event.item), errors=errors)

    def _undo(self) -> set[str] | None:
        event = self.event
        record = self.run.step(event.step)
        if record.gen != event.gen or record.undo != "due" or records.has(record.undo_ended, event.item):
            return None
        ended = records.add(record.undo_ended, event.item)
        error = record.undo_error
        if event.outcome != "done":
            error = event.error or CANCELLED
        whole = record.fan is None or records.count(ended) + records.count(record.fan.untried) >= record.fan.tasks
        state = ("failed" if error else "done") if whole else "due"
        self._put(event.step, replace(record, undo_ended=ended, undo=state, undo_error=error))
        return set()

    def _timer(self) -> set[str] | None:
        event = self.event
        record = self.run.step(event.step)
        if record.gen != event.gen or record.state != "due" or self.run.state != "running":
            return None
        step = self.graph.steps[event.step]
        if step.kind == "sleep":
            return self._come_to(event.step, None)
        if step.default is None:
            error = ErrorInfo(type="SignalTimeout", message=f"no signal {step.signal!r} came in time")
            self._fail(event.step, error)
            return self._end(event.step, "failed", error=error)
        return self._come_to(event.step, self.values.of(self.run, step.default))

    def _signal(self) -> set[str] | None:
        event = self.event
        if event.id in self.run.applied or self.run.state in {"completed", "pruned"}:
            return None
        sent = Sent(event=event.id, value=event.result, value_at=event.result_at, sent=event.sent, sender=event.sender)
        waiting = [
            (record.due, place, name)
            for place, (name, step) in enumerate(self.graph.steps.items())
            if step.kind == "wait" and step.signal == event.signal and self._in_time(record := self.run.step(name))
        ]
        if takes_no_more(self.run, event.signal):
            return None
        self._apply()
        if waiting and self.run.state == "running":
            return self._take(min(waiting)[2], sent)
        # kept for a wait that is still to come; of a run that fails, or was cancelled, for its retry
        there = self.run.inbox.get(event.signal, ())
        self.run = replace(self.run, inbox={**self.run.inbox, event.signal: (*there, sent)})
        return set()

    def _in_time(self, record: StepRecord) -> bool:
        """Tell whether a wait takes a signal now; not one that was sent after its deadline, while no worker was there."""
        late = record.until and self.event.sent > record.until < self.now
        return record.state == "due" and not late

    def _cancel(self) -> set[str] | None:
        event, run = self.event, self.run
        if event.id in run.applied or run.state != "running" or event.gen != run.gen:
            return None
        self._apply()
        error = ErrorInfo(type="RunCancelled", message="it was cancelled")
        self.run = replace(self.run, state="cancelling", undoing=event.undo, paused=False, error=error)
        return set()

    def _pause(self) -> set[str] | None:
        return self._hold(paused=True)

    def _resume(self) -> set[str] | None:
        return self._hold(paused=False)

    def _hold(self, *, paused: bool) -> set[str] | None:
        event, run = self.event, self.run
        if event.id in run.applied or (event.number, event.id) <= run.pause:
            return None
        self._apply()
        run = self.run = replace(self.run, pause=(event.number, event.id))
        if run.state in OVER or (paused and run.state != "running"):
            return set()
        self.run = replace(run, paused=paused)
        if run.paused and not paused:
            self._mark_all()
        return set()

    def _retry(self) -> set[str] | None:
        event, run = self.event, self.run
        if event.id in run.applied or run.state not in {"failed", "cancelled"} or event.gen != run.gen:
            return None
        self._apply()
        todo = again(run, self.plan)
        self.run = opened(self.run, event.id)
        for name in sorted(
            todo.steps, key=lambda name: (-run.step(name).order, name)
        ):  # signals go back in the order in which they came
            self._reopen(name, keep=name in todo.own and todo.steps.isdisjoint(self.plan.needs[name]), ask=name in todo.asked)
        self._look_at(self.graph.steps)
        return set()

    def _reopen(self, name: str, *, keep: bool, ask: bool) -> None:
        """Make a step as if it had not begun; of an `each` what has ended well is kept, unless what it needs runs again.

        `ask`: a wait's signal is not put back, since its value did not fit.
        """
        record = self.run.step(name)
        fan = well_ended(record.fan) if keep and record.fan is not None and not record.undo else None
        if record.signal and not ask:
            # it was sent once and need not be sent again
            channel = self.graph.steps[name].signal
            sent = Sent(
                event=record.signal, value=record.result, value_at=record.result_at, sent=record.sent, sender=record.sender
            )
            self.run = replace(self.run, inbox={**self.run.inbox, channel: (sent, *self.run.inbox.get(channel, ()))})
        self._put(name, StepRecord(gen=record.gen + 1, fan=fan, undone=record.undone + (record.undo == "done")))

    # ------------------------------------------------------------------ what follows

    def _settle(self, ended: set[str]) -> None:
        if self.run.state == "running":
            self._look_at({name for each in ended for name in self.plan.followers[each]})
        if self.run.state == "running" and all(self.run.step(name).state in {"done", "skipped"} for name in self.graph.steps):
            self._complete()
        if self.run.state in {"failing", "cancelling"}:
            self._unwind()

    def _look_at(self, names: Any) -> None:
        """Make due, or skip, what can be; and what follows from that."""
        wanted = set(names)
        row = deque(name for name in self.graph.steps if name in wanted)
        while row and self.run.state == "running":
            name = row.popleft()
            if self.run.step(name).state == "idle":
                row += [follower for end in self._try(name) for follower in self.plan.followers[end]]

    def _try(self, name: str) -> set[str]:
        """Look whether an idle step can begin; return it when it has ended at once."""
        step = self.graph.steps[name]
        for guard, wanted in step.guards:
            found = self.values.of(self.run, guard)
            if found is PENDING:
                return set()
            if found is SKIPPED or (isinstance(found, bool) and found is not wanted):
                return self._end(name, "skipped")
            if not isinstance(found, bool):
                return self._fault(name, found if isinstance(found, Fault) else no_condition(found))
        if any(self.values.of(self.run, each) is PENDING for each in step.after):
            return set()
        inputs = [check_size(each, self.values.of(self.run, each)) for each in self.plan.inputs[name]]
        mark = strongest(inputs)
        if mark is SKIPPED:
            return self._end(name, "skipped")
        if isinstance(mark, Fault):
            return self._fault(name, mark)
        return set() if mark is PENDING else self._begin(name, step)

    def _begin(self, name: str, step: Step) -> set[str]:
        record = replace(self.run.step(name), state="due", due=self.now, by=self.event.id)
        if step.kind == "each":
            items = self.values.of(self.run, step.over)
            if not isinstance(items, list):
                return self._fault(name, Fault(f"each runs over a list, and this came to {show(items)}"))
            pack = size_of(items) if step.auto else 0  # pyright: ignore[reportUnknownArgumentType]
            size = len(items)  # pyright: ignore[reportUnknownArgumentType]
            if record.fan is None and (problem := too_many(size, pack or step.pack, step.max_items, self.plan.max_items)):
                return self._fault(name, Fault(problem))
            fan = record.fan or Fan(tasks=-(-size // (pack or step.pack or 1)), items=size, pack=pack)
            self._put(name, replace(record, fan=fan))
            return self._end(name, "done") if records.count(fan.ended) >= fan.tasks else set()
        seconds = None
        if step.kind == "sleep":
            seconds = self.values.of(self.run, step.seconds)
        elif step.kind == "wait":
            there = self.run.inbox.get(step.signal, ())
            if there:
                self._put(name, record)
                self.run = replace(self.run, inbox={**self.run.inbox, step.signal: there[1:]})
                return self._take(name, there[0])
            seconds = self.values.of(self.run, step.timeout) if step.timeout is not None else None
        if seconds is not None or step.kind == "sleep":  # a timeout that comes to null is none
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_WAIT:
                return self._fault(name, Fault(f"a time is a number of seconds from 0 to ten years, not {show(seconds)}"))
            record = replace(record, until=self.now + int(seconds * 1000))
        self._put(name, record)
        return set()

    def _take(self, name: str, sent: Sent) -> set[str]:
        came = {"signal": sent.event, "sent": sent.sent, "sender": sent.sender}
        return self._end(name, "done", result=sent.value, result_at=sent.value_at, **came)

    def _come_to(self, name: str, value: Any) -> set[str]:
        if isinstance(value, Fault):
            return self._fault(name, value)
        result = Raw(msgspec.json.encode(value))
        if key_id_of(result):
            return self._fault(name, Fault(f"the default {LOOKS_SEALED}"))
        ended = self._end(name, "done", result=result)
        self.values.learn(name, self.run.step(name), value)  # it is not encrypted before it is stored
        return ended

    def _fault(self, name: str, fault: Fault) -> set[str]:
        error = ErrorInfo(type="InvalidPayload", message=fault.reason)
        self._fail(name, error)
        return self._end(name, "failed", error=error, untried=True)

    def _end(self, name: str, state: Any, **changes: Any) -> set[str]:
        order = self.run.settled + 1
        # its fan may have been entered just now
        record = replace(self.run.step(name), state=state, at=self.now, by=self.event.id, order=order, **changes)
        self.run = replace(self.run, settled=order)
        self._put(name, record)
        return {name}

    def _fail(self, name: str, error: ErrorInfo) -> None:
        if self.run.state == "running":
            told = ErrorInfo(type=error.type, message=f"step {name!r} failed: {error.type}: {error.message}"[:2000])
            self.run = replace(self.run, state="failing", error=told, failed=name)

    def _complete(self) -> None:
        value = check_size(self.graph.output, self.values.of(self.run, self.graph.output))
        if isinstance(value, Fault):
            self._fail_whole(f"the run's result has no value: {value.reason}")
            return
        output = Raw(msgspec.json.encode(None if is_mark(value) else value))
        if key_id_of(output):
            self._fail_whole(f"the run's result {LOOKS_SEALED}")
            return
        self.run = replace(
            self.run, state="completed", output=output, finished=self.now, by=self.event.id, paused=False, inbox={}
        )

    def _fail_whole(self, message: str) -> None:
        self.run = replace(self.run, state="failing", error=ErrorInfo(type="InvalidResult", message=message))

    # ------------------------------------------------------------------ unwinding

    def _unwind(self) -> None:
        if not self.run.unwinding:
            self.run = replace(self.run, unwinding=True)
            self._mark_all()
            for name, step in self.graph.steps.items():
                if step.kind in {"wait", "sleep"} and self.run.step(name).state == "due":
                    self._end(name, "stopped")
        if any(record.state == "due" for record in self.run.steps.values()):
            return
        if self.run.undoing or self.run.state == "failing":
            for name in sorted(self.run.steps, key=lambda name: -self.run.steps[name].order):
                if self._undo_of(name) == "due":
                    return
        state = "failed" if self.run.state == "failing" else "cancelled"
        self.run = replace(self.run, state=state, finished=self.now, by=self.event.id, paused=False)

    def _undo_of(self, name: str) -> str:
        """Make the undo of a step due where it is its turn, and return its state."""
        record = self.run.steps[name]
        can = record.state in {"done", "failed", "maybe"} and not record.untried
        if self.graph.steps[name].undo is None or record.undo or not can:
            return record.undo
        nothing = record.fan is not None and records.count(record.fan.untried) >= record.fan.tasks
        self._put(name, replace(record, undo="done" if nothing else "due", undo_by=self.event.id))
        return self.run.steps[name].undo

    # ------------------------------------------------------------------ writing

    def _mark_all(self) -> None:
        """Take over what is due: whoever made it due may not have come to submit it."""
        for name, record in self.run.steps.items():
            if record.state == "due":
                self._put(name, replace(record, by=self.event.id))
            elif record.undo == "due":
                self._put(name, replace(record, undo_by=self.event.id))

    def _apply(self) -> None:
        self.run = replace(self.run, applied=(*self.run.applied, self.event.id))

    def _put(self, name: str, record: StepRecord) -> None:
        if self.run.steps is self._before:  # copied once: a start may make a thousand steps due
            self.run = replace(self.run, steps=dict(self._before))
        self.run.steps[name] = record


def _first(values: StepValues, errors: tuple[ItemError, ...]) -> ErrorInfo:
    """Return what is told of an `each` as a whole: its first item that failed."""
    return ErrorInfo(type=errors[0].type, message=f"item {errors[0].index}: {values.text(errors[0])}")
