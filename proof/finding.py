"""The model of section 7: the doorbell, its hints, the cursors of LIST, and what is due later.

Writers put entries and ring; one reader polls the bell, follows its hints or LISTs, and wakes for what is due. Every request is one
step, and every order of steps is tried. At rest (every writer done, the bell unchanged since the reader's last look, nothing left
to LIST, no time to wait for) the reader must know every entry: the look back is for crashes and lost answers only.

An entry is (number, due, slow): `due` is the tick from which it may run; a slow one has a key older than its PUT by less than the
trail. `python proof/finding.py` tries the rules as they are, and each flag that takes one away.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from showing import try_flags

HINTS = 2
JUMP = 100
FLAGS = {
    "": "the rules as they are",
    "blind+1": "a blind ring raises n by one",
    "cut": "hints are cut within a ring",
    "gap": "hints are trusted though they do not reach back",
    "early": "the ring comes before the entry",
    "no-trail": "the cursor does not trail",
    "due-ignored": "a hint of what is due later is dropped",
    "moves-on": "a LIST that fails counts as one that was answered",
}


class Writer(NamedTuple):
    """What one process still has to do."""

    todo: tuple[tuple[int, int, bool], ...]
    at: str  # put, ring, blind, done
    rung: tuple[tuple[int, int, bool], ...]  # entries put and not rung for
    known: tuple[int, tuple[tuple[int, int], ...]] | None  # the bell as it knows it
    lost: int


class Reader(NamedTuple):
    """What the worker knows."""

    seen: int
    etag: object
    hidden: frozenset[int]  # what lies behind its cursor, unseen
    dirty: bool
    next_due: int
    found: frozenset[int]


class State(NamedTuple):
    """A bucket, its clock, and everybody's next step."""

    tick: int
    entries: frozenset[tuple[int, int, bool]]
    bell: tuple[int, tuple[tuple[int, int], ...]] | None
    writes: int  # the ETag of the bell
    writers: tuple[Writer, ...]
    reader: Reader


def rung(bell, entries, flag):
    """Return the bell with entries added, as queue/bell.py does."""
    n = bell[0] + 1 if bell else 0
    hints = (*(bell[1] if bell else ()), *((n, number) for number, _, _ in entries))
    if len(hints) > HINTS:
        cut = hints[-HINTS - 1][0]
        hints = hints[-HINTS:] if flag == "cut" else tuple(hint for hint in hints[-HINTS:] if hint[0] != cut)
    return n, hints


def steps(state, flag, most):
    """Yield (who, what, next state)."""
    for index, writer in enumerate(state.writers):
        for what, changed, rest in write(state, writer, flag):
            writers = (*state.writers[:index], changed, *state.writers[index + 1 :])
            yield f"writer {index}", what, state._replace(writers=writers, **rest)
    yield from read(state, flag)
    if state.tick < most:
        yield "clock", f"it is {state.tick + 1}", state._replace(tick=state.tick + 1)


def write(state, writer, flag):
    """Yield what a writer may do next."""
    if writer.at == "put" and writer.todo:
        entry, *todo = writer.todo
        changed = writer._replace(todo=tuple(todo), rung=(*writer.rung, entry), at="put" if todo else "ring")
        if flag != "early":
            yield f"PUT {entry}", changed, {"entries": state.entries | {entry}}
        else:
            yield f"will PUT {entry}", changed, {}
        if writer.rung:
            yield "rings for what it has put", writer._replace(at="ring"), {}
    elif writer.at == "ring":
        bell = rung(writer.known, writer.rung, flag)
        if writer.known == state.bell:
            rest = {"bell": bell, "writes": state.writes + 1}
            yield f"CAS bell {bell}", after(writer, bell, flag), rest
        elif writer.lost == 0:
            yield "CAS bell: conflict", writer._replace(known=state.bell, lost=1), {}
        else:
            yield "CAS bell: conflict again", writer._replace(known=state.bell, lost=2, at="blind"), {}
    elif writer.at == "blind":
        base = writer.known[0] if writer.known else 0
        n = base + 1 if flag == "blind+1" else base + JUMP
        rest = {"bell": (n, ()), "writes": state.writes + 1}
        yield f"PUT bell {n} blindly", after(writer, (n, ()), flag), rest
    elif writer.at == "late":
        rest = {"entries": state.entries | set(writer.rung)}
        yield "PUT what it has rung for", writer._replace(rung=(), at="put" if writer.todo else "done"), rest


def after(writer, bell, flag):
    """Return a writer that has rung."""
    if flag == "early":
        return writer._replace(known=bell, lost=0, at="late")
    return writer._replace(rung=(), known=bell, lost=0, at="put" if writer.todo else "done")


def read(state, flag):
    """Yield what the reader may do next: wake for what is due, LIST, or look at the bell."""
    reader = state.reader
    if reader.next_due and reader.next_due <= state.tick:
        yield "reader", "something is due", state._replace(reader=reader._replace(next_due=0, dirty=True))
    if reader.dirty:
        yield "reader", "LIST", state._replace(reader=listed(state, flag))
        if flag == "moves-on":  # by the rule a request that fails changes nothing, so that it is no step
            yield "reader", "LIST fails", state._replace(reader=reader._replace(dirty=False))
    elif reader.etag != state.writes and state.bell is not None:
        n, hints = state.bell
        seen = reader._replace(seen=n, etag=state.writes)
        news = None if n <= reader.seen or not hints or (hints[0][0] > reader.seen + 1 and flag != "gap") else hints
        if flag == "gap" and not hints:
            news = ()
        if news is None:
            yield "reader", f"GET bell {n}: LIST is needed", state._replace(reader=seen._replace(dirty=True))
            return
        for number in [number for rev, number in news if rev > reader.seen]:
            due = next((due for known, due, _ in ENTRIES if known == number), 0)
            if due > state.tick:
                seen = seen if flag == "due-ignored" else seen._replace(next_due=min(seen.next_due or due, due))
            elif any(each[0] == number for each in state.entries):
                seen = seen._replace(found=seen.found | {number})
        yield "reader", f"GET bell {n}: follows its hints", state._replace(reader=seen)


def listed(state, flag):
    """Return the reader after a LIST from its cursor."""
    reader = state.reader
    page = state.entries - {each for each in state.entries if each[0] in reader.hidden}
    due = {each[0] for each in page if each[1] <= state.tick}
    waits = [each[1] for each in page if each[1] > state.tick]
    hidden = reader.hidden
    if flag == "no-trail" and page:
        # the cursor stands at the last key: what is slow comes behind it, and no LIST shows it any more
        hidden |= {each[0] for each in ENTRIES if each[2] and each not in state.entries}
    return reader._replace(dirty=False, hidden=hidden, found=reader.found | due, next_due=min(waits) if waits else 0)


ENTRIES: tuple[tuple[int, int, bool], ...] = ()


def explore(plan, flag, most):
    """Try every order of steps; return the number of states, and the trace to the first one at rest that lacks an entry."""
    global ENTRIES  # noqa: PLW0603 - what the hints' keys say of each entry
    ENTRIES = tuple(entry for todo in plan for entry in todo)
    writers = tuple(Writer(tuple(todo), "put", (), None, 0) for todo in plan)
    first = State(0, frozenset(), None, 0, writers, Reader(-1, None, frozenset(), dirty=True, next_due=0, found=frozenset()))
    parents = {first: None}
    todo = [first]
    while todo:
        state = todo.pop()
        onward = [(who, what, then) for who, what, then in steps(state, flag, most) if then != state]
        if not onward:
            missed = {each[0] for each in state.entries} - state.reader.found
            if missed:
                trace = []
                while parents[state] is not None:
                    state, line = parents[state]
                    trace.append(line)
                return len(parents), missed, trace[::-1]
        for who, what, then in onward:
            if then not in parents:
                parents[then] = (state, f"{who}: {what}")
                todo.append(then)
    return len(parents), set(), []


PLANS = {
    "three writers": [[(0, 0, False)], [(1, 0, False)], [(2, 0, False)]],
    "many at once": [[(0, 0, False), (1, 0, False), (3, 0, False)], [(2, 0, False)]],
    "a slow PUT": [[(0, 0, True)], [(1, 0, False), (2, 0, False), (3, 0, False)]],
    "due later": [[(0, 1, False)], [(1, 2, False)], [(2, 0, False)]],
    "two rings each": [[(0, 0, False), (1, 0, False)], [(2, 0, False), (3, 0, False)], [(4, 0, False)]],
}


def searches(flag):
    """Yield what comes of each plan with a flag."""
    for name, plan in PLANS.items():
        yield name, *explore(plan, flag, most=2 if any(due for todo in plan for _, due, _ in todo) else 0)


def main():
    """Try all plans with the rules as they are, then each flag until one plan shows what it loses."""
    return try_flags(FLAGS, searches)


if __name__ == "__main__":
    sys.exit(main())
