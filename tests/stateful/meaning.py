"""What a workflow means, in the plainest way: the reference that `advance` is held against. They share no code.

Only facts are kept: what ended, how, and in which order. Everything else (what may run, what is skipped, what a step comes to) is
worked out anew, by recursion over the graph, whenever it is asked for. Expressions are nested tuples:

    ("value", v)  ("step", name)  ("field", of, key)  ("op", sign, left, right)  ("not", of)  ("list", parts)
    ("if", condition, then, otherwise)
"""

import operator
from dataclasses import dataclass, field
from enum import Enum


class No(Enum):
    """An expression has no value. Of several the first of these counts."""

    SKIPPED = 1
    PENDING = 2
    BAD = 3


OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "==": operator.eq,
    "<": operator.lt,
    ">=": operator.ge,
    "&": operator.and_,
    "|": operator.or_,
}
OVER = {"completed", "failed", "cancelled"}


@dataclass
class Node:
    """A step, as its user thinks of it."""

    name: str
    kind: str
    args: tuple = ("list", ())
    over: tuple = ("value", [])
    seconds: tuple = ("value", 0)
    pack: int = 0
    allow: bool = False
    undo: bool = False
    channel: str = ""
    timeout: bool = False
    default: tuple | None = None
    after: list = field(default_factory=list)
    guards: list = field(default_factory=list)

    def inputs(self):
        """What must have a value before it may begin."""
        if self.kind == "each":
            return [self.over]
        if self.kind == "wait":
            return [self.default] if self.default else []
        return [self.seconds if self.kind == "sleep" else self.args]

    def needs(self):
        found = set(self.after)
        for expr in [*self.inputs(), *(guard for guard, _ in self.guards)]:
            found |= names_in(expr)
        return found


def names_in(expr):
    if expr[0] == "step":
        return {expr[1]}
    parts = expr[1] if expr[0] == "list" else expr[1:]
    return set().union(*(names_in(part) for part in parts if isinstance(part, tuple))) if expr[0] != "value" else set()


@dataclass
class Fact:
    """How a step ended."""

    outcome: str
    value: object = None
    tried: bool = True
    misfit: bool = False
    """Whether it failed since it could not be given what it takes."""


class Meaning:
    """A run. Its methods say what happened; `state`, `mode` and `undo_state` say what it therefore is."""

    def __init__(self, nodes, output):
        self.nodes = {node.name: node for node in nodes}
        self.output = output
        self.mode = "new"
        self.gen = 1
        self.paused, self.undoing = False, True
        self.pause = (0, "")
        self.gens = dict.fromkeys(self.nodes, 1)
        self.facts, self.items, self.since = {}, {}, {}
        self.ended = []
        self.frozen = {}
        """States of the steps without a fact at the moment when the run began to unwind."""
        self.undone = {}
        """By step: its items that were taken back, and whether that went well."""
        self.inbox, self.taken, self.seen = {}, {}, set()
        self.result = None
        self.misfit = False
        """Whether the run failed since its result has no value."""
        self.moment = 0
        self.known = {}

    # ------------------------------------------------------------------ what is

    def value(self, expr):
        kind = expr[0]
        if kind == "value":
            return expr[1]
        if kind == "step":
            return self.value_of(expr[1])
        if kind == "if":
            condition = self.value(expr[1])
            if isinstance(condition, No):
                return condition
            return self.value(expr[2] if condition else expr[3]) if isinstance(condition, bool) else No.BAD
        parts = [self.value(part) for part in (expr[1] if kind == "list" else expr[1:]) if isinstance(part, tuple)]
        marks = sorted((part for part in parts if isinstance(part, No)), key=lambda mark: mark.value)
        if marks:
            return marks[0]
        return self.applied(expr, parts)

    @staticmethod
    def applied(expr, parts):
        """Work out an expression whose parts are all there."""
        kind = expr[0]
        logical = kind == "not" or (kind == "op" and expr[1] in "&|")
        if logical and not all(isinstance(part, bool) for part in parts):
            return No.BAD
        try:
            if kind == "list":
                return parts
            if kind == "field":
                return parts[0][expr[2]]
            return (not parts[0]) if kind == "not" else OPERATORS[expr[1]](*parts)
        except (TypeError, KeyError, IndexError):
            return No.BAD

    def value_of(self, name):
        state = self.state(name)
        if state == "skipped":
            return No.SKIPPED
        if state != "done":
            return No.PENDING
        return self.facts[name].value if name in self.facts else []

    def state(self, name):
        if name in self.facts:
            return self.facts[name].outcome
        if name in self.frozen:
            return self.frozen[name]
        if name not in self.known:
            self.known[name] = "idle" if self.mode == "new" else self.could(name)
        return self.known[name]

    def could(self, name):
        """What a step without a fact is: idle, skipped, due, bad; or done, where there is nothing to do."""
        node = self.nodes[name]
        for guard, wanted in node.guards:
            found = self.value(guard)
            if found is No.PENDING:
                return "idle"
            if found is No.SKIPPED or (isinstance(found, bool) and found != wanted):
                return "skipped"
            if not isinstance(found, bool):
                return "bad"
        if any(self.state(each) in {"idle", "due", "bad"} for each in node.after):
            return "idle"
        found = self.value(("list", tuple(node.inputs())))
        if isinstance(found, No):
            return {No.SKIPPED: "skipped", No.PENDING: "idle", No.BAD: "bad"}[found]
        if node.kind == "each":
            if not isinstance(found[0], list):
                return "bad"
            return "due" if found[0] else "done"
        if node.kind == "sleep" and (isinstance(found[0], bool) or not isinstance(found[0], int) or found[0] < 0):
            return "bad"
        return "due"

    def tasks(self, name):
        """How many tasks a step has."""
        node = self.nodes[name]
        return -(-len(self.value(node.over)) // (node.pack or 1)) if node.kind == "each" else 1

    def due(self):
        return {name for name in self.nodes if self.state(name) == "due"}

    def undo_items(self, name):
        """The tasks of a step that there is something to take back of."""
        if self.nodes[name].kind != "each":
            return {0}
        items = self.items.get(name, {})
        return {index for index in range(self.tasks(name)) if items[index].tried}

    def undo_state(self, name):
        if name not in self.undone:
            return ""
        if set(self.undone[name]) < self.undo_items(name):
            return "due"
        return "done" if all(self.undone[name].values()) else "failed"

    # ------------------------------------------------------------------ what happens; each tells whether it counted

    def event(self, kind, actual, **said):
        """Take in an event. `actual`: the states that the run under test then has, for what the order of its looks decides."""
        idle = {name for name in self.nodes if kind == "retry" or self.state(name) == "idle"}
        if not getattr(self, f"on_{kind}")(**said):
            return False
        self.moment += 1
        self.settle(idle, actual)
        return True

    def fact(self, name, outcome, value=None, *, tried=True):
        self.facts[name] = Fact(outcome, value, tried)
        self.ended.append(name)
        self.known = {}

    def on_start(self):
        if self.mode != "new":
            return False
        self.mode, self.known = "running", {}
        return True

    def on_step(self, step, item, gen, outcome, value, tried):
        if gen != self.gens[step] or self.state(step) != "due" or item in self.items.get(step, {}):
            return False
        node = self.nodes[step]
        unwinds = self.mode in {"failing", "cancelling"}
        if outcome == "cancelled":
            outcome = ("maybe" if tried else "stopped") if unwinds else "failed"
        if node.kind != "each":
            if outcome == "failed":
                self.unwind("failing")
            self.fact(step, outcome, value, tried=tried)
            return True
        there = self.items.setdefault(step, {})
        there[item] = Fact(outcome, value, tried)
        if outcome == "failed" and not node.allow:
            self.unwind("failing")
        if len(there) == self.tasks(step):
            self.end_each(step, node, there)
        return True

    def end_each(self, step, node, there):
        found = {each.outcome for each in there.values()}
        if found <= ({"done", "failed"} if node.allow else {"done"}):
            size = len(self.value(node.over))
            values = []
            for index in range(len(there)):
                width = min(node.pack or 1, size - index * (node.pack or 1))
                values += there[index].value if there[index].value is not None else [None] * width
            self.fact(step, "done", values)
        else:
            self.fact(step, "failed" if "failed" in found else "maybe")

    def on_timer(self, step, gen):
        if gen != self.gens[step] or self.state(step) != "due" or self.mode != "running":
            return False
        node = self.nodes[step]
        if node.kind == "sleep":
            self.fact(step, "done")
        elif node.default is not None:
            self.fact(step, "done", self.value(node.default))
        else:
            self.unwind("failing")
            self.fact(step, "failed")
        return True

    def on_signal(self, event, channel, value):
        if event in self.seen or self.mode == "completed":
            return False
        self.seen.add(event)
        self.inbox.setdefault(channel, []).append((event, value))
        return True

    def on_cancel(self, event, gen, undo):
        if event in self.seen or self.mode != "running" or gen != self.gen:
            return False
        self.seen.add(event)
        self.undoing, self.paused = undo, False
        self.unwind("cancelling")
        return True

    def on_pause(self, event, number):
        return self.hold(event, number, paused=True)

    def on_resume(self, event, number):
        return self.hold(event, number, paused=False)

    def hold(self, event, number, *, paused):
        if event in self.seen or (number, event) <= self.pause:
            return False
        self.seen.add(event)
        self.pause = (number, event)
        if self.mode == "running" or (self.mode not in OVER and not paused):
            self.paused = paused
        return True

    def on_retry(self, event, gen):
        if event in self.seen or self.mode not in {"failed", "cancelled"} or gen != self.gen:
            return False
        self.seen.add(event)
        asked = self.asked_anew()
        bad = {name for name, fact in self.facts.items() if fact.outcome != "done"} | set(self.undone) | asked

        def reopened(name):
            begun = self.state(name) != "idle" or name in self.items
            return name in bad or (begun and any(reopened(need) for need in self.nodes[name].needs()))

        again = {name for name in self.nodes if reopened(name)}
        for name in asked:
            del self.taken[name]
        for name in sorted((name for name in again if name in self.taken), key=self.ended.index, reverse=True):
            self.inbox.setdefault(self.nodes[name].channel, []).insert(0, self.taken.pop(name))
        for name in again:
            self.gens[name] += 1
            kept = name in bad and not any(need in again for need in self.nodes[name].needs()) and name not in self.undone
            there = {index: each for index, each in self.items.pop(name, {}).items() if each.outcome == "done" and each.tried}
            if kept and there:
                self.items[name] = there
        self.facts = {name: fact for name, fact in self.facts.items() if name not in again}
        self.ended = [name for name in self.ended if name not in again]
        self.since = {name: at for name, at in self.since.items() if name not in again}
        self.undone, self.frozen, self.known, self.misfit = {}, {}, {}, False
        self.mode, self.paused, self.gen = "running", False, self.gen + 1
        return True

    def asked_anew(self):
        """The waits whose signal did not fit what took it."""
        found = names_in(self.output) if self.misfit else set()
        for name, fact in self.facts.items():
            if fact.misfit:
                node = self.nodes[name]
                found |= names_in(("list", (*node.inputs(), *(guard for guard, _ in node.guards))))
        return found & set(self.taken)

    def on_undo(self, step, item, gen, ok):
        if gen != self.gens[step] or self.undo_state(step) != "due" or item in self.undone[step]:
            return False
        self.undone[step][item] = ok
        return True

    # ------------------------------------------------------------------ what follows

    def unwind(self, mode):
        """From here on nothing begins."""
        if self.mode == "running":
            self.frozen = {name: self.state(name) for name in self.nodes if name not in self.facts}
            self.mode = mode

    def settle(self, idle, actual):
        self.known = {}
        if self.mode == "running":
            self.end_at_once(actual)
            bad = self.bad()
            if bad:
                self.fail_on(bad, idle, actual)
            elif all(self.state(name) in {"done", "skipped"} for name in self.nodes):
                value = self.value(self.output)
                if value is No.BAD:
                    self.misfit = True
                    self.unwind("failing")
                else:
                    self.mode, self.paused = "completed", False
                    self.result = None if isinstance(value, No) else value
        if self.mode in {"failing", "cancelling"}:
            self.go_back()

    def bad(self):
        return [name for name in self.nodes if self.state(name) == "bad"]

    def end_at_once(self, actual):
        """Let waits take signals that are there, and an `each` over nothing end."""
        while True:
            for name in self.due():
                self.since.setdefault(name, self.moment)
            looked = [name for name in self.nodes if name not in self.facts and (actual[name] == "done" or not self.bad())]
            empty = [name for name in looked if self.state(name) == "done"]
            waits = [name for name in looked if self.state(name) == "due" and self.inbox.get(self.nodes[name].channel)]
            if empty:
                self.fact(empty[0], "done", [])
            elif waits:
                first = min(waits, key=lambda name: (self.since[name], list(self.nodes).index(name)))
                self.taken[first] = self.inbox[self.nodes[first].channel].pop(0)
                self.fact(first, "done", self.taken[first][1])
            else:
                return

    def fail_on(self, bad, idle, actual):
        """Several steps may have become ready at once: which of them were looked at before the bad one is not laid down."""
        (failed,) = [name for name in bad if actual[name] == "failed"]
        states = {name: self.state(name) for name in self.nodes if name not in self.facts}
        states |= {name: "idle" for name in states if name != failed and name in idle and actual[name] == "idle"}
        self.frozen = {name: "idle" if state == "bad" else state for name, state in states.items()}
        self.mode = "failing"
        self.fact(failed, "failed", tried=False)
        self.facts[failed].misfit = True

    def go_back(self):
        for name in self.due():
            if self.nodes[name].kind in {"wait", "sleep"}:
                self.fact(name, "stopped", tried=False)
        if self.due():
            return
        if self.undoing or self.mode == "failing":
            for name in reversed(self.ended):
                fact = self.facts[name]
                if self.nodes[name].undo and fact.outcome in {"done", "failed", "maybe"} and fact.tried:
                    self.undone.setdefault(name, {})
                    if self.undo_state(name) == "due":
                        return
        self.mode = {"failing": "failed", "cancelling": "cancelled"}[self.mode]
        self.paused = False
