"""Forks: a child must not use its parent's threads, event loops, connections, locks and random numbers.

Objects that hold any of these register here. Python's fork hooks call them. A host that forks without these hooks, as uWSGI does
by default, is detected by its process id at the next `check`.
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
    """An object with state that a child must not share."""

    def after_fork(self) -> None:
        """Start with fresh state, in the child."""
        ...


class Holder(Watched, Protocol):
    """An object that must also release something during a fork."""

    def before_fork(self) -> None:
        """Release it, in the parent."""
        ...

    def after_fork_in_parent(self) -> None:
        """Acquire it again, in the parent."""
        ...


log = logging.getLogger("buquet.task")

LEFT_BEHIND: list[Any] = []
"""Objects of the parent. The child must not close them, so they are never garbage-collected."""

_pid = os.getpid()
_watched: WeakSet[Watched] = WeakSet()
_holders: WeakSet[Holder] = WeakSet()
_fork = threading.Lock()
_paused: list[Holder] = []
"""The holders that the current fork paused. Only these are resumed, not holders that another thread made meanwhile."""


def watch(thing: Watched) -> None:
    """Call `after_fork` of an object in each child of this process."""
    _watched.add(thing)


def hold(thing: Holder) -> None:
    """Call the hooks of an object before and after each fork of this process, in parent and child."""
    _holders.add(thing)
    _watched.add(thing)


def let_go(thing: Holder) -> None:
    """Ignore an object at later forks."""
    _holders.discard(thing)
    _watched.discard(thing)


def end_stray(status: int = 1) -> None:
    """End a forked child that returned from its handler: it would continue as a second copy of the worker."""
    text = "a process that a handler forked came back from the handler, and ends here: end it with os._exit() in the handler"
    log.error(text)
    os._exit(status)


def check() -> None:
    """Run the hooks of a child, unless Python has run them."""
    if _pid != os.getpid():
        _in_child()


def _before() -> None:
    _fork.acquire()  # one fork at a time, so that `_paused` belongs to this one
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
    """Call all hooks, also after one raises: each holds locks of its own."""
    with ExitStack() as stack:
        for call in calls:
            stack.callback(call)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
