"""Where the boxes of a graph go: layers by the longest path, few crossings, edges as straight as they can be.

Positions are along one axis only, across the layers. The drawing decides which axis that is on paper.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from buquet.workflow.handle import StepInfo

Node: TypeAlias = tuple[str, str, int]
"""A step (its name, "", 0), or the lane in which an edge passes a layer (source, target, layer)."""
Neighbours: TypeAlias = dict[Node, list[Node]]

SWEEPS = 12
SETTLING = 32
"""Turns of moving nodes to their neighbours. The last third looks up and down at once."""
EFFORT = 20_000
"""Nodes and edges that all turns together may visit: a large graph gets fewer turns, at least six."""
SWAPS = 1_000
"""With more edges than this, adjacent nodes are not swapped one by one."""


@dataclass(frozen=True)
class Order:
    """The steps of a run as a graph, by transitive reduction: of a -> b -> c and a -> c, the last is left out."""

    steps: dict[str, StepInfo]
    """By name, each after its dependencies; otherwise in the order of the run."""
    before: dict[str, tuple[str, ...]]
    after: dict[str, tuple[str, ...]]

    @property
    def edges(self) -> list[tuple[str, str]]:
        """All pairs of a step and a step that depends on it."""
        return [(source, name) for name in self.steps for source in self.before[name]]

    def layers(self) -> list[list[str]]:
        """Return the steps by the length of the longest path to them."""
        depth: dict[str, int] = {}
        layers: list[list[str]] = []
        for name in self.steps:
            depth[name] = max((depth[source] + 1 for source in self.before[name]), default=0)
            if depth[name] == len(layers):
                layers.append([])
            layers[depth[name]].append(name)
        return layers


def order_of(steps: Sequence[StepInfo]) -> Order:
    """Return the order of steps.

    Dependencies on unknown steps, and those that close a cycle, are ignored: a drawing must not fail.
    """
    named = {step.name: step for step in steps}
    depends = {name: {other for other in step.needs if other in named and other != name} for name, step in named.items()}
    names = _sorted(depends)
    bit = {name: 1 << index for index, name in enumerate(names)}
    ancestors: dict[str, int] = {}
    before: dict[str, tuple[str, ...]] = {}
    after: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        direct = [other for other in dict.fromkeys(named[name].needs) if other in depends[name]]
        implied = ancestors[name] = 0
        for other in direct:
            implied |= ancestors[other]
            ancestors[name] |= bit[other] | ancestors[other]
        before[name] = tuple(other for other in direct if not implied & bit[other])
        for other in before[name]:
            after[other].append(name)
    return Order({name: named[name] for name in names}, before, {name: tuple(others) for name, others in after.items()})


def _sorted(depends: dict[str, set[str]]) -> list[str]:
    """Sort names topologically, and drop dependencies that close a cycle."""
    done: dict[str, None] = {}
    while rest := [name for name in depends if name not in done]:
        count = len(done)
        for name in rest:
            if depends[name] <= done.keys():
                done[name] = None
        if len(done) == count:
            depends[rest[0]] &= done.keys()
    return list(done)


@dataclass(frozen=True)
class Placement:
    """Layers of nodes in order, each node's position across the layers, and each edge's nodes from source to target."""

    layers: list[list[Node]]
    at: dict[Node, float]
    edges: dict[tuple[str, str], list[Node]]
    width: float
    """All nodes lie within 0 and this."""


def lay_out(order: Order, size: float, gap: float, lane: float) -> Placement:
    """Place steps of `size` across the layers, `gap` apart. An edge that passes a layer gets a lane of width `lane` there."""
    layers, edges = _with_lanes(order)
    above: Neighbours = {node: [] for layer in layers for node in layer}
    below: Neighbours = {node: [] for layer in layers for node in layer}
    for nodes in edges.values():
        for upper, lower in pairwise(nodes):
            below[upper].append(lower)
            above[lower].append(upper)
    layers = _untangled(layers, above, below)

    def half(node: Node) -> float:
        return (lane if node[1] else size) / 2

    rooms = [[half(left) + half(right) + gap for left, right in pairwise(layer)] for layer in layers]
    at = _placed(layers, above, below, rooms)
    _straighten(layers, edges, rooms, at)
    low = min((place - half(node) for node, place in at.items()), default=0.0)
    high = max((place + half(node) for node, place in at.items()), default=0.0)
    return Placement(layers, {node: place - low for node, place in at.items()}, edges, high - low)


def _with_lanes(order: Order) -> tuple[list[list[Node]], dict[tuple[str, str], list[Node]]]:
    named = order.layers()
    depth = {name: index for index, layer in enumerate(named) for name in layer}
    layers: list[list[Node]] = [[(name, "", 0) for name in layer] for layer in named]
    edges: dict[tuple[str, str], list[Node]] = {}
    for source, target in order.edges:
        lanes: list[Node] = [(source, target, index) for index in range(depth[source] + 1, depth[target])]
        for node in lanes:
            layers[node[2]].append(node)
        edges[source, target] = [(source, "", 0), *lanes, (target, "", 0)]
    return layers, edges


def _turns(most: int, below: Neighbours) -> int:
    return max(min(most, EFFORT // max(sum(map(len, below.values())), 1)), 6)


def _untangled(layers: list[list[Node]], above: Neighbours, below: Neighbours) -> list[list[Node]]:
    """Sort each layer by the mean place of its neighbours, down and up in turns. Keep the order with the fewest crossings."""
    best, fewest = layers, crossings(layers, below)
    layers = [list(layer) for layer in layers]
    place = {node: index for layer in layers for index, node in enumerate(layer)}
    for sweep in range(_turns(SWEEPS, below)):
        if not fewest:
            break
        neighbours, ordered = (below, layers[-2::-1]) if sweep % 2 else (above, layers[1:])
        for layer in ordered:
            means = {node: _mean([place[other] for other in neighbours[node]], place[node]) for node in layer}
            layer.sort(key=means.__getitem__)
            place.update((node, index) for index, node in enumerate(layer))
        if sum(map(len, below.values())) <= SWAPS:
            _swap_adjacent(layers, (above, below), place)
        count = crossings(layers, below)
        if count < fewest:
            best, fewest = [list(layer) for layer in layers], count
    return best


def _mean(places: Sequence[int], otherwise: int) -> float:
    return sum(places) / len(places) if places else otherwise


def _swap_adjacent(layers: list[list[Node]], sides: Sequence[Neighbours], place: dict[Node, int]) -> None:
    """Swap adjacent nodes wherever that removes crossings."""

    def crossed(left: Node, right: Node) -> int:
        return sum(place[a] > place[b] for neighbours in sides for a in neighbours[left] for b in neighbours[right])

    for layer in layers:
        for index in range(len(layer) - 1):
            left, right = layer[index : index + 2]
            if crossed(right, left) < crossed(left, right):
                layer[index : index + 2] = right, left
                place[right], place[left] = index, index + 1


def crossings(layers: Sequence[Sequence[Node]], below: Neighbours) -> int:
    """Return how many pairs of edges cross."""
    count = 0
    for upper, lower in pairwise(layers):
        place = {node: index for index, node in enumerate(lower)}
        ends: list[int] = []
        for node in upper:
            targets = sorted(place[other] for other in below[node])
            count += sum(len(ends) - bisect_right(ends, target) for target in targets)
            for target in targets:
                insort(ends, target)
    return count


def _placed(layers: list[list[Node]], above: Neighbours, below: Neighbours, rooms: list[list[float]]) -> dict[Node, float]:
    """Move each node near its neighbours: in turns those above, those below, and at last both."""
    at: dict[Node, float] = {}
    for layer, room in zip(layers, rooms, strict=True):
        at.update(zip(layer, accumulate(room, initial=-sum(room) / 2), strict=True))
    both = {node: [*above[node], *below[node]] for node in above}
    turns = _turns(SETTLING, below)
    for turn in range(turns):
        down = turn % 2 == 0
        neighbours = both if turn * 3 >= turns * 2 else above if down else below
        for index in range(len(layers))[:: 1 if down else -1]:
            wanted = [_pull(node, neighbours[node], at) for node in layers[index]]
            at.update(zip(layers[index], settle(wanted, rooms[index]), strict=True))
    return at


def _straighten(
    layers: list[list[Node]], edges: Mapping[tuple[str, str], list[Node]], rooms: list[list[float]], at: dict[Node, float]
) -> None:
    """Put the lanes of an edge in one line where nothing is in the way."""
    places = {node: index for layer in layers for index, node in enumerate(layer)}
    for _, *lanes, _ in edges.values():
        low, high = -inf, inf
        for node in lanes:
            index, layer, room = places[node], layers[node[2]], rooms[node[2]]
            if index:
                low = max(low, at[layer[index - 1]] + room[index - 1])
            if index + 1 < len(layer):
                high = min(high, at[layer[index + 1]] - room[index])
        if lanes and low <= high:
            mean = sum(at[node] for node in lanes) / len(lanes)
            at.update(dict.fromkeys(lanes, min(max(mean, low), high)))


def _pull(node: Node, neighbours: Iterable[Node], at: Mapping[Node, float]) -> tuple[float, float]:
    """Return where its neighbours pull a node, and how strongly. Straight lanes matter more than straight steps."""
    total, strength = 0.0, 0.0
    for other in neighbours:
        weight = 8.0 if node[1] and other[1] else 2.0 if node[1] or other[1] else 1.0
        total += at[other] * weight
        strength += weight
    return (total / strength, strength) if strength else (at[node], 0.1)


def settle(wanted: Sequence[tuple[float, float]], rooms: Sequence[float]) -> list[float]:
    """Return the positions nearest to those wanted (position, weight), by least squares, that keep their order and room.

    >>> settle([(0.0, 1.0), (0.0, 1.0), (9.0, 1.0)], [4.0, 4.0])
    [-2.0, 2.0, 9.0]
    """
    offsets = list(accumulate(rooms, initial=0.0))
    blocks: list[tuple[float, float, int]] = []  # sum of weight * position, sum of weights, number of nodes
    for (position, weight), offset in zip(wanted, offsets, strict=False):
        block = ((position - offset) * weight, weight, 1)
        while blocks and blocks[-1][0] / blocks[-1][1] > block[0] / block[1]:
            pull, strength, count = blocks.pop()
            block = (block[0] + pull, block[1] + strength, block[2] + count)
        blocks.append(block)
    positions = [pull / strength for pull, strength, count in blocks for _ in range(count)]
    return [position + offset for position, offset in zip(positions, offsets, strict=False)]
