"""Measure the dashboard's first page on SQLite, with 10,000 ended tasks in the journal and 1,000 waiting tasks.

    python benchmarks/dashboard.py [FOLDER]

Prints the milliseconds of a new server's first page (it reads everything) and of some later pages (from memory). It also prints
the CPU time of this process, which the load of other processes does not change.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from buquet import App, keys
from buquet.dashboard.app import dashboard
from buquet.journal.lines import finished
from buquet.journal.writer import _encoder
from buquet.records import Event, Task

FINISHED, WAITING, LINES = 10_000, 1_000, 30


async def fill(app: App) -> None:
    clock, reads = app.clock, app.client.reads
    now = clock.now_ms()
    lines = []
    for number in range(FINISHED):
        at = now - (FINISHED - number) * 300
        state = "failed" if number % 50 == 0 else "completed"
        events = (Event(at=at - 700, state="pending", why="submitted"), Event(at=at - 200, state="running", why="claimed"))
        task = Task(
            id=clock.new_id(), queue=f"q{number % 4}", name=f"task{number % 12}", state=state, created=at - 700, started=at - 200,
            finished=at, attempt=1, events=(*events, Event(at=at, state=state, why=state)),
        )  # fmt: skip
        lines.append((at, _encoder.encode(finished(task))))
    for first in range(0, FINISHED, LINES):
        part = lines[first : first + LINES]
        await reads.put(keys.journal(part[-1][0], "0123abcd.0123456789abcdef", first), b"".join(line + b"\n" for _, line in part))
    for number in range(WAITING):
        await app.tasks["wait"].asubmit(number)


async def main(folder: str) -> None:
    app = App(f"sqlite:{folder}/bench.db")

    @app.task
    def wait(number: int) -> None: ...

    async with app:
        await fill(app)
    async with App(f"sqlite:{folder}/bench.db") as looker:
        transport = httpx2.ASGITransport(app=dashboard(looker))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for what in ("first page", "again", "again", "tasks", "errors"):
                path = {"tasks": "/tasks", "errors": "/errors"}.get(what, "/")
                begun, spent = time.perf_counter(), time.process_time()
                answer = await client.get(path)
                took, own = (time.perf_counter() - begun) * 1000, (time.process_time() - spent) * 1000
                print(
                    f"{what}: {answer.status_code}, {took:.0f} ms ({own:.0f} ms of them at work), {len(answer.content):,} bytes"
                )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else str(Path(scratch))))
