"""Requests and tokens a minute in a real Redis, kept by several clients together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from deploy.local.redis import embedded_redis
from shared.errors import Unavailable
from shared.llm import rate as module
from shared.llm.link import Link
from shared.llm.rate import Bucket, Queue, Rate
from shared.queue.stream import connect


@pytest.fixture
async def limited(redis_url, monkeypatch) -> AsyncIterator[Callable[..., Rate]]:
    """Makes clients of one model, each with a connection of its own; a minute lasts a second."""
    monkeypatch.setattr(module, "_PERIOD_S", 1.0)
    made = []

    def make(requests: int = 0, tokens: int = 0, model: str = "m") -> Rate:
        made.append(connect(redis_url))
        return Rate(Link(made[-1]), "http://x/v1", model, requests, tokens)

    yield make
    for redis in made:
        await redis.aclose()


async def test_requests_a_minute_hold_over_two_clients(limited):
    rates = [limited(requests=22), limited(requests=22)]  # 2 at once, then 20 a period
    times: list[float] = []

    async def go(rate: Rate) -> None:
        await rate.acquire(10, 30)
        times.append(time.monotonic())

    begun = time.monotonic()
    await asyncio.gather(*(go(rates[i % 2]) for i in range(32)))
    assert times[-1] - begun >= (32 - 2) / 20 - 0.01
    for i, at in enumerate(sorted(times)):
        assert i < 2 + (at - begun) * 20 + 1  # at any moment


async def test_tokens_a_minute_hold_over_two_clients_and_what_was_not_used_comes_back(limited):
    rates = [limited(tokens=1100), limited(tokens=1100)]  # 100 at once, then 1000 a period
    begun = time.monotonic()
    await asyncio.gather(*(rates[i % 2].acquire(100, 30) for i in range(16)))
    assert time.monotonic() - begun >= 1.5 - 0.01
    await rates[0].settle(1600, 0)
    assert await rates[1].acquire(100, 30) < 0.09
    assert await rates[1].acquire(100, 30) < 0.19


async def test_models_have_limits_of_their_own(limited):
    await asyncio.gather(*(limited(requests=11).acquire(1, 30) for _ in range(5)))
    assert await limited(requests=11, model="other").acquire(1, 30) < 0.09


async def test_a_long_queue_is_joined_later_and_by_everybody(limited, monkeypatch):
    monkeypatch.setattr(module, "_QUEUE_S", 0.2)
    rates = [limited(tokens=1100), limited(tokens=1100)]
    sizes = [400 if i % 4 == 0 else 20 for i in range(16)]  # large ones are not starved by small ones
    async with asyncio.timeout(20):
        await asyncio.gather(*(rates[i % 2].acquire(size, 30) for i, size in enumerate(sizes)))


async def test_a_pause_holds_for_all_clients(limited):
    one, other = limited(), limited(requests=1000)
    await one.pause(0.3)
    assert await other.acquire(1, 30) >= 0.3
    await one.pause(100)
    await one.pause(0.1)  # does not shorten it
    with pytest.raises(Unavailable, match="no calls in the next"):
        await other.acquire(1, 30)


async def test_a_pause_also_holds_who_has_a_place_already(limited):
    one, other = limited(requests=11), limited(requests=11)
    await asyncio.gather(*(other.acquire(1, 30) for _ in range(2)))
    waiting = asyncio.create_task(other.acquire(1, 30))
    await asyncio.sleep(0.01)
    await one.pause(0.5)
    assert await waiting >= 0.45


async def test_redis_decides_as_a_process_alone_does(limited, redis):
    for costs in ([1] * 12, [3, 0, 1, 9, 1, 1], [20, 1], [2, 2, 2, -4, 2, 9, -5, 1, 1]):
        await redis.flushall()
        here, there = Queue(Bucket(3, 0.5), Bucket(4, 0.5)), limited()
        there._requests, there._tokens = here.requests, here.tokens
        for cost in costs:
            if cost < 0:
                here.give(-cost)
                await there.settle(-cost, 0)
                continue
            placed, wait_s, what = here.take(0, cost)
            found, redis_wait_s, redis_what = await there._take(cost, False)
            assert (found, redis_what) == (placed, what)
            assert redis_wait_s == pytest.approx(wait_s, abs=0.5)


async def test_without_redis_each_process_keeps_the_limit_for_itself(monkeypatch, capsys):
    monkeypatch.setattr(module, "_PERIOD_S", 1.0)
    with embedded_redis() as url:
        redis = connect(url)
        rate = Rate(Link(redis), "http://x/v1", "m", 22, 0)
        await rate.acquire(1, 30)
    begun = time.monotonic()
    await asyncio.gather(*(rate.acquire(1, 30) for _ in range(12)))
    await rate.settle(10, 1)
    assert time.monotonic() - begun >= 10 / 20 - 0.01
    await rate.pause(0.2)
    assert await rate.acquire(1, 30) >= 0.2
    assert capsys.readouterr().out.count("redis is away") == 1
    await redis.aclose()
