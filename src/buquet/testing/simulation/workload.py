"""The tasks and the workflow of the simulated processes, and how each task and run may end.

The name and the arguments alone decide that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buquet.clock import Backoff
from buquet.errors import Fail, Snooze
from buquet.queue.attempt import current
from buquet.testing.auditor import RUN_OVER, task_of
from buquet.workflow.words import Signal, each

if TYPE_CHECKING:
    from buquet.testing.simulation.world import Machine

POISON_LOSSES = 3
GO = Signal("go", int)
WORTH = 5
"""The value of every signal."""
UNDONE = ("add", "add_3")
"""The steps that have an undo."""


def declare(machine: Machine) -> None:  # noqa: C901 - a task after another
    """Declare the tasks on a process's App."""
    clock, random = machine.clock, machine.clock.random
    quick = Backoff(initial=0.3, factor=2, max=5, jitter=0.5)

    @machine.task(name="echo", backoff=quick)
    async def echo(n: int) -> int:
        await clock.sleep(random.random() * 0.3)
        return 2 * n

    @machine.task(name="slow", queue="side", backoff=quick)
    async def slow(n: int, seconds: float) -> int:
        with machine.at_work(current()):
            await clock.sleep(seconds)
        return n

    @machine.task(name="plain", backoff=quick)
    def plain(n: int) -> str:
        return "x" * n

    @machine.task(name="flaky", max_attempts=3, backoff=quick)
    async def flaky(n: int, failures: int) -> int:
        await clock.sleep(random.random() * 2)
        if current().attempt <= failures:
            raise ValueError(n)
        return n

    @machine.task(name="doomed", backoff=quick)
    async def doomed(n: int) -> None:
        await clock.sleep(random.random() * 2)
        raise Fail(str(n))

    @machine.task(name="naps", backoff=quick)
    async def naps(n: int, times: int) -> int:
        slept = current().checkpointed or 0
        with machine.at_work(current()):
            if slept < times:
                await current().acheckpoint(slept + 1)
                raise Snooze(random.random() * 3)
            await clock.sleep(random.random() * 4)
        return n + slept

    @machine.task(name="steps", max_attempts=4, backoff=quick)
    async def steps(n: int, count: int) -> int:
        done = current().checkpointed or 0
        with machine.at_work(current()):
            for step in range(done, count):
                await clock.sleep(random.random() * 4)
                await current().acheckpoint(step + 1)
        return n + count

    @machine.task(name="stumbles", max_attempts=2, backoff=quick)
    async def stumbles(n: int, seconds: float) -> int:
        # the second attempt's writes push the first one's last write out of the record's ops
        if current().attempt == 1:
            raise ValueError(n)
        with machine.at_work(current()):
            for step in range(4):
                await current().acheckpoint(step)
            await clock.sleep(seconds)
        return n

    @machine.task(name="poison", queue="side", max_losses=POISON_LOSSES, backoff=quick)
    async def poison(n: int, kills: int) -> int:
        killed = machine.world.killed.get(current().id, 0)
        if killed < kills and machine.world.cruel:
            machine.world.killed[current().id] = killed + 1
            machine.crash()
        await clock.sleep(random.random())
        return n

    @machine.task(name="item", max_attempts=2, backoff=quick)
    async def item(n: int) -> int:
        await clock.sleep(random.random() * 0.5)
        if n % 7 == 6:
            raise ValueError(n)
        return n * n

    del echo, slow, plain, flaky, doomed, naps, steps, stumbles, poison, item  # they are called by their names


def declare_workflow(machine: Machine) -> None:
    """Declare the workflow `order` and the tasks of its steps on a process's App."""
    clock, random = machine.clock, machine.clock.random
    quick = Backoff(initial=0.3, factor=2, max=3, jitter=0.5)

    # the steps of async tasks are typed as awaitables, so the workflow is async and awaits each
    @machine.task(name="add", backoff=quick)
    async def add(n: int) -> int:
        await clock.sleep(random.random() ** 3 * 2 * machine.world.ttl)
        machine.world.ran.add(current().id)
        return n + 1

    @machine.task(name="back", queue="side", backoff=quick)
    async def back(n: int, result: int | None = None) -> None:  # noqa: ARG001 - undoing needs neither
        await clock.sleep(random.random())
        machine.world.ran.add(current().id)

    @machine.task(name="join", queue="side", backoff=quick)
    async def join(a: int, b: int) -> int:
        await clock.sleep(random.random())
        return a + b

    @machine.task(name="spoil", max_attempts=2, backoff=quick)
    async def spoil(n: int, fails: bool) -> int:
        if fails:
            raise ValueError(n)
        return n

    @machine.workflow(name="order")
    async def order(n: int, waits: bool, fails: bool, fans: bool) -> int:
        a = await add.options(undo=back)(n)
        b, c = await add(a), await add.options(undo=back)(a)
        if waits:
            c = await join(c, GO.wait(timeout=15, default=0, after=[b]))
        if fans:
            each(add, [n, n, n], pack=2)
        return await spoil(await join(b, c), fails)

    machine.order = order


def draw(machine: Machine) -> tuple[str, tuple[Any, ...]]:
    """Draw a random task to submit: its name and arguments."""
    random = machine.world.random
    n = random.randrange(1000)
    name = random.choice(
        (
            *("echo", "echo", "slow", "slow", "slow", "plain", "flaky", "flaky", "doomed", "naps", "steps", "steps"),
            *("stumbles", "stumbles", "stumbles", "poison"),
        )
    )
    match name:
        case "slow" | "stumbles":
            return name, (n, round(random.random() * 3 * machine.world.ttl, 3))
        case "flaky":
            return name, (n, random.randrange(4))
        case "naps" | "steps":
            return name, (n, random.randrange(1, 5))
        case "poison":
            return name, (n, random.randrange(1, POISON_LOSSES + 2))
        case _:
            return name, (n,)


def wrong_task(task: dict[str, Any], args: dict[str, Any] | None, result: Any, *, cancelled: bool) -> str:
    """Return what is wrong with how a task ended, in words; empty if nothing. `args` is None if they are unknown."""
    state = task["state"]
    error = task.get("error", {}).get("type", "").rpartition(".")[2]
    if state in {"pruned", "tombstone"}:
        return ""
    if state == "cancelled":
        return "" if cancelled else "cancelled, though nobody asked"
    if state == "expired":
        return "" if task.get("expires_ms") else "expired, though it has no deadline"
    if state == "failed" and error == "WorkerLost":
        return "" if task.get("losses", 0) >= task.get("max_losses", 10) else "failed as lost too early"
    if task.get("pack"):
        return _wrong_pack(task, args, result)
    want = _expected(task["name"], args) if args is not None else None
    if state == "failed":
        doomed = task["name"] == "doomed" and error == "Fail"
        worn = (
            task["name"] == "flaky"
            and error == "ValueError"
            and (args is None or args["failures"] >= task.get("max_attempts", 3))
        )
        full = error == "StoreFull"  # a checkpoint that cannot be stored raises in the handler
        return "" if doomed or worn or full else f"failed with {error}: {task.get('error', {}).get('message', '')[:200]}"
    if task["name"] == "doomed" or (args is not None and result != want):
        return f"completed with {result!r}, and not {want!r}"
    return ""


def _expected(name: str, args: dict[str, Any]) -> Any:
    match name:
        case "echo":
            return 2 * args["n"]
        case "plain":
            return "x" * args["n"]
        case "naps":
            return args["n"] + args["times"]
        case "steps":
            return args["n"] + args["count"]
        case _:
            return args["n"]


def _wrong_pack(task: dict[str, Any], args: dict[str, Any] | None, result: Any) -> str:
    if args is None:
        return ""
    bad = [n for n in args["items"] if n % 7 == 6]
    if task["state"] == "failed":
        return "" if bad else "a pack failed whose items are all good"
    if bad or result["results"] != [n * n for n in args["items"]]:
        return f"a pack of {args['items']} completed with {result}"
    return ""


def wrong_run(run: dict[str, Any], *, cancelled: bool, ran: set[str]) -> list[str]:
    """Return what is wrong with how a run ended, in words. `ran`: the tasks whose handlers have completed."""
    state = run["state"]
    if state == "pruned":
        return []
    if state not in RUN_OVER:
        # a paused run waits until a caller resumes it
        return [] if run.get("paused") else [f"unfinished: the run is {state}"]
    args = run.get("args")
    problems: list[str] = []
    lost = any(step.get("error", {}).get("type") == "WorkerLost" for step in run.get("steps", {}).values())
    if state == "cancelled" and not cancelled:
        problems.append("cancelled, though nobody asked")
    if args is not None and state == "completed":
        good = {2 * args["n"] + 4, 2 * args["n"] + 4 + WORTH} if args["waits"] else {2 * args["n"] + 4}
        if args["fails"] or ("output" in run and run["output"] not in good):
            problems.append(f"completed with {run.get('output')} for {args}")
    if args is not None and state == "failed" and not args["fails"] and not lost:
        problems.append(f"failed, though nothing in it fails: {run.get('error')}")
    problems += [f"{state}, and {name} is due" for name, step in run.get("steps", {}).items() if step.get("state") == "due"]
    if state in {"failed", "cancelled"} and run.get("undoing", True):
        problems += [f"{state}, and {problem}" for name in UNDONE for problem in _not_undone(run, name, ran)]
    return problems


def _not_undone(run: dict[str, Any], name: str, ran: set[str]) -> list[str]:
    """Return whether a step's effect remains, in words. The handler's effect counts, whatever the record says."""
    step = run.get("steps", {}).get(name, {})
    done, undone = (task_of(run["id"], kind, name, 0, step.get("gen", 1)) in ran for kind in ("step", "undo"))
    if step.get("undo") == "failed" or undone or not (done or step.get("state") == "done"):
        return []
    return [f"{name} is done and not undone ({step.get('state')}, {step.get('undo', 'not begun')})"]
