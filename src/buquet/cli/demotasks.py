"""The tasks of `buquet demo`: an index of the identifiers in Python files. Written as a user's own module would be."""

from __future__ import annotations

import asyncio
import keyword
import tokenize
from collections import Counter
from typing import TypedDict

from buquet import App, Backoff, current

app = App()


class Index(TypedDict):
    """What is known of some files."""

    files: int
    lines: int
    names: dict[str, tuple[int, int]]
    """Each identifier: how often it is there, and in how many files."""


class Found(TypedDict):
    """One identifier of the report."""

    name: str
    uses: int
    files: int


class Summary(TypedDict):
    """What is known of all files."""

    files: int
    lines: int
    identifiers: int
    most_used: list[Found]


@app.task(queue="demo", backoff=Backoff(initial=0.3))
def index(paths: list[str], stumble: bool = False) -> Index:  # noqa: FBT001, FBT002 - a task's arguments are stored by name
    """Count the identifiers of some Python files. With `stumble` the first attempt fails, as a disk or a network would make it."""
    if stumble and current().attempt == 1:
        msg = "the first attempt of this one fails, to show a retry"
        raise OSError(msg)
    lines = 0
    uses: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path in paths:
        with tokenize.open(path) as file:
            source = file.readlines()
        names = Counter(
            token.string
            for token in tokenize.generate_tokens(iter(source).__next__)
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string)
        )
        lines += len(source)
        uses += names
        files.update(names.keys())
    return {"files": len(paths), "lines": lines, "names": {name: (count, files[name]) for name, count in uses.items()}}


@app.task(queue="demo")
async def merge(ids: list[str], top: int = 10) -> Summary:
    """Merge the results of `index` tasks that have completed into one report."""
    uses: Counter[str] = Counter()
    files: Counter[str] = Counter()
    counted = lines = 0
    for first in range(0, len(ids), 16):
        parts = await asyncio.gather(*(index.get(task_id).aresult() for task_id in ids[first : first + 16]))
        for part in parts:
            counted += part["files"]
            lines += part["lines"]
            for name, (count, where) in part["names"].items():
                uses[name] += count
                files[name] += where
    most: list[Found] = [{"name": name, "uses": count, "files": files[name]} for name, count in uses.most_common(top)]
    return {"files": counted, "lines": lines, "identifiers": len(uses), "most_used": most}
