"""`buquet bench` on each kind of store: what it tells, and that it leaves nothing behind."""

import asyncio
import json
import subprocess
import sys

import pytest

from buquet.clock import Clock
from buquet.store.open import open_store

TASKS = 30


@pytest.mark.parametrize("kind", ["memory", "sqlite", "seaweed"])
async def test_bench_counts_what_the_protocol_says_and_leaves_no_task(kind, request, tmp_path):
    url = {"memory": "memory:", "sqlite": f"sqlite:{tmp_path}/b.db"}.get(kind) or request.getfixturevalue("seaweed").url("bench")
    command = [sys.executable, "-m", "buquet", "bench", "--url", url, "--tasks", str(TASKS), "--samples", "3", "--json"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True, timeout=100)
    found = json.loads(done.stdout)
    assert (found["tasks"], found["samples"], found["concurrency"]) == (TASKS, 3, 64)
    assert min(found["submit_per_second"], found["drain_per_second"]) > 0
    assert 0 < found["start_p50_ms"] <= found["start_p99_ms"]
    # an entry and a record, and ten rings of the bell a second; claim and outcome, and what the worker writes of itself
    assert 2 <= found["submit_requests"]["PUT"] < 5
    assert 2 <= found["run_requests"]["PUT"] < 5
    store = open_store(url, Clock())
    try:
        for prefix in ("ready/", "later/", "tasks/", "payloads/"):
            assert await store.list(prefix) == []
    finally:
        await store.close()
