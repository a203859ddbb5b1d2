"""Time and randomness. No other code in the package asks the machine for either.

Simulations and tests pass a Clock of their own, and so control both.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from dataclasses import dataclass
from numbers import Real

from buquet import forking
from buquet.errors import UsageError


class Clock:
    """The machine's clock and random numbers.

    >>> Clock().new_id()[12]
    '7'
    """

    def __init__(self, seed: int | bytes | None = None) -> None:
        self.ahead = 0.0
        """Seconds by which this clock is ahead of the machine's clock. Tests raise it instead of waiting."""
        self.random = random.Random(os.urandom(16) if seed is None else seed)
        if seed is None:
            forking.watch(self)
        self._last_id = (0, 0)
        """Milliseconds and the other bits of the last id."""

    def after_fork(self) -> None:
        """Draw other random numbers than the parent and its other children, so that ids stay unique."""
        self.random.seed(os.urandom(16))

    def now(self) -> float:
        """Return the seconds since 1970 by the local wall clock, which may be wrong or jump."""
        return time.time() + self.ahead

    def monotonic(self) -> float:
        """Return the seconds of a clock that only goes forward."""
        return time.monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        """Wait on the running loop."""
        await asyncio.sleep(seconds)

    def block(self, seconds: float) -> None:
        """Wait in the calling thread."""
        time.sleep(seconds)

    def now_ms(self) -> int:
        """Return the milliseconds since 1970."""
        return int(self.now() * 1000)

    def jitter(self, spread: float) -> float:
        """Return a factor drawn evenly from 1 - spread to 1 + spread."""
        return 1 + spread * (2 * self.random.random() - 1)

    def new_op(self) -> str:
        """Return a fresh id for one write (64 random bits, hex)."""
        forking.check()
        return f"{self.random.getrandbits(64):016x}"

    def new_id(self) -> str:
        """Return a UUIDv7 in hex: 48 bits of milliseconds, version, variant and 74 bits that start at random.

        The ids of one millisecond ascend.
        """
        forking.check()
        now, (last, bits) = self.now_ms(), self._last_id
        # half of the range is left for counting; threads that race here add different numbers
        bits = bits + 1 + self.random.getrandbits(32) if now == last else self.random.getrandbits(73)
        self._last_id = (now, bits)
        high = (now << 16) | 0x7000 | bits >> 62
        low = (0b10 << 62) | bits & ((1 << 62) - 1)
        return f"{(high << 64) | low:032x}"


YEARS = 10 * 366 * 86_400
"""The longest wait, in seconds. The time in a key has 13 digits, and a wrong unit should be noticed at once."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff: `initial` seconds, times `factor` after each failure, at most `max`.

    A `jitter` of 0.2 varies each wait by up to 20 % in both directions.

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
        # NaN fails every comparison
        if not all(isinstance(each, Real) for each in numbers) or not (
            0 <= self.initial < math.inf and 1 <= self.factor < math.inf and 0 <= self.max < YEARS and 0 <= self.jitter <= 1
        ):
            msg = f"Backoff needs initial >= 0, factor >= 1, max from 0 to ten years and jitter from 0 to 1, not {self}"
            raise UsageError(msg)

    def seconds(self, failures: int, clock: Clock) -> float:
        """Return the wait in seconds after the n-th failure, counted from 1."""
        try:
            wait = min(self.initial * self.factor ** (failures - 1), self.max)
        except OverflowError:
            wait = self.max
        return wait * clock.jitter(self.jitter) if self.jitter else wait
