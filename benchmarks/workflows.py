"""Three-step workflows on SQLite: buquet beside DBOS, one after another and 16 side by side, in alternating rounds.

    python benchmarks/workflows.py [--rounds 3] [--seconds 6]

DBOS is installed into an environment of its own at first. Each side runs in one process, as a user would write it first: the
program starts runs and waits for their results, and the same process carries them out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.envs import environment
from harness.peers import DBOS

HERE = Path(__file__).parent
SIDES = {"buquet": "run_buquet.py", "DBOS": "run_dbos.py"}


def measure(python: str, script: str, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(HERE / "peers" / script), f"{folder}/bench.db", str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{script} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--envs", type=Path, default=HERE.parent / ".benchmarks", help="folder of the virtual environments")
    options = parser.parse_args()
    pythons = {"buquet": sys.executable, "DBOS": environment(options.envs, "dbos", DBOS)}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for round_number in range(options.rounds):
        for side, script in SIDES.items():
            found[side].append(measure(pythons[side], script, options.seconds))
            print(f"round {round_number + 1}: {side}: {found[side][-1]}", flush=True)
    for mode in ("alone", "side_by_side"):
        ours, theirs = (statistics.median(each[mode] for each in found[side]) for side in ("buquet", "DBOS"))
        print(f"{mode}: buquet {ours:.0f} runs/s, DBOS {theirs:.0f} runs/s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
