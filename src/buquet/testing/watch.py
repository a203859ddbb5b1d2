"""The auditor at work: it is told of every write as it lands, and judges it against section 5 of docs/protocol.md at once.

Like the rest of the auditor it shares no code with the queue: it knows the layout from the protocol only and parses JSON itself.
It also knows who sent a write, which the bucket does not, and so can tell a claimant from one who only believes that he is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from buquet.testing.auditor import ENDED

OVER = ENDED | {"pruned", "tombstone"}
MOVES = {
    "": {"pending", "running", "tombstone"},
    "pending": {"running", "cancelled", "expired"},
    "running": {"running", "pending", "completed", "failed", "cancelled"},
    "completed": {"completed", "pruned"},
    "failed": {"failed", "pruned", "pending"},
    "cancelled": {"cancelled", "pruned", "pending"},
    "expired": {"expired", "pruned", "pending"},
    "pruned": {"pruned", "pending"},
    "tombstone": {"tombstone", "pending"},
}
"""Section 4: what a state may become."""
OF_RUNS = {("", "cancelled"), ("pending", "pending")}
"""What a run's task may do besides: it is created as cancelled when its run unwinds, and a timer is woken early."""
RUN_OVER = {"completed", "failed", "cancelled", "pruned"}
LOSSES = {"lost", "taken over"}
_ENTRY = re.compile(r"(?:ready/[^/]+/[0-9]|later/[^/]+)/[0-9]{13}-([0-9a-f]{32})\.([0-9]+)~.+")

Json = dict[str, Any]


@dataclass
class Watch:
    """What lies in the bucket, as the writes that landed made it, and what was told to whom."""

    tasks: dict[str, Json] = field(default_factory=dict[str, Json])
    entries: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    """Each entry's task and rev."""
    sessions: dict[str, Json] = field(default_factory=dict[str, Json])
    runs: dict[str, Json] = field(default_factory=dict[str, Json])
    open: set[str] = field(default_factory=set[str])
    """Entries of runs that are not over."""
    begun: dict[str, str] = field(default_factory=dict[str, str])
    """Every session that ever was, and whose it is."""
    claimed: dict[str, str] = field(default_factory=dict[str, str])
    """Who made each claim, by its token."""
    lives: dict[str, int] = field(default_factory=dict[str, int])
    """The last rev of records that were removed."""
    submitted: set[str] = field(default_factory=set[str])
    told: dict[str, str] = field(default_factory=dict[str, str])
    """What callers were told of a task that binds: completed, cancelled."""
    loose: set[str] = field(default_factory=set[str])
    """Tasks that may come back after their end."""
    requested: set[str] = field(default_factory=set[str])
    """Tasks for which a cancel was sent."""
    found: list[str] = field(default_factory=list[str])
    """Everything that is wrong, in words."""
    working: set[str] = field(default_factory=set[str])
    """Tokens of the claims under which handlers are at work now, as the handlers themselves say."""
    _ops: set[str] = field(default_factory=set[str])

    def say(self, what: str) -> None:
        """Note a finding."""
        self.found.append(what)

    # ------------------------------------------------------------------ what callers are told

    def told_submitted(self, task: str) -> None:
        """Note that a caller was told that a task is submitted (I6)."""
        self.submitted.add(task)
        state = self.tasks.get(task, {}).get("state", "missing")
        if state in {"missing", "tombstone"}:
            self.say(f"I6: a caller is told that {task} is submitted, and its record is {state}")

    def told_ended(self, task: str, state: str) -> None:
        """Note that a caller was told that a task was completed or cancelled (I6)."""
        if task in self.loose:
            return
        self.told[task] = state
        if task in self.tasks:
            self._told(task, self.tasks[task])

    def release(self, task: str) -> None:
        """Somebody redrives a task, or submits a pruned one again: what callers are told of its end no longer binds."""
        self.told.pop(task, None)
        self.loose.add(task)

    # ------------------------------------------------------------------ writes

    def landed(self, who: str, key: str, body: bytes | None) -> None:
        """Judge a write (a body) or a delete (None) that has just been applied."""
        kind = key.partition("/")[0]
        if kind == "tasks":
            self._task(who, key[9:41], None if body is None else json.loads(body))
        elif kind in {"ready", "later"}:
            self._entry(key, there=body is not None)
        elif kind == "runs":
            self._run(key.rpartition("/")[2].removesuffix(".json"), None if body is None else json.loads(body))
        elif kind == "open":
            self.open = self.open | {key} if body is not None else self.open - {key}
            self._opened(key[5:37])
        elif kind == "workers":
            self._session(who, key.rpartition("/")[2].removesuffix(".json"), None if body is None else json.loads(body))

    # ------------------------------------------------------------------ records

    def _task(self, who: str, task: str, now: Json | None) -> None:
        before = self.tasks.get(task)
        if now is None:
            if before is not None:
                if before["state"] != "pruned" or before.get("key"):
                    self.say(f"I6: the record of {task} was removed, and it is {before['state']}")
                self.lives[task] = before.get("rev", 0)
                del self.tasks[task]
            return
        self.tasks[task] = now
        self._register(task, before, now)
        was = before["state"] if before else ""
        if now.get("run") and now["state"] in ENDED and was not in OVER:
            self._of_run(task, now)
        if now["state"] not in MOVES[was] and not (now.get("run") and (was, now["state"]) in OF_RUNS):
            self.say(f"I7: {task} went from {was or 'missing'} to {now['state']}")
        elif before is None:
            if task in self.lives and self.lives[task] >= now.get("rev", 0):
                self.say(f"{task} came back with rev {now.get('rev', 0)} after it was removed at {self.lives[task]}")
        else:
            self._move(who, task, before, now)
        if now["state"] == "running" and now["token"] not in self.claimed:
            self.claimed[now["token"]] = who
            if now["worker"] not in self.begun:
                self.say(f"{task} was claimed by {now['worker']}, whose session was never stored")
        self._told(task, now)
        self._findable(task)

    def _register(self, task: str, before: Json | None, now: Json) -> None:
        """Section 3: rev counts up, op is fresh, and ops are the last four."""
        ops = now.get("ops", [])
        if not ops or ops[-1] != now.get("op"):
            self.say(f"{task} was written without its op as the last of ops")
        elif now["op"] in self._ops:
            self.say(f"{task}: the write {now['op']} was applied twice")
        self._ops.add(now.get("op", ""))
        if before is not None and (now.get("rev", 0) != before.get("rev", 0) + 1 or ops[:-1] != before.get("ops", [])[-3:]):
            self.say(f"{task}: rev {now.get('rev', 0)} does not follow rev {before.get('rev', 0)}")

    def _move(self, who: str, task: str, before: Json, now: Json) -> None:  # noqa: C901, PLR0912 - a rule after another
        """I7 and I9: who may make this move, and with what it may go along."""
        was, state = before["state"], now["state"]
        if was in OVER:
            if state == was and now.get("events") != before.get("events"):
                self.say(f"I7: {task} had ended as {was}, and ended again")
            return
        if was == "pending":
            if state == "running" and before.get("cancel_requested") and not now.get("run"):
                self.say(f"I6: {task} is claimed although its cancel was acknowledged")
            return
        event = now["events"][-1]
        if state == "running" and now["token"] == before["token"]:
            if who != self.claimed.get(before["token"]) and not now.get("cancel_requested"):
                self.say(f"I9: {who} wrote {task}, which {self.claimed.get(before['token'])} has claimed")
            return
        lost = event["why"] in LOSSES or (state == "cancelled" and "lost" in event.get("detail", ""))
        if lost:
            self._loss(who, task, before, now)
        elif who != self.claimed.get(before["token"]):
            self.say(f"I9: {task} was claimed by {self.claimed.get(before['token'])}, and {event['why']} by {who}")
        elif before["token"] in self.working:
            self.say(f"I9: {task} is {state} ({event['why']}) while the attempt under its claim is still at work")
        if state == "cancelled" and not before.get("cancel_requested") and not now.get("run"):
            self.say(f"{task} is cancelled, and nobody asked for it in this life of it")
        if now.get("run"):
            return  # such a task goes on until its run was told, without its handler
        if state == "running" and before.get("cancel_requested"):
            self.say(f"I6: {task} is taken over although its cancel was acknowledged")
        if state == "pending" and before.get("cancel_requested"):
            self.say(f"I6: {task} goes back to pending although its cancel was acknowledged")

    def _loss(self, who: str, task: str, before: Json, now: Json) -> None:
        """Only who finds a session reaped or gone may say that a claim was lost with it; or its own worker, of its own."""
        session = self.sessions.get(before["worker"])
        own = who == self.begun.get(before["worker"])
        if session is not None and not session.get("reaped") and not own:
            self.say(f"I9: {who} calls {task} lost, and the session of {before['worker']} is alive")
        if now.get("losses", 0) != before.get("losses", 0) + 1 and now["state"] != "cancelled":
            self.say(f"{task} was lost, and its losses went from {before.get('losses', 0)} to {now.get('losses', 0)}")
        if now.get("losses", 0) >= now.get("max_losses", 10) and now["state"] != "failed":
            self.say(f"{task} is out of losses and goes on as {now['state']}")

    def _told(self, task: str, now: Json) -> None:
        if now["state"] == "pruned":
            self.release(task)
        told = self.told.get(task)
        if told and now["state"] != told:
            self.say(f"I6: of {task} a caller was told {told}, and it is {now['state']}")

    # ------------------------------------------------------------------ runs

    def _run(self, run: str, now: Json | None) -> None:
        before = self.runs.get(run)
        if now is None:
            self.runs.pop(run, None)
            return
        now.setdefault("state", "running")
        self.runs[run] = now
        self._register(run, before, now)
        self._opened(run)
        if before is None:
            return
        was, state = before["state"], now["state"]
        begun_anew = was == "pruned" and now.get("gen", 1) == 1
        if not begun_anew and now.get("gen", 1) not in {before.get("gen", 1), before.get("gen", 1) + 1}:
            self.say(f"the run {run} went from generation {before.get('gen', 1)} to {now.get('gen', 1)}")
        if was in RUN_OVER and state not in {was, "pruned"} and now.get("gen", 1) == before.get("gen", 1) and was != "pruned":
            self.say(f"the run {run} had ended as {was}, and became {state} without a retry")
        for name, step in before.get("steps", {}).items():
            after = now.get("steps", {}).get(name, {})
            if "pruned" in {was, state} or after.get("gen", 1) != step.get("gen", 1):
                continue
            if step.get("state") in {"done", "failed"} and _outcome(after) != _outcome(step):
                self.say(f"step {name} of run {run} was {_outcome(step)}, and is {_outcome(after)} in the same generation")

    def _opened(self, run: str) -> None:
        """Judge that a run which is not over has the entry of its generation."""
        now = self.runs.get(run)
        if now is not None and now["state"] not in RUN_OVER and f"open/{run}.{now.get('gen', 1)}" not in self.open:
            self.say(f"the run {run} is {now['state']} in generation {now.get('gen', 1)}, and its entry is not there")

    def _of_run(self, task: str, now: Json) -> None:
        """I8: a task of a run ends only after the run's record holds its outcome."""
        run = self.runs.get(now["run"])
        if run is None:
            if now["state"] != "cancelled":
                self.say(f"I8: {task} ({now['name']}) ended as {now['state']}, and its run {now['run']} has no record")
            return
        step = run.get("steps", {}).get(now.get("step", ""), {})
        if run["state"] in RUN_OVER or now["name"].startswith("buquet.") or step.get("gen", 1) != now.get("gen", 1):
            return
        state = step.get("undo") if now.get("undoes") else step.get("state", "idle")
        if state in {"due", "idle"} and "fan" not in step:
            self.say(f"I8: {task} ({now['step']}) ended as {now['state']}, and in its run that step is still {state}")

    # ------------------------------------------------------------------ entries, sessions

    def _findable(self, task: str) -> None:
        """I1 and I2."""
        now = self.tasks.get(task)
        if now is None or now["state"] not in {"pending", "running"} or now.get("entry") in self.entries:
            return
        if now["state"] == "pending":
            self.say(f"I1: {task} is pending at rev {now.get('rev', 0)}, and its entry is not there")
        elif not self._listed(now["worker"], now["token"]):
            self.say(f"I2: {task} runs under {now['worker']} without an entry, and its session does not list the claim")

    def _listed(self, worker: str, token: str) -> bool:
        return any(claim["token"] == token for claim in self.sessions.get(worker, {}).get("claims", ()))

    def _entry(self, key: str, *, there: bool) -> None:
        found = _ENTRY.fullmatch(key)
        if found is None:
            self.say(f"{key} is no entry")
            return
        task, rev = found[1], int(found[2])
        if there:
            self.entries[key] = (task, rev)
            return
        self.entries.pop(key, None)
        now = self.tasks.get(task)
        known = now.get("rev", 0) if now else self.lives.get(task, -1)
        if rev > known:
            self.say(f"I3: the entry of {task} at rev {rev} was deleted while its record is at rev {known}")
        self._findable(task)

    def _session(self, who: str, worker: str, now: Json | None) -> None:
        before = self.sessions.get(worker)
        if now is None:
            self.sessions.pop(worker, None)
        else:
            self.sessions[worker] = now
            if before is None and worker in self.begun:
                self.say(f"the session {worker} came back after it was removed")
            self.begun.setdefault(worker, who)
            if before is not None and before.get("reaped") and not now.get("reaped"):
                self.say(f"the session {worker} was reaped, and is alive again")
        if before is None:
            return
        kept = {claim["token"] for claim in now.get("claims", ())} if now else set[str]()
        for claim in before.get("claims", ()):
            task = self.tasks.get(claim["task"], {})
            if claim["token"] in kept or task.get("token") != claim["token"] or task.get("state") != "running":
                continue
            rule = "I5: the session" if now is None else "I4: the session's list"
            self.say(f"{rule} of {worker} no longer has the claim of {claim['task']}, which still runs under it")
            self._findable(claim["task"])

    # ------------------------------------------------------------------ at the end

    def at_rest(self) -> list[str]:
        """Return what is wrong in a bucket that everybody has left: nothing may wait, run, or lie about."""
        wrong = [
            f"lost: {task} was acknowledged, and is {self.tasks.get(task, {}).get('state', 'missing')} though all is done"
            for task in sorted(self.submitted)
            if self.tasks.get(task, {}).get("state") not in ENDED | {"pruned"} and task not in self.lives
        ]
        wrong += [
            f"unfinished: {task} is {now['state']}"
            for task, now in sorted(self.tasks.items())
            if now["state"] not in OVER and task not in self.submitted
        ]
        for task, now in sorted(self.tasks.items()):
            wrong += _attempts(task, now)
        return wrong

    def litter(self) -> list[str]:
        """Return what is left an hour after everything was done: entries and sessions that nobody will ever need."""
        return [f"litter: {key}" for key in (*sorted(self.entries), *sorted(self.sessions), *self._closed())]

    def _closed(self) -> list[str]:
        """Return the entries of runs that are over; one that somebody left paused keeps its entry."""
        return sorted(key for key in self.open if self.runs.get(key[5:37], {}).get("state", "missing") in RUN_OVER | {"missing"})


def _attempts(task: str, now: Json) -> list[str]:
    if now.get("failures", 0) > now.get("max_attempts", 3):
        return [f"{task} failed {now['failures']} times of {now.get('max_attempts', 3)}"]
    return []


def _outcome(step: Json) -> tuple[Any, ...]:
    return step.get("state"), step.get("result"), step.get("result_at")
