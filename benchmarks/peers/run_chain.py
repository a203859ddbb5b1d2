"""A chain of ten no-op steps on S3: run_chain.py URL METRICS RUNS. Times from one step's end to the next one's start, and PUTs.

The PUTs are the server's count, minus those of the workers' sessions, which this process counts.
"""

import asyncio
import itertools
import json
import statistics
import sys
import time
import urllib.request

from common import COUNTED, LABEL

from buquet import App
from buquet.clock import Clock
from buquet.store.open import open_store
from buquet.testing.faulty import FaultyStore

URL, METRICS, RUNS = sys.argv[1], sys.argv[2], int(sys.argv[3])
STEPS = 10

clock = Clock()
store = FaultyStore(open_store(URL, clock), clock)
app = App(store=store, clock=clock)
times: list[tuple[float, float]] = []


@app.task
async def step(n: int) -> int:
    begun = time.perf_counter()
    times.append((begun, time.perf_counter()))
    return n + 1


@app.workflow
def chain() -> int:
    value = 0
    for _ in range(STEPS):
        value = step(value)
    return value


def puts() -> int:
    """Return the server's count so far."""
    with urllib.request.urlopen(METRICS, timeout=10) as answer:  # noqa: S310 - the benchmark's own server
        found = COUNTED.findall(answer.read().decode())
    return round(sum(float(number) for labels, number in found if dict(LABEL.findall(labels)).get("type") == "PUT"))


def sessions() -> int:
    return sum(store.count(op, "workers") for op in ("put", "create", "update"))


async def main() -> None:
    worker = app.worker()
    working = asyncio.create_task(worker.arun())
    gaps: list[float] = []
    spent: list[int] = []
    for number in range(RUNS + 3):
        times.clear()
        before = puts() - sessions()
        run = await chain.astart()
        assert await run.aresult(timeout=60) == STEPS
        await app.client.ringer.flush()
        await asyncio.sleep(0.3)  # the last task's own end is stored after the run's
        if number >= 3:  # the first ones open connections
            spent.append(puts() - sessions() - before)
            gaps += [(later[0] - earlier[1]) * 1000 for earlier, later in itertools.pairwise(times)]
    worker.stop()
    await working
    await app.aclose()
    gaps.sort()
    found = {"gap_p50_ms": statistics.median(gaps), "gap_p90_ms": gaps[len(gaps) * 9 // 10], "puts_most": max(spent)}
    print(json.dumps(found | {"puts_median": statistics.median(spent), "runs": RUNS}))


if __name__ == "__main__":
    asyncio.run(main())
