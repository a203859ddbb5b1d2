"""Shared code of the peer modules: settings, the clock, the phases of a measurement, and the JSON line that each prints.

It uses only the standard library, since each peer runs in its own virtual environment. A peer's worker is another process. Its
handlers report to the measuring process through small files in the peer's folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
URL = os.environ.get("BENCH_URL", "")
DIR = Path(os.environ.get("BENCH_DIR", ".")).resolve()
TASKS = int(os.environ.get("BENCH_TASKS", "200"))
PROBES = int(os.environ.get("BENCH_PROBES", "20"))
WARM = 20
"""Submitted before the clock starts, so that connections are open and code is loaded."""
SETTLE = 3.0
"""Seconds of rest before the latency probes, so that an idle worker is idle."""
EVERY = 0.1
"""Seconds between two latency probes."""

STARTS, DONES, WAITS = DIR / "starts", DIR / "dones", DIR / "waits"
COUNTED = re.compile(r"^SeaweedFS_s3_request_total\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
_seen: set[str] = set()


def setting(name: str, default: str = "") -> str:
    """Return a setting of this peer, as compare.py gave it."""
    return os.environ.get(f"BENCH_{name.upper()}", default)


# In a worker's process.


def append(path: Path, value: float) -> None:
    """Append one number to a file in one write, from any process."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, f"{value!r}\n".encode())
    finally:
        os.close(fd)


def handled(sent: float) -> None:
    """Note the first start in this process, and a probe's time from submit to start. Every no-op handler calls this."""
    if sent:
        append(WAITS, time.time() - sent)
    elif "start" not in _seen:
        _seen.add("start")
        append(STARTS, time.time())


# In the measuring process.


def numbers(path: Path) -> list[float]:
    """Return the numbers that were appended to a file."""
    return [float(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(done: Callable[[], bool], timeout: float = 600, every: float = 0.02) -> None:
    """Poll until done() or fail."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"not done after {timeout:.0f} s")
        time.sleep(every)


def percentile(values: Iterable[float], q: float) -> float:
    """Return the q-quantile of the values, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def rate(count: int, seconds: float) -> float:
    """Return a rate per second, rounded for print."""
    return round(count / seconds, 1)


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of these packages."""
    return {name: version(name) for name in packages}


def requests() -> Counter[str]:
    """Return the S3 server's request counts since its start, by operation, or nothing without such a server."""
    counts: Counter[str] = Counter()
    url = setting("metrics")
    if url:
        time.sleep(0.3)  # the server counts a request a moment after it answered
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server's
            text = answer.read().decode()
        for labels, value in COUNTED.findall(text):
            counts[dict(LABEL.findall(labels)).get("type", "?")] += int(float(value))
    return counts


def per_item(before: Counter[str], after: Counter[str], items: int) -> dict[str, float]:
    """Return the requests per item between two counts."""
    return {op: round((n - before[op]) / items, 4) for op, n in sorted(after.items()) if n > before[op]}


@contextmanager
def worker(*argv: str, env: dict[str, str] | None = None, name: str = "worker"):
    """Run a worker process with its output in a log file, and end it by its process id."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    with (DIR / f"{name}.log").open("ab") as out:
        process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": path, **(env or {})}, stdout=out, stderr=out, cwd=DIR)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def tool(name: str) -> str:
    """Return the path of a command in this peer's virtual environment."""
    return str(Path(sys.executable).parent / name)


def measure(
    submit: Callable[[int], Any],
    workers: Callable[[], Iterable[AbstractContextManager[Any]]],
    finished: Callable[[], int],
    probe: Callable[[float], Any] | None,
    *,
    tasks: int = TASKS,
    claimed: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Submit without a worker, drain with one, then probe the idle worker. `finished` counts stored outcomes.

    The drain's clock runs from the first handler's start until the last outcome is found stored. A system that claims a whole
    backlog before the first start gives `claimed`, the time of its first claim, and its clock starts there.
    """
    result: dict[str, Any] = {"tasks": tasks}
    zero = requests()
    submit(WARM)
    begin = time.perf_counter()
    submit(tasks)
    result["submit_per_s"] = rate(tasks, time.perf_counter() - begin)
    one = requests()
    total = tasks + WARM
    with ExitStack() as stack:
        for each in workers():
            stack.enter_context(each)
        wait_until(lambda: finished() >= total)
        ended = time.time()
        result["drain_per_s"] = rate(total, ended - (claimed() if claimed else min(numbers(STARTS))))
        two = requests()
        if probe and PROBES:
            time.sleep(SETTLE)
            rest = requests()
            due = time.monotonic()
            for _ in range(PROBES):
                probe(time.time())
                due += EVERY
                time.sleep(max(0.0, due - time.monotonic()))
            wait_until(lambda: len(numbers(WAITS)) >= PROBES)
            result |= waits()
            if zero:
                result["requests"] = {"lone": per_item(rest, requests(), PROBES)}
    if zero:
        parts = {"submit": per_item(zero, one, total), "drain": per_item(one, two, total)}
        result["requests"] = parts | {"all": per_item(zero, two, total)} | result.get("requests", {})
    return result


def waits() -> dict[str, Any]:
    """Return p50 and p99 of the probes' waits in milliseconds."""
    ms = [1000 * s for s in numbers(WAITS)]
    return {"start_p50_ms": round(percentile(ms, 0.5), 1), "start_p99_ms": round(percentile(ms, 0.99), 1), "probes": len(ms)}


def report(**values: Any) -> None:
    """Print the one JSON line that compare.py reads."""
    print(json.dumps(values), flush=True)
