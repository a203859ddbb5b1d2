"""What a forked child must not take over from its parent: threads, event loops, connections, locks and random numbers.

Objects that hold any of these are watched. Python's own fork hooks call them. A host that forks without these hooks, as uWSGI
does by default, is noticed by its process id, at the next `check`.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


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


log = logging.getLogger("buquet.task")

LEFT_BEHIND: list[Any] = []
"""What belongs to the parent. Nothing of it may be closed in the child, so it is never collected either."""

_pid = os.getpid()
_watched: WeakSet[Watched] = WeakSet()
_holders: WeakSet[Holder] = WeakSet()
_fork = threading.Lock()
_paused: list[Holder] = []
"""What the current fork has paused. After the fork only this is resumed, and nothing that another thread made in the meantime."""


def watch(thing: Watched) -> None:
    """Call a thing's `after_fork` in each child of this process."""
    _watched.add(thing)


def hold(thing: Holder) -> None:
    """Call a thing's hooks before each fork of this process and after it, in parent and child."""
    _holders.add(thing)
    _watched.add(thing)


def let_go(thing: Holder) -> None:
    """Leave a thing alone at later forks."""
    _holders.discard(thing)
    _watched.discard(thing)


def end_stray(status: int = 1) -> None:
    """End a forked child that has come back from the handler which forked it: it would go on as a second copy of the worker."""
    text = "a process that a handler forked came back from the handler, and ends here: end it with os._exit() in the handler"
    log.error(text)
    os._exit(status)


def check() -> None:
    """Do in a child what the fork hooks should have done, unless they have."""
    if _pid != os.getpid():
        _in_child()


def _before() -> None:
    _fork.acquire()  # one fork at a time, so that `_paused` is what this one has paused
    _paused.extend(_holders)
    _call_each(holder.before_fork for holder in _paused)


def _in_parent() -> None:
    paused = list(_paused)
    _paused.clear()
    _fork.release()
    _call_each(holder.after_fork_in_parent for holder in paused)


def _in_child() -> None:
    global _pid, _fork
    _pid, _fork = os.getpid(), threading.Lock()
    _paused.clear()
    _call_each(thing.after_fork for thing in list(_watched))


def _call_each(calls: Iterable[Callable[[], None]]) -> None:
    """Call all of them, also after one that raises: each holds locks of its own."""
    with ExitStack() as stack:
        for call in calls:
            stack.callback(call)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
