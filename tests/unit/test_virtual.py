"""Virtual time: a year costs nothing, its order is that of real time, and a test that would hang fails."""

import asyncio
import uuid

import pytest

from buquet.testing.virtual import START, VirtualClock, run_virtual


@pytest.mark.timeout(10)
def test_a_year_takes_no_time():
    async def year(clock):
        await clock.sleep(365 * 86_400)
        return clock.now() - START, clock.monotonic()

    assert run_virtual(year) == (365 * 86_400, 365 * 86_400)


def test_what_is_due_earlier_runs_earlier():
    async def main(clock):
        order = []

        async def note(seconds):
            await asyncio.sleep(seconds)
            order.append((seconds, clock.monotonic()))

        await asyncio.gather(*(note(seconds) for seconds in (30, 0.5, 7, 0)))
        return order

    assert run_virtual(main) == [(0, 0), (0.5, 0.5), (7, 7), (30, 30)]


def test_a_timeout_comes_when_it_should():
    async def main(clock):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.sleep(3600)
        return clock.monotonic()

    assert run_virtual(main) == 10


def test_waiting_for_ever_is_an_error():
    async def main(clock):
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="wait for ever"):
        run_virtual(main)


def test_time_stands_still_while_code_runs():
    async def main(clock):
        before = clock.now()
        for _ in range(1000):
            await asyncio.sleep(0)
        return clock.now() - before

    assert run_virtual(main) == 0


def test_a_skewed_clock_is_wrong_about_the_hour_and_not_about_its_passing():
    async def main(clock):
        skewed = VirtualClock(clock.loop, seed=1, skew=-100)
        before = skewed.monotonic()
        await skewed.sleep(5)
        return clock.now() - skewed.now(), skewed.monotonic() - before

    assert run_virtual(main) == (100, 5)


def test_one_seed_is_one_course_of_events():
    async def main(clock):
        return [clock.new_id(), clock.new_op(), clock.jitter(0.5)]

    assert run_virtual(main, 1) == run_virtual(main, 1)
    assert run_virtual(main, 1) != run_virtual(main, 2)


def test_what_is_left_running_is_cancelled_at_the_end():
    ended = []

    async def main(clock):
        async def endless():
            try:
                await asyncio.sleep(1e9)
            finally:
                ended.append(clock.monotonic())

        task = asyncio.create_task(endless())
        await clock.sleep(1)
        return task

    assert run_virtual(main).cancelled()
    assert ended == [1]
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_block_moves_the_time_on():
    async def main(clock):
        clock.block(5)
        return clock.monotonic()

    assert run_virtual(main) == 5


def test_ids_of_one_millisecond_go_up_and_are_uuids():
    async def main(clock):
        return [clock.new_id() for _ in range(1000)]

    for seed in range(20):
        ids = run_virtual(main, seed)
        assert ids == sorted(set(ids))
        assert all(uuid.UUID(each).version == 7 and uuid.UUID(each).variant == uuid.RFC_4122 for each in ids)
        assert len({each[:12] for each in ids}) == 1
