"""Scripts that go to a real Redis together."""

from __future__ import annotations

import asyncio

import pytest

from shared.llm.link import Away, Link
from shared.queue.stream import connect

ADD = "return redis.call('INCRBY', KEYS[1], ARGV[1])"
WRONG = "return redis.call('INCR', KEYS[1], 'too', 'many')"


async def test_each_gets_its_own_answer_in_the_order_of_asking(redis):
    link = Link(redis)
    answers = await asyncio.gather(*(link.run(ADD, [f"k{i % 3}"], [i]) for i in range(60)))
    assert answers == [sum(range(i % 3, i + 1, 3)) for i in range(60)]


async def test_what_is_asked_while_others_are_on_their_way_goes_together(redis, monkeypatch):
    link, trips = Link(redis), []
    plain = redis.pipeline

    def counted(transaction):
        trips.append(transaction)
        return plain(transaction=transaction)

    monkeypatch.setattr(redis, "pipeline", counted)
    await link.run(ADD, ["k"], [1])
    trips.clear()
    await asyncio.gather(*(link.run(ADD, ["k"], [1]) for _ in range(50)))
    assert trips == [False]


async def test_a_redis_that_forgot_the_scripts_is_told_them_again(redis):
    link = Link(redis)
    assert await link.run(ADD, ["k"], [1]) == 1
    await redis.script_flush()
    assert sorted(await asyncio.gather(*(link.run(ADD, ["k"], [1]) for _ in range(5)))) == [2, 3, 4, 5, 6]


async def test_who_gave_up_before_it_was_sent_is_left_out(redis):
    link = Link(redis)
    first = asyncio.create_task(link.run(ADD, ["k"], [1]))
    given_up = asyncio.create_task(link.run(ADD, ["k"], [100]))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await first == 1
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert await link.run(ADD, ["k"], [1]) == 2


async def test_one_that_fails_does_not_take_the_others_with_it(redis):
    link = Link(redis)
    good, bad = await asyncio.gather(link.run(ADD, ["k"], [1]), link.run(WRONG, ["k"]), return_exceptions=True)
    assert good == 1
    assert isinstance(bad, Away)
    with pytest.raises(Away):  # nobody asks for a while
        await link.run(ADD, ["k"], [1])


async def test_all_that_wait_are_told_when_redis_is_away():
    redis = connect("redis://127.0.0.1:1/0")
    link = Link(redis)
    found = await asyncio.gather(*(link.run(ADD, ["k"], [1]) for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in found] == [Away] * 3
    await redis.aclose()
