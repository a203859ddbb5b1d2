"""How long to wait before the next attempt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from buquet.errors import UsageError

if TYPE_CHECKING:
    from buquet.clock import Clock

YEARS = 10 * 366 * 86_400
"""No wait is longer than this many seconds: a key's time has 13 digits, and a slip of the unit should be seen at once."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff: `initial` seconds, times `factor` after each failure, at most `max`.

    `jitter` 0.2 spreads each wait evenly over 20 % to either side.

    >>> from buquet.clock import Clock
    >>> [Backoff(jitter=0).seconds(n, Clock()) for n in (1, 2, 3)]
    [1, 2, 4]
    """

    initial: float = 1
    factor: float = 2
    max: float = 300
    jitter: float = 0.2

    def __post_init__(self) -> None:
        numbers: tuple[object, ...] = (self.initial, self.factor, self.max, self.jitter)
        # written so that NaN fits nowhere
        if not all(isinstance(each, Real) for each in numbers) or not (
            0 <= self.initial < math.inf and 1 <= self.factor < math.inf and 0 <= self.max < YEARS and 0 <= self.jitter <= 1
        ):
            msg = f"Backoff needs initial >= 0, factor >= 1, max from 0 to ten years and jitter from 0 to 1, not {self}"
            raise UsageError(msg)

    def seconds(self, failures: int, clock: Clock) -> float:
        """Return the wait after the n-th failure, counted from 1."""
        try:
            wait = min(self.initial * self.factor ** (failures - 1), self.max)
        except OverflowError:  # past the maximum it is of no interest by how much
            wait = self.max
        return wait * clock.jitter(self.jitter) if self.jitter else wait
