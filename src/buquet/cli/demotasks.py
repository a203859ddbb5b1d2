"""The tasks of `buquet demo`: an index of Python files, a file a task. Written as a user's own module would be."""

from __future__ import annotations

import asyncio
import keyword
import tokenize
from collections import Counter
from typing import TypedDict

from buquet import App, Backoff, current

app = App()


class Index(TypedDict):
    """What one file holds."""

    lines: int
    names: dict[str, int]
    """Each identifier, and how often it is there."""


class Report(TypedDict):
    """What all files hold together."""

    files: int
    lines: int
    identifiers: int
    names: list[tuple[str, int, int]]
    """The identifiers most used: how often, and in how many files."""


@app.task(queue="demo", backoff=Backoff(initial=0.3))
def index(path: str, *, stumbles: bool = False) -> Index:
    """Count the lines and identifiers of a Python file. One that `stumbles` fails at first, as things on a network do."""
    if stumbles and current().attempt == 1:
        raise ConnectionResetError("the connection was reset (on purpose: this shows a retry)")
    with tokenize.open(path) as file:
        lines = file.readlines()
    tokens = tokenize.generate_tokens(iter(lines).__next__)
    names = Counter(token.string for token in tokens if token.type == tokenize.NAME and not keyword.iskeyword(token.string))
    return {"lines": len(lines), "names": dict(names)}


@app.task(queue="demo")
async def merge(ids: list[str], most: int = 10) -> Report:
    """Merge the results of `index` tasks that have completed into one report."""
    lines = 0
    uses: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for first in range(0, len(ids), 16):
        for part in await asyncio.gather(*(index.get(task_id).aresult() for task_id in ids[first : first + 16])):
            lines += part["lines"]
            uses.update(part["names"])
            files.update(part["names"].keys())
    names = [(name, count, files[name]) for name, count in uses.most_common(most)]
    return {"files": len(ids), "lines": lines, "identifiers": len(uses), "names": names}
