"""Submit a million items from a generator as a batch on SQLite: how much memory do submitter and worker use?

python benchmarks/million.py [--items 1000000] [--singles] [--url sqlite:PATH]

Submitter and worker are separate processes. Prints, as JSON, the rates and the highest resident memory of each. With --singles,
`submit_many` submits the items, a task each, and they are not drained (for that see backlog.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOLD_EVERY = 100_000


def highest_mb() -> float:
    """Return this process's highest resident memory."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory at the moment of the fork, too
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(found[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def make(url: str) -> Any:
    """Return the App and its one task. The measuring process itself does not import buquet."""
    from buquet import App

    app = App(url)

    @app.task
    async def work(n: int) -> int:
        return n

    return app, work


def submit(url: str, count: int, singles: bool) -> dict[str, Any]:
    app, work = make(url)
    told = 0

    def progress(stored: int) -> None:
        nonlocal told
        if stored - told >= TOLD_EVERY or stored == count:
            told = stored
            print(f"{stored:,} submitted", file=sys.stderr, flush=True)

    begun = time.monotonic()
    if singles:
        batch_id, stored = "", len(work.submit_many(((n,) for n in range(count)), progress=progress))
    else:
        batch = work.batch((n for n in range(count)), progress=progress)
        batch_id, stored = batch.id, len(batch)
    took = time.monotonic() - begun
    app.close()
    if (stored, told) != (count, count):
        sys.exit(f"{stored:,} of {count:,} items were submitted, {told:,} were told")
    return {"batch": batch_id, "submit_per_s": count / took, "submitter_mb": highest_mb()}


def drain(url: str, count: int, batch_id: str) -> dict[str, Any]:
    app, work = make(url)
    begun = time.monotonic()
    app.worker(drain=True).run()
    took = time.monotonic() - begun
    peak = highest_mb()
    found = work.get_batch(batch_id).progress()
    app.close()
    if found != (count, 0, 0):
        sys.exit(f"the batch is not done: {found}")
    return {"drain_per_s": count / took, "worker_mb": peak}


def child(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--singles", action="store_true", help="a task an item, by submit_many; submitted only")
    parser.add_argument("--url")
    parser.add_argument("--part", choices=("submit", "drain"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        if given.part == "submit":
            part = submit(given.url, given.items, given.singles)
        else:
            part = drain(given.url, given.items, given.batch)
        print(json.dumps(part))
        return
    with tempfile.TemporaryDirectory() as folder:
        url = given.url or f"sqlite:{folder}/million.db"
        both = ("--items", str(given.items), "--url", url)
        result = child("--part", "submit", *both, *(["--singles"] if given.singles else []))
        batch_id = result.pop("batch")
        if batch_id:
            result |= child("--part", "drain", *both, "--batch", batch_id)
        if url.startswith("sqlite:"):
            result["file_mb"] = Path(url.removeprefix("sqlite:")).stat().st_size / 2**20
    print(json.dumps({"items": given.items} | {name: round(value, 1) for name, value in result.items()}))


if __name__ == "__main__":
    main()
