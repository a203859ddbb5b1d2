"""The simulated callers: they submit, wait, cancel, redrive, prune and repair, and steer runs.

They report each answer that binds the queue to the live auditor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buquet.errors import BuquetError, KeyConflict, Refused, StoreError, SubmitInterrupted, TaskError, TaskNotFound
from buquet.operate.fsck import fsck
from buquet.operate.prune import prune
from buquet.testing.simulation.workload import GO, WORTH, draw
from buquet.worker.fleet import Reaper

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from buquet.testing.simulation.world import Machine, World

ENDS = {"failed", "cancelled", "expired"}


class Callers:
    """Everything that callers do, each on one machine."""

    def __init__(self, world: World) -> None:
        self.auditor = world.auditor
        self.random = world.random
        self.keyed: list[tuple[str, str, tuple[Any, ...]]] = []
        """Each key that was used, with its task's name and arguments."""

    def start(self, machine: Machine, call: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Start a call in a process. An error that a caller may not get is a finding."""
        machine.process.spawn(self._guarded(machine, call, args))

    async def _guarded(self, machine: Machine, call: Callable[..., Coroutine[Any, Any, None]], args: tuple[Any, ...]) -> None:
        try:
            await call(machine, *args)
        except (StoreError, TaskError, TaskNotFound, Refused, KeyConflict, SubmitInterrupted, TimeoutError):
            pass
        except BuquetError as error:
            self.auditor.report(f"{machine.name} got {type(error).__name__}: {error}")

    # ------------------------------------------------------------------ submits

    async def submit(self, machine: Machine, wait: bool = False) -> None:
        """Submit a random task, and perhaps wait for its result."""
        random = self.random
        name, args = draw(machine)
        options: dict[str, Any] = {}
        if random.random() < 0.3:
            key = f"k{random.randrange(4)}"
            options["key"] = key
            for known, its_name, its_args in self.keyed:
                if known == key and random.random() < 0.9:
                    name, args = its_name, its_args
            self.keyed.append((key, name, args))
        if random.random() < 0.15:
            options["delay"] = round(random.random() * 20, 3)
        if random.random() < 0.2:
            options["priority"] = random.randrange(10)
        if random.random() < 0.1:
            options["expires"] = 1 + random.random() * 20
        handle = await machine.tasks[name].options(**options).asubmit(*args)
        self.auditor.told_submitted(handle.id)
        if wait:
            await handle.aresult(timeout=random.random() * 60)
            self.auditor.told_ended(handle.id, "completed")

    async def many(self, machine: Machine) -> None:
        calls = [(self.random.randrange(1000),) for _ in range(self.random.randrange(2, 9))]
        for handle in await machine.tasks["echo"].asubmit_many(calls):
            self.auditor.told_submitted(handle.id)

    async def batch(self, machine: Machine) -> None:
        items = [self.random.randrange(40) for _ in range(self.random.randrange(1, 8))]
        batch = await machine.tasks["item"].abatch(items, pack=3)
        for task in batch.task_ids:
            self.auditor.told_submitted(task)

    async def probe(self, machine: Machine, ids: list[str]) -> None:
        """Submit a small task in good weather, and note its id."""
        handle = await machine.tasks["echo"].asubmit(self.random.randrange(1000))
        self.auditor.told_submitted(handle.id)
        ids.append(handle.id)

    # ------------------------------------------------------------------ tasks

    def some_task(self, states: set[str] | None = None) -> str | None:
        """Return the id of a random task in one of these states."""
        tasks = [
            task_id
            for task_id, task in self.auditor.tasks.items()
            if (states is None or task["state"] in states) and not task.get("run")
        ]
        return self.random.choice(tasks) if tasks else None

    async def cancel(self, machine: Machine) -> None:
        task = self.some_task({"pending", "running"} if self.random.random() < 0.9 else None)
        if task is not None:
            self.auditor.cancels.add(task)
            if await machine.acancel(task) == "cancelled":
                self.auditor.told_ended(task, "cancelled")

    async def redrive(self, machine: Machine) -> None:
        task = self.some_task(ENDS if self.random.random() < 0.9 else None)
        if task is not None:
            self.auditor.release(task)
            await machine.aredrive(task)

    async def cancel_twice(self, machine: Machine) -> None:
        """Cancel a running task, redrive it, and cancel another: the worker finds its old note beside the new one."""
        task = self.some_task({"running"})
        if task is None:
            return
        self.auditor.cancels.add(task)
        await machine.acancel(task)
        await machine.clock.sleep(self.random.random() * 6)
        self.auditor.release(task)
        await machine.aredrive(task)
        await machine.clock.sleep(self.random.random() * 3)
        await self.cancel(machine)

    # ------------------------------------------------------------------ runs

    async def start_run(self, machine: Machine) -> None:
        random = self.random
        options: dict[str, Any] = {"key": f"r{random.randrange(3)}"} if random.random() < 0.3 else {}
        args = (random.randrange(100), random.random() < 0.4, random.random() < 0.3, random.random() < 0.3)
        run = await machine.order.astart(*args, **options)
        self.auditor.told_submitted(run.id)

    async def steer_run(self, machine: Machine) -> None:
        """Signal, cancel, pause, resume or retry a random run."""
        if not self.auditor.runs:
            return
        run_id = self.random.choice(list(self.auditor.runs))
        run = machine.order.get(run_id)
        match self.random.choice(("signal", "signal", "signal", "cancel", "pause", "resume", "retry")):
            case "signal":
                await GO.asend(run_id, WORTH, app=machine)
            case "cancel":
                self.auditor.cancels.add(run_id)
                await run.acancel()
            case "pause":
                await run.apause()
            case "resume":
                await run.aresume()
            case _:
                await run.aretry()

    async def resume_run(self, machine: Machine, run_id: str) -> None:
        await machine.order.get(run_id).aresume()

    # ------------------------------------------------------------------ operators

    async def prune(self, machine: Machine) -> None:
        await prune(machine.client, 3600)

    async def reap(self, machine: Machine) -> None:
        """Reap a worker that may be alive, as a parent does that lost sight of its child: any session may be reaped."""
        sessions = self.auditor.sessions
        workers = sorted(worker for worker, session in sessions.items() if session.get("claims")) or sorted(sessions)
        if workers:
            worker = self.random.choice(workers)
            beat = sessions[worker]["beat"]
            for _ in range(100):  # right after a heartbeat, so that the worker learns of it late. A dead worker has none
                if sessions.get(worker, {}).get("beat") != beat:
                    break
                await machine.clock.sleep(0.03)
            await Reaper(machine.client.register, machine.client.added, lambda _: None).reap(worker)

    async def repair(self, machine: Machine) -> None:
        """Let fsck repair everything. Afterwards it must find nothing but payloads, which prune removes."""
        await fsck(machine.client, repair=True)
        for finding in (await fsck(machine.client)).findings:
            if finding.kind != "orphaned payload":
                self.auditor.report(f"fsck: {finding.kind} after a repair: {finding.key}: {finding.detail}")

    async def fsck(self, machine: Machine) -> None:
        """Check the bucket while others work on it: fsck must find nothing, and break nothing."""
        report = await fsck(machine.client, repair=self.random.random() < 0.5)
        for finding in report.findings:
            if not finding.kind.endswith("missing") and finding.kind != "unreadable record":
                continue
            if finding.key.startswith("runs/"):
                continue  # when a run is opened again, its entry is written after its record
            self.auditor.report(f"fsck: {finding.kind}: {finding.key}: {finding.detail}")
