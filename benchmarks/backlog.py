"""Drain a backlog of 100,000 tasks in one worker: does its rate fall, does its memory grow?

python benchmarks/backlog.py [--tasks 100000] [--url sqlite:PATH]

Prints, as JSON, the submitting process's rate and memory, the worker process's drain rate over the first and the last tenth, its
resident memory after a tenth and at its highest, and the size of the file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from buquet import App
from buquet.queue.background import new_loop
from buquet.worker.session import resident


def make(url: str) -> App:
    app = App(url)
    app.task(queue="backlog")(noop)
    return app


async def noop(n: int) -> int:
    return n


def submit(app: App, count: int) -> dict[str, float]:
    begun = time.monotonic()
    task = app.tasks["noop"]
    for start in range(0, count, 10_000):
        task.submit_many((n,) for n in range(start, min(start + 10_000, count)))
        print(f"{min(start + 10_000, count):,} submitted", file=sys.stderr)
    return {"submit_per_s": count / (time.monotonic() - begun), "submitter_mb": resident() / 2**20}


async def drain(app: App, count: int) -> dict[str, float]:
    worker = app.worker(drain=True, concurrency=64)
    marks: list[tuple[float, int, float]] = []

    async def watch() -> None:
        while True:
            marks.append((time.monotonic(), worker.keeper.completed, resident() / 2**20))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    await worker.arun()
    watching.cancel()
    tenth = count // 10

    def rate(low: int, high: int) -> float:
        inside = [mark for mark in marks if low <= mark[1] <= high]
        if len(inside) < 2:  # a short run: there is nothing to compare
            inside = marks
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    after_a_tenth = next(mark[2] for mark in marks if mark[1] >= tenth)
    return {
        "completed": worker.keeper.completed,
        "drain_per_s": count / (marks[-1][0] - marks[0][0]),
        "drain_first_tenth_per_s": rate(1, tenth),
        "drain_last_tenth_per_s": rate(count - tenth, count),
        "worker_after_a_tenth_mb": after_a_tenth,
        "worker_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--url")
    parser.add_argument("--drain-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"sqlite:{folder}/backlog.db"
        app = make(url)
        if options.drain_only:
            with asyncio.Runner(loop_factory=new_loop) as runner:  # the loop of `buquet worker`
                print(json.dumps(runner.run(drain(app, options.tasks))), flush=True)
            os._exit(0)
        result = submit(app, options.tasks)
        app.close()
        command = [sys.executable, __file__, "--drain-only", "--tasks", str(options.tasks), "--url", url]
        result |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        if url.startswith("sqlite:"):
            result["file_mb"] = Path(url.removeprefix("sqlite:")).stat().st_size / 2**20
        print(json.dumps({name: round(value, 1) for name, value in result.items()}))


if __name__ == "__main__":
    main()
