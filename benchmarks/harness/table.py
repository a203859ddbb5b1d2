"""The results as a table and as a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REFERENCES = ("celery-redis", "huey-sqlite", "procrastinate-pg", "dbos-pg", "buquet-0.1")
RATES = ("submit_per_s", "drain_per_s")


def ratios(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """For each entry, its rates as multiples of those of some peers, measured in the same file."""
    by_name = {result["name"]: result for result in results}
    return {
        name: {
            reference: {key: round(result[key] / by_name[reference][key], 2) for key in RATES}
            for reference in REFERENCES
            if reference in by_name and reference != name
        }
        for name, result in by_name.items()
    }


def merge(path: Path, results: list[dict[str, Any]], machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the results into a file beside those of other peers that it holds; each carries the date of its own run."""
    old = json.loads(path.read_text())["results"] if path.exists() else []
    new = {result["name"]: {**result, "date": machine["date"]} for result in results}
    kept = [result for result in old if result["name"] not in new]
    both = [*kept, *new.values()]
    whole = {"machine": machine, "results": both, "ratios": ratios(both)}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return both


def _requests(result: dict[str, Any]) -> str:
    parts = result.get("requests", {}).get("all", {})
    return ", ".join(f"{value:.3g} {op}" for op, value in parts.items())


def show(results: list[dict[str, Any]]) -> None:
    """Print the results for people."""
    head = ("system", "workers", "submit/s", "drain/s", "start p50 ms", "p99 ms", "requests an item")
    rows = [head]
    for result in results:
        rates = tuple(f"{result[key]:,.0f}" for key in RATES)
        waits = tuple(f"{result[key]:,.1f}" if key in result else "-" for key in ("start_p50_ms", "start_p99_ms"))
        rows.append((result["label"], result["workers"], *rates, *waits, _requests(result)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [cell.ljust(w) if i in {0, 1, 6} else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    celery = next((r for r in results if r["name"] == "celery-redis"), None)
    for result in results if celery else []:
        times = {key: result[key] / celery[key] for key in RATES}
        if result is not celery:
            print(f"{result['label']}: {times['submit_per_s']:.2f} x Celery's submit/s, {times['drain_per_s']:.2f} x its drain/s")
