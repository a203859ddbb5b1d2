"""Deterministic simulation: the real queue and worker in virtual time, on a bucket and a network that misbehave, by a seed.

`simulate(seed)` plays one seed; `buquet-sim --seeds 1000` plays many. docs/proof.md says what is simulated and what is judged.
"""

from buquet.testing.simulation.play import SeedResult, simulate

__all__ = ["SeedResult", "simulate"]
