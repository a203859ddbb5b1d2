"""`make proof`: a bounded search of all models, with their rules as they are and with one taken away.

Prints a line a search and exits 1 when a rule taken away shows nothing, or the rules as they are show something.
"""

from __future__ import annotations

import sys
import time

import cursors
import finding
import run_runs
import run_tasks
import runs
import tasks

AS_THEY_ARE = [
    ("A0", 1),
    ("A", 0),
    ("B1", 0),
    ("B", 0),
    ("C", 0),
    ("C2", 0),
    ("D", 0),
    ("F", 0),
    ("F2", 0),
    ("G", 1),
    ("L", 0),
    ("O", 0),
]
"""Small worlds of run_tasks, with so many faults."""
TAKEN_AWAY = [
    ("A0", "i3", "text", 0),
    ("C", "take", "text", 0),
    ("D", "hbdel", "lookup", 0),
    ("B1", "hour", "text", 0),
    ("F", "cx", "text", 0),
    ("F2", "mbx", "text", 0),
    ("G", "screate", "resend", 1),
    ("L", "tok", "worker", 0),
]
MOST = 60_000
"""States of a search whose end is not waited for."""
RUNS = [name for name, graph in run_runs.B.items() if graph.get("K") != 2]


def search_tasks(name, flags, fb, most, seconds):
    """Search a world of section 6; return its states, whether that was all, and what was found."""
    config, first = run_tasks.configs(name, fb)
    model = tasks.Model({**tasks.MEND, **flags}, config)
    result = tasks.explore(model, first, most, seconds, 1)
    return result["states"], result["full"], [what for what, _, _ in result["found"]]


def say(what, states, seconds, verdict):
    """Print a line."""
    print(f"{what:44} {states:8} states {seconds:6.1f} s  {verdict}", flush=True)


def main():
    """Search everything."""
    wrong = 0
    for name, fb in AS_THEY_ARE:
        begun = time.perf_counter()
        states, full, found = search_tasks(name, {}, fb, MOST, 600)
        say(
            f"tasks {name}, {fb} faults",
            states,
            time.perf_counter() - begun,
            found or ("all of them" if full else "so far nothing"),
        )
        wrong += bool(found)
    for name, flag, value, fb in TAKEN_AWAY:
        begun = time.perf_counter()
        states, _, found = search_tasks(name, {flag: value}, fb, 3_000_000, 600)
        say(
            f"tasks {name} with {flag}={value}",
            states,
            time.perf_counter() - begun,
            f"shows: {found[0][:80]}" if found else "NOTHING",
        )
        wrong += not found
    for name in RUNS:
        states, _, found, seconds = runs.check(runs.cfg(muts=(), maxstates=MOST, **run_runs.B[name]))
        limit = found.pop("(state limit)", None) is not None
        say(f"runs {name}", states, seconds, sorted(found) or ("so far nothing" if limit else "all of them"))
        wrong += bool(found)
    for rule, name in run_runs.M:
        states, _, found, seconds = runs.check(runs.cfg(muts=(rule,), **run_runs.B[name]))
        found.pop("(state limit)", None)
        say(f"runs {name} with {rule}", states, seconds, f"shows: {min(found)}" if found else "NOTHING")
        wrong += not found
    wrong += finding.main() + cursors.main()
    print("all as it should be" if not wrong else f"{wrong} searches are not as they should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
