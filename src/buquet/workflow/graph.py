"""The graph of a workflow: its steps, what each needs, and the conditions under which it runs. A run keeps its graph."""

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
from buquet.workflow.expression import MOST_NODES, NULL, Expr, measure, steps_of, text_of

if TYPE_CHECKING:
    from buquet.workflow.records import Fan

Kind: TypeAlias = Literal["task", "each", "wait", "sleep"]

MOST_STEPS = 1_000
MOST_PARTS = 300_000
"""The most parts of all expressions together. Reading such a graph blocks a worker for a second or two."""
DEEPEST = 100
"""How deep an expression may be nested: it is evaluated by recursion."""
RESTORE = "Restore it from a backup, or start the workflow again with another key"
"""How to recover from a damaged run."""


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a step submits its task."""

    task: str
    queue: str
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    max_attempts: AtLeastOne = 3
    max_losses: AtLeastOne = 10
    expires_ms: Due = 0
    tags: dict[str, str] = {}


class Undo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The task that takes a finished step back. It gets the step's result first, and arguments of the step by name."""

    call: Call
    result: str
    """The parameter that gets the step's result."""
    args: tuple[str, ...] = ()
    """The arguments of the step that it gets."""


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node of the graph."""

    kind: Kind
    call: Call | None = None
    """The task of a `task` or an `each`."""
    args: Expr = NULL
    """The arguments by name; of an `each` those besides the item."""
    over: Expr = NULL
    """Of an `each`: the list of items."""
    item: str = ""
    """Of an `each`: the parameter that gets an item."""
    pack: PackSize = 0
    """Of an `each`: items per task; 0: one, with arguments of its own."""
    auto: bool = False
    """Of an `each`: whether the pack size is chosen once the list is known, see `pack_size_for` and `packed`."""
    max_items: Place = 0
    """Of an `each`: the most items; 0: as many as MOST_FANNED tasks hold."""
    allow_failures: bool = False
    after: tuple[Expr, ...] = ()
    """What must have ended before, skipped or not."""
    guards: tuple[tuple[Expr, bool], ...] = ()
    """Conditions of `when` and their required values; otherwise the step is skipped."""
    undo: Undo | None = None
    signal: str = ""
    """Of a `wait`: the signal's name."""
    schema: Raw = ABSENT
    """Of a `wait`: the JSON schema of the signal's type; absent if it has none, or in an older graph."""
    timeout: Expr | None = None
    """Of a `wait`: the seconds after which it ends without a signal."""
    default: Expr | None = None
    """Of a `wait`: its result after the timeout; None: it fails."""
    seconds: Expr = NULL
    """Of a `sleep`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps that must end before this one may run, each once."""
        return tuple(dict.fromkeys(step for expr in self.expressions for step in steps_of(expr)))

    @property
    def condition(self) -> str:
        """The guards as text; empty if there are none."""
        return " and ".join(text_of(expr) if wanted else f"not ({text_of(expr)})" for expr, wanted in self.guards)

    @property
    def expressions(self) -> tuple[Expr, ...]:
        """All expressions of the step."""
        guards = (expr for expr, _ in self.guards)
        return (*guards, *self.after, self.args, self.over, self.seconds, *self._bounds)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        """The expressions that a step of its kind takes values from."""
        return {"task": (self.args,), "each": (self.args, self.over), "sleep": (self.seconds,), "wait": self._bounds}[self.kind]

    @property
    def _bounds(self) -> tuple[Expr, ...]:
        return tuple(expr for expr in (self.timeout, self.default) if expr is not None)

    def fits(self, fan: Fan) -> bool:
        """Whether the record of a fan-out can be this step's: its tasks are those of its list, which was a JSON value."""
        size = packed(self, fan) or 1
        return self.kind == "each" and fan.items <= keys.LARGEST // 2 and fan.tasks == -(-fan.items // size)


def packed(step: Step, fan: Fan) -> int:
    """Return how many items of a fan-out a task has; 0: one, with arguments of its own."""
    return fan.pack or step.pack


def pack_size_for(items: list[Any]) -> int:
    """Return the pack size for these items: as of a batch with a key, for as many workers, and by the bytes of the items.

    >>> pack_size_for([1] * 640), pack_size_for(["x" * 100_000] * 640)
    (10, 2)
    """
    most = AUTO_BYTES * len(items) // max(len(msgspec.json.encode(items)), 1)
    return max(min(len(items) // (PACKS_A_WORKER * KEYED_WORKERS), most, MOST_ITEMS), 1)


class Graph(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Steps by name, each after the steps that it needs; and the output of the workflow."""

    steps: dict[str, Step] = {}
    output: Expr = NULL

    def ordered(self) -> Graph:
        """Return the graph with its steps in order. Raises UsageError for an unknown step, a cycle, or an exceeded bound."""
        if len(self.steps) > MOST_STEPS:
            msg = (
                f"this workflow has {len(self.steps):,} steps, and a graph has at most {MOST_STEPS:,}. "
                "Use each(task, items) for repeated work: it is one step"
            )
            raise UsageError(msg)
        for name, step in self.steps.items():
            if (step.kind in {"task", "each"}) is (step.call is None):
                raise UsageError(f"step {name!r} of kind {step.kind} has {'no task' if step.call is None else 'a task'} to run")
            for call in (step.call, step.undo and step.undo.call):
                if call is not None:
                    keys.quoted(call.task, "task")
                    keys.quoted(call.queue, "queue")
        self._check_expressions()
        needs = {name: step.needs for name, step in self.steps.items()}
        earlier: set[str] = set()
        for name, needed in needs.items():
            if not earlier.issuperset(needed):
                return self._sorted(needs)
            earlier.add(name)
        return self

    def _sorted(self, needs: dict[str, tuple[str, ...]]) -> Graph:
        for name, needed in needs.items():
            unknown = next((need for need in needed if need not in needs), None)
            if unknown is not None:
                msg = f"step {name!r} comes after {unknown!r}, and there is no step of that name: {', '.join(self.steps)[:300]}"
                raise UsageError(msg)
        try:
            # independent steps stay in the order of the calls: the same function always gives the same graph
            order = list(TopologicalSorter(needs).static_order())
        except CycleError as error:
            msg = f"these steps wait for each other in a circle: {' -> '.join(error.args[1])}. Leave one of them out of `after`"
            raise UsageError(msg) from None
        return msgspec.structs.replace(self, steps={name: self.steps[name] for name in order})

    def _check_expressions(self) -> None:
        left = MOST_PARTS
        for name, expr in [*((name, expr) for name, step in self.steps.items() for expr in step.expressions), ("", self.output)]:
            parts, depth = measure(expr, left)
            left -= max(parts, 1)
            what = f"an expression of step {name!r}" if name else "what the workflow returns"
            if left < 0:
                msg = f"the expressions of this workflow have more than {MOST_PARTS:,} parts together: compute them in tasks"
                raise UsageError(msg)
            if depth > DEEPEST:
                raise UsageError(f"{what} is nested more than {DEEPEST} deep: compute it in a task")
            if parts > MOST_NODES:
                raise UsageError(f"{what} has more than {MOST_NODES:,} parts: compute it in a task")


class GraphIndex:
    """A graph with its lookups precomputed."""

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
        self.inputs: dict[str, tuple[Expr, ...]] = {name: step.inputs for name, step in graph.steps.items()}


_decoder = msgspec.json.Decoder(Graph)


def read_graph(run_id: str, body: bytes | Raw) -> Graph:
    """Return the graph of a run. Raises UnreadableRecord for one that buquet cannot have written."""
    what = f"the graph of run {run_id}"
    try:
        return decode_stored(_decoder, body, what, RESTORE).ordered()
    except UsageError as error:
        raise UnreadableRecord(f"{what} cannot be read: {error}. {RESTORE}") from None
