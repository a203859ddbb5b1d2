"""Compare task queues on this machine: `python benchmarks/compare.py [--only a,b] [--tasks N] [--out results.json]`.

Needs nothing but the standard library; each peer gets a virtual environment of its own, and an empty server of its own.
See README.md beside this file for what is measured and how each peer is set up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import envs, facts, servers, table
from harness.peers import PEERS, SEAWEED, Peer

HERE = Path(__file__).resolve().parent
LIMIT = 900
"""Seconds after which a peer is given up."""


def run_peer(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one peer in a folder and on a server of its own."""
    python = envs.environment(options.envs, peer.env, peer.packages)
    helper = envs.environment(options.envs, "seaweed", SEAWEED) if peer.server == "seaweed" else python
    tasks = max(peer.unit, round(options.tasks * peer.scale) // peer.unit * peer.unit)
    with tempfile.TemporaryDirectory(prefix="buquet-bench-") as name:
        folder = Path(name)
        with servers.KINDS[peer.server](folder, helper) as server:
            given = {"url": server.url, "dir": str(folder), "tasks": str(tasks), "probes": str(options.probes)}
            given |= server.extra | peer.settings
            env = {**os.environ, **server.env, **{f"BENCH_{key.upper()}": value for key, value in given.items()}}
            env.pop("PYTHONPATH", None)
            program = HERE / "peers" / f"{peer.module}.py"
            begin = time.monotonic()
            found = run([str(python), str(program)], env, folder)
    found |= {"name": peer.name, "label": peer.label, "workers": peer.workers, "seconds": round(time.monotonic() - begin, 1)}
    if server.version:
        found.setdefault("versions", {})[peer.server] = server.version
    return found


def run(command: list[str], env: dict[str, str], folder: Path) -> dict[str, Any]:
    """Run a peer's program and return the JSON object of its last line."""
    process = subprocess.Popen(
        command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # the peer with the workers that it started
        out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise RuntimeError(f"gave up after {LIMIT} s\n{tail(err, folder)}") from None
    if process.returncode:
        raise RuntimeError(f"ended with status {process.returncode}\n{tail(err, folder)}")
    return json.loads(out.strip().splitlines()[-1])


def tail(errors: str, folder: Path) -> str:
    """The end of what a failed peer and its workers said."""
    logs = [log.read_text(errors="replace")[-1500:] for log in sorted(folder.glob("worker*.log"))]
    return "\n".join([errors[-2500:], *logs]).strip()


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of peers, separated by commas; --list shows them")
    parser.add_argument("--list", action="store_true", help="list the peers and stop")
    parser.add_argument(
        "--tasks", type=int, default=2000, help="tasks a peer; batched peers take a multiple of it (default 2000)"
    )
    parser.add_argument("--probes", type=int, default=100, help="latency probes, one each 100 ms (default 100)")
    parser.add_argument("--out", type=Path, help="write the results as JSON; results of other peers in that file are kept")
    parser.add_argument("--envs", type=Path, default=HERE.parent / ".benchmarks", help="folder of the virtual environments")
    given = parser.parse_args()
    wanted = [name for name in given.only.split(",") if name]
    unknown = set(wanted) - {peer.name for peer in PEERS}
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(peer.name for peer in PEERS)}")
    given.peers = [peer for peer in PEERS if not wanted or peer.name in wanted]
    return given


def main() -> int:
    """Measure the peers one after another."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that servers and workers are stopped
    given = options()
    if given.list:
        for peer in PEERS:
            print(f"{peer.name:24} {peer.label}")
        return 0
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for peer in given.peers:
        print(f"{peer.name} ...", file=sys.stderr, flush=True)
        try:
            results.append(run_peer(peer, given))
        except (RuntimeError, OSError, ValueError) as error:
            failed.append(peer.name)
            print(f"{peer.name} failed: {error}", file=sys.stderr, flush=True)
    if given.out:
        results = table.merge(given.out, results, facts.machine())
    table.show(results)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
