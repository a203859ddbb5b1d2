"""Compare task queues on this machine: `python benchmarks/compare.py [--only a,b] [--tasks N] [--out results.json [--docs]]`.

Needs only the standard library. Each peer gets its own virtual environment and its own empty server. If a peer fails, the results
note the reason and the others go on. README.md in this folder describes the measurements and each peer's set-up.
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

import document
import plot
from harness import envs, facts, servers, table
from harness.peers import EXTRAS, PEERS, SEAWEED, Extra, Peer

HERE = Path(__file__).resolve().parent
LIMIT = 1200
"""Seconds after which a peer is given up."""


def run_peer(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one peer, in its own folder and on its own server."""
    python = envs.environment(options.envs, peer.env, peer.packages)
    helper = envs.environment(options.envs, "seaweed", SEAWEED) if peer.server == "seaweed" else python
    tasks = max(peer.unit, round(options.tasks * peer.scale) // peer.unit * peer.unit)
    with tempfile.TemporaryDirectory(prefix="buquet-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with servers.KINDS[peer.server](folder, helper) as server:
            given = {"url": server.url, "dir": str(folder), "tasks": str(tasks), "probes": str(options.probes)}
            given |= server.extra | peer.settings
            env = {**os.environ, **server.env, **{f"BENCH_{key.upper()}": value for key, value in given.items()}}
            env.pop("PYTHONPATH", None)
            begin = time.monotonic()
            found = run([str(python), str(HERE / "peers" / f"{peer.module}.py")], env, folder)
    found |= {"name": peer.name, "label": peer.label, "workers": peer.workers, "seconds": round(time.monotonic() - begin, 1)}
    if server.version:
        found.setdefault("versions", {})[peer.server] = server.version
    return found


def run_extra(extra: Extra, options: argparse.Namespace) -> dict[str, Any]:
    """Run one of buquet's own benchmarks, which no peer has."""
    python = envs.environment(options.envs, extra.env, extra.packages)
    count = max(1000, round(extra.count * min(1.0, options.tasks / options.full)))
    with tempfile.TemporaryDirectory(prefix="buquet-bench-", ignore_cleanup_errors=True) as name:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return run([str(python), str(HERE / f"{extra.name}.py"), extra.flag, str(count)], env, Path(name))


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
    lines = out.strip().splitlines()
    if process.returncode or not lines:
        why = tail(err, folder)
        raise RuntimeError(f"ended with status {process.returncode}: {why.rpartition(chr(10))[2]}\n{why}")
    return json.loads(lines[-1])


def tail(errors: str, folder: Path) -> str:
    """Return the last output of a failed peer and its workers."""
    logs = [log.read_text(errors="replace")[-1500:] for log in sorted(folder.glob("worker*.log"))]
    return "\n".join([errors[-2500:], *logs]).strip()


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [each.name for each in (*PEERS, *EXTRAS)]
    full = 2000
    parser.add_argument("--only", default="", help="names of peers, separated by commas; --list shows them")
    parser.add_argument("--list", action="store_true", help="list the peers and stop")
    parser.add_argument("--tasks", type=int, default=full, help="tasks a peer; some take a multiple of it (default 2000)")
    parser.add_argument("--probes", type=int, default=100, help="latency probes, one each 100 ms (default 100)")
    parser.add_argument("--out", type=Path, help="write the results as JSON; results of other peers in that file are kept")
    parser.add_argument("--docs", action="store_true", help="and from that file the tables and the plot of docs/performance.md")
    parser.add_argument("--envs", type=Path, default=HERE.parent / ".benchmarks", help="folder of the virtual environments")
    given = parser.parse_args()
    given.full = full
    wanted = [name for name in given.only.split(",") if name]
    unknown = set(wanted) - set(names)
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if given.docs and not given.out:
        parser.error("--docs needs --out, the file that the tables are made of")
    given.chosen = [each for each in (*PEERS, *EXTRAS) if not wanted or each.name in wanted]
    return given


def install(given: argparse.Namespace) -> None:
    """Make every environment before the first measurement, so that no pip runs during one. Its peer reports a failure again."""
    wanted = {each.env: each.packages for each in given.chosen}
    if any(isinstance(each, Peer) and each.server == "seaweed" for each in given.chosen):
        wanted["seaweed"] = SEAWEED
    if given.docs:
        wanted["plot"] = plot.PACKAGES
    for name, packages in wanted.items():
        try:
            envs.environment(given.envs, name, packages)
        except Exception as error:  # noqa: BLE001 - one peer's bad luck is no reason to measure nothing
            say(f"{name} cannot be installed: {error}")


def say(text: str) -> None:
    """Print the progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measure the peers in turn, and store each result at once. Return all results, and the names of failed peers."""
    machine = facts.machine()
    whole: dict[str, Any] = {}
    failed: list[str] = []
    for number, each in enumerate(given.chosen, 1):
        say(f"[{number}/{len(given.chosen)}] {each.name}: {each.label} ...")
        begin = time.monotonic()
        try:
            found = run_peer(each, given) if isinstance(each, Peer) else run_extra(each, given)
        except Exception as error:  # noqa: BLE001 - whatever became of one, the others are to be measured
            failed.append(each.name)
            say(f"{each.name} failed: {type(error).__name__}: {error}")
            found = {"failed": f"{type(error).__name__}: {error}"}
        else:
            rates = [f"{key.removesuffix('_per_s')} {found[key]:,.0f}/s" for key in table.RATES if key in found]
            say(f"    {', '.join([*rates, f'{time.monotonic() - begin:.0f} s'])}")
        whole = table.add(whole or table.load(given.out), each.name, found, machine, peer=isinstance(each, Peer))
        if given.out:
            given.out.write_text(json.dumps(whole, indent=1) + "\n")
    return whole, failed


def main() -> int:
    """Install, measure, and write the results."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that servers and workers are stopped
    given = options()
    if given.list:
        for each in (*PEERS, *EXTRAS):
            print(f"{each.name:24} {each.label}")
        return 0
    install(given)
    whole, failed = measure(given)
    table.show(whole)
    if given.docs:
        document.write(whole, given.out)
        plot.run(given.out, plot.PLACE, given.envs)
    if failed:
        say(f"failed: {', '.join(failed)}; why is above" + (f", and in {given.out}" if given.out else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
