"""Compare buquet's targets with the results of a run: `python benchmarks/reached.py results.json`, as a Markdown table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One line: the target, its value, and where the figure is in the results."""

    what: str
    at_least: float
    """Or at most, where `below`."""
    found: Callable[[Results], float]
    unit: str
    below: bool = False


class Results:
    """Figures by the names of entries, with the dates of their runs."""

    def __init__(self, whole: dict[str, Any]) -> None:
        self.entries = {result["name"]: result for result in whole.get("results", [])} | whole.get("extra", {})
        self.dates: set[str] = set()
        """Of what was looked at."""

    def get(self, name: str, *keys: str) -> float:
        """Return one figure. Raises KeyError if it was not measured."""
        value: Any = self.entries[name]
        self.dates.add(value.get("date", ""))
        for key in keys:
            value = value[key]
        return float(value)

    def ratio(self, name: str, other: str, key: str) -> float:
        """Return the ratio of two entries' rates."""
        return self.get(name, key) / self.get(other, key)

    def million(self, key: str) -> float:
        """Return a figure of million.py. Raises KeyError if that ran with fewer items."""
        if self.get("million", "items") < MILLION:
            raise KeyError(key)
        return self.get("million", key)


BATCH, SINGLE = "buquet-s3-batch", "buquet-s3"
TIMES = " times"
MILLION = 1_000_000
ASKED = (
    Asked(
        "batch on SeaweedFS: submit, to Celery's on Redis", 10, lambda r: r.ratio(BATCH, "celery-redis", "submit_per_s"), TIMES
    ),
    Asked("batch on SeaweedFS: drain, to Celery's on Redis", 8, lambda r: r.ratio(BATCH, "celery-redis", "drain_per_s"), TIMES),
    Asked("batch on SeaweedFS: PUT an item", 0.06, lambda r: r.get(BATCH, "requests", "all", "PUT"), "", below=True),
    Asked("batch on SQLite: drain, to Huey's", 5, lambda r: r.ratio("buquet-sqlite-batch", "huey-sqlite", "drain_per_s"), TIMES),
    Asked("singles on SeaweedFS: drain, to the bare loop's", 0.7, lambda r: r.ratio(SINGLE, "bare-s3", "drain_per_s"), TIMES),
    Asked("singles on SeaweedFS: submit, to the bare loop's", 0.7, lambda r: r.ratio(SINGLE, "bare-s3", "submit_per_s"), TIMES),
    Asked("singles on SeaweedFS: drain, to buquet 0.1.0's", 2.5, lambda r: r.ratio(SINGLE, "buquet-0.1", "drain_per_s"), TIMES),
    Asked("singles on SeaweedFS: submit to start, p50", 25, lambda r: r.get(SINGLE, "start_p50_ms"), " ms", below=True),
    Asked("singles on SQLite: submit", 5000, lambda r: r.get("buquet-sqlite", "submit_per_s"), " /s"),
    Asked("singles on SQLite: drain", 2500, lambda r: r.get("buquet-sqlite", "drain_per_s"), " /s"),
    Asked("singles on SQLite: submit to start, p50", 5, lambda r: r.get("buquet-sqlite", "start_p50_ms"), " ms", below=True),
    Asked("a million items on SQLite: submitter's memory", 200, lambda r: r.million("submitter_mb"), " MB", below=True),
    Asked("a million items on SQLite: worker's memory", 200, lambda r: r.million("worker_mb"), " MB", below=True),
)


def table(whole: dict[str, Any]) -> str:
    """Return the whole table."""
    lines = ["| | asked | reached | |", "|---|---:|---:|---|"]
    for asked in ASKED:
        results = Results(whole)
        limit = f"{'at most' if asked.below else 'at least'} {asked.at_least:,g}{asked.unit}"
        try:
            value = asked.found(results)
        except (KeyError, ZeroDivisionError):
            lines.append(f"| {asked.what} | {limit} | - | not measured |")
            continue
        met = value <= asked.at_least if asked.below else value >= asked.at_least
        verdict = "reached" if met else "**missed**"
        if len(results.dates) > 1:
            verdict += ", but of different runs"
        shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        lines.append(f"| {asked.what} | {limit} | {shown}{asked.unit} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what compare.py wrote with --out")
    print(table(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
