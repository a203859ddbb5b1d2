"""A nightly report with a branch: it counts unfinished work in a source tree, and raises an alarm above a limit.

    python examples/nightly.py

runs the report twice, on Python's own sources, on a temporary store with a worker in this process. In production you only need
workers. They submit one report a night, however many workers there are, even if none of them ran at two o'clock.

    buquet worker nightly:app
    buquet run ls --workflow report
"""

import asyncio
import re
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from buquet import App, each, when

app = App()
SOURCES = sysconfig.get_paths()["stdlib"]


@dataclass
class Part:
    name: str
    lines: int
    marks: int
    """Lines with a TODO, FIXME or XXX."""


@dataclass
class Summary:
    lines: int
    marks: int
    worst: str


@app.task
def packages(folder: str) -> list[str]:
    return sorted(str(path.parent) for path in Path(folder).glob("*/__init__.py") if path.parent.name != "test")


@app.task
def inspect(package: str) -> Part:
    text = [line for path in Path(package).rglob("*.py") for line in path.read_text("utf-8", "replace").splitlines()]
    return Part(Path(package).name, len(text), sum(1 for line in text if re.search(r"#.*\b(TODO|FIXME|XXX)\b", line)))


@app.task
def summarise(parts: list[Part]) -> Summary:
    worst = max(parts, key=lambda part: part.marks)
    return Summary(sum(part.lines for part in parts), sum(part.marks for part in parts), worst.name)


@app.task
def alarm(summary: Summary, limit: int) -> str:
    return f"{summary.marks} things are unfinished, more than {limit}; begin with {summary.worst}"


@app.task
def archive(summary: Summary) -> str:
    return f"all is well: {summary.marks} things are unfinished in {summary.lines:,} lines"


@app.workflow
def report(folder: str = SOURCES, limit: int = 100) -> str:
    summary = summarise(each(inspect, packages(folder), pack=5))
    return when(summary.marks > limit, then=lambda: alarm(summary, limit), otherwise=lambda: archive(summary))


app.schedule("nightly", report, cron="0 2 * * *", tz="Europe/Berlin")


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        app.use(f"sqlite:{folder}/store.db")
        async with app:
            worker = app.worker()
            working = asyncio.create_task(worker.arun())
            for limit in (10, 100_000):
                run = await report.astart(limit=limit)
                print(await run.aresult(timeout=120))
                print(*(f"  {step.name}: {step.status}" for step in await run.asteps()), sep="\n")
            worker.stop()
            await working


if __name__ == "__main__":
    asyncio.run(main())
