"""Where boxes go: layers by the longest way, few crossings, edges as straight as they can be.

Positions are along one axis only, across the layers; which axis that is on paper, the drawing decides.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from buquet.insights.drawing.order import Order

Node: TypeAlias = tuple[str, str, int]
"""A step (its name, "", 0), or where an edge passes a layer (source, target, layer)."""
Neighbours: TypeAlias = dict[Node, list[Node]]

SWEEPS = 12
SETTLING = 32
"""Turns of moving nodes to their neighbours; the last third looks up and down at once."""


@dataclass(frozen=True)
class Layout:
    """Layers of nodes in order, each node's position across the layers, and each edge's nodes from source to target."""

    layers: list[list[Node]]
    at: dict[Node, float]
    edges: dict[tuple[str, str], list[Node]]
    width: float
    """All nodes lie within 0 and this."""


def lay_out(order: Order, size: float, gap: float, lane: float) -> Layout:
    """Place steps of `size` across the layers, `gap` apart, and edges that pass a layer in lanes of `lane`."""
    layers, edges = _with_passages(order)
    above: Neighbours = {node: [] for layer in layers for node in layer}
    below: Neighbours = {node: [] for layer in layers for node in layer}
    for nodes in edges.values():
        for upper, lower in pairwise(nodes):
            below[upper].append(lower)
            above[lower].append(upper)
    layers = _untangled(layers, above, below)

    def breadth(node: Node) -> float:
        return lane if node[1] else size

    rooms = [[(breadth(a) + breadth(b)) / 2 + gap for a, b in pairwise(layer)] for layer in layers]
    at = _placed(layers, above, below, rooms)
    _straighten(layers, edges, rooms, at)
    low = min((at[node] - breadth(node) / 2 for node in at), default=0.0)
    high = max((at[node] + breadth(node) / 2 for node in at), default=0.0)
    return Layout(layers, {node: place - low for node, place in at.items()}, edges, high - low)


def _with_passages(order: Order) -> tuple[list[list[Node]], dict[tuple[str, str], list[Node]]]:
    named = order.layers()
    depth = {name: index for index, layer in enumerate(named) for name in layer}
    layers: list[list[Node]] = [[(name, "", 0) for name in layer] for layer in named]
    edges: dict[tuple[str, str], list[Node]] = {}
    for source, target in order.edges:
        passages: list[Node] = [(source, target, index) for index in range(depth[source] + 1, depth[target])]
        for passage in passages:
            layers[passage[2]].append(passage)
        edges[source, target] = [(source, "", 0), *passages, (target, "", 0)]
    return layers, edges


def _untangled(layers: list[list[Node]], above: Neighbours, below: Neighbours) -> list[list[Node]]:
    """Order each layer by the mean place of its neighbours, down and up again, and keep the order with the fewest crossings."""
    best, fewest = layers, crossings(layers, below)
    now = [list(layer) for layer in layers]
    for sweep in range(SWEEPS):
        if not fewest:
            break
        down = sweep % 2 == 0
        neighbours = above if down else below
        indexes = range(1, len(now)) if down else range(len(now) - 2, -1, -1)
        for index in indexes:
            place = {node: place for place, node in enumerate(now[index - 1 if down else index + 1])}
            now[index] = _by_mean(now[index], neighbours, place)
        _swap_neighbours(now, above, below)
        count = crossings(now, below)
        if count < fewest:
            best, fewest = [list(layer) for layer in now], count
    return best


def _by_mean(layer: list[Node], neighbours: Neighbours, place: Mapping[Node, int]) -> list[Node]:
    def mean(index: int) -> float:
        near = neighbours[layer[index]]
        return sum(place[each] for each in near) / len(near) if near else index

    return [layer[index] for index in sorted(range(len(layer)), key=mean)]


def _swap_neighbours(layers: list[list[Node]], above: Neighbours, below: Neighbours) -> None:
    """Swap two that lie side by side wherever that crosses fewer edges."""
    for index, layer in enumerate(layers):
        upper = {node: place for place, node in enumerate(layers[index - 1] if index else ())}
        lower = {node: place for place, node in enumerate(layers[index + 1] if index + 1 < len(layers) else ())}
        for left in range(len(layer) - 1):
            a, b = layer[left], layer[left + 1]
            pairs = ((above, upper), (below, lower))
            as_is = sum(
                _inversions([place[each] for each in near[a]], [place[each] for each in near[b]]) for near, place in pairs
            )
            swapped = sum(
                _inversions([place[each] for each in near[b]], [place[each] for each in near[a]]) for near, place in pairs
            )
            if swapped < as_is:
                layer[left], layer[left + 1] = b, a


def _inversions(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(1 for a in left for b in right if a > b)


def crossings(layers: Sequence[Sequence[Node]], below: Neighbours) -> int:
    """Return how many pairs of edges cross."""
    count = 0
    for upper, lower in pairwise(layers):
        place = {node: index for index, node in enumerate(lower)}
        ends: list[int] = []
        for node in upper:
            targets = sorted(place[each] for each in below[node])
            count += sum(len(ends) - bisect_left(ends, target + 1) for target in targets)
            for target in targets:
                insort(ends, target)
    return count


def _placed(layers: list[list[Node]], above: Neighbours, below: Neighbours, rooms: list[list[float]]) -> dict[Node, float]:
    """Give each node a position near its neighbours', by turns from above, from below, and from both."""
    at: dict[Node, float] = {}
    for layer, room in zip(layers, rooms, strict=True):
        at.update(zip(layer, accumulate(room, initial=-sum(room) / 2), strict=True))
    for turn in range(SETTLING):
        last = turn * 3 >= SETTLING * 2
        downwards = turn % 2 == 0
        for index in range(len(layers)) if downwards else range(len(layers) - 1, -1, -1):
            layer = layers[index]
            wanted: list[tuple[float, float]] = []
            for node in layer:
                near = [*above[node], *below[node]] if last else above[node] if downwards else below[node]
                wanted.append(_pull(node, near, at))
            at.update(zip(layer, settle(wanted, rooms[index]), strict=True))
    return at


def _straighten(
    layers: list[list[Node]], edges: Mapping[tuple[str, str], list[Node]], rooms: list[list[float]], at: dict[Node, float]
) -> None:
    """Put the passages of an edge in one line where nothing is in the way."""

    def look(node: Node) -> tuple[float, float]:
        layer = layers[node[2]]
        index = layer.index(node)
        left = at[layer[index - 1]] + rooms[node[2]][index - 1] if index else float("-inf")
        right = at[layer[index + 1]] - rooms[node[2]][index] if index + 1 < len(layer) else float("inf")
        return left, right

    for nodes in edges.values():
        passages = nodes[1:-1]
        free = {node: look(node) for node in passages}
        left = max((each for each, _ in free.values()), default=0.0)
        right = min((each for _, each in free.values()), default=0.0)
        if passages and left <= right:
            mean = sum(at[node] for node in passages) / len(passages)
            at.update(dict.fromkeys(passages, min(max(mean, left), right)))


def _pull(node: Node, near: Iterable[Node], at: Mapping[Node, float]) -> tuple[float, float]:
    """Return where its neighbours would have a node, and how strongly. What passes layers is kept straight before all else."""
    whole, strength = 0.0, 0.0
    for each in near:
        weight = 8.0 if node[1] and each[1] else 2.0 if node[1] or each[1] else 1.0
        whole += at[each] * weight
        strength += weight
    return (whole / strength, strength) if strength else (at[node], 0.1)


def settle(wanted: Sequence[tuple[float, float]], rooms: Sequence[float]) -> list[float]:
    """Return the positions nearest to those wanted (position, weight) that keep their order and room: the least squares.

    >>> settle([(0.0, 1.0), (0.0, 1.0), (9.0, 1.0)], [4.0, 4.0])
    [-2.0, 2.0, 9.0]
    """
    blocks: list[tuple[float, float, int]] = []  # sum of weight * place, sum of weights, how many
    offset, offsets = 0.0, [0.0]
    for room in rooms:
        offset += room
        offsets.append(offset)
    for (place, weight), shift in zip(wanted, offsets, strict=False):
        pull, strength, count = (place - shift) * weight, weight, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > pull / strength:
            more, stronger, many = blocks.pop()
            pull, strength, count = pull + more, strength + stronger, count + many
        blocks.append((pull, strength, count))
    flat = [pull / strength for pull, strength, count in blocks for _ in range(count)]
    return [place + shift for place, shift in zip(flat, offsets, strict=False)]
