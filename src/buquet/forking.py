"""What a forked child must not take over from its parent: threads, event loops, connections, locks and random numbers.

Objects that hold any of these are watched. Python's own fork hooks call them. A host that forks without these hooks, as uWSGI
does by default, is noticed by its process id, at the next `check`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable


class Watched(Protocol):
    """What takes part in a fork."""

    def after_fork(self) -> None:
        """Start afresh, in the child."""
        ...


class Holder(Watched, Protocol):
    """What must also give something up for the moment of the fork."""

    def before_fork(self) -> None:
        """Give it up, in the parent."""
        ...

    def after_fork_in_parent(self) -> None:
        """Take it up again."""
        ...


LEFT_BEHIND: list[Any] = []
"""What belongs to the parent. Nothing of it may be closed in the child, so it is never collected either."""

_pid = os.getpid()
_watched: WeakSet[Watched] = WeakSet()
_holders: WeakSet[Holder] = WeakSet()


def watch(thing: Watched) -> None:
    """Call a thing's `after_fork` in each child of this process."""
    _watched.add(thing)


def hold(thing: Holder) -> None:
    """Call a thing's hooks before each fork of this process and after it, in parent and child."""
    _holders.add(thing)
    _watched.add(thing)


def check() -> None:
    """Do in a child what the fork hooks should have done, unless they have."""
    if _pid != os.getpid():
        _in_child()


def _in_child() -> None:
    global _pid  # noqa: PLW0603 - which process this is, is global
    _pid = os.getpid()
    for thing in list(_watched):
        thing.after_fork()


def _each_holder(call: Callable[[Holder], None]) -> None:
    for thing in list(_holders):
        call(thing)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=lambda: _each_holder(lambda holder: holder.before_fork()),
        after_in_parent=lambda: _each_holder(lambda holder: holder.after_fork_in_parent()),
        after_in_child=_in_child,
    )
