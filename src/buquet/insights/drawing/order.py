"""What comes before what in a run, without the dependencies that follow from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from buquet.insights.runview import StepView


@dataclass(frozen=True)
class Order:
    """The steps of a run as a graph. Of a -> b -> c and a -> c the last is left out: it says nothing new about the order."""

    steps: dict[str, StepView]
    """By name, each after all those that it depends on; otherwise as the run names them."""
    before: dict[str, tuple[str, ...]]
    after: dict[str, tuple[str, ...]]

    @property
    def edges(self) -> list[tuple[str, str]]:
        """All pairs of a step and one that waits for it."""
        return [(source, name) for name in self.steps for source in self.before[name]]

    def layers(self) -> list[list[str]]:
        """Return the steps by the length of the longest way to them."""
        depth: dict[str, int] = {}
        found: list[list[str]] = []
        for name in self.steps:
            depth[name] = at = max((depth[each] + 1 for each in self.before[name]), default=0)
            found.extend([] for _ in range(at + 1 - len(found)))
            found[at].append(name)
        return found


def order_of(steps: Sequence[StepView]) -> Order:
    """Return the order of steps.

    Names that are no step are left out, and so is what would close a circle: a drawing must not fail.
    """
    named = {step.name: step for step in steps}
    waits = {name: {each for each in step.depends if each in named and each != name} for name, step in named.items()}
    sorted_names = _sorted(waits)
    bit = {name: 1 << index for index, name in enumerate(sorted_names)}
    earlier: dict[str, int] = {}
    before: dict[str, tuple[str, ...]] = {}
    after: dict[str, list[str]] = {name: [] for name in sorted_names}
    for name in sorted_names:
        direct = [each for each in dict.fromkeys(named[name].depends) if each in waits[name]]
        implied = 0
        for each in direct:
            implied |= earlier[each]
        before[name] = tuple(each for each in direct if not implied & bit[each])
        earlier[name] = implied
        for each in direct:
            earlier[name] |= bit[each]
        for each in before[name]:
            after[each].append(name)
    return Order({name: named[name] for name in sorted_names}, before, {name: tuple(each) for name, each in after.items()})


def _sorted(waits: dict[str, set[str]]) -> list[str]:
    """Sort names so that each comes after those that it waits for; takes out of `waits` what would close a circle."""
    done: dict[str, None] = {}
    left = list(waits)
    while left:
        rest: list[str] = []
        for name in left:
            if waits[name] <= done.keys():
                done[name] = None
            else:
                rest.append(name)
        if len(rest) == len(left):
            waits[rest[0]] &= done.keys()
        left = rest
    return list(done)
