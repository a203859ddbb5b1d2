"""fsck's part on runs: each open one has its entry, and no other entry is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from buquet import keys
from buquet.errors import UnreadableRecord
from buquet.operate.strangers import is_stranger
from buquet.operate.sweep import each_key, side_by_side
from buquet.records import TERMINAL, Task
from buquet.workflow.limits import check_tasks
from buquet.workflow.records import OVER, RunRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.store.base import Listed
    from buquet.store.register import Register


class _Finding(Protocol):
    repaired: bool


class _Find(Protocol):
    def __call__(self, kind: str, key: str, detail: str) -> _Finding: ...


async def check_runs(register: Register, find: _Find, foreign: Callable[[str], None], *, repair: bool) -> None:
    """Look at every run and at every entry of an open one; with `repair`, put missing entries back and delete stale ones."""

    async def look(listed: Listed) -> None:
        if is_stranger(listed.key):
            foreign(listed.key)
        else:
            await _check_run(register, listed, find, repair)

    await side_by_side(look, each_key(register.reads, keys.RUNS))
    await side_by_side(lambda each: _check_entry(register, each, find, repair), each_key(register.reads, keys.OPEN))


async def _check_run(register: Register, listed: Listed, find: _Find, repair: bool) -> None:
    try:
        held = await register.read(RunRecord, listed.key)
    except UnreadableRecord as error:
        find("unreadable record", listed.key, str(error))
        return
    if held is None:
        return
    run = held.record
    try:
        check_tasks(run)
    except UnreadableRecord as error:
        find("unreadable record", listed.key, str(error))
        return
    if run.state in OVER:
        return
    entry = keys.open_run(run.id, run.gen)
    if await register.reads.get(entry) is None:
        finding = find("entry missing", held.key, f"the run is not over, and its entry {entry} is not there")
        if repair:
            await register.reads.put(entry, b"")
            finding.repaired = True


async def _check_entry(register: Register, listed: Listed, find: _Find, repair: bool) -> None:
    parsed = keys.parse_open(listed.key)
    if parsed is None:
        return  # named with the other strangers
    run_id, gen = parsed
    if not await _is_over(register, run_id, gen):
        return
    finding = find("stale entry", listed.key, f"generation {gen} of this run is over: a PUT that landed late has left this")
    if repair:
        await register.reads.delete(listed.key)
        finding.repaired = True
        # the key of a pruned run may have been started anew meanwhile, which counts from generation 1 again
        if not await _is_over(register, run_id, gen):
            await register.reads.put(listed.key, b"")


async def _is_over(register: Register, run_id: str, gen: int) -> bool:
    """Tell whether a generation of a run is over, or its run was pruned; one that may be about to open is not."""
    try:
        # the start's task first: it ends after the run's record is there
        start = await register.read(Task, keys.task(run_id))
        held = await register.read(RunRecord, keys.run(run_id))
    except UnreadableRecord:
        return False  # reported with the record
    if held is not None:
        return gen < held.record.gen or (gen == held.record.gen and held.record.state in OVER)
    return start is None or start.record.state in TERMINAL
