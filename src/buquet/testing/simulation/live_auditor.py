"""The live auditor: judges every write as it lands against section 5 of docs/protocol.md.

Like `buquet.testing.auditor`, the live auditor shares no code with the queue, knows the layout from the protocol alone, and
parses JSON itself. It also knows which process sent a write, and so tells the claimant from a process that only believes that
it holds the claim.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from buquet.testing.auditor import ENDED, RUN_OVER, Json

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
"""Section 4: which states may follow a state."""
OF_RUNS = {("", "cancelled"), ("pending", "pending")}
"""Further moves of a run's tasks: one is created as cancelled when its run unwinds, and a timer is woken early."""
LOSSES = {"lost", "taken over"}
_ENTRY = re.compile(r"(?:ready/[^/]+/[0-9]|later/[^/]+)/[0-9]{13}-([0-9a-f]{32})\.([0-9]+)~.+")


@dataclass
class LiveAuditor:
    """The bucket's content as the writes so far have made it, what callers were told, and the findings."""

    tasks: dict[str, Json] = field(default_factory=dict[str, Json])
    entries: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    """Each entry's task and rev."""
    sessions: dict[str, Json] = field(default_factory=dict[str, Json])
    runs: dict[str, Json] = field(default_factory=dict[str, Json])
    open: set[str] = field(default_factory=set[str])
    """The entries of open runs."""
    session_owners: dict[str, str] = field(default_factory=dict[str, str])
    """Which process stored each session, past ones included."""
    claimants: dict[str, str] = field(default_factory=dict[str, str])
    """Which process made each claim, by the claim's token."""
    removed: dict[str, int] = field(default_factory=dict[str, int])
    """The last rev of each record that was removed."""
    submitted: set[str] = field(default_factory=set[str])
    told: dict[str, str] = field(default_factory=dict[str, str])
    """How a task ended, as a caller was told: completed or cancelled."""
    released: set[str] = field(default_factory=set[str])
    """Tasks that may come back after their end."""
    cancels: set[str] = field(default_factory=set[str])
    """Tasks and runs for which a cancel was sent."""
    findings: list[str] = field(default_factory=list[str])
    """Everything that is wrong, in words."""
    working: set[str] = field(default_factory=set[str])
    """Tokens of the claims whose handlers run now, as the handlers themselves report."""
    _ops: set[str] = field(default_factory=set[str])

    def report(self, what: str) -> None:
        self.findings.append(what)

    # ------------------------------------------------------------------ what callers are told

    def told_submitted(self, task: str) -> None:
        """Note that a caller's submit was acknowledged (I6)."""
        self.submitted.add(task)
        state = self.tasks.get(task, {}).get("state", "missing")
        if state in {"missing", "tombstone"}:
            self.report(f"I6: a caller is told that {task} is submitted, and its record is {state}")

    def told_ended(self, task: str, state: str) -> None:
        """Note that a caller was told that a task was completed or cancelled (I6)."""
        if task in self.released:
            return
        self.told[task] = state
        if task in self.tasks:
            self._check_told(task, self.tasks[task])

    def release(self, task: str) -> None:
        """Forget how a task ended: it is redriven, or submitted again after it was pruned."""
        self.told.pop(task, None)
        self.released.add(task)

    # ------------------------------------------------------------------ writes

    def landed(self, who: str, key: str, body: bytes | None) -> None:
        """Judge a write (a body) or a delete (None) that has just been applied."""
        kind = key.partition("/")[0]
        name = key.rpartition("/")[2].removesuffix(".json")
        record = json.loads(body) if body is not None and kind in {"tasks", "runs", "workers"} else None
        match kind:
            case "tasks":
                self._task(who, key[9:41], record)
            case "ready" | "later":
                self._entry(key, written=body is not None)
            case "runs":
                self._run(name, record)
            case "open":
                self.open = self.open | {key} if body is not None else self.open - {key}
                self._open_entry(key[5:37])
            case "workers":
                self._session(who, name, record)
            case _:
                pass

    # ------------------------------------------------------------------ records

    def _task(self, who: str, task: str, after: Json | None) -> None:
        before = self.tasks.get(task)
        if after is None:
            if before is not None:
                if before["state"] != "pruned" or before.get("key"):
                    self.report(f"I6: the record of {task} was removed, and it is {before['state']}")
                self.removed[task] = before.get("rev", 0)
                del self.tasks[task]
            return
        self.tasks[task] = after
        self._register(task, before, after)
        was = before["state"] if before else ""
        if after.get("run") and after["state"] in ENDED and was not in OVER:
            self._of_run(task, after)
        if after["state"] not in MOVES[was] and not (after.get("run") and (was, after["state"]) in OF_RUNS):
            self.report(f"I7: {task} went from {was or 'missing'} to {after['state']}")
        elif before is None:
            if task in self.removed and self.removed[task] >= after.get("rev", 0):
                self.report(f"{task} came back with rev {after.get('rev', 0)} after it was removed at {self.removed[task]}")
        else:
            self._move(who, task, before, after)
        if after["state"] == "running" and after["token"] not in self.claimants:
            self.claimants[after["token"]] = who
            if after["worker"] not in self.session_owners:
                self.report(f"{task} was claimed by {after['worker']}, whose session was never stored")
        self._check_told(task, after)
        self._findable(task)

    def _register(self, task: str, before: Json | None, after: Json) -> None:
        """Section 3: rev counts up, op is fresh, and ops are the last four."""
        ops = after.get("ops", [])
        if not ops or ops[-1] != after.get("op"):
            self.report(f"{task} was written without its op as the last of ops")
        elif after["op"] in self._ops:
            self.report(f"{task}: the write {after['op']} was applied twice")
        self._ops.add(after.get("op", ""))
        if before is not None and (after.get("rev", 0) != before.get("rev", 0) + 1 or ops[:-1] != before.get("ops", [])[-3:]):
            self.report(f"{task}: rev {after.get('rev', 0)} does not follow rev {before.get('rev', 0)}")

    def _move(self, who: str, task: str, before: Json, after: Json) -> None:  # noqa: C901, PLR0912 - a rule after another
        """I7 and I9: which process may make this move, and what must hold with it."""
        was, state = before["state"], after["state"]
        if was in OVER:
            if state == was and after.get("events") != before.get("events"):
                self.report(f"I7: {task} had ended as {was}, and ended again")
            return
        if was == "pending":
            if state == "running" and before.get("cancel_requested") and not after.get("run"):
                self.report(f"I6: {task} is claimed although its cancel was acknowledged")
            return
        event = after["events"][-1]
        if state == "running" and after["token"] == before["token"]:
            if who != self.claimants.get(before["token"]) and not after.get("cancel_requested"):
                self.report(f"I9: {who} wrote {task}, which {self.claimants.get(before['token'])} has claimed")
            return
        lost = event["why"] in LOSSES or (state == "cancelled" and "lost" in event.get("detail", ""))
        if lost:
            self._loss(who, task, before, after)
        elif who != self.claimants.get(before["token"]):
            self.report(f"I9: {task} was claimed by {self.claimants.get(before['token'])}, and {event['why']} by {who}")
        elif before["token"] in self.working:
            self.report(f"I9: {task} is {state} ({event['why']}) while the attempt under its claim is still at work")
        if state == "cancelled" and not before.get("cancel_requested") and not after.get("run"):
            self.report(f"{task} is cancelled, and nobody asked for it in this life of it")
        if after.get("run"):
            return  # it stays running until its run has its outcome, without its handler
        if state == "running" and before.get("cancel_requested"):
            self.report(f"I6: {task} is taken over although its cancel was acknowledged")
        if state == "pending" and before.get("cancel_requested"):
            self.report(f"I6: {task} goes back to pending although its cancel was acknowledged")

    def _loss(self, who: str, task: str, before: Json, after: Json) -> None:
        """Check that only the claim's own worker calls a claim lost before its session is reaped or gone."""
        session = self.sessions.get(before["worker"])
        own = who == self.session_owners.get(before["worker"])
        if session is not None and not session.get("reaped") and not own:
            self.report(f"I9: {who} calls {task} lost, and the session of {before['worker']} is alive")
        if after.get("losses", 0) != before.get("losses", 0) + 1 and after["state"] != "cancelled":
            self.report(f"{task} was lost, and its losses went from {before.get('losses', 0)} to {after.get('losses', 0)}")
        if after.get("losses", 0) >= after.get("max_losses", 10) and after["state"] != "failed":
            self.report(f"{task} is out of losses and goes on as {after['state']}")

    def _check_told(self, task: str, after: Json) -> None:
        if after["state"] == "pruned":
            self.release(task)
        told = self.told.get(task)
        if told and after["state"] != told:
            self.report(f"I6: of {task} a caller was told {told}, and it is {after['state']}")

    # ------------------------------------------------------------------ runs

    def _run(self, run: str, after: Json | None) -> None:
        before = self.runs.get(run)
        if after is None:
            self.runs.pop(run, None)
            return
        after.setdefault("state", "running")
        self.runs[run] = after
        self._register(run, before, after)
        self._open_entry(run)
        if before is None:
            return
        was, state = before["state"], after["state"]
        begun_anew = was == "pruned" and after.get("gen", 1) == 1
        if not begun_anew and after.get("gen", 1) not in {before.get("gen", 1), before.get("gen", 1) + 1}:
            self.report(f"the run {run} went from generation {before.get('gen', 1)} to {after.get('gen', 1)}")
        if was in RUN_OVER and state not in {was, "pruned"} and after.get("gen", 1) == before.get("gen", 1) and was != "pruned":
            self.report(f"the run {run} had ended as {was}, and became {state} without a retry")
        for name, step in before.get("steps", {}).items():
            step_after = after.get("steps", {}).get(name, {})
            if "pruned" in {was, state} or step_after.get("gen", 1) != step.get("gen", 1):
                continue
            if step.get("state") in {"done", "failed"} and _outcome(step_after) != _outcome(step):
                self.report(f"step {name} of run {run} was {_outcome(step)}, and is {_outcome(step_after)} in one generation")

    def _open_entry(self, run: str) -> None:
        """Judge that a run which is not over has the entry of its generation."""
        after = self.runs.get(run)
        if after is not None and after["state"] not in RUN_OVER and f"open/{run}.{after.get('gen', 1)}" not in self.open:
            self.report(f"the run {run} is {after['state']} in generation {after.get('gen', 1)}, and its entry is not there")

    def _of_run(self, task: str, after: Json) -> None:
        """I8: a task of a run ends only after the run's record holds its outcome."""
        run = self.runs.get(after["run"])
        if run is None:
            if after["state"] != "cancelled":
                self.report(f"I8: {task} ({after['name']}) ended as {after['state']}, and its run {after['run']} has no record")
            return
        step = run.get("steps", {}).get(after.get("step", ""), {})
        if run["state"] in RUN_OVER or after["name"].startswith("buquet.") or step.get("gen", 1) != after.get("gen", 1):
            return
        state = step.get("undo") if after.get("undoes") else step.get("state", "idle")
        if state in {"due", "idle"} and "fan" not in step:
            self.report(f"I8: {task} ({after['step']}) ended as {after['state']}, and in its run that step is still {state}")

    # ------------------------------------------------------------------ entries, sessions

    def _findable(self, task: str) -> None:
        """I1 and I2."""
        after = self.tasks.get(task)
        if after is None or after["state"] not in {"pending", "running"} or after.get("entry") in self.entries:
            return
        if after["state"] == "pending":
            self.report(f"I1: {task} is pending at rev {after.get('rev', 0)}, and its entry is not there")
        elif not self._listed(after["worker"], after["token"]):
            self.report(f"I2: {task} runs under {after['worker']} without an entry, and its session does not list the claim")

    def _listed(self, worker: str, token: str) -> bool:
        return any(claim["token"] == token for claim in self.sessions.get(worker, {}).get("claims", ()))

    def _entry(self, key: str, *, written: bool) -> None:
        match = _ENTRY.fullmatch(key)
        if match is None:
            self.report(f"{key} is no entry")
            return
        task, rev = match[1], int(match[2])
        if written:
            self.entries[key] = (task, rev)
            return
        self.entries.pop(key, None)
        after = self.tasks.get(task)
        known = after.get("rev", 0) if after else self.removed.get(task, -1)
        if rev > known:
            self.report(f"I3: the entry of {task} at rev {rev} was deleted while its record is at rev {known}")
        self._findable(task)

    def _session(self, who: str, worker: str, after: Json | None) -> None:
        before = self.sessions.get(worker)
        if after is None:
            self.sessions.pop(worker, None)
        else:
            self.sessions[worker] = after
            if before is None and worker in self.session_owners:
                self.report(f"the session {worker} came back after it was removed")
            self.session_owners.setdefault(worker, who)
            if before is not None and before.get("reaped") and not after.get("reaped"):
                self.report(f"the session {worker} was reaped, and is alive again")
        if before is None:
            return
        kept = {claim["token"] for claim in after.get("claims", ())} if after else set[str]()
        for claim in before.get("claims", ()):
            task = self.tasks.get(claim["task"], {})
            if claim["token"] in kept or task.get("token") != claim["token"] or task.get("state") != "running":
                continue
            rule = "I5: the session" if after is None else "I4: the session's list"
            self.report(f"{rule} of {worker} no longer has the claim of {claim['task']}, which still runs under it")
            self._findable(claim["task"])

    # ------------------------------------------------------------------ at the end

    def unfinished(self) -> list[str]:
        """Return the tasks that are not over, or failed too often, after all work is done."""
        wrong = [
            f"lost: {task} was acknowledged, and is {self.tasks.get(task, {}).get('state', 'missing')} though all is done"
            for task in sorted(self.submitted)
            if self.tasks.get(task, {}).get("state") not in ENDED | {"pruned"} and task not in self.removed
        ]
        wrong += [
            f"unfinished: {task} is {after['state']}"
            for task, after in sorted(self.tasks.items())
            if after["state"] not in OVER and task not in self.submitted
        ]
        wrong += [
            f"{task} failed {record['failures']} times of {record.get('max_attempts', 3)}"
            for task, record in sorted(self.tasks.items())
            if record.get("failures", 0) > record.get("max_attempts", 3)
        ]
        return wrong

    def litter(self) -> list[str]:
        """Return the entries and sessions that are left an hour after all work was done. A paused run keeps its entry."""
        closed = (key for key in self.open if self.runs.get(key[5:37], {}).get("state", "missing") in RUN_OVER | {"missing"})
        return [f"litter: {key}" for key in (*sorted(self.entries), *sorted(self.sessions), *sorted(closed))]


def _outcome(step: Json) -> tuple[object, ...]:
    return step.get("state"), step.get("result"), step.get("result_at")
