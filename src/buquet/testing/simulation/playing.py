"""One seed from its world to what it came to."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buquet.clock import Clock
from buquet.queue import bell, values
from buquet.testing.simulation.scenario import Play
from buquet.testing.simulation.world import Defects, World
from buquet.worker import finder, logs
from buquet.workflow import committer

if TYPE_CHECKING:
    from collections.abc import Generator


@dataclass
class Outcome:
    """What a seed came to."""

    seed: int
    hash: str
    """Of the whole trace: two runs of a seed that differ in one request differ here."""
    found: list[str] = field(default_factory=list[str])
    lines: list[str] = field(default_factory=list[str])
    requests: int = 0
    tasks: int = 0
    seconds: float = 0.0
    """Of virtual time."""


def simulate(seed: int, *, keep: bool = False) -> Outcome:
    """Play one seed and return what was found wrong; nothing, where all is well. `keep`: with the whole trace in `lines`.

    >>> simulate(1).found
    []
    """
    world = World(seed, keep=keep)
    play = Play(world)
    with _tuned(world), _heard(world):
        try:
            world.loop.run_until_complete(play.run())
        except RuntimeError as error:
            if "for ever" not in str(error):
                raise
            world.watch.say(f"stuck: {error}")
        finally:
            world.close()
    watch = world.watch
    return Outcome(
        seed=seed,
        hash=world.hash.hexdigest(),
        found=watch.found[:20],
        lines=list(world.lines),
        requests=world.told,
        tasks=len(watch.tasks) + len(watch.lives),
        seconds=world.loop.elapsed,
    )


@contextmanager
def _tuned(world: World) -> Generator[None]:
    """Make some sizes small, so that what happens past them happens often; and nothing depend on where the code lies."""
    random = world.random
    tight = Clock(f"sizes of {world.seed}".encode()).random.random() < 0.2  # drawn apart from what the play draws
    changed: tuple[tuple[Any, str, Any], ...] = (
        (bell, "HINTS", random.choice((64, 8, 2))),
        (finder, "PAGE", random.choice((1000, 1000, 3))),
        (values, "INLINE", random.choice((64 << 10, 64 << 10, 8))),
        (committer, "ROOM", 1000 if tight else committer.ROOM),
        (committer, "SMALL", 8 if tight else committer.SMALL),
        (logs, "trace_of", repr),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _heard(world: World) -> Generator[None]:
    """Listen to the log for what the code itself calls a defect, and for nothing else."""
    log = logging.getLogger("buquet")
    before = (log.level, log.propagate, list(log.handlers))
    log.setLevel(logging.ERROR)
    log.propagate = False
    log.handlers = [Defects(world)]
    try:
        yield
    finally:
        log.setLevel(before[0])
        log.propagate = before[1]
        log.handlers = before[2]
