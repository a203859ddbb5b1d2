"""Lines of the journal: from a task's record to a line, and from a journal object to its lines. Pure."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.records import FORMAT, ErrorInfo, Finished

if TYPE_CHECKING:
    from buquet.records import Task

LONGEST_MESSAGE = 500
TAGS = 1000
"""The most characters of a task's tags in a line; the other tags are left out."""
PUT_BACK = {"retry", "snoozed", "released", "lost"}
OTHERS = ("/site-packages/", "/dist-packages/", "/lib/python", "<frozen")
"""Parts of the paths of code that is not the user's."""

_decoder = msgspec.json.Decoder(Finished)
_FRAME = re.compile(r'^[ |+]*File "(.+)", line \d+, in (.+)$', re.MULTILINE)


def is_retried(task: Task) -> bool:
    """Return whether a task's last transition put it back because an attempt failed or its worker was lost."""
    if task.state != "pending" or not task.events:
        return False
    why = task.events[-1].why
    # a pack is snoozed, and its error says that items failed
    return why in {"retry", "lost"} or (why == "snoozed" and task.pack > 0 and task.error is not None)


def finished(task: Task) -> Finished:
    """Return the line of an ended task, or of its last attempt if that is retried.

    Times come from the timeline. A task that was retried very often has lost its first timeline events, and has no `ready`.
    """
    retried = task.state == "pending"
    at = task.events[-1].at if retried else task.finished
    begun = claimed = 0
    put_back = False
    worker = task.worker
    for event in reversed(task.events):
        if event.why in {"claimed", "taken over"}:
            worker = worker or event.worker
            claimed = claimed or event.at
        put_back = put_back or event.why in PUT_BACK
        if event.why in {"submitted", "redriven"}:
            begun = event.at
            break
    error = task.error if task.state in {"failed", "pending"} else None
    if retried and task.events[-1].why == "lost":
        error = ErrorInfo(type="WorkerLost", message=f"an attempt was lost {task.events[-1].detail}")
    return Finished(
        kind="attempt" if retried else "task",
        id=task.id,
        name=task.name,
        queue=task.queue,
        status=task.state,
        at=at,
        submitted=begun or task.created,
        ready=0 if put_back else _ready(task, begun),
        started=task.started,
        ran=max(at - claimed, 0) if claimed and task.started else 0,
        attempts=task.attempt,
        losses=task.losses,
        worker=worker,
        error=ErrorInfo(type=error.type, message=error.message[:LONGEST_MESSAGE]) if error else msgspec.UNSET,
        group=_group(task.name, error) if error else "",
        run=task.run,
        step=task.step,
        tags=_short(task.tags),
        pack=task.pack,
        max_attempts=task.max_attempts,
        due=task.due if retried else 0,
        allowed=task.allowed,
    )


def _ready(task: Task, begun: int) -> int:
    """Return when a task that was never put back became ready. Its entry tells how long it was delayed."""
    entry = keys.parse_entry(task.entry)
    return entry.at if entry is not None and entry.priority is None else begun


def _short(tags: dict[str, str]) -> dict[str, str]:
    room = TAGS
    kept: dict[str, str] = {}
    for name, value in tags.items():
        room -= len(name) + len(value)
        if room < 0:
            break
        kept[name] = value
    return kept


def _group(name: str, error: ErrorInfo) -> str:
    """Return what failures of one kind share. Line numbers and messages change too easily to be part of it."""
    parts = "\0".join((name, error.type, raised_in(error.traceback)))
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


def raised_in(traceback: str) -> str:
    r"""Return the innermost function of the user's code in a traceback, after its folder and file. Without one, the innermost.

    >>> raised_in('  File "/srv/jobs/tasks.py", line 3, in resize\n  File "/usr/lib/python3.11/json/x.py", line 9, in loads\n')
    'jobs/tasks.py resize'
    """
    frames: list[tuple[str, str]] = _FRAME.findall(traceback.rpartition("Traceback (most recent call last):")[2])
    if not frames:
        return ""
    own = [frame for frame in frames if not any(place in frame[0].replace("\\", "/") for place in OTHERS)]
    path, function = (own or frames)[-1]
    return f"{'/'.join(path.replace(chr(92), '/').split('/')[-2:])} {function}"


def decode_lines(body: bytes) -> tuple[list[Finished], int]:
    """Return the lines of a journal object, and the number of unreadable lines."""
    lines: list[Finished] = []
    texts = body.splitlines()
    for text in texts:
        try:
            line = _decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if line.v <= FORMAT:
            lines.append(line)
    return lines, len(texts) - len(lines)
