"""When a schedule fires: a pure function from a rule to times. No clock is asked here.

Times are milliseconds since 1970. Cron expressions are read by cronsim, as Debian's cron reads them, with five fields or with
seconds as a sixth in front. Where the clocks of the time zone go forward, a fire at a fixed hour (minute and hour both without a
leading `*`) that falls into the gap comes right after it, once; where they go back, it comes once, the first time. Rules with a
leading `*` in minute or hour follow real time, so an hour that comes twice has its fires twice.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from cronsim import CronSim

from buquet.bounds import LATEST
from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import tzinfo

SHORTEST = 1000
"""Milliseconds: no schedule fires more often."""
LONGEST = 10 * 366 * 86_400_000
LONGEST_CRON = 1000
"""Characters of a cron expression."""
NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
SPANS = ((0, 59, ()), (0, 59, ()), (0, 23, ()), (1, 31, ()), (1, 12, MONTHS), (0, 6, DAYS))
"""The first and the last value of each field of a cron expression, and the names of its values."""
FIRST_WINDOW = 1_000_000
"""Milliseconds before the end in which `newest` looks first; then eight times as far back, and so on."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Either a cron expression in a time zone, or every so many milliseconds since 1970."""

    cron: str = ""
    tz: str = ""
    every_ms: int = 0

    def __post_init__(self) -> None:
        if self.every_ms:
            if not SHORTEST <= self.every_ms <= LONGEST:
                raise UsageError(f"a schedule fires every 1 second to ten years, not every {self.every_ms / 1000:g} s")
            return
        if len(self.cron) > LONGEST_CRON:
            raise UsageError(f"the cron expression has {len(self.cron):,} characters; the most is {LONGEST_CRON:,}")
        try:
            first = next(self._by_cron(0), None)
        except Exception as error:  # noqa: BLE001 - cronsim raises its own errors, and others for what it did not think of
            msg = f"{self.cron!r} is no cron expression: {error}. Write five fields, minute hour day month weekday: '0 2 * * *'"
            raise UsageError(msg) from None
        if first is None:
            raise UsageError(f"the cron expression {self.cron!r} never fires: it names a day that no month has")

    def __str__(self) -> str:
        """Say the rule as people do."""
        return self.cron or f"every {self.every_ms / 1000:g} s"

    def after(self, at: int) -> Iterator[int]:
        """Yield the fires later than `at`, in order, up to the end of the year 9999 unless the rule ends before.

        >>> from itertools import islice
        >>> list(islice(Rule(every_ms=60_000).after(0), 2))
        [60000, 120000]
        >>> summer = Rule(cron="30 2 * * *", tz="Europe/Berlin")  # on the 29th there is no half past two
        >>> start = int(datetime(2026, 3, 28, tzinfo=UTC).timestamp() * 1000)
        >>> [datetime.fromtimestamp(at / 1000, UTC).isoformat() for at in islice(summer.after(start), 3)]
        ['2026-03-28T01:30:00+00:00', '2026-03-29T01:00:00+00:00', '2026-03-30T00:30:00+00:00']
        """
        if self.every_ms:
            yield from range((at // self.every_ms + 1) * self.every_ms, LATEST, self.every_ms)
            return
        with suppress(OverflowError, ValueError):  # past the end of the calendar
            yield from self._by_cron(at)

    def _by_cron(self, at: int) -> Iterator[int]:
        zone = UTC if self.tz == "UTC" else zone_of(self.tz)
        last, start = at, datetime.fromtimestamp(at / 1000, zone)
        fixed = not any(field.startswith("*") for field in self.cron.split()[-5:-3])
        for moment in CronSim(self.cron, start.replace(tzinfo=None) if fixed else start):
            fire = int((_at(moment, zone) if fixed else moment).timestamp()) * 1000
            # an hour that comes twice is met from its first time on, also by who begins in the second
            if fire > last:
                last = fire
                yield fire

    def next(self, at: int) -> int | None:
        """Return the first fire later than `at`; None when there is none (within 50 years)."""
        return next(iter(self.after(at)), None)

    def newest(self, after: int, until: int, most: int) -> tuple[list[int], bool]:
        """Return the last fires, at most `most`, of those later than `after` and not later than `until`; and whether all.

        However long the time and however often the rule fires, not many more than `most` are worked out.
        """
        window = max(FIRST_WINDOW, self.every_ms)
        while True:
            start = max(after, until - window)
            found: list[int] = []
            for fire in self.after(start):
                if fire > until:
                    break
                found.append(fire)
            if len(found) > most or start <= after:
                return found[-most:], len(found) <= most
            window *= 8


def _at(local: datetime, zone: tzinfo) -> datetime:
    """Return the first moment at which clocks show a time, or else the end of the gap that they leap over."""
    moment = local.replace(tzinfo=zone)
    while moment.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != local:
        local = local.replace(second=0) + timedelta(minutes=1)
        moment = local.replace(tzinfo=zone)
    return moment


def zone_of(name: str) -> ZoneInfo:
    """Return a time zone by its name. Raises UsageError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError):
        raise UsageError(f"there is no time zone {name!r}: names are like 'Europe/Berlin', 'America/New_York' or 'UTC'") from None


def rule_of(cron: str | None, every: float | timedelta | None, tz: str | None) -> Rule:
    """Return the rule that a user wrote down. Raises UsageError for what is none.

    >>> str(rule_of(None, timedelta(minutes=5), None))
    'every 300 s'
    """
    if (cron is None) == (every is None):
        raise UsageError("a schedule has either cron='0 2 * * *' or every=seconds" + (", not both" if cron is not None else ""))
    if cron is not None:
        return _cron(cron, "UTC" if tz is None else tz)
    if tz is not None:
        raise UsageError(f"tz={tz!r} goes with cron: every=... counts from 1970 in UTC, whatever the clocks say")
    seconds: Any = every.total_seconds() if isinstance(every, timedelta) else every
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
    if not number or not SHORTEST <= round(seconds * 1000) <= LONGEST:
        raise UsageError(f"every is a number of seconds or a timedelta, from 1 second to ten years, not {every!r}")
    return Rule(every_ms=round(seconds * 1000))


def _cron(cron: Any, tz: Any) -> Rule:
    if not isinstance(cron, str) or not isinstance(tz, str):
        raise UsageError(f"cron and tz are strings, not {cron!r} and {tz!r}")
    if tz != "UTC":
        zone_of(tz)
    # as cronsim has it, and workers of every version
    fields = NICKNAMES.get(cron.strip().lower(), cron).split()
    spans = SPANS[-len(fields) :] if len(fields) in {len(SPANS) - 1, len(SPANS)} else ()
    fields = [",".join(_unwrapped(term, *span) for term in field.split(",")) for field, span in zip(fields, spans, strict=False)]
    return Rule(cron=" ".join(fields or cron.split()), tz=tz)


def _unwrapped(term: str, first: int, last: int, names: tuple[str, ...]) -> str:
    """Return a range over the end of its field as a list: `fri-mon` as `5,6,0,1`; anything else as it is."""
    found = re.fullmatch(r"(\w+)-(\w+)(?:/([1-9]\d*))?", term)
    if found is None:
        return term
    ends = [_number(end.lower(), first, names) for end in (found[1], found[2])]
    if not all(first <= end <= last + (names is DAYS) for end in ends) or ends[0] <= ends[1]:
        return term
    start = ends[0] % 7 if names is DAYS else ends[0]  # 7 is Sunday, too
    numbers = range(start, ends[1] + 1) if start <= ends[1] else [*range(start, last + 1), *range(first, ends[1] + 1)]
    return ",".join(map(str, numbers[:: int(found[3] or 1)]))


def _number(end: str, first: int, names: tuple[str, ...]) -> int:
    return names.index(end) + first if end in names else int(end) if end.isdecimal() else -1


def iso(fire: int) -> str:
    """Return a fire's time in UTC, as the tag `fire` carries it."""
    return datetime.fromtimestamp(fire / 1000, UTC).isoformat()
