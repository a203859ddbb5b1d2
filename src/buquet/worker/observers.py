"""Who hears of a worker's tasks as they go: the log, the journal, those who wait for a result, and watchers such as metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet.journal.lines import is_retried
from buquet.worker.logs import enter_task

if TYPE_CHECKING:
    from buquet.journal.writer import JournalWriter
    from buquet.queue.client import Client
    from buquet.records import Task


class Watcher:
    """Hears of each move of a worker's tasks, on the worker's loop, and must be quick. The record's last event says which."""

    def started(self, task: Task) -> None:
        """Hear of a task that this worker claimed, or took over, and is about to run."""

    def moved(self, task: Task) -> None:
        """Hear of a task that this worker, as its claimant or its reaper, ended or put back."""


class Telling:
    """Tells all of them."""

    def __init__(self, client: Client, journal: JournalWriter) -> None:
        self.client = client
        self.journal = journal
        self.watchers: list[Watcher] = []

    def started(self, task: Task) -> None:
        """Tell of a claim, in the context in which the task will run."""
        enter_task(task)
        for watcher in self.watchers:
            watcher.started(task)

    def moved(self, task: Task) -> None:
        """Tell of a task that this process ended or put back, as its claimant or its reaper, once its record says so."""
        for watcher in self.watchers:
            watcher.moved(task)
        if task.state != "pending":
            self.client.waiting.ended(task.id)
        if task.state != "pending" or is_retried(task):
            self.journal.add(task)
