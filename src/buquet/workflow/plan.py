"""A graph with what is asked of it again and again: computed once, and kept while its run is at work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet.workflow.expression import Expr
    from buquet.workflow.graph import Graph, Step


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
