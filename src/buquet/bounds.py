"""What the fields of records may hold: types whose bounds decoding checks, and checks of what no type can say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from msgspec import Meta

from buquet import keys

if TYPE_CHECKING:
    from collections.abc import Iterable

LATEST = 253_402_300_800_000
"""The end of the year 9999, in milliseconds since 1970: no calendar here goes further."""
MOST = 10**15
"""Small enough for any key and any sum, and more than buquet ever counts to."""
MOST_GENERATIONS = 100_000
"""Retries of a run: its record has no room for more."""
MOST_ITEMS = 10_000
"""Items in a pack."""

Time: TypeAlias = Annotated[int, Meta(ge=0, lt=LATEST)]
Due: TypeAlias = Annotated[int, Meta(ge=0, lt=keys.LAST_MS)]
"""A time that an entry's key can carry: 13 digits, which end in 2286."""
Count: TypeAlias = Annotated[int, Meta(ge=0, lt=MOST)]
AtLeastOne: TypeAlias = Annotated[int, Meta(ge=1, lt=2**31)]
Generation: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_GENERATIONS)]
Place: TypeAlias = Annotated[int, Meta(ge=0, lt=10**8)]
"""The index of an item or of a task among those of its step, or how many there are."""
PackSize: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_ITEMS)]
Range: TypeAlias = tuple[Place, Place]
"""From the first to the one after the last."""
Id: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
OptionalId: TypeAlias = Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")]
Name: TypeAlias = Annotated[str, Meta(max_length=keys.MAX_NAME)]
Short: TypeAlias = Annotated[str, Meta(max_length=1024)]
PayloadKey: TypeAlias = Annotated[str, Meta(pattern=r"^(payloads/[0-9a-f]{32}/[0-9a-f]{64}(\.[0-9a-f]{1,18})?)?\Z")]


def foreign(key: str, name: str) -> str:
    """Return what is wrong with a record of this id, or name, that was read from `key`; empty when it is that record's own."""
    return "" if key.rpartition("/")[2] == f"{name}.json" else f"it says that it is {name[:120]!r}"


def nameless(names: Iterable[str]) -> str:
    """Return what is wrong with the first of these names that no queue or task can have; empty when all are good."""
    wrong = next((name for name in names if not keys.is_name(name)), None)
    return "" if wrong is None else f"it names {wrong[:120]!r}, which no queue or task is called"


def elsewhere(task_id: str, payloads: Iterable[str]) -> str:
    """Return what is wrong with these keys of a task's payloads, if so: those of another task's may be deleted with that one."""
    wrong = next((key for key in payloads if key and not key.startswith(keys.payloads(task_id))), None)
    return "" if wrong is None else f"it names {wrong}, a payload of another task"


def ascending(ranges: Iterable[Range]) -> bool:
    """Tell whether these are ranges of a set: none is empty, and each begins after the one before it has ended."""
    before = 0
    for start, end in ranges:
        if not before <= start < end:
            return False
        before = end
    return True
