"""The tasks of `buquet demo`: index the source of Python's standard library, a file a task."""

from __future__ import annotations

import io
import keyword
import tokenize
from collections import Counter
from pathlib import Path
from typing import TypedDict

from buquet.app import App
from buquet.backoff import Backoff
from buquet.queue.attempt import current

app = App()

MOST = 200


class Index(TypedDict):
    """What one file holds."""

    file: str
    lines: int
    names: dict[str, int]
    """The identifiers most used in it, with how often."""


class Report(TypedDict):
    """What all files hold together."""

    files: int
    lines: int
    names: list[tuple[str, int]]
    longest: list[tuple[str, int]]


@app.task(queue="demo", backoff=Backoff(initial=0.2))
def index(path: str, *, stumbles: bool = False) -> Index:
    """Count the lines and identifiers of a Python file. One that `stumbles` fails at its first attempt, as things on a network do."""
    if stumbles and current().attempt == 1:
        message = "the connection was reset (on purpose: this demo wants to show a retry)"
        raise ConnectionResetError(message)
    text = Path(path).read_text("utf-8", "replace")
    names: Counter[str] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
            names[token.string] += 1
    return Index(file=path, lines=text.count("\n"), names=dict(names.most_common(MOST)))


@app.task(queue="demo")
def merge(indexes: list[Index]) -> Report:
    """Add the indexes of all files up."""
    names: Counter[str] = Counter()
    for each in indexes:
        names.update(each["names"])
    longest = sorted(((each["file"], each["lines"]) for each in indexes), key=lambda each: -each[1])
    return Report(files=len(indexes), lines=sum(each["lines"] for each in indexes), names=names.most_common(10), longest=longest[:3])
