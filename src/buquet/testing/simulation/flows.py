"""Runs of workflows in the simulation: one workflow of many shapes, what callers do with its runs, and how each may end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buquet.clock import Backoff
from buquet.queue.attempt import current
from buquet.testing.run_auditor import task_of
from buquet.workflow.words import Signal, each

if TYPE_CHECKING:
    from buquet.testing.simulation.world import Node, World

GO = Signal("go", int)
WORTH = 5
"""The value of every signal."""
UNDONE = ("add", "add_3")
"""The steps that have an undo."""
OVER = {"completed", "failed", "cancelled", "pruned"}


def declare_flows(node: Node) -> None:
    """Declare the workflow and the tasks of its steps on a process's App."""
    clock, random = node.clock, node.clock.random
    quick = Backoff(initial=0.3, factor=2, max=3, jitter=0.5)

    # async tasks give steps that are typed as what they await to; the workflow is therefore async, too, and awaits each
    @node.task(name="add", backoff=quick)
    async def add(n: int) -> int:
        await clock.sleep(random.random() ** 3 * 2 * node.world.ttl)
        node.world.ran.add(current().id)
        return n + 1

    @node.task(name="back", queue="side", backoff=quick)
    async def back(n: int, result: int | None = None) -> None:  # noqa: ARG001 - undoing looks at neither
        await clock.sleep(random.random())
        node.world.ran.add(current().id)

    @node.task(name="join", queue="side", backoff=quick)
    async def join(a: int, b: int) -> int:
        await clock.sleep(random.random())
        return a + b

    @node.task(name="spoil", max_attempts=2, backoff=quick)
    async def spoil(n: int, fails: bool) -> int:
        if fails:
            raise ValueError(n)
        return n

    @node.workflow(name="order")
    async def order(n: int, waits: bool, fails: bool, fans: bool) -> int:
        a = await add.options(undo=back)(n)
        b, c = await add(a), await add.options(undo=back)(a)
        if waits:
            c = await join(c, GO.wait(timeout=15, default=0, after=[b]))
        if fans:
            each(add, [n, n, n], pack=2)
        return await spoil(await join(b, c), fails)

    node.order = order


class RunCallers:
    """What callers ask for of runs. Each is told to the auditor by its outcome alone."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.watch = world.watch
        self.random = world.random

    async def begin(self, node: Node) -> None:
        """Start a run."""
        random = self.random
        options: dict[str, Any] = {"key": f"r{random.randrange(3)}"} if random.random() < 0.3 else {}
        args = (random.randrange(100), random.random() < 0.4, random.random() < 0.3, random.random() < 0.3)
        run = await node.order.astart(*args, **options)
        self.watch.told_submitted(run.id)

    def some_run(self) -> str | None:
        """Return the id of some run."""
        return self.random.choice(list(self.watch.runs)) if self.watch.runs else None

    async def ask(self, node: Node) -> None:
        """Signal, cancel, pause, resume or retry some run."""
        run_id = self.some_run()
        if run_id is None:
            return
        run = node.order.get(run_id)
        match self.random.choice(("signal", "signal", "signal", "cancel", "pause", "resume", "retry")):
            case "signal":
                await GO.asend(run_id, WORTH, app=node)
            case "cancel":
                self.watch.requested.add(run_id)
                await run.acancel()
            case "pause":
                await run.apause()
            case "resume":
                await run.aresume()
            case _:
                await run.aretry()

    async def resume(self, node: Node, run_id: str) -> None:
        """Resume a run that somebody paused."""
        await node.order.get(run_id).aresume()


def wrong_run(run: dict[str, Any], *, cancelled: bool, ran: set[str]) -> list[str]:
    """Say what is wrong with how a run ended. `ran`: the tasks whose handlers came to their end."""
    state = run["state"]
    if state == "pruned":
        return []
    if state not in OVER:
        # one that somebody paused waits for whoever resumes it
        return [] if run.get("paused") else [f"unfinished: the run is {state}"]
    args = run.get("args")
    found: list[str] = []
    lost = any(step.get("error", {}).get("type") == "WorkerLost" for step in run.get("steps", {}).values())
    if state == "cancelled" and not cancelled:
        found.append("cancelled, though nobody asked")
    if args is not None and state == "completed":
        good = {2 * args["n"] + 4, 2 * args["n"] + 4 + WORTH} if args["waits"] else {2 * args["n"] + 4}
        if args["fails"] or ("output" in run and run["output"] not in good):
            found.append(f"completed with {run.get('output')} for {args}")
    if args is not None and state == "failed" and not args["fails"] and not lost:
        found.append(f"failed, though nothing in it fails: {run.get('error')}")
    found += [f"{state}, and {name} is due" for name, step in run.get("steps", {}).items() if step.get("state") == "due"]
    if state in {"failed", "cancelled"} and run.get("undoing", True):
        found += [f"{state}, and {problem}" for name in UNDONE for problem in _not_undone(run, name, ran)]
    return found


def _not_undone(run: dict[str, Any], name: str, ran: set[str]) -> list[str]:
    """Say whether something that a step did is there still. What its handler did counts, not what the record says."""
    step = run.get("steps", {}).get(name, {})
    done, undone = (task_of(run["id"], kind, name, 0, step.get("gen", 1)) in ran for kind in ("step", "undo"))
    if step.get("undo") == "failed" or undone or not (done or step.get("state") == "done"):
        return []
    return [f"{name} is done and not undone ({step.get('state')}, {step.get('undo', 'not begun')})"]
