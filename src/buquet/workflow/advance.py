"""The state machine of runs: a pure function of a run's record and an event. All I/O is elsewhere.

The steps that an event makes due store the event's id in `by`: the event's task submits them before it ends, and no other worker
need. At a resume, and when the run unwinds, all due steps are marked anew, since an earlier event's task may be delayed.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from buquet.records import ErrorInfo
from buquet.sealing import key_id_of
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
from buquet.workflow.graph import pack_size_for, packed
from buquet.workflow.records import (
    CANCELLED_UNSTARTED,
    CANCELLED_UNSURE,
    KEPT_ERRORS,
    OVER,
    Fan,
    ItemError,
    RunRecord,
    Sent,
    StepRecord,
    add,
    count,
    has,
    numbers,
    too_many,
)
from buquet.workflow.values import entry_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from buquet.workflow.expression import Expr
    from buquet.workflow.graph import GraphIndex, Step
    from buquet.workflow.records import Ranges, RunEvent, StepState
    from buquet.workflow.values import StepValues

LONGEST_WAIT = 10 * 366 * 86_400
LOOKS_SEALED = "has the one field that marks encrypted values. Name the field otherwise"
CANCELLED = ErrorInfo(type="TaskCancelled", message="its task was cancelled")
MISFITS = {"InvalidPayload", "buquet.errors.InvalidPayload"}
"""Error types of a value that does not fit, in a handler's arguments or in an expression."""


def advance(run: RunRecord, index: GraphIndex, event: RunEvent, now: int, values: StepValues) -> RunRecord:
    """Return the run after an event; the same object if the event changes nothing. Raises Missing for values not fetched."""
    return _Advance(run, index, event, now, values).after()


class _Advance:
    def __init__(self, run: RunRecord, index: GraphIndex, event: RunEvent, now: int, values: StepValues) -> None:
        self.run = run
        self._before = run.steps
        self.index = index
        self.steps = index.graph.steps
        self.event = event
        self.now = now
        self.values = values

    def after(self) -> RunRecord:
        event = self.event
        if event.id in self.run.applied:
            return self.run
        ended: set[str] | None = getattr(self, f"_{event.kind}")()
        if ended is None:
            return self.run
        if event.kind not in {"step", "undo", "timer"}:
            self._set(applied=(*self.run.applied, event.id))
        if self.run.state == "running":
            self._try_all({name for step in ended for name in self.index.followers[step]})
        if self.run.state == "running" and all(self.run.step(name).state in {"done", "skipped"} for name in self.steps):
            self._complete()
        if self.run.state in {"failing", "cancelling"}:
            self._unwind()
        return self.run

    # ------------------------------------------------------------------ events: each returns the steps that ended
    # None: the event changes nothing

    def _start(self) -> set[str] | None:
        self._try_all(self.index.first)
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
            return self._end(event.step, CANCELLED_UNSURE if event.tried else CANCELLED_UNSTARTED)
        return self._fail(event.step, event.error or CANCELLED, untried=not event.tried)

    def _fan(self, event: RunEvent, record: StepRecord, fan: Fan) -> set[str] | None:
        """Record the outcome of a fan-out's task. The step ends with its last task."""
        if has(fan.ended, event.item):
            return None
        step = self.steps[event.step]
        if event.result_at or bytes(event.result):
            fan = replace(fan, results={**fan.results, event.item: entry_of(event)})
        if event.outcome != "done":
            fan = self._failed_item(event, step, fan)
        fan = replace(fan, ended=add(fan.ended, event.item))
        self._put(event.step, replace(record, fan=fan))
        if count(fan.ended) < fan.tasks:
            return set()
        if not fan.stopped and (step.allow_failures or not fan.failed):
            return self._end(event.step, "done")
        if not fan.failed:
            return self._end(event.step, CANCELLED_UNSURE)
        return self._end(event.step, "failed", error=self._first_error(fan.errors))

    def _failed_item(self, event: RunEvent, step: Step, fan: Fan) -> Fan:
        """Return a fan-out with a failed or cancelled task of it."""
        if not event.tried:
            fan = replace(fan, untried=add(fan.untried, event.item))
        if event.outcome == "cancelled" and self.run.unwinding:
            return replace(fan, stopped=add(fan.stopped, event.item))
        error = event.error or CANCELLED
        errors = event.errors or (ItemError(index=0, type=error.type, message=error.message[:500]),)
        base = event.item * (packed(step, fan) or 1)
        errors = tuple(replace(item, index=base + item.index) for item in errors)
        if not step.allow_failures:
            self._fail_run(event.step, self._first_error(errors))
        fans = sum(each.kind == "each" for each in self.steps.values())
        kept = min(KEPT_ERRORS, max(3, 10 * KEPT_ERRORS // fans))
        return replace(fan, failed=add(fan.failed, event.item), errors=(*fan.errors, *errors)[:kept])

    def _first_error(self, errors: tuple[ItemError, ...]) -> ErrorInfo:
        return ErrorInfo(type=errors[0].type, message=f"item {errors[0].index}: {self.values.text(errors[0])}")

    def _undo(self) -> set[str] | None:
        event = self.event
        record = self.run.step(event.step)
        if record.gen != event.gen or record.undo != "due" or has(record.undo_ended, event.item):
            return None
        ended = add(record.undo_ended, event.item)
        error = record.undo_error if event.outcome == "done" else event.error or CANCELLED
        whole = record.fan is None or count(ended) + count(record.fan.untried) >= record.fan.tasks
        undo = ("failed" if error else "done") if whole else "due"
        self._put(event.step, replace(record, undo_ended=ended, undo=undo, undo_error=error))
        return set()

    def _timer(self) -> set[str] | None:
        event = self.event
        record = self.run.step(event.step)
        if record.gen != event.gen or record.state != "due" or self.run.state != "running":
            return None
        step = self.steps[event.step]
        if step.kind == "wait" and step.default is None:
            return self._fail(event.step, ErrorInfo(type="SignalTimeout", message=f"no signal {step.signal!r} came in time"))
        value = self.values.of(self.run, step.default) if step.default is not None and step.kind == "wait" else None
        if isinstance(value, Fault):
            return self._fault(event.step, value)
        result = Raw(msgspec.json.encode(value))
        if key_id_of(result):
            return self._fault(event.step, Fault(f"the default {LOOKS_SEALED}"))
        ended = self._end(event.step, "done", result=result)
        self.values.learn(event.step, self.run.step(event.step), value)  # the record's result is encrypted when it is stored
        return ended

    def _signal(self) -> set[str] | None:
        event, run = self.event, self.run
        if run.state in {"completed", "pruned"} or run.rejects(event.signal):
            return None
        sent = Sent(event=event.id, value=event.result, value_at=event.result_at, sent=event.sent, sender=event.sender)
        waiting = [
            (record.due, place, name)
            for place, (name, step) in enumerate(self.steps.items())
            if step.kind == "wait" and step.signal == event.signal and self._in_time(record := run.step(name))
        ]
        if waiting and run.state == "running":
            return self._take(min(waiting)[2], sent)
        # kept for a later wait, or for a retry of a run that fails or was cancelled
        self._set(inbox={**run.inbox, event.signal: (*run.inbox.get(event.signal, ()), sent)})
        return set()

    def _in_time(self, record: StepRecord) -> bool:
        """Whether a wait takes the signal. It takes none that was sent after its deadline while no worker was running."""
        late = record.until and self.event.sent > record.until < self.now
        return record.state == "due" and not late

    def _cancel(self) -> set[str] | None:
        if self.run.state != "running" or self.event.gen != self.run.gen:
            return None
        error = ErrorInfo(type="RunCancelled", message="it was cancelled")
        self._set(state="cancelling", undoing=self.event.undo, paused=False, error=error)
        return set()

    def _pause(self, *, paused: bool = True) -> set[str] | None:
        order, was_paused = (self.event.number, self.event.id), self.run.paused
        if order <= self.run.pause:
            return None
        self._set(pause=order)
        if self.run.state not in OVER and not (paused and self.run.state != "running"):
            self._set(paused=paused)
            if was_paused and not paused:
                self._mark_all()
        return set()

    def _resume(self) -> set[str] | None:
        return self._pause(paused=False)

    def _retry(self) -> set[str] | None:
        run = self.run
        if run.state not in {"failed", "cancelled"} or self.event.gen != run.gen:
            return None
        asked = self._misfits()
        own = {
            name for name, record in run.steps.items() if record.state not in {"idle", "done", "skipped"} or record.undo
        } | asked
        again = set(own)
        for name in self.steps:  # in order: each comes after the steps that it needs
            # a step that did not begin since the last retry may keep items of an older list
            began = run.step(name).state != "idle" or run.step(name).fan is not None
            if began and not again.isdisjoint(self.index.needs[name]):
                again.add(name)
        self._set(unwinding=False, paused=False, error=None, failed="", finished=0)
        self._set(state="running", gen=run.gen + 1, by=self.event.id)
        # signals go back into the inbox in the order in which they were taken
        for name in sorted(again, key=lambda name: (-run.step(name).order, name)):
            keeps_items = name in own and again.isdisjoint(self.index.needs[name])
            self._reopen(name, keeps_items=keeps_items, keeps_signal=name not in asked)
        self._try_all(self.steps)
        return set()

    def _misfits(self) -> set[str]:
        """Return the waits whose signal made the run fail, since its value does not fit: they wait for another signal."""
        exprs: list[Expr] = []
        for name, record in self.run.steps.items():
            if record.state == "failed" and record.error is not None and record.error.type in MISFITS:
                args = self.steps[name].args
                place = re.search(r"at `\$\.(\w+)", record.error.message)
                if isinstance(args, Fields) and place and place[1] in args.fields:
                    exprs.append(args.fields[place[1]])  # the other arguments fit
                else:
                    exprs += [*(guard for guard, _ in self.steps[name].guards), *self.index.inputs[name]]
        if self.run.error is not None and self.run.error.type == "InvalidResult":
            exprs.append(self.index.graph.output)
        return {name for expr in exprs for name in steps_of(expr) if self.run.step(name).signal}

    def _reopen(self, name: str, *, keeps_items: bool, keeps_signal: bool) -> None:
        """Reset a step. A fan-out may keep its successful items; a wait's signal may go back into the inbox."""
        record = self.run.step(name)
        fan = _successful(record.fan) if keeps_items and record.fan is not None and not record.undo else None
        if record.signal and keeps_signal:  # it was sent once and need not be sent again
            signal = self.steps[name].signal
            self._set(inbox={**self.run.inbox, signal: (record.taken(), *self.run.inbox.get(signal, ()))})
        self._put(name, StepRecord(gen=record.gen + 1, fan=fan, undone=record.undone + (record.undo == "done")))

    # ------------------------------------------------------------------ steps

    def _try_all(self, names: Iterable[str]) -> None:
        """Begin or skip the steps that can, and then the steps that follow."""
        wanted = set(names)
        row = deque(name for name in self.steps if name in wanted)
        while row and self.run.state == "running":
            name = row.popleft()
            if self.run.step(name).state == "idle":
                row += [follower for ended in self._try(name) for follower in self.index.followers[ended]]

    def _try(self, name: str) -> set[str]:
        """Begin an idle step if it can; return it if it ended at once."""
        step = self.steps[name]
        for guard, wanted in step.guards:
            value = self.values.of(self.run, guard)
            if value is PENDING:
                return set()
            if value is SKIPPED or (isinstance(value, bool) and value is not wanted):
                return self._end(name, "skipped")
            if not isinstance(value, bool):
                return self._fault(name, value if isinstance(value, Fault) else no_condition(value))
        if any(self.values.of(self.run, expr) is PENDING for expr in step.after):
            return set()
        mark = strongest([check_size(expr, self.values.of(self.run, expr)) for expr in self.index.inputs[name]])
        if mark is SKIPPED:
            return self._end(name, "skipped")
        if isinstance(mark, Fault):
            return self._fault(name, mark)
        return set() if mark is PENDING else self._begin(name, step)

    def _begin(self, name: str, step: Step) -> set[str]:
        record = replace(self.run.step(name), state="due", due=self.now, by=self.event.id)
        if step.kind == "each":
            return self._begin_fan(name, step, record)
        if step.kind == "wait" and (inbox := self.run.inbox.get(step.signal, ())):
            self._put(name, record)
            self._set(inbox={**self.run.inbox, step.signal: inbox[1:]})
            return self._take(name, inbox[0])
        expr = step.seconds if step.kind == "sleep" else step.timeout if step.kind == "wait" else None
        seconds = self.values.of(self.run, expr) if expr is not None else None
        if seconds is not None or step.kind == "sleep":  # a timeout of null is none
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_WAIT:
                return self._fault(name, Fault(f"a time is a number of seconds from 0 to ten years, not {show(seconds)}"))
            record = replace(record, until=self.now + int(seconds * 1000))
        self._put(name, record)
        return set()

    def _begin_fan(self, name: str, step: Step, record: StepRecord) -> set[str]:
        items = self.values.of(self.run, step.over)
        if not isinstance(items, list):
            return self._fault(name, Fault(f"each runs over a list, not {show(items)}"))
        pack = pack_size_for(items) if step.auto else 0  # pyright: ignore[reportUnknownArgumentType]
        size = len(items)  # pyright: ignore[reportUnknownArgumentType]
        if record.fan is None and (problem := too_many(size, pack or step.pack, step.max_items, self.index.max_items)):
            return self._fault(name, Fault(problem))
        fan = record.fan or Fan(tasks=-(-size // (pack or step.pack or 1)), items=size, pack=pack)
        self._put(name, replace(record, fan=fan))
        return self._end(name, "done") if count(fan.ended) >= fan.tasks else set()

    def _take(self, name: str, sent: Sent) -> set[str]:
        fields = {"signal": sent.event, "sent": sent.sent, "sender": sent.sender}
        return self._end(name, "done", result=sent.value, result_at=sent.value_at, **fields)

    def _fault(self, name: str, fault: Fault) -> set[str]:
        return self._fail(name, ErrorInfo(type="InvalidPayload", message=fault.reason), untried=True)

    def _fail(self, name: str, error: ErrorInfo, *, untried: bool = False) -> set[str]:
        self._fail_run(name, error)
        return self._end(name, "failed", error=error, untried=untried)

    def _end(self, name: str, state: StepState, **changes: Any) -> set[str]:
        order = self.run.settled + 1
        self._set(settled=order)
        record = self.run.step(name)
        self._put(name, replace(record, state=state, at=self.now, by=self.event.id, order=order, **changes))
        return {name}

    # ------------------------------------------------------------------ the end of the run

    def _fail_run(self, name: str, error: ErrorInfo) -> None:
        if self.run.state == "running":
            message = f"step {name!r} failed: {error.type}: {error.message}"[:2000]
            self._set(state="failing", error=ErrorInfo(type=error.type, message=message), failed=name)

    def _complete(self) -> None:
        value = check_size(self.index.graph.output, self.values.of(self.run, self.index.graph.output))
        output = Raw(msgspec.json.encode(None if is_mark(value) else value))
        problem = ""
        if isinstance(value, Fault):
            problem = f"the run's result has no value: {value.reason}"
        elif key_id_of(output):
            problem = f"the run's result {LOOKS_SEALED}"
        if problem:
            self._set(state="failing", error=ErrorInfo(type="InvalidResult", message=problem))
        else:
            self._set(state="completed", output=output, finished=self.now, by=self.event.id, paused=False, inbox={})

    def _unwind(self) -> None:
        if not self.run.unwinding:
            self._set(unwinding=True)
            self._mark_all()
            for name, step in self.steps.items():
                if step.kind in {"wait", "sleep"} and self.run.step(name).state == "due":
                    self._end(name, CANCELLED_UNSTARTED)
        if any(record.state == "due" for record in self.run.steps.values()):
            return
        if self.run.undoing or self.run.state == "failing":
            for name in sorted(self.run.steps, key=lambda name: -self.run.steps[name].order):
                if self._undo_of(name) == "due":
                    return
        state = "failed" if self.run.state == "failing" else "cancelled"
        self._set(state=state, finished=self.now, by=self.event.id, paused=False)

    def _undo_of(self, name: str) -> str:
        """Make the undo of a step due if the step needs one, and return its state."""
        record = self.run.steps[name]
        can = record.state in {"done", "failed", CANCELLED_UNSURE} and not record.untried
        if self.steps[name].undo is None or record.undo or not can:
            return record.undo
        nothing = record.fan is not None and count(record.fan.untried) >= record.fan.tasks
        self._put(name, replace(record, undo="done" if nothing else "due", undo_by=self.event.id))
        return self.run.steps[name].undo

    # ------------------------------------------------------------------ writing

    def _mark_all(self) -> None:
        """Mark all that is due with this event: the task of the event that made it due may not have submitted it."""
        for name, record in self.run.steps.items():
            if record.state == "due":
                self._put(name, replace(record, by=self.event.id))
            elif record.undo == "due":
                self._put(name, replace(record, undo_by=self.event.id))

    def _set(self, **changes: Any) -> None:
        self.run = replace(self.run, **changes)

    def _put(self, name: str, record: StepRecord) -> None:
        if self.run.steps is self._before:  # copied once: a start may make a thousand steps due
            self._set(steps=dict(self._before))
        self.run.steps[name] = record


def _successful(fan: Fan) -> Fan:
    """Return a fan-out with only its successful tasks. Later results outrank those in a chunk."""
    bad = {*numbers(fan.failed), *numbers(fan.stopped), *numbers(fan.untried)}
    ended: Ranges = ()
    for index in numbers(fan.ended):
        if index not in bad:
            ended = add(ended, index)
    results = {index: result for index, result in fan.results.items() if index not in bad}
    return Fan(tasks=fan.tasks, items=fan.items, pack=fan.pack, ended=ended, results=results, chunks=fan.chunks)
