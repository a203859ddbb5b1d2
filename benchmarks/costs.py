"""What the counted requests cost at AWS's list prices: `python benchmarks/costs.py results.json`, as a Markdown table.

Requests only: $5 a million PUT, LIST, COPY and POST, $0.40 a million GET and HEAD, DELETE free (S3 Standard, us-east-1).
It leaves out storage, traffic, and the old versions that a bucket keeps until a lifecycle rule removes them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOLLARS_A_MILLION = {"PUT": 5.0, "LIST": 5.0, "COPY": 5.0, "POST": 5.0, "GET": 0.4, "HEAD": 0.4, "DELETE": 0.0}
SHOWN = ("PUT", "LIST", "GET", "DELETE")
HOURS_A_MONTH = 730
MILLION = 1e6


@dataclass(frozen=True)
class Figure:
    """One line: its name, where its counts are in the results, and the factor for them."""

    label: str
    peer: str
    where: tuple[str, ...]
    times: float = MILLION


FIGURES = (
    Figure("a million tasks in a backlog", "buquet-s3", ("requests", "all")),
    Figure("a million lone tasks, ten a second, one worker", "buquet-s3", ("requests", "lone")),
    Figure("a million batched items, 100 a task", "buquet-s3-batch", ("requests", "all")),
    Figure("an idle worker, a month", "buquet-s3", ("idle_hour",), HOURS_A_MONTH),
    Figure("buquet 0.1.0: a million tasks in a backlog", "buquet-0.1", ("requests", "all")),
    Figure("buquet 0.1.0: a million lone tasks, ten a second, one worker", "buquet-0.1", ("requests", "lone")),
    Figure("buquet 0.1.0: an idle worker, a month", "buquet-0.1", ("idle_hour",), HOURS_A_MONTH),
    Figure("bare loop: a million tasks, an object each", "bare-s3", ("requests", "all")),
    Figure("bare loop: a million items, 100 an object", "bare-s3-100", ("requests", "all")),
)


def dollars(counts: dict[str, float]) -> float:
    """Return the price of these requests."""
    unknown = set(counts) - set(DOLLARS_A_MILLION)
    if unknown:
        raise ValueError(f"no price is known for {', '.join(sorted(unknown))}")
    return sum(n * DOLLARS_A_MILLION[op] / MILLION for op, n in counts.items())


def counts_of(figure: Figure, results: dict[str, Any]) -> dict[str, float] | None:
    """Return the counted requests of a figure, or None if they were not measured."""
    found: Any = results.get(figure.peer, {})
    for step in figure.where:
        found = found.get(step) or {}
    return {op: n * figure.times for op, n in found.items()} or None


def table(whole: dict[str, Any], file: str) -> str:
    """Return the whole table for the results in this file."""
    results = {result["name"]: result for result in whole["results"]}
    lines = [f"| | {' | '.join(SHOWN)} | US$ | counted by |", f"|---|{'---:|' * len(SHOWN)}---:|---|"]
    for figure in FIGURES:
        command = f"`python benchmarks/compare.py --only {figure.peer} --out {file}`"
        counts = counts_of(figure, results)
        if counts is None:
            cells = ["-"] * len(SHOWN) + ["not measured"]
        else:
            cells = [f"{counts.get(op, 0):,.0f}" for op in SHOWN] + [f"{dollars(counts):,.2f}"]
        lines.append(f"| {figure.label} | {' | '.join(cells)} | {command} |")
    nothing = " | ".join("-" for _ in SHOWN)
    lines.append(f'| "$100 a million tasks", the first estimate for such a design | {nothing} | 100.00 | nothing: an estimate |')
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what compare.py wrote with --out")
    path = parser.parse_args().results
    print(table(json.loads(path.read_text()), path.name))


if __name__ == "__main__":
    main()
