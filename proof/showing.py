"""Tries rules as they are, then with one after another taken away, and prints a line for each."""

from __future__ import annotations

import sys
import time


def try_flags(flags, searches):
    """Print what each flag of `flags` loses; return whether one is amiss: the rules as they are lose something, or a flag nothing.

    `searches(flag)` yields (world, number of states, what was missed, trace) for one world after another.
    """
    failed = False
    for flag, meaning in flags.items():
        begun, states, shown = time.perf_counter(), 0, None
        for world, number, missed, trace in searches(flag):
            states += number
            if missed:
                shown = f"loses {len(missed)} in '{world}', {len(trace)} steps", trace
                break
        seconds = time.perf_counter() - begun
        verdict = shown[0] if shown else "finds everything"
        print(f"{flag or 'as is':12} {states:8} states {seconds:5.1f} s  {verdict}  ({meaning})", flush=True)
        if shown and "-v" in sys.argv:
            print(*(f"    {line}" for line in shown[1]), sep="\n")
        failed |= bool(shown) == (flag == "")
    return failed
