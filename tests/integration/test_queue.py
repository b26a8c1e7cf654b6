from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.queue.stream import WorkQueue
from tests.integration.waiting import eventually

LEASE_MS = 400


@pytest.fixture
async def queue(redis: Redis) -> WorkQueue:
    made = WorkQueue(redis, "test", LEASE_MS)
    await made.ensure()
    await made.ensure()
    return made


async def payloads(queue: WorkQueue, consumer: str, count: int = 10) -> list[bytes]:
    return [entry.payload for entry in await queue.read(consumer, count, block_ms=1)]


async def test_entries_come_in_order_each_to_one_consumer(queue):
    await queue.add([b"%d" % i for i in range(5)])
    assert await queue.backlog() == (5, 0)
    first, second = await queue.read("a", 2, 1), await queue.read("b", 10, 1)
    assert [entry.payload for entry in (*first, *second)] == [b"0", b"1", b"2", b"3", b"4"]
    assert {entry.deliveries for entry in (*first, *second)} == {1}
    assert await queue.backlog() == (0, 5)


async def test_done_deletes_and_the_backlog_stays_true(queue, redis):
    await queue.add([b"%d" % i for i in range(3)])
    for left in (2, 1):
        (entry,) = await queue.read("a", 1, 1)
        assert await queue.backlog() == (left, 1)
        await queue.done(entry)
        assert await queue.backlog() == (left, 0)
        assert await redis.xlen("hibug2:queue:test") == left
    await queue.add([b"more"])
    assert await queue.backlog() == (2, 0)
    for entry in reversed(await queue.read("a", 2, 1)):
        await queue.done(entry)
    assert await queue.backlog() == (0, 0)


async def test_an_entry_whose_consumer_went_silent_goes_to_another_and_is_counted(queue):
    await queue.add([b"x"])
    (first,) = await queue.read("silent", 1, 1)
    assert await payloads(queue, "other") == []
    (again,) = await eventually(lambda: queue.read("other", 1, 1))
    assert (again.id, again.payload, again.deliveries) == (first.id, b"x", 2)
    (third,) = await eventually(lambda: queue.read("third", 1, 1))
    assert third.deliveries == 3
    await queue.done(third)
    await asyncio.sleep(LEASE_MS / 1000)
    assert await payloads(queue, "other") == []


async def test_an_entry_that_is_kept_is_not_claimed(queue):
    await queue.add([b"x"])
    (entry,) = await queue.read("a", 1, 1)
    end = time.monotonic() + 2 * LEASE_MS / 1000
    while time.monotonic() < end:
        await queue.keep("a", entry)
        assert await payloads(queue, "b") == []
    (claimed,) = await eventually(lambda: queue.read("b", 1, 1))
    assert claimed.deliveries == 2  # keeping counts no delivery


async def test_a_silent_consumers_entry_is_found_behind_many_that_are_kept(queue):
    await queue.add([b"%d" % i for i in range(60)])
    kept = await queue.read("busy", 59, 1)
    (silent,) = await queue.read("silent", 1, 1)

    async def claim():
        for entry in kept:
            await queue.keep("busy", entry)
        return await queue.read("other", 1, 1)

    (found,) = await eventually(claim)
    assert found.id == silent.id


async def test_whatever_happens_to_consumers_every_entry_is_handled(queue):
    await queue.add([b"%d" % i for i in range(60)])
    handled: Counter[bytes] = Counter()

    async def consume(name: str, dies_after: int) -> None:
        taken = 0
        while len(handled) < 60:
            for entry in await queue.read(name, 3, block_ms=20):
                taken += 1
                if taken == dies_after:
                    return  # with what it had in hand
                handled[entry.payload] += 1
                await queue.done(entry)

    await asyncio.wait_for(asyncio.gather(consume("a", 5), consume("b", 11), consume("c", 10**6)), 20)
    assert set(handled) == {b"%d" % i for i in range(60)}
    assert await queue.backlog() == (0, 0)


async def test_after_redis_lost_its_data_the_queue_is_made_again(queue, redis):
    await queue.add([b"lost"])
    (entry,) = await queue.read("a", 1, 1)
    await redis.flushall()
    assert await queue.backlog() == (0, 0)
    with pytest.raises(ResponseError, match="NOGROUP"):
        await queue.read("a", 1, 1)
    await queue.done(entry)
    await queue.add([b"early"])  # before the group is there
    await queue.ensure()
    await queue.add([b"late"])
    assert await queue.backlog() == (2, 0)
    assert await payloads(queue, "a") == [b"early", b"late"]


async def test_a_waiting_reader_gets_what_is_added(queue):
    waiting = asyncio.create_task(queue.read("a", 1, block_ms=10_000))
    await queue.add([b"x"])
    assert [entry.payload for entry in await asyncio.wait_for(waiting, 5)] == [b"x"]


async def test_a_task_that_talks_to_redis_ends_when_it_is_cancelled_at_whatever_moment(redis):
    async def talk() -> None:
        while True:
            await redis.get("key")

    for turns in range(300):
        talking = asyncio.create_task(talk())
        for _ in range(turns % 30):
            await asyncio.sleep(0)
        talking.cancel()
        _, still = await asyncio.wait([talking], timeout=5)
        assert not still
        assert await redis.incr("count") == turns + 1  # and no answer goes to the wrong call
