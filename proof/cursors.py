"""The model of section 7's cursors: priorities, pages, a clock that is wrong, and what was left to a worker that then dies.

Producers stamp an entry's key, PUT it and ring; another worker may claim, finish, or die; one reader hears rings, lists its lanes page
by page and takes what it meets. A ring is a hint or, after lost races, blind: `finding.py` models how. Every request is one step, and
every order of steps is tried. At rest the reader must have taken all that the other one does not run, without a look back at what lies
behind its cursors. `python proof/cursors.py` tries the rules as they are, and each flag that takes one away; -v shows the traces.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from showing import try_flags

AHEAD = 2
"""Ticks by which the reader's clock is wrong until it has learnt the store's time."""
TRAIL = 1
"""Ticks that a cursor stays behind, and within which an entry is PUT after its key was made."""
PAGE = 2
KNOWN = 5
"""The priority that everybody looks at; others are learnt."""
FLAGS = {
    "": "the rules as they are",
    "trusts-clock": "a cursor follows a clock that was not compared yet",
    "no-trail": "a cursor does not trail",
    "keeps-hand": "a page in hand is not dropped however long it takes",
    "no-behind": "after full pages a cursor goes to the trail of now, not to that of the first young page",
    "no-again": "a blind ring among full pages does not have the last of them listed again",
    "no-learn": "priorities are not learnt after a blind ring",
    "forgets": "what was left to another worker is not remembered",
    "no-gap": "priorities are not learnt when a session was reaped",
    "moves-on": "a request that fails counts as one that was answered",
    "drops-hint": "a hint that lies behind the page in hand is dropped, as if a LIST would show it anyway",
}


class Entry(NamedTuple):
    """A key of `ready/`: its priority, its time, and which task it is of."""

    lane: int
    at: int
    task: int


class Producer(NamedTuple):
    """What one process still has to do."""

    todo: tuple[tuple[int, int], ...]  # priority and task
    entry: Entry | None  # its key is made
    is_put: bool


class Lane(NamedTuple):
    """How far the reader has looked through a priority, as worker/cursor.py knows it."""

    cursor: tuple[int, int] = (-9, 0)  # keys after it are still shown
    hand: tuple[Entry, ...] = ()
    last: tuple[int, int] | None = None
    fetched: int = 0
    behind: tuple[int, int] | None = None
    full: bool = False
    dirty: bool = True
    again: bool = False


class Reader(NamedTuple):
    """What the reader knows."""

    lanes: tuple[tuple[int, Lane], ...]
    knows_time: bool
    gap: bool
    hinted: tuple[Entry, ...]
    left: frozenset[Entry]


class State(NamedTuple):
    """A bucket, its clock, and everybody's next step."""

    tick: int
    entries: frozenset[Entry]
    rings: tuple[object, ...]  # not heard yet: entries, "session", "blind"
    producers: tuple[Producer, ...]
    claimed: frozenset[int]  # tasks that the other worker runs
    session: str  # the other's: live, dead, gone
    reader: Reader


def steps(state, flag, most):
    """Yield (what, next state)."""
    for index, producer in enumerate(state.producers):
        for what, changed, rest in produce(state, producer):
            producers = (*state.producers[:index], changed, *state.producers[index + 1 :])
            yield f"producer {index}: {what}", state._replace(producers=producers, **rest)
    yield from other(state)
    yield from read(state, flag)
    late = any(each.entry and not each.is_put and state.tick >= each.entry.at + TRAIL for each in state.producers)
    if state.tick < most and not late:
        yield f"it is {state.tick + 1}", state._replace(tick=state.tick + 1)


def produce(state, producer):
    """Yield what a producer may do next."""
    if producer.entry is None and producer.todo:
        (lane, task), *todo = producer.todo
        entry = Entry(lane, state.tick, task)
        yield f"makes the key {entry}", producer._replace(todo=tuple(todo), entry=entry, is_put=False), {}
    elif producer.entry and not producer.is_put:
        yield f"PUT {producer.entry}", producer._replace(is_put=True), {"entries": state.entries | {producer.entry}}
    elif producer.entry:
        for ring in (producer.entry, "blind"):
            yield f"rings {ring}", producer._replace(entry=None, is_put=False), {"rings": (*state.rings, ring)}


def other(state):
    """Yield what the other worker may do, and what is done to it once it is dead."""
    if state.session == "live":
        for entry in state.entries:
            if entry.task not in state.claimed:
                yield f"the other claims {entry}", state._replace(claimed=state.claimed | {entry.task})
            else:
                yield f"the other ends {entry}", state._replace(entries=state.entries - {entry})
        yield "the other dies", state._replace(session="dead")
    elif state.session == "dead":
        # what its session listed goes back under a new entry; what it claimed since its last heartbeat was listed nowhere
        for listed in (True, False):
            back = [entry for entry in state.entries if entry.task in state.claimed and listed]
            fresh = [entry._replace(at=state.tick) for entry in back]
            after = state._replace(
                session="gone",
                claimed=state.claimed - {entry.task for entry in back},
                entries=(state.entries - set(back)) | set(fresh),
            )
            for rings in ((*fresh, "session"), ("blind",)):
                yield f"its session is reaped, {len(back)} listed, rings {rings}", after._replace(rings=(*state.rings, *rings))


def read(state, flag):
    """Yield what the reader may do next."""
    reader = state.reader
    if not reader.knows_time:
        yield "reader: learns the time", state._replace(reader=reader._replace(knows_time=True))
    if state.rings:
        yield "reader: GET bell", state._replace(rings=(), reader=heard(state, flag))
    if reader.gap and flag != "no-learn":
        lanes = dict(reader.lanes)
        for entry in state.entries:
            lanes.setdefault(entry.lane, Lane())
        yield "reader: learns priorities", state._replace(reader=reader._replace(gap=False, lanes=tuple(sorted(lanes.items()))))
        if flag == "moves-on":  # by the rule a request that fails changes nothing, so that it is no step
            yield "reader: learning fails", state._replace(reader=reader._replace(gap=False))
    if state.session == "gone" and reader.left:
        hinted = (*reader.hinted, *sorted(reader.left - set(reader.hinted)))
        yield "reader: looks again", state._replace(reader=reader._replace(left=frozenset(), hinted=hinted))
    for priority, lane in reader.lanes:
        if entry := min((each for each in reader.hinted if each.lane == priority), default=None):
            without = state._replace(reader=reader._replace(hinted=tuple(each for each in reader.hinted if each != entry)))
            if lane.hand and (entry.at, entry.task) > lane.last:
                if flag == "drops-hint":
                    yield f"reader: drops {entry}", without
            elif lane.hand or not lane.dirty:
                yield f"reader: GET of {entry}", met(without, entry, flag)
        if lane.hand and lane.fetched < state.tick and flag != "keeps-hand":
            yield "reader: drops a page", with_lane(state, priority, lane._replace(hand=(), dirty=True))
        elif lane.hand:
            entry, *hand = lane.hand
            then = lane._replace(hand=tuple(hand))
            then = then if hand else passed(then, state, flag)
            yield f"reader: takes {entry}", met(with_lane(state, priority, then), entry, flag)
        elif lane.dirty:
            keys = sorted(each for each in state.entries if each.lane == priority and (each.at, each.task) > lane.cursor)[:PAGE]
            last = (keys[-1].at, keys[-1].task) if keys else lane.cursor
            hand = tuple(each for each in keys if each not in reader.left)
            then = lane._replace(hand=hand, last=last, fetched=state.tick, full=len(keys) == PAGE, dirty=False)
            fresh = state._replace(reader=reader._replace(hinted=tuple(each for each in reader.hinted if each not in keys)))
            yield f"reader: LIST {keys}", with_lane(fresh, priority, then if hand else passed(then, state, flag))
            if flag == "moves-on":
                yield "reader: LIST fails", with_lane(state, priority, lane._replace(dirty=False))


def heard(state, flag):
    """Return the reader after it heard what was rung."""
    reader = state.reader
    if "blind" in state.rings:
        lanes = tuple((priority, lane._replace(dirty=True, again=lane.full)) for priority, lane in reader.lanes)
        return reader._replace(gap=True, lanes=lanes)
    lanes = dict(reader.lanes)
    for ring in state.rings:
        if ring == "session":
            reader = reader._replace(gap=reader.gap or flag != "no-gap")
        else:
            lane = lanes.setdefault(ring.lane, Lane())
            if ring not in (*reader.hinted, *lane.hand):
                reader = reader._replace(hinted=(*reader.hinted, ring))
    return reader._replace(lanes=tuple(sorted(lanes.items())))


def met(state, entry, flag):
    """Return the state after the reader looked at an entry's task: it runs it, takes it over, or leaves it to the other."""
    if entry not in state.entries:
        return state
    if entry.task in state.claimed and state.session != "gone":
        left = state.reader.left if flag == "forgets" else state.reader.left | {entry}
        return state._replace(reader=state.reader._replace(left=left))
    return state._replace(entries=state.entries - {entry})


def passed(lane, state, flag):
    """Return a lane whose page was dealt with."""
    now = state.tick if state.reader.knows_time else state.tick + AHEAD
    trail = (now - (0 if flag == "no-trail" else TRAIL), -1)
    if flag == "no-trail":
        trail = lane.last
    elif not state.reader.knows_time and flag != "trusts-clock":
        trail = Lane().cursor
    behind = lane.behind
    if lane.last > trail and flag != "no-behind":
        behind = min(behind or trail, trail)
    lane = lane._replace(cursor=lane.last, last=None, behind=behind)
    if lane.full:
        return lane._replace(dirty=True)
    again = lane.dirty or (lane.again and flag != "no-again")
    return lane._replace(cursor=behind or trail, dirty=again, again=False, behind=None)


def with_lane(state, priority, lane):
    """Return the state with the reader's lane changed."""
    lanes = tuple(sorted({**dict(state.reader.lanes), priority: lane}.items()))
    return state._replace(reader=state.reader._replace(lanes=lanes))


def explore(first, flag, most):
    """Try every order of steps; return the number of states, and the trace to the first one at rest that lacks an entry."""
    parents = {first: None}
    todo = [first]
    while todo:
        state = todo.pop()
        onward = [(what, then) for what, then in steps(state, flag, most) if then != state]
        for what, then in onward:
            if then not in parents:
                parents[then] = (state, what)
                todo.append(then)
        # the other may do no more than die or go on, and that is no help: what it does not run is the reader's
        waits = [what for what, _ in onward if not what.startswith(("the other", "it is"))]
        missed = {each for each in state.entries if state.session == "gone" or each.task not in state.claimed}
        if not waits and missed:
            trace = []
            while parents[state] is not None:
                state, line = parents[state]
                trace.append(line)
            return len(parents), missed, trace[::-1]
    return len(parents), set(), []


def world(todo, *, entries=(), claimed=(), session="gone", knows_time=True):
    """Return a first state: producers with what they submit, and what is there before."""
    producers = tuple(Producer(tuple(each), None, is_put=False) for each in todo)
    reader = Reader(((KNOWN, Lane()),), knows_time=knows_time, gap=False, hinted=(), left=frozenset())
    there = frozenset(Entry(*each) for each in entries)
    return State(0, there, (), producers, frozenset(claimed), session, reader)


WORLDS = {
    "a wrong clock": (world([[(KNOWN, 0)], [(KNOWN, 1)]], knows_time=False), 3),
    "late ones among pages": (world([[(KNOWN, 8)], [(KNOWN, 9)]], entries=[(KNOWN, 0, task) for task in range(3)]), 2),
    "a new priority": (world([[(3, 0)], [(KNOWN, 1)]]), 1),
    "left to one that dies": (world([[(KNOWN, 0)]], session="live"), 3),
    "known to the dead only": (world([], entries=[(3, 0, 0)], claimed=[0], session="live"), 1),
}


def searches(flag):
    """Yield what comes of each world with a flag."""
    for name, (first, most) in WORLDS.items():
        yield name, *explore(first, flag, most)


def main():
    """Try all worlds with the rules as they are, then each flag until one world shows what it loses; return whether one is amiss."""
    return try_flags(FLAGS, searches)


if __name__ == "__main__":
    sys.exit(main())
