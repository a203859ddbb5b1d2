"""Makes text safe to print. Names, errors and values come from anybody who may write to the bucket.

All text for terminals, logs and pages goes through `printable`. Otherwise a terminal would obey control characters, a line break
would forge a log line, and a bidirectional override would reorder the text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from unicodedata import category

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

UNSAFE = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
"""Unicode categories of control characters, invisible and bidirectional marks, unassigned characters and line breaks."""
LONGEST = 10**18
"""Milliseconds, the most that a length of time is shown as."""
JOINERS = "\u200c\u200d"
"""Invisible but harmless characters, part of words (Persian) and of emoji."""


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def printable(text: str, keep: str = "", mark: Callable[[str], str] = _escape) -> str:
    r"""Return a text on one line, with each unsafe character but those in `keep` replaced by what `mark` makes of it.

    >>> printable("red \x1b[31m\r\n"), printable("a\n\tb", keep="\n\t", mark=lambda _: "?")
    ('red \\x1b[31m\\r\\n', 'a\n\tb')
    """
    if text.isprintable():
        return text
    return "".join(mark(char) if category(char) in UNSAFE and char not in keep and char not in JOINERS else char for char in text)


def counted(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun, or with another text that depends on the number.

    >>> counted(1, "task"), counted(1200, "task"), counted(0, "entry", "entries"), counted(2, "run goes", "runs go")
    ('1 task', '1,200 tasks', '0 entries', '2 runs go')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def indented(text: str) -> str:
    r"""Return a text of several lines with all lines but the first indented, so that none looks like a line of the program.

    >>> indented("first\nsecond\x07")
    'first\n    second\\x07'
    """
    return "\n    ".join(map(printable, text.split("\n")))


def json_line(value: Any) -> str:
    r"""Return a value as JSON on one line, with safe characters only. A value that JSON does not carry becomes its `str`.

    >>> json_line({"name": "\x9b31m"})
    '{"name":"\\u009b31m"}'
    """
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return printable(text, mark=lambda char: json.dumps(char)[1:-1])


def encodable(text: str) -> str:
    r"""Return a text with lone surrogates, which UTF-8 and JSON cannot carry, replaced by their escapes.

    >>> encodable("\udc80")
    '\\udc80'
    """
    return text.encode("utf-8", "backslashreplace").decode()


def in_seconds(ms: float) -> float:
    """Return milliseconds as seconds. A record may hold a number too large to be divided, so the result is bounded.

    >>> in_seconds(1500), in_seconds(10**400)
    (1.5, 1000000000000000.0)
    """
    return min(max(ms, -LONGEST), LONGEST) / 1000


def duration(seconds: float) -> str:
    """Return a length of time as people write it.

    >>> [duration(seconds) for seconds in (0.24, 12.34, 130, 7500, 201_600)]
    ['240 ms', '12.3 s', '2 min 10 s', '2 h 5 min', '2 d 8 h']
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s"
    for size, unit, smaller, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole} {unit} {rest // smaller} {name}" if rest >= smaller else f"{whole} {unit}"
    return ""
