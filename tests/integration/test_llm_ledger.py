"""Accounts in a real Redis: the cap holds whatever happens to the processes and to Redis."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from deploy.local.redis import embedded_redis
from shared.errors import InvalidInput, Precondition, Unavailable
from shared.llm import ledger as ledger_module
from shared.llm.ledger import Account, BudgetSpent, Ledger, Spend
from shared.llm.prices import NANO
from shared.queue.stream import connect
from tests.integration.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
WHO = Account("red", "datasets/d/taggings/t")
LEASE_S = 60.0


@pytest.fixture(scope="module")
def shared_url() -> Iterator[str]:
    with embedded_redis() as url:
        yield url


async def end_leases(redis: Redis) -> None:
    """As if all reservations had been made a long time ago."""
    for key in await redis.keys("hibug2:llm:account:*:reserved"):
        for member in await redis.zrange(key, 0, -1):
            await redis.zadd(key, {member: 1})


RESERVE = st.tuples(st.just("reserve"), st.integers(0, 1), st.integers(0, 60))
OPERATIONS = st.lists(
    st.one_of(
        RESERVE,
        RESERVE,
        RESERVE,
        st.tuples(st.just("settle"), st.integers(0, 9), st.integers(0, 60)),
        st.tuples(st.just("settle twice"), st.integers(0, 9), st.integers(0, 60)),
        st.tuples(st.just("release"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("lose"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("die"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("time passes"), st.just(0), st.just(0)),
    ),
    min_size=15,
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cap=st.integers(0, 400), operations=OPERATIONS)
def test_the_cap_holds_in_any_order_of_events(shared_url, cap, operations):
    asyncio.run(play(shared_url, cap, operations))


async def play(url: str, cap: int, operations: list[tuple[str, int, int]]) -> None:
    """Two processes' ledgers against a model of what the provider may have billed at most."""
    redis, other = connect(url), connect(url)
    await redis.flushall()
    ledgers = [Ledger(redis), Ledger(other)]
    await ledgers[0].open(WHO, cap / NANO)
    on_the_way: list = []
    billed, expected = 0, 0  # what the provider may want, and what the account must then say
    for what, which, amount in operations:
        if what == "reserve":
            room = cap - expected - sum(paid.nano for paid in on_the_way)
            if amount > cap - expected:
                with pytest.raises(BudgetSpent):
                    await ledgers[which].reserve(WHO, amount, "USD", LEASE_S)
            elif amount > room:
                with pytest.raises(TimeoutError):  # waits for the others
                    await asyncio.wait_for(ledgers[which].reserve(WHO, amount, "USD", LEASE_S), 0.01)
            else:
                on_the_way.append(await ledgers[which].reserve(WHO, amount, "USD", LEASE_S))
        elif what == "time passes":
            await end_leases(redis)
            late, on_the_way = on_the_way, []
            billed += sum(paid.nano for paid in late)
            expected += sum(paid.nano for paid in late)
            await ledgers[0].spent(WHO)
            for paid in late:
                await ledgers[1].settle(paid, 1, 1, 1, 1)
        elif on_the_way:
            paid = on_the_way.pop(which % len(on_the_way))
            cost = {"release": 0, "lose": paid.nano, "die": paid.nano}.get(what, min(amount, paid.nano))
            if what == "release":
                await ledgers[0].release(paid)
            elif what == "lose":
                await ledgers[0].lose(paid)
            elif what == "die":
                on_the_way.append(paid)  # nobody will settle it; its time passes
                continue
            else:
                for _ in range(1 + (what == "settle twice")):
                    await ledgers[1].settle(paid, cost, 1, 10, 5)
            billed += cost
            expected += cost
        told = await ledgers[1].spent(WHO)
        assert round(told.amount * NANO) == expected
        assert round(told.reserved * NANO) == sum(paid.nano for paid in on_the_way)
        assert billed + sum(paid.nano for paid in on_the_way) <= cap
    await redis.aclose()
    await other.aclose()


WORKER = """
import asyncio, random, sys
from shared.llm import ledger
from shared.llm.ledger import Account, BudgetSpent, Ledger
from shared.queue.stream import connect
async def lane(ledger, account):
    while True:
        most = random.randint(1, 100)
        try:
            paid = await ledger.reserve(account, most, "USD", float(sys.argv[2]))
        except BudgetSpent:
            return
        print("sent", most, flush=True)  # from here on it may be billed
        await asyncio.sleep(random.random() / 200)
        cost = random.randint(0, most)
        print("cost", most - cost, flush=True)  # this much less than feared
        await ledger.settle(paid, cost, 1, 1, 1)
async def main():
    ledger, account = Ledger(connect(sys.argv[1])), Account("red", "datasets/d/taggings/t")
    await asyncio.gather(*(lane(ledger, account) for _ in range(4)))
asyncio.run(main())
"""


async def test_processes_that_are_killed_never_take_more_than_the_cap(redis_url, redis):
    cap, ledger = 20_000, Ledger(redis)
    await ledger.open(WHO, cap / NANO)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    workers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, redis_url, "1", env=environment, stdout=PIPE, cwd=ROOT
        )
        for _ in range(3)
    ]
    reading = [asyncio.create_task(worker.communicate()) for worker in workers]
    await eventually(lambda: spent_over(ledger, cap // 10))
    workers[0].send_signal(signal.SIGKILL)
    await eventually(lambda: spent_over(ledger, cap // 5))
    workers[1].send_signal(signal.SIGSTOP)  # and wakes up when its reservations are over
    await eventually(lambda: spent_over(ledger, cap - 2000))
    workers[1].send_signal(signal.SIGCONT)
    printed = "".join([(await read)[0].decode() for read in reading])
    lines = [line.split() for line in printed.splitlines()]
    billed = sum((1 if what == "sent" else -1) * int(amount) for what, amount in lines)
    told = await ledger.spent(WHO)
    spent = round((told.amount + told.reserved) * NANO)
    assert workers[2].returncode == 0
    assert billed <= spent <= cap
    assert spent > cap - 200  # and it was not left unused


async def spent_over(ledger: Ledger, nano: int) -> bool:
    return (await ledger.spent(WHO)).amount * NANO > nano


async def test_many_at_once_use_the_cap_up_and_no_more(redis_url):
    ledgers = [Ledger(connect(redis_url)) for _ in range(4)]
    await ledgers[0].open(WHO, 1000 / NANO)
    paid = 0

    async def work(ledger: Ledger) -> None:
        nonlocal paid
        while True:
            try:
                reserved = await ledger.reserve(WHO, 100, "USD", LEASE_S)
            except BudgetSpent:
                return
            await asyncio.sleep(random.random() / 100)
            paid += 10  # a tenth of what was feared
            await ledger.settle(reserved, 10, 1, 1, 1)

    await asyncio.gather(*(work(ledger) for ledger in ledgers for _ in range(8)))
    assert 1000 - 100 < paid <= 1000
    assert round((await ledgers[1].spent(WHO)).amount * NANO) == paid
    for ledger in ledgers:
        await ledger.link._redis.aclose()


async def test_an_account_says_what_was_spent_and_can_be_raised(redis):
    ledger = Ledger(redis)
    assert await ledger.spent(WHO) == Spend()
    await ledger.open(WHO, 0.5)
    paid = await ledger.reserve(WHO, NANO // 2, "EUR", LEASE_S)
    assert await ledger.spent(WHO) == Spend(0.0, "EUR", reserved=0.5, cap=0.5)
    await ledger.settle(paid, NANO // 4, 1, 100, 20)
    assert await ledger.spent(WHO) == Spend(0.25, "EUR", 1, 100, 20, 0.0, 0.5)
    with pytest.raises(BudgetSpent, match=r"0\.25 of 0\.5 EUR") as caught:
        await ledger.reserve(WHO, NANO // 2, "EUR", LEASE_S)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert caught.value.metadata == {"account": WHO.name, "spent": "0.25", "cap": "0.5", "currency": "EUR"}
    await ledger.open(WHO, 1)
    await ledger.release(await ledger.reserve(WHO, NANO // 2, "EUR", LEASE_S))
    await ledger.open(WHO, None)
    await ledger.lose(await ledger.reserve(WHO, 2 * NANO, "EUR", LEASE_S))
    assert await ledger.spent(WHO) == Spend(2.25, "EUR", 2, 100, 20)
    assert await ledger.spent(Account("blue", WHO.name)) == Spend()


async def test_a_cap_needs_a_price_and_one_currency(redis):
    ledger = Ledger(redis)
    await ledger.settle(await ledger.reserve(WHO, None, "", LEASE_S), 0, 1, 7, 3)
    assert await ledger.spent(WHO) == Spend(calls=1, input_tokens=7, output_tokens=3)
    await ledger.open(WHO, 1)
    with pytest.raises(Precondition, match="HIBUG2_LLM_PRICES"):
        await ledger.reserve(WHO, None, "", LEASE_S)
    await ledger.reserve(WHO, 5, "USD", LEASE_S)
    with pytest.raises(Precondition, match="USD"):
        await ledger.reserve(WHO, 5, "EUR", LEASE_S)


@pytest.mark.parametrize("cap", [-1, float("nan"), float("inf"), 2_000_000])
async def test_a_cap_that_is_no_amount_is_refused(redis, cap):
    with pytest.raises(InvalidInput, match="budget"):
        await Ledger(redis).open(WHO, cap)


async def test_after_redis_lost_its_data_nothing_is_paid_until_the_account_is_open_again(redis):
    ledger, fresh = Ledger(redis), Ledger(redis)
    await ledger.open(WHO, 1000 / NANO)
    paid = await ledger.reserve(WHO, 100, "USD", LEASE_S)
    await redis.flushall()
    for who in (ledger.reserve(WHO, 1, "USD", LEASE_S), fresh.reserve(WHO, 1, "USD", LEASE_S, capped=True)):
        with pytest.raises(Unavailable, match="lost its data"):
            await who
    await ledger.settle(paid, 60, 1, 10, 5)  # of a life that Redis forgot: counted all the same
    with pytest.raises(Unavailable):
        await ledger.reserve(WHO, 1, "USD", LEASE_S)
    await ledger.open(WHO, 1000 / NANO)
    assert await ledger.spent(WHO) == Spend(60 / NANO, "", 1, 10, 5, 0.0, 1000 / NANO)
    for _ in range(2):  # saying it twice changes nothing
        await ledger.seed(WHO, Spend(900 / NANO, "USD", 9, 5, 100))
        assert await ledger.spent(WHO) == Spend(900 / NANO, "USD", 9, 10, 100, 0.0, 1000 / NANO)
    with pytest.raises(BudgetSpent):
        await fresh.reserve(WHO, 101, "USD", LEASE_S)
    assert (await fresh.reserve(WHO, 100, "USD", LEASE_S)).nano == 100


async def test_without_redis_nothing_that_has_a_cap_or_may_have_one_is_paid():
    free, seen_once = Account("red", "free"), Account("red", "seen")
    with embedded_redis() as url:
        redis = connect(url)
        ledger = Ledger(redis)
        await ledger.open(WHO, 1)
        await ledger.open(free, None)
        await ledger.reserve(seen_once, 1, "USD", LEASE_S)
        await ledger.spent(free)
    for account in (WHO, Account("red", "never seen")):
        with pytest.raises(Unavailable, match="no paid call"):
            await ledger.reserve(account, 1, "USD", LEASE_S)
    for account in (free, seen_once):
        await ledger.settle(await ledger.reserve(account, 1, "USD", LEASE_S), 1, 1, 1, 1)
    for asked in (ledger.open(WHO, 1), ledger.spent(WHO), ledger.seed(WHO, Spend())):
        with pytest.raises(Unavailable, match="Redis is away"):
            await asked
    await redis.aclose()


async def test_only_accounts_with_a_cap_that_are_in_use_are_told_and_not_too_many(redis, monkeypatch):
    book, free = Ledger(redis), Account("red", "free")
    await book.open(free, None)
    await book.reserve(free, 5, "USD", LEASE_S)
    capped = [Account("red", f"runs/{i}") for i in range(5)]
    for i, account in enumerate(capped):
        await book.open(account, 1.0)
        await redis.zadd("hibug2:llm:accounts", {f"red runs/{i}": 10**13 + i})  # used one after the other
    paid = await book.reserve(capped[0], NANO // 2, "USD", LEASE_S)
    await book.settle(paid, NANO // 4, 1, 10, 10)
    await book.reserve(capped[0], NANO // 8, "USD", LEASE_S)
    told = await book.capped()
    assert {account for account, _ in told} == set(capped)
    spend = dict(told)[capped[0]]
    assert (spend.amount, spend.reserved, spend.cap) == (0.25, 0.125, 1.0)

    monkeypatch.setattr(ledger_module, "_MOST_LIVE", 2)
    assert [account for account, _ in await book.capped()] == [capped[4], capped[3]]
    await redis.zadd("hibug2:llm:accounts", {"red runs/4": 1})
    assert [account for account, _ in await book.capped()] == [capped[3], capped[2]]
    await book.open(capped[3], None)  # its cap is taken off
    assert [account for account, _ in await book.capped()] == [capped[2]]
    assert await redis.zscore("hibug2:llm:accounts", "red runs/4") is None


async def test_a_reservation_brings_an_account_back_into_use(redis):
    book = Ledger(redis)
    await book.open(WHO, 1.0)
    await redis.delete("hibug2:llm:accounts")
    assert await book.capped() == []
    await book.reserve(WHO, 1, "USD", LEASE_S)
    assert [account for account, _ in await book.capped()] == [WHO]
