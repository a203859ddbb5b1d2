"""A million handles in little room: 17 bytes each, and a Handle only when one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar, overload

from buquet.printing import counted
from buquet.queue.handle import Handle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from buquet.codec import Signature
    from buquet.queue.client import Submitted
    from buquet.queue.handle import Home

R_co = TypeVar("R_co", covariant=True)

WIDTH = 16


class Handles(Sequence[Handle[R_co]]):
    """The handles of many tasks, in the order in which they were submitted. Reads like a list: length, index, slice, iteration.

    The Handle of a place is made anew whenever it is asked for.
    """

    __slots__ = ("_created", "_home", "_ids", "_signature")

    def __init__(self, home: Home, signature: Signature | None, ids: bytes = b"", created: bytes = b"") -> None:
        self._home = home
        self._signature = signature
        self._ids = bytearray(ids)
        self._created = bytearray(created)

    def add(self, submitted: Iterable[Submitted]) -> None:
        """Append what was submitted."""
        for task_id, created in submitted:
            self._ids += bytes.fromhex(task_id)
            self._created.append(created)

    @property
    def ids(self) -> list[str]:
        """The tasks' ids."""
        return [self._ids[start : start + WIDTH].hex() for start in range(0, len(self._ids), WIDTH)]

    def __len__(self) -> int:
        """Return how many tasks there are."""
        return len(self._created)

    @overload
    def __getitem__(self, index: int) -> Handle[R_co]: ...
    @overload
    def __getitem__(self, index: slice) -> Handles[R_co]: ...

    def __getitem__(self, index: int | slice) -> Handle[R_co] | Handles[R_co]:
        """Return the handle of a place, or the handles of a slice."""
        places = range(len(self))[index]
        if isinstance(places, range):
            ids = b"".join(self._ids[place * WIDTH : (place + 1) * WIDTH] for place in places)
            return Handles(self._home, self._signature, ids, bytes(self._created[index]) if isinstance(index, slice) else b"")
        task_id = self._ids[places * WIDTH : (places + 1) * WIDTH].hex()
        return Handle(self._home, task_id, self._signature, created=bool(self._created[places]))

    def __eq__(self, other: object) -> bool:
        """Tell whether these are the same tasks in the same order."""
        return self._ids == other._ids if isinstance(other, Handles) else NotImplemented  # pyright: ignore[reportUnknownMemberType]

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        """Show how many there are."""
        return f"<{counted(len(self), 'handle')} of buquet tasks>"
