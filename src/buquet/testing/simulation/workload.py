"""What the simulated processes work on, and what must come of each task: its name and arguments alone say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buquet.clock import Backoff
from buquet.errors import Fail, Snooze
from buquet.queue.attempt import current

if TYPE_CHECKING:
    from buquet.testing.simulation.world import Node

POISON_LOSSES = 3


def declare(node: Node) -> None:  # noqa: C901 - a task after another
    """Declare all tasks on a process's App."""
    clock, random = node.clock, node.clock.random
    quick = Backoff(initial=0.3, factor=2, max=5, jitter=0.5)

    @node.task(name="echo", backoff=quick)
    async def echo(n: int) -> int:
        await clock.sleep(random.random() * 0.3)
        return 2 * n

    @node.task(name="slow", queue="side", backoff=quick)
    async def slow(n: int, seconds: float) -> int:
        with node.at_work(current()):
            await clock.sleep(seconds)
        return n

    @node.task(name="plain", backoff=quick)
    def plain(n: int) -> str:
        return "x" * n

    @node.task(name="flaky", max_attempts=3, backoff=quick)
    async def flaky(n: int, failures: int) -> int:
        await clock.sleep(random.random() * 2)
        if current().attempt <= failures:
            raise ValueError(n)
        return n

    @node.task(name="doomed", backoff=quick)
    async def doomed(n: int) -> None:
        await clock.sleep(random.random() * 2)
        raise Fail(str(n))

    @node.task(name="naps", backoff=quick)
    async def naps(n: int, times: int) -> int:
        slept = current().checkpointed or 0
        with node.at_work(current()):
            if slept < times:
                await current().acheckpoint(slept + 1)
                raise Snooze(random.random() * 3)
            await clock.sleep(random.random() * 4)
        return n + slept

    @node.task(name="steps", max_attempts=4, backoff=quick)
    async def steps(n: int, count: int) -> int:
        done = current().checkpointed or 0
        with node.at_work(current()):
            for step in range(done, count):
                await clock.sleep(random.random() * 4)
                await current().acheckpoint(step + 1)
        return n + count

    @node.task(name="stumbles", max_attempts=2, backoff=quick)
    async def stumbles(n: int, seconds: float) -> int:
        # the second attempt pushes the first one's last write out of the record's ops, and must not be taken for it
        if current().attempt == 1:
            raise ValueError(n)
        with node.at_work(current()):
            for step in range(4):
                await current().acheckpoint(step)
            await clock.sleep(seconds)
        return n

    @node.task(name="poison", queue="side", max_losses=POISON_LOSSES, backoff=quick)
    async def poison(n: int, kills: int) -> int:
        killed = node.world.killed.get(current().id, 0)
        if killed < kills and node.world.cruel:
            node.world.killed[current().id] = killed + 1
            node.crash()
        await clock.sleep(random.random())
        return n

    @node.task(name="item", max_attempts=2, backoff=quick)
    async def item(n: int) -> int:
        await clock.sleep(random.random() * 0.5)
        if n % 7 == 6:
            raise ValueError(n)
        return n * n

    del echo, slow, plain, flaky, doomed, naps, steps, stumbles, poison, item  # they are found by their names


def draw(node: Node) -> tuple[str, tuple[Any, ...]]:
    """Draw a task to submit: its name and arguments."""
    random = node.world.random
    n = random.randrange(1000)
    name = random.choice(
        (
            *("echo", "echo", "slow", "slow", "slow", "plain", "flaky", "flaky", "doomed", "naps", "steps", "steps"),
            *("stumbles", "stumbles", "stumbles", "poison"),
        )
    )
    match name:
        case "slow" | "stumbles":
            return name, (n, round(random.random() * 3 * node.world.ttl, 3))
        case "plain":
            return name, (n,)
        case "flaky":
            return name, (n, random.randrange(4))
        case "naps" | "steps":
            return name, (n, random.randrange(1, 5))
        case "poison":
            return name, (n, random.randrange(1, POISON_LOSSES + 2))
        case _:
            return name, (n,)


def wrong(task: dict[str, Any], args: dict[str, Any] | None, result: Any, *, cancelled: bool) -> str:
    """Say what is wrong with how a task ended; nothing, when it may end so. `args` is None where they are not at hand."""
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
    want = expected(task["name"], args) if args is not None else None
    if state == "failed":
        doomed = task["name"] == "doomed" and error == "Fail"
        worn = (
            task["name"] == "flaky"
            and error == "ValueError"
            and (args is None or args["failures"] >= task.get("max_attempts", 3))
        )
        full = error == "StoreFull"  # a checkpoint that could not be stored is an error of the handler
        return "" if doomed or worn or full else f"failed with {error}: {task.get('error', {}).get('message', '')[:200]}"
    if task["name"] == "doomed" or (args is not None and result != want):
        return f"completed with {result!r}, and not {want!r}"
    return ""


def expected(name: str, args: dict[str, Any]) -> Any:
    """Return what a task must return."""
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
