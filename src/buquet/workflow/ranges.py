"""Sets of small numbers as ranges, each from its first to the one after its last: ten thousand items in a few bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

Ranges: TypeAlias = tuple[tuple[int, int], ...]


def has(ranges: Ranges, number: int) -> bool:
    """Tell whether a number is in the set."""
    return any(start <= number < end for start, end in ranges)


def add(ranges: Ranges, number: int) -> Ranges:
    """Return the set with one number more.

    >>> add(((0, 2), (3, 4)), 2)
    ((0, 4),)
    """
    if has(ranges, number):
        return ranges
    merged: list[tuple[int, int]] = []
    for start, end in sorted((*ranges, (number, number + 1))):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def count(ranges: Ranges) -> int:
    """Return how many numbers are in the set."""
    return sum(end - start for start, end in ranges)


def missing(ranges: Ranges, size: int) -> Iterator[int]:
    """Yield the numbers from 0 to before `size` that are not in the set."""
    at = 0
    for start, end in ranges:
        yield from range(at, min(start, size))
        at = end
    yield from range(at, size)


def numbers(ranges: Ranges) -> list[int]:
    """Return the numbers in the set."""
    return [number for start, end in ranges for number in range(start, end)]
