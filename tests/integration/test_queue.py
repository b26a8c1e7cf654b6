from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError, ResponseError
from redis.retry import Retry

from deploy.local.redis import embedded_redis
from shared.queue.stream import Backlog, Effect, Priority, WorkQueue
from tests.integration.waiting import eventually

LEASE_MS = 400
BATCH, INTERACTIVE = Priority.BATCH, Priority.INTERACTIVE
STREAM = "hibug2:queue:test:batch"


@pytest.fixture(params=["valkey", "redis-server"])
def redis_url(request, tmp_path: Path) -> Iterator[str]:
    """Of both servers: what the scripts do must be the same."""
    if request.param == "valkey":
        with embedded_redis() as url:
            yield url
        return
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server here (Debian's package redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server, "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            patience = Retry(ConstantBackoff(0.02), 500, supported_errors=(ConnectionError,))
            with BlockingRedis(port=port, retry=patience) as client:
                assert client.ping()
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


@pytest.fixture
async def queue(redis: Redis) -> WorkQueue:
    made = WorkQueue(redis, "test", LEASE_MS)
    await made.ensure()
    await made.ensure()
    return made


async def add(queue, count, *, priority=BATCH, team="team", job="job", first=0, cap=10**6, left=None) -> int:
    items = [(i, b"%d" % i) for i in range(first, first + count)]
    return await queue.offer(priority, team, job, items, count if left is None else left, cap)


async def take(queue, consumer, count=1):
    """At most `count` entries that are there now."""
    found = []
    while len(found) < count and (entries := await queue.take(consumer)):
        found += entries
    return found


async def payloads(queue: WorkQueue, consumer: str, count: int = 10) -> list[bytes]:
    return [entry.payload for entry in await take(queue, consumer, count)]


async def test_entries_come_in_order_each_to_one_consumer(queue):
    assert await add(queue, 5) == 5
    assert await queue.backlog() == Backlog(5, 0)
    first, second = await take(queue, "a", 2), await take(queue, "b", 10)
    assert [entry.payload for entry in (*first, *second)] == [b"0", b"1", b"2", b"3", b"4"]
    assert [entry.number for entry in (*first, *second)] == [0, 1, 2, 3, 4]
    assert {(e.deliveries, e.team, e.job, e.priority) for e in (*first, *second)} == {(1, "team", "job", BATCH)}
    assert await queue.backlog() == Backlog(0, 5)


async def test_done_deletes_and_the_backlog_stays_true(queue, redis):
    await add(queue, 3)
    for left in (2, 1):
        (entry,) = await take(queue, "a")
        assert await queue.backlog() == Backlog(left, 1)
        await queue.done(entry)
        assert await queue.backlog() == Backlog(left, 0)
        assert await redis.xlen(STREAM) == left
    await add(queue, 1, first=3)
    assert await queue.backlog() == Backlog(2, 0)
    for entry in reversed(await take(queue, "a", 2)):
        await queue.done(entry)
    assert await queue.backlog() == Backlog(0, 0)


async def test_an_entry_whose_consumer_went_silent_goes_to_another_and_is_counted(queue):
    await add(queue, 1)
    (first,) = await take(queue, "silent")
    assert await payloads(queue, "other") == []
    (again,) = await eventually(lambda: take(queue, "other"))
    assert (again.id, again.payload, again.deliveries) == (first.id, b"0", 2)
    (third,) = await eventually(lambda: take(queue, "third"))
    assert third.deliveries == 3
    await queue.done(third)
    await asyncio.sleep(LEASE_MS / 1000)
    assert await payloads(queue, "other") == []


async def test_an_entry_that_is_kept_is_not_claimed(queue):
    await add(queue, 1)
    (entry,) = await take(queue, "a")
    end = time.monotonic() + 2 * LEASE_MS / 1000
    while time.monotonic() < end:
        assert await queue.renew("a", [entry]) == {entry.id}
        assert await payloads(queue, "b") == []
    (claimed,) = await eventually(lambda: take(queue, "b"))
    assert claimed.deliveries == 2  # keeping counts no delivery


async def test_only_the_owner_can_renew_and_it_learns_what_it_lost(queue):
    await add(queue, 3)
    lost, kept, done = await take(queue, "a", 3)
    await queue.release("b", kept)  # not its own
    await queue.release("a", lost)
    (claimed,) = await take(queue, "b")
    assert claimed.id == lost.id
    await queue.done(done)
    assert await queue.renew("a", [lost, kept, done]) == {kept.id}
    assert await queue.renew("b", [lost]) == {lost.id}


async def test_a_silent_consumers_entry_is_found_behind_many_that_are_kept(queue):
    await add(queue, 60)
    kept = await take(queue, "busy", 59)
    (silent,) = await take(queue, "silent")

    async def claim():
        await queue.renew("busy", kept)
        return await take(queue, "other")

    (found,) = await eventually(claim)
    assert found.id == silent.id


async def test_whatever_happens_to_consumers_every_entry_is_handled(queue):
    await add(queue, 60)
    handled: Counter[bytes] = Counter()

    async def consume(name: str, dies_after: int) -> None:
        taken = 0
        while len(handled) < 60:
            for entry in await queue.take(name, block_ms=20):
                taken += 1
                if taken == dies_after:
                    return  # with what it had in hand
                handled[entry.payload] += 1
                await queue.done(entry)

    await asyncio.wait_for(asyncio.gather(consume("a", 5), consume("b", 11), consume("c", 10**6)), 20)
    assert handled == {b"%d" % i: 1 for i in range(60)}
    assert await queue.backlog() == Backlog(0, 0)


async def test_after_redis_lost_its_data_the_queue_is_made_again(queue, redis):
    await add(queue, 1)
    (entry,) = await take(queue, "a")
    await redis.flushall()
    assert await queue.backlog() == Backlog(0, 0)
    with pytest.raises(ResponseError, match="NOGROUP"):
        await queue.take("a")
    await queue.done(entry)
    await add(queue, 1, first=1)  # before the group is there
    await queue.ensure()
    await add(queue, 1, first=2)
    assert await queue.backlog() == Backlog(2, 0)
    assert await payloads(queue, "a") == [b"1", b"2"]


async def test_a_waiting_reader_gets_what_is_added(queue):
    for priority in Priority:
        waiting = asyncio.create_task(queue.take("a", block_ms=10_000))
        await add(queue, 1, priority=priority)
        (entry,) = await asyncio.wait_for(waiting, 5)
        assert (entry.payload, entry.priority) == (b"0", priority)
        await queue.done(entry)


async def test_while_both_wait_three_interactive_entries_come_for_one_of_batch(queue):
    await add(queue, 20, priority=INTERACTIVE)
    await add(queue, 20)
    first = Counter(entry.priority for entry in await take(queue, "a", 16))
    assert first == {INTERACTIVE: 12, BATCH: 4}
    assert len(await take(queue, "a", 100)) == 24  # what is alone has no turn to wait for


async def test_an_item_is_in_the_queue_once_however_often_it_is_offered(queue, redis):
    assert await add(queue, 4) == 4
    assert await add(queue, 6) == 6
    assert await redis.xlen(STREAM) == 6
    assert await queue.in_flight(BATCH, "team", "job") == set(range(6))
    (entry,) = await take(queue, "a")
    await queue.done(entry)
    assert await queue.in_flight(BATCH, "team", "job") == set(range(1, 6))
    await add(queue, 1)
    assert await redis.xlen(STREAM) == 6


async def test_a_team_has_no_more_in_the_queue_than_its_cap_and_another_team_its_own(queue):
    assert await add(queue, 50, cap=8) == 8
    assert await add(queue, 42, first=8, cap=8) == 0
    assert await add(queue, 50, team="other", cap=8) == 8
    assert await add(queue, 50, priority=INTERACTIVE, cap=8) == 8
    for entry in await take(queue, "a", 3):
        await queue.done(entry)
    assert (await queue.backlog()).waiting == 42 + 42 + 42
    # A job says itself how many it has left.
    assert await add(queue, 3, first=8, cap=8, left=42) + await add(queue, 3, priority=INTERACTIVE, first=8, cap=8) == 3


async def test_the_jobs_of_a_team_share_its_cap_also_when_one_has_all_of_it(queue):
    """Two jobs, from two replicas; the first fills the cap, then each gets half as room comes."""
    taken = {"one": await add(queue, 100, job="one", cap=12), "two": 0}
    assert taken["one"] == 12
    for _ in range(12):
        (entry,) = await take(queue, "a")
        await queue.done(entry)
        for job in ("one", "two"):
            taken[job] += await add(queue, 100, job=job, first=taken[job], cap=12)
    flights = [len(await queue.in_flight(BATCH, "team", job)) for job in ("one", "two")]
    assert flights == [6, 6]
    # One that has nothing left to add takes no share.
    await add(queue, 0, job="two")
    for entry in await take(queue, "a", 100):
        await queue.done(entry)
    assert await add(queue, 100, job="one", first=taken["one"], cap=12) == 12


async def test_what_an_effect_does_is_done_with_the_entry_or_not_at_all(queue, redis):
    await add(queue, 1)
    (entry,) = await take(queue, "a")
    with pytest.raises(ResponseError, match="no such"):
        await queue.done(entry, Effect("error('no such')", ()))
    effect = Effect("return redis.call('HSET', K[1], A[1], A[2])", ["results"], ["x", b"\x00\xff"])
    assert await queue.done(entry, effect) == 1
    assert await redis.hget("results", "x") == b"\x00\xff"
    assert await queue.backlog() == Backlog(0, 0)


async def test_what_is_buried_is_listed_by_team_with_its_reason_and_leaves_the_queue(queue, redis):
    await add(queue, 2)
    await add(queue, 1, team="other", job="theirs")
    for entry in await take(queue, "a", 3):
        effect = Effect("redis.call('INCR', K[1]) return 0", ["buried"])
        assert await queue.bury(entry, f"part {entry.number} is bad", effect)
        assert not await queue.bury(entry, "again", effect)  # it is gone: nothing
    assert await redis.get("buried") == b"3"
    assert await queue.backlog() == Backlog(0, 0)
    assert await queue.in_flight(BATCH, "team", "job") == set()
    dead = await queue.dead("team", "job")
    assert [(d.job, d.number, d.payload, d.reason) for d in dead] == [
        ("job", 0, b"0", "part 0 is bad"),
        ("job", 1, b"1", "part 1 is bad"),
    ]
    assert await queue.dead("team", "theirs") == []
    await queue.drop_dead("team", dead[:1], Effect("redis.call('SET', K[1], A[1])", ["dropped"], ["yes"]))
    assert [d.number for d in await queue.dead("team")] == [1]
    assert await redis.get("dropped") == b"yes"
    assert [d.number for d in await queue.dead("other")] == [0]


async def test_the_slots_of_all_workers_are_known_until_they_leave(queue, redis):
    assert await queue.slots() == 0
    await queue.register("a", 3)
    await queue.register("b", 4)
    await queue.register("a", 3)
    assert await queue.slots() == 7
    await add(queue, 1)
    (entry,) = await take(queue, "b")
    await queue.leave("a", 3)
    await queue.leave("b", 4)
    assert await queue.slots() == 0
    consumers = [c["name"] for c in await redis.xinfo_consumers(STREAM, "workers")]
    assert consumers == [b"b"]  # it holds an entry, which must not be lost with it
    (again,) = await eventually(lambda: take(queue, "c"))
    assert again.id == entry.id


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


async def test_more_calls_at_once_than_connections_wait_for_one(redis):
    assert await asyncio.gather(*(redis.set(f"k{i}", i) for i in range(500))) == [True] * 500
    assert len(await redis.client_list()) < 100


async def test_the_oldest_entry_is_the_one_that_was_added_first_and_is_not_done(queue, redis):
    assert await queue.oldest_s() == 0
    long_ago, now = 90_000, int((await redis.time())[0]) * 1000
    fields = {"d": b"x", "t": "team", "j": "job", "k": "9"}
    await redis.xadd(STREAM, fields, id=f"{now - long_ago}-0")
    await add(queue, 2)
    await add(queue, 1, priority=INTERACTIVE, job="small")

    async def is_old() -> bool:
        return long_ago / 1000 <= await queue.oldest_s() < long_ago / 1000 + 60

    assert await is_old()
    entries = await take(queue, "a", 4)
    assert await is_old()  # in hand, and not done
    await eventually(lambda: take(queue, "b"))
    assert await is_old()  # another has taken it over
    await queue.done(next(entry for entry in entries if entry.number == 9))
    assert await queue.oldest_s() < 60
    for entry in entries:
        await queue.done(entry)
    assert await queue.oldest_s() == 0
