"""What tests in virtual time share: an App on a virtual loop, a worker that drains it, and a decorator that runs a test."""

from functools import wraps

from buquet import App
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual


def virtual_app(clock, store=None):
    app = App(store=store or MemoryStore(clock), clock=clock)
    app.background = Background(clock.loop)
    return app


async def drain(app, **options):
    await app.worker(heartbeat_thread=False, drain=True, **options).arun()


def in_virtual_time(*rig):
    """Return a decorator that runs a test coroutine in virtual time. Its arguments are made from the clock by `rig`."""

    def virtual(test):
        def run():
            run_virtual(lambda clock: test(*(make(clock) for make in rig)))

        wraps(test)(run)
        del run.__wrapped__  # pytest would take the coroutine's parameters for fixtures
        return run

    return virtual
