"""Calls to a model that are paid by an account and kept for its team: real HTTP, real Redis, real faults."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import pytest
from PIL import Image
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from deploy.local.redis import embedded_redis
from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.llm import LLM, Account, BudgetSpent, LLMSettings, Prices, Usage, WrongAnswer
from shared.llm.prices import NANO, Price, estimate
from shared.prompting import load_prompt, prompts_root
from shared.queue.stream import connect
from shared.schema import Attribute, Category, Tagger
from tests.integration.waiting import eventually
from tests.scripted_llm import MODEL, Fault, ScriptedLLM

KEY = "sk-not-to-be-seen"
RED, BLUE = Account("red", "datasets/d/taggings/t"), Account("blue", "datasets/d/taggings/t")
YES_NO = {
    "type": "object",
    "properties": {"is it": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["is it"],
    "additionalProperties": False,
}
TABLE = f"""
- source: the test
  date: 2026-01-01
  currency: USD
  models:
    {MODEL}: {{input: 1000, output: 4000}}
"""


def asked(text: str = "Is it?") -> list[dict]:
    return [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]


def pictured(colour: str = "red") -> list[dict]:
    out = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(out, "JPEG")
    prompt = load_prompt("tagging", "tag", root=prompts_root())
    attributes = (Attribute("object pose", Category.MAIN_OBJECT, ("upright", "lying"), Tagger.VLM),)
    return prompt.render(images=[out.getvalue()], main_object="bag", attributes=attributes)


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as started:
        yield started


@pytest.fixture
def server(running: ScriptedLLM) -> ScriptedLLM:
    running.reset()
    return running


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with embedded_redis() as url:
        yield url


@pytest.fixture(autouse=True)
async def _empty(redis: Redis) -> None:
    await redis.flushall()


@pytest.fixture(scope="module")
def prices(tmp_path_factory) -> Prices:
    path = tmp_path_factory.mktemp("prices") / "prices.yaml"
    path.write_text(TABLE)
    return Prices.load(path)


@pytest.fixture
def price(prices) -> Price:
    return prices.known(MODEL)


@pytest.fixture
async def client(server, redis_url, prices) -> AsyncIterator[Callable[..., LLM]]:
    """Makes clients as if each were in a process of its own."""
    made: list[tuple[LLM, Redis]] = []

    def make(table: Prices = prices, **changed: object) -> LLM:
        values = {"base_url": server.base_url, "api_key": KEY, "model": MODEL, "timeout_s": 10, "max_attempts": 2}
        redis = connect(redis_url)
        made.append((LLM(LLMSettings.model_validate(values | changed), redis, table), redis))
        return made[-1][0]

    yield make
    for llm, redis in made:
        await llm.close()
        await redis.aclose()


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def cost(server: ScriptedLLM, price: Price) -> int:
    """What the provider bills, in billionths."""
    return sum(price.nano(c.usage["prompt_tokens"], c.usage["completion_tokens"]) for c in server.calls if c.usage)


async def nano_spent(llm: LLM, account: Account = RED) -> tuple[int, int]:
    told = await llm.ledger.spent(account)
    return round(told.amount * NANO), round(told.reserved * NANO)


# --- money


async def test_what_an_answer_used_is_charged_to_the_account(server, client, price):
    llm, before = client(), counted("hibug2_llm_spend_total", team="red", currency="USD")
    reply = await llm.charging(RED).ask(asked(), YES_NO)
    told = await llm.ledger.spent(RED)
    assert round(told.amount * NANO) == cost(server, price) > 0
    assert (told.calls, told.currency, told.reserved) == (1, "USD", 0)
    assert (told.input_tokens, told.output_tokens) == (reply.usage.input_tokens, reply.usage.output_tokens)
    assert reply.usage.amount == pytest.approx(told.amount)
    assert counted("hibug2_llm_spend_total", team="red", currency="USD") - before == pytest.approx(told.amount)
    assert server.calls[0].body["max_tokens"] > 1000  # where the prompt sets no limit, the money does


@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.SERVER_ERROR, Fault.QUOTA, Fault.BAD_KEY, Fault.FILTERED])
async def test_what_was_refused_is_not_charged(server, client, fault):
    server.fail(fault, fault)
    llm = client()
    with pytest.raises(HiBug2Error):
        await llm.charging(RED).ask(asked(), YES_NO)
    assert await nano_spent(llm) == (0, 0)


async def test_a_connection_that_never_came_about_is_not_charged(client):
    with ScriptedLLM() as gone:
        pass
    llm = client(base_url=gone.base_url)
    with pytest.raises(Unavailable, match="no connection"):
        await llm.charging(RED).ask(asked(), YES_NO)
    assert await nano_spent(llm) == (0, 0)


@pytest.mark.parametrize(
    ("fault", "calls"),
    [(Fault.CUT_CONNECTION, 2), (Fault.GATEWAY_TIMEOUT, 2), (Fault.HANG, 2), (Fault.DRIP, 2), (Fault.HTML, 1)],
)
async def test_what_may_have_been_billed_is_charged_as_it_was_feared(server, client, price, fault, calls):
    server.fail(fault, fault)
    llm = client(timeout_s=0.5)
    with pytest.raises(HiBug2Error):
        await llm.charging(RED).ask(asked(), YES_NO, max_tokens=100)
    spent, reserved = await nano_spent(llm)
    assert reserved == 0
    assert (await llm.ledger.spent(RED)).calls == calls
    assert spent >= calls * price.nano(len("Answer.Is it?"), 100)


async def test_an_answer_that_does_not_tell_its_usage_is_charged_as_it_was_feared(server, client, price):
    server.fail(Fault.NO_USAGE)
    llm = client()
    reply = await llm.charging(RED).ask(asked(), YES_NO, max_tokens=100)
    assert reply.usage.input_tokens == 0
    assert (await nano_spent(llm))[0] > price.nano(0, 100)


@pytest.mark.parametrize("fault", [Fault.REFUSAL, Fault.TRUNCATED, Fault.EMPTY, Fault.WRONG_TYPES, Fault.PROSE])
async def test_wrong_answers_are_paid_as_well(server, client, price, fault):
    server.fail(fault, fault)
    llm = client()
    try:
        usage = (await llm.charging(RED).ask(asked(), YES_NO)).usage
    except WrongAnswer as wrong:
        usage = wrong.usage
    spent, _ = await nano_spent(llm)
    assert spent == cost(server, price) == round(usage.amount * NANO)
    assert usage.calls == len(server.calls)


async def test_a_cancelled_call_counts_as_spent_when_its_time_is_over(server, client, redis):
    server.fail(Fault.HANG)
    llm = client()
    waiting = asyncio.create_task(llm.charging(RED).ask(asked(), YES_NO))
    assert await asyncio.to_thread(server.arrived.wait, 10)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    spent, reserved = await nano_spent(llm)
    assert spent == 0 < reserved
    key = f"hibug2:llm:account:{RED.team}:{RED.name}:reserved"
    [member] = await redis.zrange(key, 0, -1)
    await redis.zadd(key, {member: 1})
    assert await nano_spent(llm) == (reserved, 0)


@pytest.mark.parametrize("faults", [[], [Fault.CUT_CONNECTION, Fault.RATE_LIMIT, Fault.SERVER_ERROR] * 2])
async def test_two_clients_together_never_spend_more_than_the_cap(server, client, price, faults):
    first, other = client(max_concurrency=4), client(max_concurrency=4)
    cap = 1_200_000_000  # a call costs about a sixteenth of it, and may cost a third
    await first.ledger.open(RED, cap / NANO)
    server.fail(*faults)
    views = [first.charging(RED, capped=True), other.charging(RED, capped=True)]
    questions = [views[i % 2].ask(asked(f"Is it {i}?"), YES_NO, max_tokens=20) for i in range(40)]
    said = await asyncio.gather(*questions, return_exceptions=True)
    assert {type(each) for each in said if isinstance(each, Exception)} <= {BudgetSpent, Unavailable}
    assert any(isinstance(each, BudgetSpent) for each in said)
    spent, reserved = await nano_spent(first)
    assert cost(server, price) <= spent <= cap
    assert reserved == 0
    assert spent > cap / 2  # what others only feared does not stop a call, it waits for them

    refused, calls = str(next(each for each in said if isinstance(each, BudgetSpent))), len(server.calls)
    assert "higher budget" in refused
    with pytest.raises(BudgetSpent):
        await views[0].ask(asked("Is it more?"), YES_NO)
    assert len(server.calls) == calls
    await first.ledger.open(RED, 4 * cap / NANO)
    server.reset()
    assert (await views[1].ask(asked("Is it more?"), YES_NO, max_tokens=20)).usage.calls == 1


async def test_a_cap_for_a_model_without_price_is_refused_before_any_call(server, client):
    llm = client(Prices({}, "no table"))
    view = llm.charging(RED)
    assert (await view.ask(asked(), YES_NO)).usage.amount is None
    told = await llm.ledger.spent(RED)
    assert (told.calls, told.amount, told.currency) == (1, 0, "")
    assert told.input_tokens > 0
    await llm.ledger.open(RED, 5)
    with pytest.raises(Precondition, match="HIBUG2_LLM_PRICES"):
        await view.ask(asked("another"), YES_NO)
    with pytest.raises(Precondition, match=MODEL):
        llm.prices.known(MODEL)
    assert len(server.calls) == 1


async def test_an_estimate_is_near_what_is_paid(server, client, price):
    llm = client()
    messages = pictured()
    without_image = [*messages[:-1], asked("Main object: bag")[1]]
    told = estimate(price, 3, without_image, schema=YES_NO, output_tokens=4, image_px=[(56, 56)])
    for colour in ("red", "green", "blue"):
        await llm.charging(RED).complete(pictured(colour), YES_NO)
    assert told.calls == 3
    assert told.amount == pytest.approx(cost(server, price) / NANO, rel=0.2)


async def test_without_redis_calls_are_made_and_counted_in_metrics_alone(server, prices):
    values = {"base_url": server.base_url, "model": MODEL}
    async with LLM(LLMSettings.model_validate(values), None, prices) as llm:
        before = counted("hibug2_llm_tokens_total", team="green", direction="input")
        reply = await llm.charging(Account("green", "x")).ask(asked(), YES_NO)
        assert counted("hibug2_llm_tokens_total", team="green", direction="input") - before == reply.usage.input_tokens
        with pytest.raises(Precondition, match="needs Redis"):
            llm.charging(RED, capped=True)


async def test_redis_that_goes_away_stops_what_has_a_cap_and_nothing_else(server, prices):
    values = {"base_url": server.base_url, "model": MODEL, "requests_per_minute": 600}
    with embedded_redis() as url:
        redis = connect(url)
        llm = LLM(LLMSettings.model_validate(values), redis, prices)
        await llm.ledger.open(RED, 100)
        await llm.ledger.open(BLUE, None)
    calls = len(server.calls)
    with pytest.raises(Unavailable, match="no paid call"):
        await llm.charging(RED).ask(asked(), YES_NO)
    assert len(server.calls) == calls
    assert (await llm.charging(BLUE).ask(asked(), YES_NO)).usage.calls == 1
    assert (await llm.ask(asked(), YES_NO)).usage.calls == 1
    await llm.close()
    await redis.aclose()


# --- kept answers


async def test_what_a_team_asked_before_costs_nothing(server, client):
    first, other = client(), client()
    paid = await first.charging(RED).ask(asked(), YES_NO)
    spent = await nano_spent(first)
    for view in (first.charging(RED), other.charging(Account("red", "another run"))):
        again = await view.ask(asked(), YES_NO)
        assert (again.text, again.value, again.model) == (paid.text, paid.value, paid.model)
        assert again.usage == Usage(cached=1, amount=0.0, currency="USD")
    assert len(server.calls) == 1
    assert await nano_spent(first) == spent


async def test_teams_do_not_see_each_others_answers(server, client):
    llm = client()
    for view in (llm.charging(RED), llm.charging(BLUE), llm):
        assert (await view.ask(asked(), YES_NO)).usage.calls == 1
    assert len(server.calls) == 3


async def test_answers_under_a_salt_are_kept_apart_and_paid_once(server, client):
    llm = client()
    for salt in ("", "one check", "another"):
        view = llm.charging(RED, salt=salt)
        assert (await view.ask(asked(), YES_NO)).usage.calls == 1
        assert (await view.ask(asked(), YES_NO)).usage.cached == 1
    assert len(server.calls) == 3


async def test_whatever_differs_is_another_question(server, client):
    llm = client().charging(RED)
    other = {**YES_NO, "properties": {"is it": {"type": "string", "enum": ["no", "yes"]}}}
    await llm.complete(asked(), YES_NO)
    await llm.complete(asked("Is it"), YES_NO)
    await llm.complete(asked(), other)
    await llm.complete(asked(), YES_NO, temperature=0.5)
    await llm.complete(asked(), YES_NO, max_tokens=50)
    await llm.complete(asked(), YES_NO, name="other")
    await client(model="another").charging(RED).complete(asked(), YES_NO)
    await llm.complete(pictured("red"), YES_NO)
    await llm.complete(pictured("blue"), YES_NO)
    await client(image_detail="low").charging(RED).complete(pictured("red"), YES_NO)
    assert len(server.calls) == 10


async def test_the_whole_conversation_is_kept_when_the_first_answer_was_wrong(server, client):
    server.fail(Fault.FOREIGN_TAG)
    llm = client()
    paid = await llm.charging(RED).ask(asked(), YES_NO)
    again = await llm.charging(RED).ask(asked(), YES_NO)
    assert again.value == paid.value
    assert (paid.usage.calls, again.usage.calls, again.usage.cached) == (2, 0, 2)
    assert len(server.calls) == 2


@pytest.mark.parametrize("fault", [Fault.REFUSAL, Fault.TRUNCATED, Fault.EMPTY, Fault.CUT_JSON, Fault.SERVER_ERROR])
async def test_what_is_no_answer_is_not_kept(server, client, fault):
    llm = client(max_attempts=1).charging(RED)
    server.fail(fault)
    with suppress(HiBug2Error):
        assert (await llm.complete(asked(), YES_NO)).value is None
    assert (await llm.complete(asked(), YES_NO)).usage.calls == 1
    assert len(server.calls) == 2


async def test_answers_go_when_their_time_is_over_or_redis_lost_them(server, client, redis):
    llm = client(cache_ttl_s=1000).charging(RED)
    await llm.complete(asked(), YES_NO)
    [key] = await redis.keys("hibug2:llm:answer:*")
    assert 990_000 < await redis.pttl(key) <= 1_000_000
    await redis.set(key, b"what nobody wrote")
    await llm.complete(asked(), YES_NO)
    await redis.flushall()
    await llm.complete(asked(), YES_NO)
    assert len(server.calls) == 3
    never = client(cache_ttl_s=0).charging(BLUE)
    for _ in range(2):
        await never.complete(asked(), YES_NO)
    assert len(server.calls) == 5


async def test_an_answer_that_is_very_long_is_not_kept(client, redis):
    llm = client()
    await llm._cache.put("k", ("x" * 200_000, "m"))
    assert await redis.exists("k")  # long, and nothing in it
    await llm._cache.put("l", (random.Random(0).randbytes(100_000).hex(), "m"))
    assert not await redis.exists("l")


async def test_equal_questions_at_a_time_are_asked_once(client):
    with ScriptedLLM(latency_s=0.2) as slow:
        llm = client(base_url=slow.base_url)
        said = await asyncio.gather(*(llm.charging(RED).ask(asked(), YES_NO) for _ in range(6)))
        assert len(slow.calls) == 1
    assert sorted(reply.usage.calls for reply in said) == [0, 0, 0, 0, 0, 1]
    said[0].value.clear()  # each has its own
    assert all(reply.value for reply in said[1:])


async def test_when_the_first_of_equal_questions_is_given_up_another_is_asked(server, client):
    server.fail(Fault.HANG)
    llm = client().charging(RED)
    first = asyncio.create_task(llm.ask(asked(), YES_NO))
    assert await asyncio.to_thread(server.arrived.wait, 10)
    others = [asyncio.create_task(llm.ask(asked(), YES_NO)) for _ in range(3)]
    await asyncio.sleep(0)
    others.pop().cancel()  # who waits may give up as well
    await asyncio.sleep(0)
    first.cancel()
    said = await asyncio.gather(*others)
    assert sorted(reply.usage.calls for reply in said) == [0, 1]
    assert len(server.calls) == 2


async def test_neither_key_nor_image_nor_question_lie_in_redis(server, client, redis):
    llm = client(requests_per_minute=1000)
    messages = pictured()
    await llm.ledger.open(RED, 100)
    await llm.charging(RED).complete(messages, YES_NO)
    image = messages[-1]["content"][-1]["image_url"]["url"].partition(",")[2]
    everything = b""
    for key in await redis.keys("*"):
        everything += key + await redis.dump(key)
    for secret in (KEY, image[:40], "Main object", "127.0.0.1"):
        assert secret.encode() not in everything


# --- limits, details, counts


async def test_requests_a_minute_are_limited_over_clients(server, client):
    llms = [client(requests_per_minute=660) for _ in range(2)]  # 60 at once, then 10 a second
    begun = time.monotonic()
    await asyncio.gather(*(llms[i % 2].complete(asked(str(i)), YES_NO) for i in range(70)))
    assert time.monotonic() - begun >= (70 - 60) / 10 - 0.05


async def test_retry_after_pauses_the_other_clients(server, client, redis):
    one, other = client(), client()
    server.fail(Fault.RATE_LIMIT_RETRY_AFTER)
    first = asyncio.create_task(one.complete(asked("one"), YES_NO))
    await eventually(lambda: redis.keys("hibug2:llm:rate:*:pause"))
    await other.complete(asked("other"), YES_NO)
    await first
    assert all(call.begin_s - server.calls[0].begin_s >= 1 for call in server.calls[1:])


@pytest.mark.parametrize(("setting", "sent"), [("auto", "auto"), ("low", "low"), ("high", "high")])
async def test_the_detail_of_images_is_a_setting(server, client, setting, sent):
    await client(image_detail=setting).complete(pictured(), YES_NO)
    parts = server.calls[0].body["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"]  # the image last: what comes before stays the same
    assert parts[-1]["image_url"]["detail"] == sent


OUTCOMES = {
    None: {"ok": 1},
    Fault.PROSE: {"ok": 1},
    Fault.EMPTY: {"invalid": 1, "ok": 1},
    Fault.FOREIGN_TAG: {"invalid": 1, "ok": 1},
    Fault.REFUSAL: {"refused": 1},
    Fault.FILTERED: {"refused": 1},
    Fault.TRUNCATED: {"truncated": 1},
    Fault.RATE_LIMIT: {"rate_limited": 1, "ok": 1},
    Fault.SERVER_ERROR: {"error": 1, "ok": 1},
    Fault.CUT_CONNECTION: {"error": 1, "ok": 1},
    Fault.HANG: {"timeout": 1, "ok": 1},
    Fault.HTML: {"error": 1},
}


@pytest.mark.parametrize("fault", list(OUTCOMES))
async def test_every_call_is_counted_by_its_outcome(server, client, fault):
    def told() -> dict[str, float]:
        names = ("ok", "invalid", "refused", "truncated", "rate_limited", "error", "timeout", "cached")
        return {name: counted("hibug2_llm_calls_total", outcome=name) for name in names}

    if fault is not None:
        server.fail(fault)
    before, llm = told(), client(timeout_s=2)
    with suppress(HiBug2Error):
        await llm.charging(RED).ask(asked(), YES_NO)
    assert {name: n - before[name] for name, n in told().items() if n != before[name]} == OUTCOMES[fault]
    assert sum(OUTCOMES[fault].values()) == len(server.calls)
    if fault is None:
        await llm.charging(RED).ask(asked(), YES_NO)
        assert told()["cached"] == before["cached"] + 1
