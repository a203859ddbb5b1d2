"""What the journal says of a task that ended. Pure: from its record to a line, and from an object to its lines."""

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


def finished(task: Task) -> Finished:
    """Return the journal's line of a task that ended.

    Its times come from the timeline in the record, so one that was retried very often, and lost its first lines, has no `ready`.
    """
    begun, claimed, once = 0, 0, True
    for event in reversed(task.events):
        if event.why in CLAIMED:
            claimed = claimed or event.at
        once = once and event.why not in BACK
        if event.why in BEGUN:
            begun = event.at
            break
    error = msgspec.UNSET if task.error is None or task.state != "failed" else _brief(task.error)
    return Finished(
        id=task.id,
        name=task.name,
        queue=task.queue,
        status=task.state,
        at=task.finished,
        submitted=begun or task.created,
        ready=_ready(task, begun) if once else 0,
        started=task.started,
        ran=task.finished - claimed if claimed and task.started else 0,
        attempts=task.attempt,
        losses=task.losses,
        worker=task.worker,
        error=error,
        group=group(task) if error else "",
        run=task.run,
        step=task.step,
        tags=_short(task.tags),
        pack=task.pack,
    )


def _ready(task: Task, begun: int) -> int:
    """Return from when on a task could start that was never put back: its entry still says until when it was delayed."""
    entry = keys.parse_entry(task.entry)
    return entry.at if entry is not None and entry.priority is None else begun


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


def group(task: Task) -> str:
    """Return what failures of one kind share. Numbers of lines and texts of messages change too easily to be part of it."""
    error = task.error
    if error is None:
        return ""
    parts = "\0".join((task.name, error.type, raised_in(error.traceback)))
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
