"""`buquet-sim`: play many seeds, in several processes, and print the command that repeats each one that found something."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buquet.clock import Clock
from buquet.testing.simulation.play import SeedResult, simulate

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(add_completion=False)
EVERY = 10.0
"""Seconds between two lines of progress."""
STOPPED = 130
"""Exit status after Ctrl-C, as shells have it, when nothing was found until then."""


def many(start: int, seeds: int, jobs: int) -> Iterator[SeedResult]:
    """Play seeds from `start` on, side by side in `jobs` processes; yield what each came to, in no certain order.

    >>> sum(len(result.findings) for result in many(1, 2, 1))
    0
    """
    numbers = range(start, start + seeds)
    if jobs == 1:
        yield from map(simulate, numbers)
        return
    # Ctrl-C reaches every process of a terminal: this one answers it, and ends the others
    with multiprocessing.get_context("spawn").Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(simulate, numbers, chunksize=5)


@app.command()
def run(
    seeds: Annotated[int, typer.Option(help="How many seeds to play.", min=1)] = 1000,
    start: Annotated[int, typer.Option(help="The first seed.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Play this one only.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="With --seed: print every request and event.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON value a finding, and one at the end.")] = False,
    hashes: Annotated[
        Path | None,
        typer.Option(
            help="Compare each seed's trace hash with this file of `seed hash` lines. Write the file if it does not exist."
        ),
    ] = None,
) -> None:
    """Simulate the queue under faults, and say what was found wrong.

    Exit status 1 when something was, or when a trace hash differs. Ctrl-C ends it early, with a summary.
    """
    if seed is not None:
        result = simulate(seed, keep=trace)
        if trace:
            print("\n".join(result.lines))
        report(result, as_json=as_json)
        print(json.dumps(summary([result])) if as_json else f"seed {seed}: trace {result.hash}, {len(result.findings)} findings")
        raise typer.Exit(bool(result.findings))
    clock = Clock()
    begun = told = clock.monotonic()
    done = found = requests = tasks = 0
    stopped = False
    traces: dict[int, str] = {}
    try:
        for result in many(start, seeds, jobs):
            done += 1
            requests += result.requests
            tasks += result.tasks
            found += bool(result.findings)
            traces[result.seed] = result.hash
            report(result, as_json=as_json)
            now = clock.monotonic()
            if now - told >= EVERY and not as_json:
                told = now
                rate = done / (now - begun)
                print(f"{done} of {seeds} seeds, {found} with findings, {rate:.1f} a second", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        stopped = True  # what was played so far is told all the same
    seconds = round(clock.monotonic() - begun, 1)
    total = {"seeds": done, "start": start, "with_findings": found, "requests": requests, "tasks": tasks, "seconds": seconds}
    text = f"{done} seeds from {start} on, {tasks} tasks, {requests} requests, in {seconds:g} s: {found} with findings"
    print(json.dumps(total) if as_json else text + ", and stopped" * stopped)
    differing = compare_hashes(hashes, traces, complete=not stopped) if hashes else []
    if differing:
        message = f"{len(differing)} of {done} seeds have another trace hash than in {hashes}: {', '.join(map(str, differing))}"
        print(json.dumps({"other_hash": differing}) if as_json else message)
    raise typer.Exit(1 if found or differing else STOPPED * stopped)


def compare_hashes(path: Path, traces: dict[int, str], *, complete: bool) -> list[int]:
    """Return the seeds whose trace hash differs from the file's, or that the file lacks. Write the file if it does not exist.

    An interrupted run (not `complete`) writes no file.
    """
    if path.exists():
        recorded = dict(line.split() for line in path.read_text().splitlines())
        return sorted(seed for seed, digest in traces.items() if recorded.get(str(seed)) != digest)
    if complete:
        path.write_text("".join(f"{seed} {digest}\n" for seed, digest in sorted(traces.items())))
    return []


def report(result: SeedResult, *, as_json: bool) -> None:
    """Print what a seed found, and how to see it again."""
    if not result.findings:
        return
    command = f"buquet-sim --seed {result.seed} --trace"
    if as_json:
        print(json.dumps({"seed": result.seed, "found": result.findings, "repeat": command}), flush=True)
        return
    for line in result.findings:
        print(f"seed {result.seed}: {line}")
    print(f"  again, with every request: {command}", flush=True)


def summary(results: list[SeedResult]) -> dict[str, object]:
    """Return the figures of some seeds."""
    return {
        "seeds": len(results),
        "with_findings": sum(bool(result.findings) for result in results),
        "hash": results[0].hash,
        "requests": results[0].requests,
    }


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
