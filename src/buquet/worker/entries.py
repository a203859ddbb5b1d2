"""Putting a claim's task back after a defect, and its entry after the session that listed the claim was lost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import StoreError, UnreadableRecord
from buquet.records import Task
from buquet.store.retrying import pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.store.register import Register
    from buquet.worker.fleet import Reaper
    from buquet.worker.session import Listing

log = logging.getLogger("buquet.worker")


async def put_back(reaper: Reaper, listing: Listing, lost: Callable[[], bool]) -> bool:
    """Make a claim's task pending again, however long the store refuses that; False when the session was `lost` before."""
    tries, problem = 0, ""
    while not lost():
        try:
            await reaper.put_back(listing)
        except Exception as error:  # noqa: BLE001 - whatever it is, the claim must not stay listed for the worker's life
            if problem != str(error):
                problem = str(error)
                log.error("task %s cannot be put back yet: %s", listing.task, error)  # noqa: TRY400 - the text says all
            await pause(reaper.clock, tries)
            tries += 1
        else:
            return True
    return False


async def put_entry_back(register: Register, worker: str, listing: Listing) -> None:
    """Write a claim's entry again: a heartbeat may have deleted it, trusting in a session that is gone now."""
    tries = 0
    while True:
        try:
            held = await register.read(Task, keys.task(listing.task))
            task = held.record if held else None
            if task is not None and (task.state, task.token, task.worker) == ("running", listing.token, worker):
                await register.reads.put(task.entry, b"")
        except UnreadableRecord as error:
            log.error("%s", error)  # noqa: TRY400 - the text says all; fsck puts the entry back once it can be read
        except StoreError as error:  # a lasting no, such as a full disk: without the entry nobody would find the task
            log.error("the entry of task %s cannot be put back yet: %s", listing.task, error)  # noqa: TRY400
            await pause(register.clock, tries)
            tries += 1
            continue
        return
