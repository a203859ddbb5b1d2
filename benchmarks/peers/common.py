"""What every peer module shares: arguments, the clock, percentiles and the one JSON line that is printed.

Only the standard library: each peer runs in a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass
class Args:
    """What compare.py tells a peer."""

    url: str
    dir: Path
    tasks: int
    probes: int
    extra: dict[str, str] = field(default_factory=dict)


def arguments() -> Args:
    """Parse the arguments that compare.py gives to every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    a = parser.parse_args()
    return Args(a.url, a.dir, a.tasks, a.probes, dict(item.split("=", 1) for item in a.set))


def percentile(values: Iterable[float], q: float) -> float | None:
    """The q-quantile (nearest rank) of the values, None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def latency(seconds: list[float]) -> dict[str, float | int | None]:
    """p50 and p99 in milliseconds of a list of seconds."""
    ms = [s * 1000 for s in seconds]
    p50, p99 = percentile(ms, 0.5), percentile(ms, 0.99)
    return {
        "latency_p50_ms": None if p50 is None else round(p50, 2),
        "latency_p99_ms": None if p99 is None else round(p99, 2),
        "latency_samples": len(ms),
    }


def rate(count: int, seconds: float) -> float:
    """Things a second, rounded for print."""
    return round(count / seconds, 1)


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages."""
    return {name: version(name) for name in packages}


def wait_until(done: Callable[[], bool], timeout: float = 300, every: float = 0.01) -> None:
    """Poll until done() or fail."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"not done after {timeout:.0f} s")
        time.sleep(every)


def probe(submit: Callable[[float], Any], probes: int, every: float = 0.1) -> None:
    """Submit one task each 100 ms that carries the time of its submit."""
    due = time.monotonic()
    for _ in range(probes):
        submit(time.time())
        due += every
        time.sleep(max(0.0, due - time.monotonic()))


def read_lines(path: Path) -> list[float]:
    """The numbers that handlers appended to a file, one a line."""
    if not path.exists():
        return []
    return [float(line) for line in path.read_text().splitlines() if line]


def append(path: Path | str, value: float) -> None:
    """Append one number to a file in one write, from any process."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, f"{value!r}\n".encode())
    finally:
        os.close(fd)


def spawn(*argv: str, env: dict[str, str] | None = None, log: Path) -> subprocess.Popen[bytes]:
    """Start a worker process; its output goes to a log file."""
    full = {**os.environ, "PYTHONPATH": str(HERE), **(env or {})}
    with log.open("ab") as out:
        return subprocess.Popen(argv, env=full, stdout=out, stderr=out, cwd=log.parent)


def stop(process: subprocess.Popen[bytes], timeout: float = 15) -> None:
    """Terminate a process that spawn() started, kill it when it does not go."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tool(name: str) -> str:
    """The path of a command of this peer's own virtual environment."""
    return str(Path(sys.executable).parent / name)


def report(**values: Any) -> None:
    """Print the one JSON line that compare.py reads."""
    print(json.dumps(values), flush=True)
