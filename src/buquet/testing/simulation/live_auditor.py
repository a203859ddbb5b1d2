"""The live auditor: judges every write as it lands against section 5 of docs/protocol.md.

Like `buquet.testing.auditor`, the live auditor shares no code with the queue, knows the layout from the protocol alone, and
parses JSON itself. It also knows which process sent a write, and so tells the claimant from a process that only believes that
it holds the claim.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet.testing.auditor import ENDED, RUN_OVER, Json

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from buquet.testing.simulation.play import Play
    from buquet.testing.simulation.world import Machine, World

    Call = Callable[[str], Coroutine[Any, Any, object]]


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


PROMPT_BOUND = 20.0
"""Seconds for a task that the bell announced, or whose due time is known: two waits of 7.5 s before a request is sent again."""
OTHER_BOUND = 60.0
"""Seconds for any other task: the next rescan finds it."""
SETTLED = 90.0
"""Seconds after a clock jumped until the cursors are right again."""
READS = (
    ("get", "bell/"),
    ("get", "queues/"),
    ("get", "control/"),
    ("get", "tasks/"),
    ("list", "ready/"),
    ("list", "ready/default/5/"),
    ("list", "later/"),
    ("list", "workers/"),
)
"""The requests by which a worker looks for work."""
LONGEST = 16.0
"""Seconds of an outage."""
LONG_AGO = 700.0
"""Seconds after which a rescan no longer reaches an entry."""


class Lateness:
    """Looks at the world every second, and reports each task that starts too late."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.prompt: set[str] = set()
        """Tasks that were submitted in good weather, so that workers saw the bell."""
        self.paused: set[str] = set()
        """Names of the processes and queues that are paused."""
        self.jumped = -SETTLED
        """When a clock last jumped."""
        self._store_well = 0.0
        """Since when the store answers every request."""
        self._pending: dict[str, tuple[int, float]] = {}
        """The rev of each pending task, and since when the task has had it."""
        self._free: dict[tuple[str, str], float] = {}
        """Since when a process could take a task of a queue."""

    def look(self) -> None:
        """Report the tasks that have waited too long."""
        now, weather = self.world.loop.elapsed, self.world.network.weather
        if weather.faults or weather.slow or weather.lag or now < max(weather.away, weather.refused_until):
            self._store_well = now
        able = {
            (machine.name, queue)
            for machine in self.world.machines
            for queue in ("default", "side")
            if self._able(machine, queue)
        }
        self._free = {pair: self._free.get(pair, now) for pair in sorted(able)}
        pending = {task_id: task for task_id, task in self.world.auditor.tasks.items() if task["state"] == "pending"}
        self._pending = {
            task_id: known
            if (known := self._pending.get(task_id)) and known[0] == task.get("rev", 0)
            else (task.get("rev", 0), now)
            for task_id, task in pending.items()
        }
        for task_id, task in pending.items():
            lane = str(task["entry"]).split("/")
            if lane[0] == "ready" and lane[2] != "5":
                continue  # workers must first learn of this priority
            bound = PROMPT_BOUND if task_id in self.prompt else OTHER_BOUND
            due = now - (self.world.bucket.clock.now() - due_ms(task) / 1000)
            free = min((since for (_, queue), since in self._free.items() if queue == lane[1]), default=now)
            begun = max(self._pending[task_id][1], due, self._store_well, free, self.jumped + SETTLED)
            if now - begun > bound:
                self.world.auditor.report(f"late: {task['name']} {task_id} is not begun {bound:g} s after it could be")
                self.prompt.discard(task_id)

    def _able(self, machine: Machine, queue: str) -> bool:
        worker = machine.own_worker
        if worker is None or machine.process.state != "up" or machine.stopping or not worker.free or queue not in worker.queues:
            return False
        return machine.holds_its_session() and not {machine.name, queue} & self.paused


def due_ms(task: dict[str, object]) -> int:
    """Return when a task is due, in milliseconds: if a wrong clock released the task too early, at its entry's time."""
    lane, _, name = str(task.get("entry", "")).rpartition("/")
    return max(int(str(task.get("due", 0))), int(name[:13]) if lane.startswith("later/") else 0)


class Outage:
    """The act in which the store refuses one kind of request. It comes after the calm, when workers are idle."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.world = play.world
        self.random = play.random
        self.lateness = play.lateness
        self.ids: list[str] = []

    async def run(self) -> None:
        """Refuse requests during one kind of look for work, and wait until all tasks have begun."""
        acts: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            *(self.due, self.due, self.hint, self.unrung, self.reaped),
            *(self.queue_resumed, self.queue_resumed, self.worker_resumed, self.worker_resumed),
        )
        self.play.some("w")
        await self.random.choice(acts)()
        until = self.world.loop.elapsed + LONGEST + 70
        while self.waiting() and self.world.loop.elapsed < until and not self.world.auditor.findings:
            await self.play.pause(1)
        await self.play.until_done("the workers of an outage")

    def waiting(self) -> bool:
        tasks = self.world.auditor.tasks
        return any(task_id not in tasks or tasks[task_id]["state"] == "pending" for task_id in self.ids)

    def refuse(self, likely: tuple[str, str] | None = None) -> None:
        """Refuse one kind of request for some seconds: `likely` in half of all cases, else any read."""
        which = likely if likely and self.random.random() < 0.5 else self.random.choice(READS)
        self.world.network.refuse(which, self.random.uniform(2, LONGEST))

    def trap(self, op: str, prefix: str) -> None:
        """Start to refuse requests now, or once a worker has sent a certain request."""
        if self.random.random() < 0.5:
            self.refuse((op, prefix))
        else:
            self.world.network.trap = (op, prefix, self.refuse)

    async def submit(self, machine: Machine, name: str, args: tuple[object, ...], delay: float = 0) -> None:
        handle = await machine.tasks[name].options(delay=delay or None).asubmit(*args)
        self.world.auditor.told_submitted(handle.id)
        self.lateness.prompt.add(handle.id)
        self.ids.append(handle.id)

    def caller(self) -> Machine:
        """Start a caller whose clock is nearly right."""
        return self.play.machine("c", self.random.uniform(-1, 1))

    def some(self) -> None:
        machine = self.caller()
        for _ in range(self.random.randrange(1, 4)):
            self.play.callers.start(machine, self.submit, "echo", (self.random.randrange(1000),))

    # ------------------------------------------------------------------ the looks

    async def due(self) -> None:
        delay = self.random.uniform(2, 25)
        self.play.callers.start(self.caller(), self.submit, "echo", (1,), delay)
        await self.play.pause(delay - self.random.uniform(0, 1))
        self.refuse(("list", "later/"))

    async def hint(self) -> None:
        self.refuse(("get", "bell/"))
        await self.play.pause(self.random.random())
        self.some()

    async def unrung(self) -> None:
        """Let a caller die before it rings the bell, so that a rescan must find its task."""
        machine = self.caller()
        self.world.network.refuse(("write", "bell/"), 2)
        self.play.callers.start(machine, self.submit, "echo", (1,))
        await self.play.pause(1)
        machine.crash()
        self.lateness.prompt.difference_update(self.ids)
        self.trap("list", "ready/")

    async def reaped(self) -> None:
        self.play.callers.start(self.caller(), self.submit, "slow", (1, 30.0))
        await self.play.pause(8)
        self.trap("create", "workers/")
        self.play.callers.start(self.caller(), self.play.callers.reap)
        await self.play.pause(10)

    async def queue_resumed(self) -> None:
        """Pause a queue and resume it, perhaps so late that only a full rescan finds its tasks."""
        machine = self.caller()
        await self._resumed(machine, {"default": "default"}, machine.apause_queue, machine.aresume_queue, "queues/")

    async def worker_resumed(self) -> None:
        """Pause and resume all workers in the same way."""
        machine = self.caller()
        workers = {worker.name: worker.own_worker.id for worker in self.play.living("w") if worker.own_worker}
        await self._resumed(machine, workers, machine.apause_worker, machine.aresume_worker, "control/")

    async def _resumed(self, machine: Machine, ids: dict[str, str], pause: Call, resume: Call, prefix: str) -> None:
        """Pause queues or workers, submit tasks, and resume. `ids` are by the names that Lateness knows."""
        self.lateness.paused.update(ids)

        async def pause_all(_node: Machine) -> None:
            for one in ids.values():
                await pause(one)

        async def resume_all(_node: Machine) -> None:
            for name, one in ids.items():
                await resume(one)
                self.lateness.paused.discard(name)
            self.trap("get", prefix)

        self.play.callers.start(machine, pause_all)
        await self.play.pause(8)
        self.some()
        await self.play.pause(self.random.choice((20.0, LONG_AGO)))
        self.play.callers.start(machine, resume_all)
        await self.play.pause(1)
