"""Whether the process of a worker on this machine is gone: others need not wait then until its session is too old.

A pid says something only under the same kernel, since its boot, in the same PID namespace; and only of the process that started
when the worker's did, since pids are used again. Where any of that cannot be told, nobody is called gone.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet.records import Session

PROC = Path("/proc")


def place() -> str:
    """Return within what this process's pid and start time count: the boot and the namespaces; empty where that is not known."""
    try:
        if os.readlink(PROC / "self") != str(os.getpid()):  # noqa: PTH115 - this /proc is of another PID namespace
            return ""
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(PROC / "self/ns" / each) for each in ("pid", "time")]  # noqa: PTH115
    except OSError:
        return ""
    return " ".join((boot, *spaces))


def born(pid: int) -> int:
    """Return when a process started, in ticks since the boot: 0 where that is not known, -1 for one that has ended."""
    try:
        # the name, in parentheses, may hold anything
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" and int(fields[17]) <= 1 else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_neighbour(session: Session) -> bool:
    """Tell whether a worker is, or was, another process of this machine whose end can be seen here."""
    here = place()
    return bool(here) and (session.place, session.host) == (here, socket.gethostname()) and session.pid != os.getpid()


def is_gone(session: Session) -> bool:
    """Tell whether the process of a neighbour has ended, beyond doubt."""
    if session.pid <= 0 or session.born <= 0:
        return False
    try:
        os.kill(session.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is somebody else's, but there
        pass
    started = born(session.pid)
    return started not in {0, session.born}
