"""The waits between attempts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buquet import Backoff, UsageError
from buquet.clock import Clock

fixed = settings(derandomize=True, deadline=None, database=None)


def waits(backoff, count):
    return [backoff.seconds(number, Clock(1)) for number in range(1, count + 1)]


def test_it_grows_by_its_factor_up_to_its_maximum():
    assert waits(Backoff(initial=1, factor=2, max=10, jitter=0), 6) == [1, 2, 4, 8, 10, 10]
    assert waits(Backoff(initial=5, factor=1, jitter=0), 3) == [5, 5, 5]
    assert waits(Backoff(initial=0, jitter=0), 3) == [0, 0, 0]
    assert waits(Backoff(initial=100, max=10, jitter=0), 1) == [10]


def test_the_default_waits_from_a_second_to_five_minutes():
    assert (Backoff().initial, Backoff().factor, Backoff().max, Backoff().jitter) == (1, 2, 300, 0.2)


@fixed
@given(
    initial=st.floats(0, 1e6),
    factor=st.floats(1, 1e4),
    most=st.floats(0, 3e8),
    jitter=st.floats(0, 1),
    failures=st.integers(1, 10**9),
    seed=st.integers(0, 100),
)
def test_no_wait_is_negative_or_longer_than_the_maximum_and_its_spread(initial, factor, most, jitter, failures, seed):
    wait = Backoff(initial, factor, most, jitter).seconds(failures, Clock(seed))
    assert 0 <= wait <= most * (1 + jitter)
    assert isinstance(wait, int | float)


def test_a_huge_factor_meets_the_maximum_and_no_overflow():
    assert waits(Backoff(initial=1, factor=1e5, max=60, jitter=0), 200)[-1] == 60


@fixed
@given(failures=st.integers(1, 100))
def test_without_jitter_no_wait_is_shorter_than_the_one_before(failures):
    backoff = Backoff(initial=0.5, factor=1.7, max=100, jitter=0)
    assert backoff.seconds(failures, Clock(1)) <= backoff.seconds(failures + 1, Clock(1))


def test_jitter_spreads_to_both_sides_and_comes_from_the_clock():
    clock = Clock(1)
    spread = [Backoff(initial=10, factor=1, jitter=0.2).seconds(1, clock) for _ in range(200)]
    assert 8 <= min(spread) < 8.5
    assert 11.5 < max(spread) <= 12
    assert Backoff().seconds(1, Clock(5)) == Backoff().seconds(1, Clock(5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial": -1},
        {"factor": 0.5},
        {"max": -1},
        {"jitter": -0.1},
        {"jitter": 1.1},
        *({name: float("nan")} for name in ("initial", "factor", "max", "jitter")),
        {"max": float("inf")},
        {"factor": "2"},
    ],
    ids=str,
)
def test_a_backoff_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError, match="Backoff needs"):
        Backoff(**wrong)
