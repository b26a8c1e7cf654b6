"""The LLM client and the image tagger against a real HTTP server that misbehaves."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from PIL import Image

from services.tagging.vlm import vlm_codes
from shared.config import LLMEnvironment
from shared.errors import HiBug2Error, NotFound, Precondition, Unavailable
from shared.llm import LLM, LLMSettings, Refused, Truncated, Usage, WrongAnswer, llm_from, retry
from shared.prompting import load_prompt, prompts_root
from shared.schema import NOT_VISIBLE, UNKNOWN, Attribute, Category, Tagger
from tests.scripted_llm import MODEL, Fault, ScriptedLLM

pytestmark = pytest.mark.timeout(60)

KEY = "sk-not-to-be-seen"
PROMPTS = prompts_root()
YES_NO = {
    "type": "object",
    "properties": {"is it": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["is it"],
    "additionalProperties": False,
}
ASKED = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Is it?"}]
ATTRIBUTES = tuple(
    Attribute(name, Category.MAIN_OBJECT, tags, Tagger.VLM)
    for name, tags in {
        "object shape": ("narrow", "medium", "wide"),
        "object pose": ("upright", "tilted", "lying", NOT_VISIBLE),
        "is print present": ("yes", "no"),
    }.items()
)


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as started:
        yield started


@pytest.fixture
def server(running: ScriptedLLM) -> ScriptedLLM:
    running.reset()
    return running


def client(server: ScriptedLLM, **changed: object) -> LLM:
    settings = {"base_url": server.base_url, "api_key": KEY, "model": MODEL, "timeout_s": 10, "max_attempts": 3}
    return LLM(LLMSettings.model_validate(settings | changed))


def picture(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


# --- the client


async def test_an_answer_comes_with_its_cost(server: ScriptedLLM) -> None:
    async with client(server) as llm:
        reply = await llm.ask(ASKED, YES_NO, temperature=0, max_tokens=10)
    [call] = server.calls
    assert reply.value in ({"is it": "yes"}, {"is it": "no"})
    assert reply.model == MODEL
    assert reply.usage.calls == 1
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens > 0
    assert call.authorization == f"Bearer {KEY}"
    assert call.body["response_format"]["json_schema"] == {"name": "answer", "schema": YES_NO, "strict": True}
    assert (call.body["temperature"], call.body["max_tokens"]) == (0, 10)


@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.SERVER_ERROR, Fault.GATEWAY_TIMEOUT, Fault.CUT_CONNECTION])
async def test_what_passes_is_tried_again_and_paid_once(server: ScriptedLLM, fault: Fault) -> None:
    server.fail(fault)
    async with client(server) as llm:
        reply = await llm.ask(ASKED, YES_NO)
    assert len(server.calls) == 2
    assert reply.usage.calls == 1


@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.SERVER_ERROR, Fault.CUT_CONNECTION])
async def test_what_does_not_pass_ends_after_the_attempts_and_no_more(server: ScriptedLLM, fault: Fault) -> None:
    server.fail(*[fault] * 20)
    async with client(server) as llm:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
            await llm.ask(ASKED, YES_NO)
    assert len(server.calls) == 3


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.DRIP])
async def test_an_endpoint_that_gives_no_answer_is_left(server: ScriptedLLM, fault: Fault) -> None:
    server.fail(*[fault] * 20)
    started = time.monotonic()
    async with client(server, timeout_s=0.3, max_attempts=2) as llm:
        with pytest.raises(Unavailable, match=r"no answer within 0\.3 s"):
            await llm.ask(ASKED, YES_NO)
    assert 1 <= len(server.calls) <= 2
    assert time.monotonic() - started < 5


async def test_after_a_hang_the_next_attempt_is_taken(server: ScriptedLLM) -> None:
    server.fail(Fault.HANG)
    async with client(server, timeout_s=2, max_attempts=5) as llm:
        assert (await llm.ask(ASKED, YES_NO)).usage.calls == 1
    assert len(server.calls) == 2


async def test_retry_after_is_honoured(server: ScriptedLLM) -> None:
    server.fail(Fault.RATE_LIMIT_RETRY_AFTER)
    async with client(server) as llm:
        await llm.ask(ASKED, YES_NO)
    first, second = server.calls
    assert second.begin_s - first.begin_s >= 1


async def test_retry_after_may_be_a_date(server: ScriptedLLM) -> None:
    server.retry_after = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)  # whole seconds
    server.fail(Fault.RATE_LIMIT_RETRY_AFTER)
    async with client(server) as llm:
        await llm.ask(ASKED, YES_NO)
    first, second = server.calls
    assert second.begin_s - first.begin_s >= 1.5


async def test_a_wait_beyond_the_bound_is_not_begun(server: ScriptedLLM) -> None:
    server.retry_after = "3600"
    server.fail(Fault.RATE_LIMIT_RETRY_AFTER)
    async with client(server) as llm:
        with pytest.raises(Unavailable, match="429"):
            await asyncio.wait_for(llm.ask(ASKED, YES_NO), 5)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault.QUOTA, Precondition, "quota"),
        (Fault.BAD_KEY, Precondition, "HIBUG2_LLM_API_KEY"),
        (Fault.NO_MODEL, Precondition, "HIBUG2_LLM_MODEL"),
        (Fault.HTML, Precondition, "HIBUG2_LLM_BASE_URL"),
        (Fault.FILTERED, Refused, "filter"),
        (Fault.REFUSAL, Refused, "can't help"),
        (Fault.TRUNCATED, Truncated, "max_tokens"),
    ],
)
async def test_what_will_not_pass_is_said_at_once(
    server: ScriptedLLM, fault: Fault, error: type[HiBug2Error], says: str
) -> None:
    server.fail(fault)
    async with client(server) as llm:
        with pytest.raises(error, match=says) as caught:
            await llm.ask(ASKED, YES_NO)
    assert len(server.calls) == 1
    assert KEY not in str(caught.value)
    if isinstance(caught.value, WrongAnswer):
        assert caught.value.usage.calls == 1


async def test_a_request_that_is_not_taken_in_any_form(server: ScriptedLLM) -> None:
    server.fail(*[Fault.ECHO] * 9)  # its words name response_format, and it is not what is wrong
    async with client(server) as llm:
        with pytest.raises(Precondition, match="400"):
            await llm.ask(ASKED, YES_NO, temperature=0, max_tokens=10)
        assert len(server.calls) <= 4
        server.reset()
        await llm.ask(ASKED, YES_NO, temperature=0)
    assert server.calls[-1].format == "json_schema"
    assert "temperature" in server.calls[-1].body


async def test_nobody_listens() -> None:
    with ScriptedLLM() as gone:
        pass
    async with client(gone, max_attempts=2) as llm:
        with pytest.raises(Unavailable, match="no connection"):
            await llm.ask(ASKED, YES_NO)


@pytest.mark.parametrize(
    "fault", [Fault.CUT_JSON, Fault.EMPTY, Fault.NO_CHOICES, Fault.RENAMED, Fault.FOREIGN_TAG, Fault.WRONG_TYPES]
)
async def test_a_wrong_answer_is_sent_back_once(server: ScriptedLLM, fault: Fault) -> None:
    server.fail(fault)
    async with client(server) as llm:
        reply = await llm.ask(ASKED, YES_NO)
    assert reply.value["is it"] in ("yes", "no")
    assert reply.usage.calls == 2
    first, second = (call.body["messages"] for call in server.calls)
    assert second[: len(first)] == first
    assert [m["role"] for m in second[len(first) :]] == ["assistant", "user"]

    server.fail(fault, fault, fault)
    async with client(server) as llm:
        with pytest.raises(WrongAnswer, match="wrongly twice") as caught:
            await llm.ask(ASKED, YES_NO)
    assert len(server.calls) == 4
    assert caught.value.usage.calls == 2
    assert caught.value.value is None


async def test_prose_around_the_answer_does_no_harm(server: ScriptedLLM) -> None:
    server.fail(Fault.PROSE)
    async with client(server) as llm:
        assert (await llm.ask(ASKED, YES_NO)).usage.calls == 1


async def test_what_the_check_finds_is_told_to_the_model_and_to_the_caller(server: ScriptedLLM) -> None:
    async with client(server) as llm:
        with pytest.raises(WrongAnswer, match="too plain") as caught:
            await llm.ask(ASKED, YES_NO, lambda _: ["too plain"])
    assert "too plain" in server.calls[1].body["messages"][-1]["content"]
    assert len(server.calls) == 2
    assert caught.value.value["is it"] in ("yes", "no")


@pytest.mark.parametrize("formats", [("json_object", "text"), ("text",)])
async def test_the_form_that_an_endpoint_takes_is_found_once(formats: tuple[str, ...]) -> None:
    with ScriptedLLM(formats=formats) as server:
        async with client(server) as llm:
            for _ in range(3):
                assert (await llm.ask(ASKED, YES_NO)).value["is it"] in ("yes", "no")
    refused = 3 - len(formats)
    assert [call.status for call in server.calls] == [400] * refused + [200] * 3
    assert {call.format for call in server.calls[refused:]} == {formats[0]}
    assert server.calls[-1].body["messages"][0]["content"].startswith("Answer.")


async def test_calls_side_by_side_step_down_together() -> None:
    with ScriptedLLM(formats=("json_object",), latency_s=0.1) as server:
        async with client(server) as llm:
            await asyncio.gather(*(llm.ask(ASKED, YES_NO) for _ in range(5)))
    assert [call.format for call in server.calls if call.status == 200] == ["json_object"] * 5


async def test_a_model_that_takes_neither_max_tokens_nor_temperature() -> None:
    with ScriptedLLM(reasoning=True) as server:
        async with client(server) as llm:
            for _ in range(2):
                await llm.ask(ASKED, YES_NO, temperature=0, max_tokens=10)
    assert [call.status for call in server.calls] == [400, 400, 200, 200]
    assert server.calls[-1].body["max_completion_tokens"] == 10
    assert {call.format for call in server.calls} == {"json_schema"}


async def test_calls_in_flight_are_bounded() -> None:
    with ScriptedLLM(latency_s=0.1) as server:
        async with client(server, max_concurrency=3) as llm:
            await asyncio.gather(*(llm.ask(ASKED, YES_NO) for _ in range(12)))
    assert len(server.calls) == 12
    assert max(call.in_flight for call in server.calls) <= 3


async def test_a_call_that_waits_to_try_again_lets_others_pass(
    server: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_backoff", lambda _: 1.0)
    server.fail(Fault.SERVER_ERROR)
    ended: list[str] = []

    async def ask(llm: LLM, name: str) -> None:
        await llm.ask(ASKED, YES_NO, name=name)
        ended.append(name)

    async with client(server, max_concurrency=1) as llm:
        fails_first = asyncio.create_task(ask(llm, "fails_first"))
        assert await asyncio.to_thread(server.arrived.wait, 10)
        await ask(llm, "passes")
        await fails_first
    assert ended == ["passes", "fails_first"]
    assert max(call.in_flight for call in server.calls) == 1


async def test_few_calls_go_in_a_form_that_was_refused() -> None:
    with ScriptedLLM(formats=("json_object",), latency_s=0.05) as server:
        async with client(server, max_concurrency=4) as llm:
            await asyncio.gather(*(llm.ask(ASKED, YES_NO) for _ in range(24)))
    assert (
        len([call for call in server.calls if call.status == 400]) <= 5
    )  # those that the first refusal comes too late for


async def test_few_calls_are_sent_into_a_pause() -> None:
    with ScriptedLLM(latency_s=0.05) as server:
        server.fail(Fault.RATE_LIMIT_RETRY_AFTER)
        async with client(server, max_concurrency=4) as llm:
            await asyncio.gather(*(llm.ask(ASKED, YES_NO) for _ in range(24)))
    refused_s = server.calls[0].begin_s + server.latency_s
    assert len([call for call in server.calls if refused_s < call.begin_s < refused_s + 0.9]) <= 5


async def test_a_cancelled_call_ends_and_frees_its_place(server: ScriptedLLM) -> None:
    server.fail(Fault.HANG)
    async with client(server, max_concurrency=1, timeout_s=30) as llm:
        waiting = asyncio.create_task(llm.ask(ASKED, YES_NO))
        assert await asyncio.to_thread(server.arrived.wait, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 1)
        assert (await llm.ask(ASKED, YES_NO)).usage.calls == 1


@pytest.mark.parametrize("fault", [Fault.ECHO, Fault.BAD_KEY, Fault.SERVER_ERROR, Fault.FOREIGN_TAG])
async def test_neither_key_nor_image_are_told(
    server: ScriptedLLM, fault: Fault, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("aiohttp").setLevel(logging.DEBUG)
    prompt = load_prompt("tagging", "tag", root=PROMPTS)
    messages = prompt.render(images=[picture()], main_object="bag", attributes=ATTRIBUTES)
    image = messages[-1]["content"][-1]["image_url"]["url"].partition(",")[2]
    server.fail(*[fault] * 9)
    async with client(server) as llm:
        with pytest.raises(HiBug2Error) as caught:
            await llm.ask(messages, YES_NO, lambda _: ["wrong"])
    told = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    trace: BaseException | None = caught.value
    while trace is not None:
        told += repr(trace)
        trace = None if trace.__suppress_context__ else trace.__cause__ or trace.__context__
    assert KEY not in told
    assert image[:64] not in told
    assert image[-64:] not in told


def test_the_environment_names_the_model() -> None:
    assert llm_from(LLMEnvironment(llm_base_url="")) is None
    url = "http://localhost:1/v1"
    llm = llm_from(
        LLMEnvironment(
            llm_base_url=url,
            llm_model="m",
            llm_max_concurrency=2,
            llm_requests_per_minute=3,
            llm_tokens_per_minute=4,
            llm_image_detail="low",
            llm_cache_ttl_s=5,
        )
    )
    assert llm is not None
    assert llm.settings == LLMSettings(
        base_url=url,
        model="m",
        max_concurrency=2,
        requests_per_minute=3,
        tokens_per_minute=4,
        image_detail="low",
        cache_ttl_s=5,
    )
    with pytest.raises(NotFound, match="HIBUG2_LLM_PRICES"):
        llm_from(LLMEnvironment(llm_base_url=url, llm_model="m", llm_prices="/no/such/table.yaml"))
    assert KEY not in repr(LLMSettings(base_url="http://x/v1", api_key=KEY, model="m"))


# --- the tags of an image


async def tag(llm: LLM, image: bytes, attributes: tuple[Attribute, ...] = ATTRIBUTES) -> tuple[list[int], Usage, int]:
    prompt = load_prompt("tagging", "tag", root=PROMPTS)
    codes, usage, invalid = await vlm_codes(llm, prompt, image, "bag", attributes)
    assert codes.dtype == np.uint16
    assert codes.shape == (len(attributes),)
    assert all(code == UNKNOWN or code < len(a.tags) for code, a in zip(codes, attributes, strict=True))
    assert invalid == (codes == UNKNOWN).sum()
    return codes.tolist(), usage, invalid


async def test_one_call_tags_an_image(server: ScriptedLLM) -> None:
    async with client(server) as llm:
        codes, usage, invalid = await tag(llm, picture())
        assert codes == (await tag(llm, picture()))[0]
    assert (usage.calls, invalid) == (1, 0)
    first, second = server.calls
    assert first.images == [picture()]
    parts = first.body["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"]
    assert parts[0]["text"] == "Main object: bag"
    assert first.body["messages"][0] == second.body["messages"][0]


async def test_no_attributes_no_call(server: ScriptedLLM) -> None:
    async with client(server) as llm:
        assert await tag(llm, picture(), ()) == ([], Usage(), 0)
    assert not server.calls


@pytest.mark.parametrize("fault", [Fault.RENAMED, Fault.MISSING, Fault.FOREIGN_TAG])
async def test_only_what_is_wrong_is_asked_again(server: ScriptedLLM, fault: Fault) -> None:
    async with client(server) as llm:
        right, _, _ = await tag(llm, picture())
        server.calls.clear()
        server.fail(fault)
        codes, usage, invalid = await tag(llm, picture())
    assert (codes, usage.calls, invalid) == (right, 2, 0)
    assert list(server.calls[1].schema["properties"]) == ["object shape"]
    assert server.calls[1].images == [picture()]
    assert server.calls[1].body["messages"][:2] == server.calls[0].body["messages"]


@pytest.mark.parametrize(
    ("fault", "unknown"),
    [(Fault.RENAMED, 1), (Fault.MISSING, 1), (Fault.FOREIGN_TAG, 1)]
    + [(fault, 3) for fault in (Fault.CUT_JSON, Fault.EMPTY, Fault.NO_CHOICES, Fault.WRONG_TYPES)],
)
async def test_what_stays_wrong_is_unknown_and_counted(server: ScriptedLLM, fault: Fault, unknown: int) -> None:
    server.fail(fault, fault, fault)
    async with client(server) as llm:
        _, usage, invalid = await tag(llm, picture())
    assert (usage.calls, len(server.calls), invalid) == (2, 2, unknown)


@pytest.mark.parametrize("fault", [Fault.REFUSAL, Fault.FILTERED, Fault.TRUNCATED])
async def test_an_image_that_is_not_answered_is_unknown_and_not_asked_again(server: ScriptedLLM, fault: Fault) -> None:
    server.fail(fault)
    async with client(server) as llm:
        assert await tag(llm, picture()) == ([UNKNOWN] * 3, server_usage(server, fault), 3)
    assert len(server.calls) == 1


def server_usage(server: ScriptedLLM, fault: Fault) -> Usage:
    if fault is Fault.FILTERED:
        return Usage(calls=1)
    spent = server.calls[0].usage
    return Usage(1, spent["prompt_tokens"], spent["completion_tokens"])


@pytest.mark.parametrize("fault", [Fault.PROSE, Fault.DUPLICATE])
async def test_what_can_be_read_is_not_asked_again(server: ScriptedLLM, fault: Fault) -> None:
    server.fail(fault)
    async with client(server) as llm:
        _, usage, invalid = await tag(llm, picture())
    assert (usage.calls, invalid) == (1, 0)


@pytest.mark.parametrize(("fault", "error"), [(Fault.QUOTA, Precondition), (Fault.SERVER_ERROR, Unavailable)])
async def test_an_endpoint_that_does_not_serve_ends_the_tagging(
    server: ScriptedLLM, fault: Fault, error: type[HiBug2Error]
) -> None:
    server.fail(*[fault] * 9)
    async with client(server) as llm:
        with pytest.raises(error):
            await tag(llm, picture())
    assert len(server.calls) == (1 if fault is Fault.QUOTA else 3)


@pytest.mark.parametrize("formats", [("json_object",), ("text",)])
async def test_plain_endpoints_tag_as_well(formats: tuple[str, ...]) -> None:
    with ScriptedLLM(formats=formats) as server:
        async with client(server) as llm:
            _, _, invalid = await tag(llm, picture())
            assert invalid == 0
            server.fail(Fault.MISSING)
            _, usage, invalid = await tag(llm, picture())
    assert (usage.calls, invalid) == (2, 0)
