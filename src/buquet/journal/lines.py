"""What the journal says of a task. Pure: from its record to a line, and from an object to its lines."""

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
"""Characters of a task's tags that a line has room for; the rest are left out."""
BACK = {"retry", "snoozed", "released", "lost"}
BEGUN = {"submitted", "redriven"}
CLAIMED = {"claimed", "taken over"}
OTHERS = ("/site-packages/", "/dist-packages/", "/lib/python", "<frozen")
"""Where code lies that is not the user's."""

_decoder = msgspec.json.Decoder(Finished)
_FRAME = re.compile(r'^[ |+]*File "(.+)", line \d+, in (.+)$', re.MULTILINE)


def is_retried(task: Task) -> bool:
    """Tell whether the last move of a task put it back because an attempt failed or lost its worker."""
    if task.state != "pending" or not task.events:
        return False
    why = task.events[-1].why
    # a pack comes back as snoozed; its error says that items failed meanwhile
    return why in {"retry", "lost"} or (why == "snoozed" and task.pack > 0 and task.error is not None)


def finished(task: Task) -> Finished:
    """Return the journal's line of a task that ended, or of its last attempt where that is retried.

    Its times come from the timeline in the record, so one that was retried very often, and lost its first lines, has no `ready`.
    """
    again = task.state == "pending"
    at = task.events[-1].at if again else task.finished
    begun, claimed, once = 0, 0, True
    worker = task.worker
    for event in reversed(task.events):
        if event.why in CLAIMED:
            worker = worker or event.worker
            claimed = claimed or event.at
        once = once and event.why not in BACK
        if event.why in BEGUN:
            begun = event.at
            break
    failure = _failure(task)
    return Finished(
        kind="attempt" if again else "task",
        id=task.id,
        name=task.name,
        queue=task.queue,
        status=task.state,
        at=at,
        submitted=begun or task.created,
        ready=_ready(task, begun) if once else 0,
        started=task.started,
        ran=max(at - claimed, 0) if claimed and task.started else 0,
        attempts=task.attempt,
        losses=task.losses,
        worker=worker,
        error=_brief(failure) if failure else msgspec.UNSET,
        group=_group(task.name, failure) if failure else "",
        run=task.run,
        step=task.step,
        tags=_short(task.tags),
        pack=task.pack,
        max_attempts=task.max_attempts,
        due=task.due if again else 0,
        allowed=task.allowed,
    )


def _failure(task: Task) -> ErrorInfo | None:
    """Return why a task failed, or why its last attempt did."""
    if task.state == "pending" and task.events[-1].why == "lost":
        return ErrorInfo(type="WorkerLost", message=f"an attempt was lost {task.events[-1].detail}")
    return task.error if task.state in {"failed", "pending"} else None


def _ready(task: Task, begun: int) -> int:
    """Return from when on a task could start that was never put back: its entry still says until when it was delayed."""
    entry = keys.parse_entry(task.entry) if task.entry.startswith(keys.LATER) else None
    return entry.at if entry is not None else begun


def _brief(error: ErrorInfo) -> ErrorInfo:
    return ErrorInfo(type=error.type, message=error.message[:LONGEST_MESSAGE])


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
    """Return what failures of one kind share. Numbers of lines and texts of messages change too easily to be part of it."""
    parts = "\0".join((name, error.type, raised_in(error.traceback)))
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


def raised_in(traceback: str) -> str:
    r"""Return the innermost function of the user's in a traceback, with the names of its file and folder; else the innermost.

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
    """Return the lines of one object of the journal, and how many could not be read."""
    lines: list[Finished] = []
    unreadable = 0
    for text in body.splitlines():
        try:
            line = _decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            unreadable += 1
            continue
        if line.v <= FORMAT:
            lines.append(line)
        else:
            unreadable += 1
    return lines, unreadable
