"""A workflow as data: its steps, what each needs, under which condition it runs. The run's record keeps it to its end."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from buquet import keys
from buquet.codec import decode_stored
from buquet.errors import UnreadableRecord, UsageError
from buquet.queue.batch import AUTO_BYTES, KEYED_WORKERS, PACKS_A_WORKER
from buquet.records import ABSENT, MOST_ITEMS, AtLeastOne, Due, PackSize, Place
from buquet.workflow.expression import MOST_NODES, NULL, Expr, count_parts, depth_of, steps_of, text_of

if TYPE_CHECKING:
    from buquet.workflow.records import Fan


Kind: TypeAlias = Literal["task", "each", "wait", "sleep"]

MOST_STEPS = 1_000
MOST_PARTS = 300_000
"""Parts of all expressions together: a worker that reads the graph does nothing else meanwhile, for a second or two."""
DEEPEST = 100
"""How deep an expression may be nested: it is worked out by recursion."""
RESTORE = "Restore it from a backup, or start the workflow anew under another key"
"""How to get over what was damaged of a run."""


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a task function is submitted for a step."""

    task: str
    queue: str
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    max_attempts: AtLeastOne = 3
    max_losses: AtLeastOne = 10
    expires_ms: Due = 0
    tags: dict[str, str] = {}


class Undo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What takes a finished step back: a task that is given the step's result first, and arguments of the step by their name."""

    call: Call
    result: str
    """The name of the parameter that takes the step's result."""
    args: tuple[str, ...] = ()
    """The names of the step's arguments that it takes too."""


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node of the graph."""

    kind: Kind
    call: Call | None = None
    """What a `task` or an `each` runs."""
    args: Expr = NULL
    """The arguments by name; of an `each` those besides the item."""
    over: Expr = NULL
    """Of an `each`: the list whose items are run."""
    item: str = ""
    """Of an `each`: the name of the parameter that takes an item."""
    pack: PackSize = 0
    """Of an `each`: items in a task; 0: one task an item, with arguments of its own."""
    auto: bool = False
    """Of an `each` with packs: whether their size is decided when its list is there, see `size_of` and `packed`."""
    max_items: Place = 0
    """Of an `each`: the most items that it may run over; 0: as many as MOST_FANNED tasks hold."""
    allow_failures: bool = False
    after: tuple[Expr, ...] = ()
    """What must have ended before, skipped or not."""
    guards: tuple[tuple[Expr, bool], ...] = ()
    """Conditions of `when`, and what each must come to; else the step is skipped."""
    undo: Undo | None = None
    signal: str = ""
    """Of a `wait`: the channel."""
    schema: Raw = ABSENT
    """Of a `wait`: the JSON schema of the signal's type; absent where it has none, or the graph is older than schemas."""
    timeout: Expr | None = None
    """Of a `wait`: seconds after which it is over without a signal."""
    default: Expr | None = None
    """Of a `wait`: what it then comes to; None: it fails."""
    seconds: Expr = NULL
    """Of a `sleep`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps that must have ended before this one may run, each once."""
        return tuple(dict.fromkeys(step for expr in self.expressions for step in steps_of(expr)))

    @property
    def condition(self) -> str:
        """The guards as text, or an empty one."""
        return " and ".join(text_of(expr) if wanted else f"not ({text_of(expr)})" for expr, wanted in self.guards)

    @property
    def expressions(self) -> tuple[Expr, ...]:
        """All that it takes values from."""
        rest = [each for each in (self.timeout, self.default) if each is not None]
        return (*(expr for expr, _ in self.guards), *self.after, self.args, self.over, self.seconds, *rest)


def packed(step: Step, fan: Fan) -> int:
    """Return how many items of an `each` are in a task; 0: a task an item."""
    return fan.pack or step.pack


def size_of(items: list[Any]) -> int:
    """Return how many of these items a pack is to have: as of a batch with a key, for as many workers, and by their bytes.

    >>> size_of([1] * 640), size_of(["x" * 100_000] * 640)
    (10, 2)
    """
    most = AUTO_BYTES * len(items) // max(len(msgspec.json.encode(items)), 1)
    return max(min(len(items) // (PACKS_A_WORKER * KEYED_WORKERS), most, MOST_ITEMS), 1)


class Graph(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Steps by name, in an order in which each comes after what it needs; and what the whole comes to."""

    steps: dict[str, Step] = {}
    output: Expr = NULL

    def ordered(self) -> Graph:
        """Return the graph in such an order. Raises UsageError for a step that does not exist, a cycle, or any bound exceeded."""
        if len(self.steps) > MOST_STEPS:
            msg = (
                f"this workflow has {len(self.steps):,} steps, and a graph has at most {MOST_STEPS:,}. "
                "Use each(task, items) for what is done many times: it is one step"
            )
            raise UsageError(msg)
        for name, step in self.steps.items():
            _check_calls(name, step)
        self._check_expressions()
        needs = {name: step.needs for name, step in self.steps.items()}
        if _sorted(needs):
            return self
        for name, needed in needs.items():
            missing = next((need for need in needed if need not in needs), None)
            if missing is not None:
                msg = f"step {name!r} comes after {missing!r}, and there is no step of that name: {', '.join(self.steps)[:300]}"
                raise UsageError(msg)
        try:
            # ties stay in the order of the calls, so that the same function always gives the same graph
            order = list(TopologicalSorter(needs).static_order())
        except CycleError as error:
            msg = f"these steps wait for each other in a circle: {' -> '.join(error.args[1])}. Leave one of them out of `after`"
            raise UsageError(msg) from None
        return msgspec.structs.replace(self, steps={name: self.steps[name] for name in order})

    def _check_expressions(self) -> None:
        left = MOST_PARTS
        for name, expr in [*((name, each) for name, step in self.steps.items() for each in step.expressions), ("", self.output)]:
            left -= count_parts(expr, left)
            if left < 0:
                msg = f"the expressions of this workflow have more than {MOST_PARTS:,} parts together: work them out in tasks"
                raise UsageError(msg)
            what = f"an expression of step {name!r}" if name else "what the workflow returns"
            if depth_of(expr) > DEEPEST:
                raise UsageError(f"{what} is nested more than {DEEPEST} deep: work it out in a task")
            if expr.size > MOST_NODES:
                raise UsageError(f"{what} has more than {MOST_NODES:,} parts: work it out in a task")


_decoder = msgspec.json.Decoder(Graph)


def read_graph(run_id: str, body: bytes | Raw) -> Graph:
    """Return the graph of a run. Raises UnreadableRecord for one that no tracer makes: anybody may have written it."""
    what = f"the graph of run {run_id}"
    try:
        return decode_stored(_decoder, body, what, RESTORE).ordered()
    except UsageError as error:
        raise UnreadableRecord(f"{what} cannot be read: {error}. {RESTORE}") from None


def _check_calls(name: str, step: Step) -> None:
    if (step.kind in {"task", "each"}) is (step.call is None):
        raise UsageError(f"step {name!r} of kind {step.kind} has {'no task' if step.call is None else 'a task'} to run")
    for call in (step.call, step.undo.call if step.undo else None):
        if call is not None:
            keys.quoted(call.task, "task")
            keys.quoted(call.queue, "queue")


def _sorted(needs: dict[str, tuple[str, ...]]) -> bool:
    seen: set[str] = set()
    for name, needed in needs.items():
        if not seen.issuperset(needed):
            return False
        seen.add(name)
    return True


class Plan:
    """The steps that each one needs, those that follow it, and its inputs."""

    def __init__(self, graph: Graph, max_items: int | None = None) -> None:
        self.graph = graph
        self.max_items = max_items
        """The most items of an `each` that the App of this process allows."""
        self.needs: dict[str, frozenset[str]] = {name: frozenset(step.needs) for name, step in graph.steps.items()}
        self.followers: dict[str, list[str]] = {name: [] for name in graph.steps}
        for name, needs in self.needs.items():
            for need in needs:
                self.followers[need].append(name)
        self.first = [name for name, needs in self.needs.items() if not needs]
        self.inputs: dict[str, tuple[Expr, ...]] = {name: _inputs(step) for name, step in graph.steps.items()}


def _inputs(step: Step) -> tuple[Expr, ...]:
    """Return the expressions that a step takes values from; those of its own kind only."""
    if step.kind == "task":
        return (step.args,)
    if step.kind == "each":
        return step.args, step.over
    if step.kind == "sleep":
        return (step.seconds,)
    return tuple(each for each in (step.timeout, step.default) if each is not None)
