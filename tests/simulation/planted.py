"""Bugs on purpose: each takes one rule of the protocol away, to see that the simulation finds what comes of it.

`python -m tests.simulation.planted` (`make planted`) plays seeds with each of them until one finds something, and writes how many
that took into docs/proof.md. Nothing of this is in the product: every bug is a patch of a method.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from msgspec.structs import replace
from tests.simulation.runbugs import RUN_BUGS

from buquet import keys
from buquet.errors import AlreadyExists, Changed, Refused, StoreError, StoreUnavailable
from buquet.queue import bell, client, transitions
from buquet.records import TERMINAL, Session, Task
from buquet.store.base import Stored
from buquet.store.register import Register, Write
from buquet.testing.simulation import simulate
from buquet.worker import claim, control, cursor, finder, fleet, running, session

PAGE = Path(__file__).parents[2] / "docs" / "proof.md"
MOST = 2000
MISFIT = re.compile(r"\b(AttributeError|NameError|TypeError|ImportError)\b")
"""The errors of a planted bug that uses a name which the code no longer has."""

ORIGINAL = {
    name: getattr(owner, name.rpartition(".")[2])
    for name, owner in {
        "Claimer._decide": claim.Claimer,
        "SessionKeeper.beat": session.SessionKeeper,
        "SessionKeeper.create": session.SessionKeeper,
        "OutcomeWriter.store": running.OutcomeWriter,
        "Register.update": Register,
        "transitions.claim": transitions,
        "transitions.take_over": transitions,
        "QueueFinder._rescan": finder.QueueFinder,
        "QueueFinder._list": finder.QueueFinder,
        "Pause.refresh": control.Pause,
        "Ringer._ring_now": bell.Ringer,
    }.items()
}


# ---------------------------------------------------------------------- those that the protocol's model shows


async def i3_text(self, seeks, found, held):
    if held is not None and found.entry.rev > held.record.rev:
        await self._delete(seeks, found)
        return None
    return await ORIGINAL["Claimer._decide"](self, seeks, found, held)


async def take_text(self, who):
    if who in self.sessions and self.lives(who):
        return False
    stored = await self.register.reads.get(keys.session(who))
    return not isinstance(stored, Stored) or self.store_now() - stored.modified > self.keeper.ttl


async def hour_text(self, seeks, found):
    if self._is_orphan(found):
        await self._delete(seeks, found)
    else:
        seeks.defer(found)


async def hbdel_lookup(self):
    before = self.stored_at
    await ORIGINAL["SessionKeeper.beat"](self)
    if self.stored_at != before and not self.lost:
        for listing in list(self.claims.values()):
            if listing.entry:
                await self._forget(listing, listing.entry)


def cx_text(task, now):
    return transitions._lost_too_often(task, now, task.losses + 1) if task.losses + 1 >= task.max_losses else None


async def rerev_reuse(self, task_id):
    held = await self.read(task_id)
    entry = ""
    while held is not None:
        task = transitions.redrive(held.record, self.clock.now_ms())
        if not entry:
            entry = task.entry
            await self.reads.put(entry, b"")
        write = await self.register.update(held, replace(task, entry=entry))
        if write.landed:
            self.added(task.queue, entry)
            return
        held = write.held


async def rerev_reuse_reaper(self, lost):
    held = await self.register.read(Task, keys.task(lost.task))
    entry = ""
    while held is not None and held.record.state == "running" and held.record.token == lost.token:
        task = transitions.lose(held.record, lost.token, self.clock.now_ms())
        if task.state == "pending":
            if not entry:
                entry = task.entry
                await self.register.reads.put(entry, b"")
            task = replace(task, entry=entry)
        write = await self.register.update(held, task)
        if write.landed:
            if task.state == "pending":
                self.added(task.queue, entry)
            return
        held = write.held


async def screate_resend(self, key, record):
    op = self.clock.new_op()
    while True:
        try:
            return (await self.create(key, record, op=op)).held
        except StoreUnavailable:
            continue


TOKENS = {}


def note_claim(task, who, token, now):
    TOKENS[token] = who
    return ORIGINAL["transitions.claim"](task, who, token, now)


def note_take_over(task, who, token, now):
    TOKENS[token] = who
    return ORIGINAL["transitions.take_over"](task, who, token, now)


def tok_worker(task, token):
    if task.state != "running" or task.worker != TOKENS.get(token, task.worker):
        raise Refused(task.id)


async def mbx_text(_self, run):
    run.request_stop("cancel")


async def giveup(self, held, task, *, op="", entry="", drop=""):
    """Give up on a claim after one try, and do not adopt it either."""
    if isinstance(task, Task) and task.state == "running" and held.record.state == "pending":
        fresh = replace(task, rev=held.record.rev + 1, op=op, ops=(*held.record.ops[-3:], op), prev=held.version)
        try:
            from buquet.codec import encode_record

            receipt = await self.store.update(held.key, encode_record(fresh), held.etag)
        except (Changed, StoreUnavailable):
            return Write(landed=False, held=held)
        return Write(landed=True, held=held._replace(record=fresh, etag=receipt.etag, version=receipt.version))
    return await ORIGINAL["Register.update"](self, held, task, op=op, entry=entry, drop=drop)


async def selfrun_leave(self, seeks, found, held):
    if held is not None and held.record.state == "running" and held.record.worker == self.keeper.id:
        seeks.leave_to(found, self.keeper.id)
        return None
    return await ORIGINAL["Claimer._decide"](self, seeks, found, held)


async def orphan_leave(self, seeks, found, held):
    if held is not None and found.entry.rev > held.record.rev:
        seeks.defer(found)
        return None
    return await ORIGINAL["Claimer._decide"](self, seeks, found, held)


async def earlydrop(self, run, outcome):
    self.keeper.claims.pop(run.token, None)
    return await ORIGINAL["OutcomeWriter.store"](self, run, outcome)


async def nofence(self, who, still_dead=None):
    held = await self.register.read(Session, keys.session(who))
    if held is None or (still_dead is not None and not still_dead(held)):
        return False
    for each in held.record.claims:
        await self.put_back(each)
    await self.register.reads.delete(keys.session(who))
    return True


# ---------------------------------------------------------------------- others


async def no_write_id(self, key, record, base, entry="", drop=""):
    """Take whatever is read back after a conflict or a lost answer for the own write."""
    from buquet.codec import encode_record
    from buquet.store.register import Held

    body = encode_record(record)
    if entry and self.grouping is None:
        await self.reads.put(entry, b"")
    while True:
        try:
            receipt = await self._send(key, body, base and base.etag, entry, drop)
            return Write(landed=True, held=Held(key, record, receipt.etag, receipt.version))
        except (AlreadyExists, Changed, StoreUnavailable):
            now = await self.read(type(record), key)
            if now is not None and now.record.rev >= record.rev:
                return Write(landed=True, held=now)
            await self.clock.sleep(0.1)


async def session_not_awaited(self, *, first=True):
    self._creating = asyncio.ensure_future(ORIGINAL["SessionKeeper.create"](self, first=first))
    await asyncio.sleep(0)


def cursor_skips(self, _cursor):
    self.page = {}
    self.last = ""
    self.dirty = True


def gap_trusted(rung, seen):
    return [entry for rev, entry in rung.hints if rev > seen]


async def session_deleted_first(self, who, still_dead=None):
    held = await self.register.read(Session, keys.session(who))
    if held is None or (still_dead is not None and not still_dead(held)):
        return False
    await self.register.reads.delete(keys.session(who))
    for each in held.record.claims:
        await self.put_back(each)
    return True


async def entry_before_record(self, run, outcome):
    if run.listing.entry:
        await self.register.reads.delete(run.listing.entry)
    return await ORIGINAL["OutcomeWriter.store"](self, run, outcome)


async def record_before_entry(self, held, record, *, op="", entry="", drop=""):
    """Put a task back with its record first and its entry second."""
    write = await ORIGINAL["Register.update"](self, held, record, op=op, drop=drop)
    if entry and write.landed:
        await self.reads.put(entry, b"")
    return write


async def payload_not_buried(self, listed):
    """Prune payloads without a record as they are met."""
    from buquet import keys

    needed, _ = await self.pruner.needed(keys.owner_of_payload(listed.key) or "")
    if not needed:
        await self.reads.delete(listed.key)


def drain_forgets(self, found, *, again=False):
    return FINDER_DEFER(self, found)


FINDER_DEFER = finder.QueueFinder.defer


async def look_forgotten(self):
    """Take a look for done before its requests are answered."""
    now = self.clock.monotonic()
    everything = now >= self.full_rescan_at
    try:
        await ORIGINAL["QueueFinder._rescan"](self)
    except StoreError:
        self.gap = False
        self.rescan_at = now + finder.RESCAN_EVERY
        if everything:
            self.full_rescan_at = now + finder.FULL_RESCAN_EVERY
        raise


async def list_forgotten(self, part):
    """Take a lane for listed before the LIST is answered."""
    try:
        await ORIGINAL["QueueFinder._list"](self, part)
    except StoreError:
        part.dirty = False
        raise


async def settings_forgotten(self):
    try:
        return await ORIGINAL["Pause.refresh"](self)
    except StoreError:
        self.due = False
        raise


async def ring_forgotten(self, queue, *, first):
    await ORIGINAL["Ringer._ring_now"](self, queue, first=first)
    self._added.pop(queue, None)
    return True


def retry_unfenced(task, token):
    if task.state in TERMINAL:
        raise Refused(task.id)


def _sweep():
    from buquet.operate import prune

    return prune._Pruning


BUGS = {
    "i3=text": ("an entry with a later rev than its record is deleted", [(claim.Claimer, "_decide", i3_text)]),
    "take=text": ("a task is taken over while the dead worker's session is still stored", [(fleet.Fleet, "missing", take_text)]),
    "hbdel=lookup": (
        "a heartbeat deletes the current entries instead of the noted ones",
        [(session.SessionKeeper, "beat", hbdel_lookup)],
    ),
    "hour=text": ("an old entry without a record is deleted without a tombstone", [(claim.Claimer, "_missing", hour_text)]),
    "cx=text": ("a lost task runs again although its cancel was acknowledged", [(transitions, "_lost_for_good", cx_text)]),
    "mbx=text": ("a worker obeys a note without reading the record", [(control.Control, "_obey", mbx_text)]),
    "screate=resend": ("the create of a session is sent twice", [(Register, "create_once", screate_resend)]),
    "tok=worker": (
        "a claim is fenced by the worker, not by the token",
        [
            (transitions, "claim", note_claim),
            (transitions, "take_over", note_take_over),
            (transitions, "_need_claim", tok_worker),
        ],
    ),
    "rerev=reuse": (
        "after a lost race, the next try uses the same entry",
        [(client.Client, "redrive", rerev_reuse), (fleet.Reaper, "put_back", rerev_reuse_reaper)],
    ),
    "selfrun=leave, giveup": (
        "a claim with an unknown outcome is given up, and not adopted when its task is found",
        [(claim.Claimer, "_decide", selfrun_leave), (Register, "update", giveup)],
    ),
    "orphan=leave": ("an old entry with a later rev than an ended record stays", [(claim.Claimer, "_decide", orphan_leave)]),
    "earlydrop": (
        "a claim leaves the session's list before its outcome is stored",
        [(running.OutcomeWriter, "store", earlydrop)],
    ),
    "nofence": ("a session is reaped without being marked first", [(fleet.Reaper, "reap", nofence)]),
    "no write id": (
        "after a conflict, the record that is read back is taken for this process's own write",
        [(Register, "_write", no_write_id)],
    ),
    "session not awaited": (
        "a worker claims before its session is stored",
        [(session.SessionKeeper, "create", session_not_awaited)],
    ),
    "cursor that skips": ("a rescan does not move the cursor back", [(cursor.Cursor, "rewind", cursor_skips)]),
    "gap trusted": ("the bell's hints are trusted although some are missing", [(finder, "news", gap_trusted)]),
    "session deleted first": (
        "a reaper deletes the session before it puts the tasks back",
        [(fleet.Reaper, "reap", session_deleted_first)],
    ),
    "entry before record": (
        "an entry is deleted before the outcome is stored",
        [(running.OutcomeWriter, "store", entry_before_record)],
    ),
    "record before entry": ("a retry stores the record before its entry", [(Register, "update", record_before_entry)]),
    "payload not buried": (
        "prune deletes a payload without a record and writes no tombstone",
        [(_sweep(), "_payload", payload_not_buried)],
    ),
    "drain forgets": (
        "an entry that is found while its task is being claimed is forgotten",
        [(finder.QueueFinder, "defer", drain_forgets)],
    ),
    "look forgotten": (
        "a full rescan counts as done before its requests are answered",
        [(finder.QueueFinder, "_rescan", look_forgotten)],
    ),
    "list forgotten": (
        "a lane counts as listed before the LIST is answered",
        [(finder.QueueFinder, "_list", list_forgotten)],
    ),
    "settings forgotten": (
        "a queue's settings count as read before the GET is answered",
        [(control.Pause, "refresh", settings_forgotten)],
    ),
    "ring forgotten": (
        "a ring without an answer from the store is not sent again",
        [(bell.Ringer, "_ring_now", ring_forgotten)],
    ),
    "no fence": ("a transition by a claimant needs no claim", [(transitions, "_need_claim", retry_unfenced)]),
    **RUN_BUGS,
}
"""Name: what is wrong, and the patches that make it so."""
GOOD = [(owner, attribute, getattr(owner, attribute)) for _, patches in BUGS.values() for owner, attribute, _ in patches]


@contextmanager
def planted(name):
    """Plant a bug for a while."""
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in BUGS[name][1]]
    try:
        for owner, attribute, bug in BUGS[name][1]:
            setattr(owner, attribute, bug)
        yield
    finally:
        for owner, attribute, good in before:
            setattr(owner, attribute, good)


def unsound(name, seed):
    """Tell whether the seed finds the same without the bug: then it was not the bug that it found."""
    good = {(owner, attribute): value for owner, attribute, value in GOOD}
    bugs = [(owner, attribute, bug) for owner, attribute, bug in BUGS[name][1]]
    for owner, attribute, _ in bugs:
        setattr(owner, attribute, good[owner, attribute])
    try:
        return bool(simulate(seed).findings)
    finally:
        for owner, attribute, bug in bugs:
            setattr(owner, attribute, bug)


def hunt(name, most=MOST, start=0):
    """Play seeds with a bug; return how many it took, and what the last one found."""
    begun = time.process_time()
    with planted(name):
        for seed in range(start, start + most):
            found = simulate(seed).findings
            if found and MISFIT.search(found[0]):
                raise AssertionError(f"the bug {name} no longer fits the code: {found[0]}")
            if found and not unsound(name, seed):
                return {"bug": name, "seeds": seed - start + 1, "found": found[0], "cpu": round(time.process_time() - begun, 1)}
    return {"bug": name, "seeds": None, "tried": most, "found": "", "cpu": round(time.process_time() - begun, 1)}


def table(results):
    """Return the table of docs/proof.md."""
    lines = ["| planted bug | what is wrong | seeds until found | found as | CPU seconds |", "|---|---|---|---|---|"]
    for each in results:
        seeds = each["seeds"] or f"not found in {each['tried']}"
        said = re.sub(r"[0-9a-f]{16,}", "…", each["found"])[:110].replace("|", "/")
        lines.append(f"| `{each['bug']}` | {BUGS[each['bug']][0]} | {seeds} | {said} | {each['cpu']:g} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=MOST, help="seeds a bug, at most")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default="", help="a file for the results, one JSON object a line")
    parser.add_argument("--only", nargs="*", default=list(BUGS))
    options = parser.parse_args()
    results = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for result in pool.imap_unordered(partial(hunt, most=options.most), options.only):
            results[result["bug"]] = result
            print(json.dumps(result), flush=True)
            if options.out:
                with Path(options.out).open("a") as file:
                    file.write(json.dumps(result) + "\n")
    if set(results) == set(BUGS):
        write(results)


def write(results):
    """Put the table into docs/proof.md, between its two marks."""
    text = PAGE.read_text()
    head, _, rest = text.partition("<!-- planted -->")
    _, _, tail = rest.partition("<!-- end -->")
    PAGE.write_text(f"{head}<!-- planted -->\n{table([results[name] for name in BUGS])}\n<!-- end -->{tail}")


if __name__ == "__main__":
    main()
