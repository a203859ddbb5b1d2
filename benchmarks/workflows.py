"""Measure workflows: three steps on SQLite against DBOS, one run after another and 16 at once; ten steps in a chain on SeaweedFS.

    python benchmarks/workflows.py [--rounds 3] [--seconds 6] [--out benchmarks/workflows.json] [--write docs/performance.md]

Needs only Python: it installs buquet, DBOS and SeaweedFS into their own environments first. On SQLite each side is one process,
as a user would first write it: the program starts runs and waits for their results, and the same process executes them. The sides
take turns. `--write` puts the table between the two marks of that page.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import envs, facts, servers
from harness.peers import BUQUET, DBOS, SEAWEED

HERE = Path(__file__).resolve().parent
SIDES = {"buquet": "run_buquet.py", "DBOS": "run_dbos.py"}
LIMIT = 900
BEGIN, END = "<!-- workflows: written by benchmarks/workflows.py -->", "<!-- end of workflows -->"


def measure(python: Path, script: str, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a program and return the JSON object of its last line."""
    clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "BUQUET_URL"}}
    command = [str(python), str(HERE / "peers" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT, env={**clean, **(env or {})})
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def on_sqlite(pythons: dict[str, Path], rounds: int, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Measure both sides in alternating rounds."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side, script in SIDES.items():
            with tempfile.TemporaryDirectory(prefix="buquet-bench-") as folder:
                found[side].append(measure(pythons[side], script, f"{folder}/bench.db", str(seconds)))
            print(f"round {number + 1}: {side}: {found[side][-1]}", flush=True)
    return found


def on_seaweed(python: Path, helper: Path, runs: int) -> dict[str, Any]:
    """Measure the chain on its own server."""
    with tempfile.TemporaryDirectory(prefix="buquet-bench-") as name, servers.seaweed(Path(name), helper) as server:
        found = measure(python, "run_chain.py", server.url, server.extra["metrics"], str(runs), env=server.env)
        return found | {"seaweedfs": server.version}


def table(results: dict[str, Any]) -> str:
    """Return the figures as a Markdown section."""
    lines = ["| three steps, SQLite | buquet, runs/s | DBOS, runs/s | ratio |", "|---|---:|---:|---:|"]
    for mode, label in (("alone", "one after another"), ("side_by_side", "16 side by side")):
        ours, theirs = (statistics.median(each[mode] for each in results["sqlite"][side]) for side in SIDES)
        lines.append(f"| {label} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |")
    chain, machine = results["chain"], results["machine"]
    said = (
        f"A chain of ten no-op steps on SeaweedFS, {chain['runs']} runs one after another, one worker: from one step's end to "
        f"the next one's\nstart {chain['gap_p50_ms']:.1f} ms in the median, {chain['gap_p90_ms']:.1f} ms at the 90th percentile; "
        f"{chain['puts_median']:g} PUT a run in the median, {chain['puts_most']} at most, heartbeats\napart."
    )
    how = (
        f"`python benchmarks/workflows.py --rounds {len(results['sqlite']['buquet'])}`, {machine['date']}, "
        f"{machine['cores']} cores, load before {machine['load_before']}; the medians of the rounds."
    )
    return "\n".join([*lines, "", said, "", how])


def write(page: Path, text: str) -> None:
    """Write the section between its marks."""
    whole = page.read_text()
    before, rest = whole.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of each of the two modes, a round and side (default 6)")
    parser.add_argument("--runs", type=int, default=30, help="runs of the chain (default 30)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, between its marks")
    parser.add_argument("--envs", type=Path, default=HERE.parent / ".benchmarks", help="folder of the virtual environments")
    given = parser.parse_args()
    pythons = {
        "buquet": envs.environment(given.envs, "buquet", BUQUET),
        "DBOS": envs.environment(given.envs, "dbos", DBOS),
    }
    helper = envs.environment(given.envs, "seaweed", SEAWEED)
    results: dict[str, Any] = {"machine": facts.machine()}
    results["sqlite"] = on_sqlite(pythons, given.rounds, given.seconds)
    results["chain"] = on_seaweed(pythons["buquet"], helper, given.runs)
    text = table(results)
    print(text)
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    if given.write:
        write(given.write, text)


if __name__ == "__main__":
    main()
