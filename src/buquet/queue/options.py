"""Options of attempts and of submits.

All of them are stored in records, which every process must be able to read. So types are checked, not only values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from numbers import Real
from typing import Any, TypeVar, cast

from buquet import keys
from buquet.clock import YEARS, Backoff
from buquet.errors import UsageError

T = TypeVar("T")

LONGEST_KEY = 1024
MOST_TAGS = 16 << 10
"""The most bytes of all tags of a task. They are in its record, which is written four times."""


def in_seconds(time: T | timedelta) -> T | float:
    """Return a timedelta as seconds, and any other value unchanged.

    >>> in_seconds(timedelta(minutes=1)), in_seconds(1.5), in_seconds(None)
    (60.0, 1.5, None)
    """
    return time.total_seconds() if isinstance(time, timedelta) else time


@dataclass(frozen=True, slots=True)
class Policy:
    """Options of a task's attempts."""

    max_attempts: int = 3
    max_losses: int = 10
    backoff: Backoff = field(default_factory=Backoff)
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not (_count(self.max_attempts) and _count(self.max_losses)):
            raise UsageError(f"max_attempts and max_losses start at 1, not {self.max_attempts!r} and {self.max_losses!r}")
        if not isinstance(cast("object", self.backoff), Backoff):
            raise UsageError(f"backoff is a Backoff(initial=1, factor=2, max=300, jitter=0.2), not {self.backoff!r}")
        if self.timeout is not None and not (_number(self.timeout) and 0 < self.timeout < YEARS):
            raise UsageError(f"timeout is a number of seconds above 0, not {self.timeout!r}")


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Options of a submit."""

    key: str | None = None
    delay: float | None = None
    run_at: datetime | None = None
    priority: int = 5
    expires: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        check_key(self.key)
        check_tags(self.tags)
        problem = self._problem()
        if problem:
            raise UsageError(problem)

    def _problem(self) -> str | None:
        if self.delay is not None and self.run_at is not None:
            return "give delay or run_at, not both"
        if self.delay is not None and not (_number(self.delay) and 0 <= self.delay < YEARS):
            return f"delay is in seconds, from 0 to ten years, not {self.delay!r}"
        if self.run_at is not None and (not isinstance(cast("object", self.run_at), datetime) or self.run_at.tzinfo is None):
            return f"run_at is a datetime with a time zone: datetime(..., tzinfo=...), not {self.run_at!r}"
        if self.run_at is not None and self.run_at.timestamp() * 1000 >= keys.LAST_MS:
            return f"run_at lies before the year 2286, and not at {self.run_at}"
        if not _integer(self.priority) or self.priority not in keys.PRIORITIES:
            return f"priority goes from 0 (first) to 9, not {self.priority!r}"
        if self.expires is not None and not (_number(self.expires) and 0 < self.expires < YEARS):
            return f"expires is a number of seconds above 0, not {self.expires!r}"
        return None

    @property
    def expires_ms(self) -> int:
        """The time within which the task must start, in milliseconds; 0: no limit."""
        return max(int(self.expires * 1000), 1) if self.expires else 0

    def due_ms(self, now_ms: int) -> int:
        """Return when the task is due, in milliseconds since 1970; 0: at once."""
        if self.run_at is not None:
            return max(int(self.run_at.timestamp() * 1000), 0)
        return now_ms + int(self.delay * 1000) if self.delay else 0


def check_key(key: object) -> None:
    """Raise UsageError unless this can be an idempotency key."""
    if key is not None and not (isinstance(key, str) and 1 <= _bytes_of(key) <= LONGEST_KEY):
        raise UsageError(f"key is a string of 1 to {LONGEST_KEY:,} bytes, not {str(key)[:80]!r}")


def check_tags(tags: object) -> None:
    """Raise UsageError unless these can be the tags of a task or run."""
    pairs: list[Any] = [*cast("Mapping[Any, Any]", tags).items()] if isinstance(tags, Mapping) else [(None,)]
    sizes = [_bytes_of(part) if isinstance(part, str) else -1 for pair in pairs for part in pair]
    if any(size < 0 for size in sizes):
        raise UsageError(f"tags are strings by strings, not {repr(cast('object', tags))[:200]}")
    if sum(sizes) > MOST_TAGS:
        msg = f"tags have at most {MOST_TAGS:,} bytes in all, and these have {sum(sizes):,}: put large values into the arguments"
        raise UsageError(msg)


def _bytes_of(text: str) -> int:
    """Return the number of bytes in UTF-8; -1 for a text with a lone surrogate, which has none."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return -1


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return _integer(value) and 1 <= cast("int", value) < 1 << 31


def _number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)
