"""What a user's own tests need: an App in memory, and its tasks worked off in the test's own process."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from buquet.app import App
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import VirtualClock, VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Generator


def run_until_idle(app: App, *, virtual: bool = False) -> None:
    """Work off every task that the App has a handler for, also delayed ones and retries, in this process.

    With `virtual`, a delay of a day takes no time. Handlers must then be async, as threads know nothing of virtual time, and the
    App must be on `memory:`. Raises nothing for a task that fails: ask its handle.

    >>> from buquet import App
    >>> app = App("memory:")
    >>> @app.task
    ... async def double(n: int) -> int:
    ...     return 2 * n
    >>> handle = double.options(delay=86_400).submit(4)
    >>> run_until_idle(app, virtual=True)
    >>> handle.result()
    8
    """
    if not virtual:
        app.worker(drain=True).run()
        return
    store = app.client.store
    if not isinstance(store, MemoryStore):
        msg = f"virtual time needs an App on memory:, and this one is on {app.url}"
        raise TypeError(msg)
    loop = VirtualLoop()
    with _virtual(app, store, loop):
        try:
            worker = app.worker(drain=True, heartbeat_thread=False)
            worker.longest_drain_wait = 3600.0  # it has no others, and is woken when something is due
            loop.run_until_complete(worker.arun())
            loop.run_until_complete(app.client.ringer.flush())
        finally:
            loop.close()
            asyncio.set_event_loop(None)


@contextmanager
def _virtual(app: App, store: MemoryStore, loop: VirtualLoop) -> Generator[None]:
    """Put the App on a virtual loop and clock for a while, which begins at the real time of now."""
    client = app.client
    clock = VirtualClock(loop)
    clock.skew = app.clock.now() - clock.now()
    real, background = app.clock, client.ringer.background
    registers = (client.register, client.ringer.register)
    parts = (app, client, store, *registers, *(each.reads for each in registers))
    # a ring that is under way on the real loop would wait by the one clock for a time of the other
    app.background.run(client.ringer.flush, "run_until_idle")
    for part in parts:
        part.clock = clock
    client.ringer.use(clock, Background(loop))
    try:
        yield
    finally:
        for part in parts:
            part.clock = real
        client.ringer.use(real, background)


@contextmanager
def in_memory(app: App) -> Generator[App]:
    """Put an App, such as the module-level one of the code under test, on a fresh store in memory for a while.

    >>> from buquet import App
    >>> app = App("s3://production")
    >>> @app.task
    ... def double(n: int) -> int:
    ...     return 2 * n
    >>> with in_memory(app):
    ...     handle = double.submit(4)
    ...     run_until_idle(app)
    ...     handle.result()
    8
    """
    with app.on_store(MemoryStore(app.clock)):
        yield app


class MemoryApp(App):
    """An App on a store in memory that works its own tasks off; the fixture `buquet_app` gives one."""

    def __init__(self) -> None:
        super().__init__("memory:")

    def run_until_idle(self, *, virtual: bool = False) -> None:
        """Do what the function `run_until_idle` does, for this App."""
        run_until_idle(self, virtual=virtual)
