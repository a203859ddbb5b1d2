"""The blocking twin of an async method: its name, its help, its signature, and what it does on a running loop."""

import inspect

import pytest

from buquet import App
from buquet.errors import WrongLoop
from buquet.queue.background import Background, blocking


class Counter:
    def __init__(self):
        self.home = self
        self.background = Background()

    async def aadd(self, number: int, *, times: int = 1) -> int:
        """Return a product.

        Raises nothing.
        """
        return number * times

    add = blocking(aadd)


def test_a_twin_takes_the_same_arguments_and_returns_the_result():
    counter = Counter()
    assert counter.add(3, times=4) == 12
    counter.background.stop()


def test_a_twin_has_a_name_a_docstring_and_a_signature():
    assert Counter.add.__qualname__ == "Counter.add"
    assert inspect.getdoc(Counter.add) == "Return a product. Blocks; `aadd` is its async twin.\n\nRaises nothing."
    assert str(inspect.signature(Counter().add)) == "(number: int, *, times: int = 1) -> int"
    assert not inspect.iscoroutinefunction(Counter.add)


async def test_on_a_loop_where_it_would_wait_for_ever_a_twin_names_the_async_one():
    app = App("memory:")
    import asyncio

    with app.background.serving(asyncio.get_running_loop()), pytest.raises(WrongLoop, match="`await apause_queue\\(\\)`"):
        app.pause_queue("default")
