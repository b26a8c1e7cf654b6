"""The queue that a process keeps for itself; the one in Redis is compared with it among the integration tests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Unavailable
from shared.llm.rate import Bucket, Queue, Rate

LIMITS = st.one_of(st.integers(1, 20), st.integers(21, 5000))


def admitted(queue: Queue, arrivals: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """(time at which it goes, tokens) of each arrival (time, tokens) that gets a place at once."""
    gone = []
    for at, tokens in arrivals:
        placed, wait_s, _ = queue.take(at, tokens)
        if placed:
            gone.append((at + wait_s, tokens))
    return gone


def most_in_a_minute(gone: list[tuple[float, float]]) -> float:
    return max((sum(n for at, n in gone if start <= at < start + 60 - 1e-6) for start, _ in gone), default=0)


@given(LIMITS, st.lists(st.floats(0, 200), min_size=1, max_size=400))
def test_no_minute_sees_more_requests_than_the_limit(limit, arrivals):
    gone = admitted(Queue(Bucket.of(limit), Bucket.of(0)), [(at, 5) for at in sorted(arrivals)])
    assert most_in_a_minute([(at, 1) for at, _ in gone]) <= limit


@given(st.integers(1000, 100_000), st.lists(st.tuples(st.floats(0, 200), st.integers(1, 1000)), max_size=200))
def test_no_minute_sees_more_tokens_than_the_limit(limit, arrivals):
    bucket = Bucket.of(limit)
    gone = admitted(Queue(Bucket.of(0), bucket), sorted(arrivals))
    beyond = max((tokens - bucket.capacity for _, tokens in gone), default=0)  # of one call that is large for the limit
    assert most_in_a_minute(gone) <= limit + max(0, beyond) + 1e-3


@given(LIMITS, LIMITS, st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=2, max_size=100))
def test_who_has_a_place_goes_in_the_order_of_coming(requests, tokens, arrivals):
    gone = admitted(Queue(Bucket.of(requests), Bucket.of(tokens)), sorted(arrivals))
    assert [at for at, _ in gone] == pytest.approx(sorted(at for at, _ in gone), abs=1e-6)


def test_a_call_larger_than_the_limit_passes_alone():
    queue = Queue(Bucket.of(0), Bucket.of(100))
    placed, wait_s, what = queue.take(0, 1000)
    assert (placed, what) == (True, "tokens")
    assert 60 < wait_s < 1000


def test_a_long_queue_is_not_joined_and_what_was_too_much_comes_back():
    queue = Queue(Bucket.of(0), Bucket.of(6600))  # 100 a second, 600 at once
    assert queue.take(0, 600) == (True, 0, "")
    assert queue.take(0, 2000) == (True, 20, "tokens")
    assert queue.take(0, 1) == (False, 10, "queue")
    queue.give(1900)
    placed, wait_s, _ = queue.take(0, 100)
    assert (placed, wait_s) == (True, pytest.approx(2))


def test_no_limit_no_wait():
    queue = Queue(Bucket.of(0), Bucket.of(0))
    assert all(queue.take(0, 10**9) == (True, 0, "") for _ in range(1000))


async def test_a_pause_longer_than_the_patience_is_not_waited_for():
    rate = Rate(None, "http://x/v1", "m", 0, 0)
    assert await rate.acquire(10, 30) < 0.1
    await rate.pause(100)
    with pytest.raises(Unavailable, match="no calls in the next"):
        await rate.acquire(10, 30)


async def test_a_pause_is_waited_for():
    rate = Rate(None, "http://x/v1", "m", 600, 100_000)
    await rate.pause(0.2)
    assert await rate.acquire(10, 30) >= 0.2
