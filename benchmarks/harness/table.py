"""The results as a JSON file and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.peers import PEERS

REFERENCES = ("celery-redis", "huey-sqlite", "procrastinate-pg", "dbos-pg", "buquet-0.1")
RATES = ("submit_per_s", "drain_per_s")
HEAD = ("system", "workers", "submit/s", "drain/s", "start p50 ms", "p99 ms", "requests an item")


def ratios(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return each entry's rates as multiples of some peers' rates in the same file."""
    by_name = {result["name"]: result for result in results}
    return {
        name: {
            reference: {key: round(result[key] / by_name[reference][key], 2) for key in RATES}
            for reference in REFERENCES
            if reference in by_name and reference != name
        }
        for name, result in by_name.items()
    }


def load(path: Path | None) -> dict[str, Any]:
    """Return the results of an earlier run in this file."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def add(whole: dict[str, Any], name: str, found: dict[str, Any], machine: dict[str, Any], *, peer: bool) -> dict[str, Any]:
    """Return the results with one more, which replaces an earlier one of that name. Each carries the date of its run.

    A failed one replaces nothing: its reason stays in `failed` until it succeeds.
    """
    order = [each.name for each in PEERS]
    results = [result for result in whole.get("results", []) if result["name"] in order]
    extra, failed = dict(whole.get("extra", {})), dict(whole.get("failed", {}))
    dated = {**found, "date": machine["date"]}
    if "failed" in found:
        failed[name] = {"why": found["failed"].splitlines()[0], "date": machine["date"]}
    else:
        failed.pop(name, None)
        if peer:
            results = [*(result for result in results if result["name"] != name), dated]
        else:
            extra[name] = dated
    results.sort(key=lambda result: order.index(result["name"]))
    return {"machine": machine, "results": results, "extra": extra, "failed": failed, "ratios": ratios(results)}


def _requests(result: dict[str, Any]) -> str:
    parts = result.get("requests", {}).get("all", {})
    return ", ".join(f"{value:.3g} {op}" for op, value in parts.items())


def rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells, one row per entry."""
    found: list[tuple[str, ...]] = []
    for result in results:
        rates = tuple(f"{result[key]:,.0f}" for key in RATES)
        waits = tuple(f"{result[key]:,.1f}" if key in result else "-" for key in ("start_p50_ms", "start_p99_ms"))
        found.append((result["label"], result["workers"], *rates, *waits, _requests(result)))
    return found


def markdown(whole: dict[str, Any]) -> str:
    """Return the table for a page."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|---:|---:|---:|---:|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(whole.get("results", []))]
    return "\n".join(lines)


def show(whole: dict[str, Any]) -> None:
    """Print the results for people."""
    lines = [HEAD, *rows(whole.get("results", []))]
    widths = [max(len(row[i]) for row in lines) for i in range(len(HEAD))]
    for row in lines:
        cells = [cell.ljust(w) if i in {0, 1, 6} else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    for name, each in whole.get("extra", {}).items():
        print(f"{name}: {json.dumps(each)}")
    for name, each in whole.get("failed", {}).items():
        print(f"{name}: failed at {each['date']}: {each['why']}")
