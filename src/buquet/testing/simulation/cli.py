"""`buquet-sim`: plays many seeds in several processes, and prints the command that repeats each seed with findings."""

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
"""Seconds between two progress lines."""
STOPPED = 130
"""Exit status after Ctrl-C without findings, as in shells."""


def many(start: int, seeds: int, jobs: int) -> Iterator[SeedResult]:
    """Play seeds from `start` on in `jobs` processes, and yield their results in any order.

    >>> sum(len(result.findings) for result in many(1, 2, 1))
    0
    """
    numbers = range(start, start + seeds)
    if jobs == 1:
        yield from map(simulate, numbers)
        return
    # Ctrl-C reaches every process of the terminal: this process handles it, and ends the others
    with multiprocessing.get_context("spawn").Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(simulate, numbers, chunksize=5)


@app.command()
def run(
    seeds: Annotated[int, typer.Option(help="How many seeds to play.", min=1)] = 1000,
    start: Annotated[int, typer.Option(help="The first seed.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Play this seed only.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="With --seed: print every request and event.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON value per seed with findings, and one at the end.")] = False,
    hashes: Annotated[
        Path | None,
        typer.Option(
            help="Compare each seed's trace hash with this file of `seed hash` lines. Write the file if it does not exist."
        ),
    ] = None,
) -> None:
    """Simulate the queue under faults, and print the findings.

    Exit status 1 if there are any, or if a trace hash differs. Ctrl-C ends it early, with a summary.
    """
    clock = Clock()
    begun = last_line = clock.monotonic()
    requests = tasks = findings = with_findings = 0
    stopped = False
    traces: dict[int, str] = {}
    results = many(start, seeds, jobs) if seed is None else iter([simulate(seed, keep=trace)])
    try:
        for result in results:
            traces[result.seed] = result.hash
            requests += result.requests
            tasks += result.tasks
            findings += len(result.findings)
            with_findings += bool(result.findings)
            if trace and seed is not None:
                print("\n".join(result.lines))
            report(result, as_json=as_json)
            now = clock.monotonic()
            if now - last_line >= EVERY and not as_json:
                last_line = now
                line = (
                    f"{len(traces)} of {seeds} seeds, {with_findings} with findings, {len(traces) / (now - begun):.1f} a second"
                )
                print(line, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        stopped = True  # the seeds so far are summarized all the same
    seconds = round(clock.monotonic() - begun, 1)
    if as_json:
        total = {"seeds": len(traces), "start": start, "with_findings": with_findings, "requests": requests, "tasks": tasks}
        print(json.dumps({**total, "seconds": seconds, **({} if seed is None else {"start": seed, "hash": traces[seed]})}))
    elif seed is not None:
        print(f"seed {seed}: trace {traces[seed]}, {findings} findings")
    else:
        text = f"{len(traces)} seeds from {start} on, {tasks} tasks, {requests} requests, in {seconds:g} s"
        print(f"{text}: {with_findings} with findings" + ", and stopped" * stopped)
    differing = compare_hashes(hashes, traces, complete=not stopped) if hashes else []
    if differing:
        message = (
            f"{len(differing)} of {len(traces)} seeds have another trace hash than in {hashes}: {', '.join(map(str, differing))}"
        )
        print(json.dumps({"other_hash": differing}) if as_json else message)
    raise typer.Exit(1 if with_findings or differing else STOPPED * stopped)


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
    """Print the findings of a seed, and the command that repeats it."""
    if not result.findings:
        return
    command = f"buquet-sim --seed {result.seed} --trace"
    if as_json:
        print(json.dumps({"seed": result.seed, "found": result.findings, "repeat": command}), flush=True)
        return
    for line in result.findings:
        print(f"seed {result.seed}: {line}")
    print(f"  again, with every request: {command}", flush=True)


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
