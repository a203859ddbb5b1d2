"""`each_of`: results in order, a bound that holds, and nothing left running after an error or a cancellation."""

import asyncio

import pytest

from buquet.concurrency import each_of


class Work:
    """Sleeps for as many milliseconds as its item says; counts how many calls run."""

    def __init__(self):
        self.running = self.most = 0
        self.begun = []

    async def __call__(self, item):
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.append(item)
        try:
            await asyncio.sleep(abs(item) / 1000)
            if item < 0:
                raise ValueError(item)
            return item * 10
        finally:
            self.running -= 1


async def spread(items):
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize("source", [list, iter, spread])
async def test_the_results_are_in_the_order_of_the_items_and_the_bound_holds(source):
    work = Work()
    items = [5, 1, 3, 2, 4, 1, 2]
    assert await each_of(source(items), work, 3) == [item * 10 for item in items]
    assert (work.most, work.running, work.begun) == (3, 0, items)


@pytest.mark.parametrize("source", [list, iter, spread])
async def test_without_items_nothing_is_called(source):
    work = Work()
    assert await each_of(source([]), work, 3) == []
    assert work.begun == []


async def test_items_are_taken_only_when_there_is_room():
    taken = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number

    async def work(number):
        assert len(taken) <= number + 3
        await asyncio.sleep(0)

    await each_of(items(), work, 2)
    assert taken == list(range(10))


@pytest.mark.parametrize("source", [list, spread])
async def test_the_first_error_cancels_the_others_and_begins_no_more(source):
    work = Work()
    with pytest.raises(ValueError, match="-2"):
        await each_of(source([5000, -2, 5000, 5000, 5000]), work, 3)
    assert work.running == 0
    assert work.begun == [5000, -2, 5000]


async def test_an_error_of_the_source_cancels_what_runs():
    work = Work()

    async def broken():
        yield 5000
        raise KeyError("gone")

    with pytest.raises(KeyError):
        await each_of(broken(), work, 3)
    assert work.running == 0


async def test_a_cancellation_ends_what_runs():
    work = Work()
    task = asyncio.create_task(each_of([5000] * 5, work, 2))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (work.running, len(work.begun)) == (0, 2)


async def test_work_that_is_cancelled_from_elsewhere_cancels_all():
    future = asyncio.get_running_loop().create_future()

    async def work(item):
        await (future if item == 1 else asyncio.sleep(5))

    asyncio.get_running_loop().call_later(0.01, future.cancel)
    with pytest.raises(asyncio.CancelledError):
        await each_of([0, 1, 2], work, 3)
