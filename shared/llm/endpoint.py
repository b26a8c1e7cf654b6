"""One model at one endpoint over HTTP: the one retry layer, the limits, and what errors mean.

Endpoints differ in what they take. A call starts with what is strictest, `response_format` with a strict JSON
schema, and steps down to JSON mode and to plain text when the endpoint refuses; what was found out holds for all
later calls.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from shared import logs, metrics, traces
from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.llm import retry, tokens
from shared.llm.answer import Refused, Reply, Truncated, Usage, extract_json, shortened
from shared.llm.dialect import Dialect, Request
from shared.llm.encoding import encoded
from shared.llm.ledger import Reservation
from shared.llm.rate import Rate
from shared.llm.settings import LLMSettings
from shared.llm.till import Till
from shared.llm.wire import Broken, NoAnswer, Rejected, Wire

log = logs.get("llm")

MOST_OUTPUT = 8192  # tokens that an answer may take where the prompt sets no limit and somebody pays
_LIKELY_OUTPUT = 1024
# Calls for each that is on its way: a few are encoded and have had their turn when a slot gets free. They go in the
# form that was known to help before, and even if the endpoint asked for a pause meanwhile, so they are few.
_AHEAD = 1.25
_LONGEST_PAUSE_S = 3600.0  # that an endpoint may ask of all processes
_DATA_URL = re.compile(r"data:[\w/+.-]+;base64,[\w+/=%-]*")
_LONG_RUN = re.compile(r"[A-Za-z0-9+/=_-]{65,}")  # nothing a person reads: image bytes, keys


class _Answered(NamedTuple):
    """What came back for a request, its reservation, and the tokens that the rate took it for."""

    completion: Any
    paid: Reservation | None
    likely: int


class Endpoint:
    """Belongs to one event loop; close it when done."""

    def __init__(self, settings: LLMSettings, rate: Rate) -> None:
        self.settings = settings
        self._wire = Wire(settings.base_url, settings.api_key.get_secret_value())
        self._rate = rate
        self._slots = asyncio.Semaphore(settings.max_concurrency)  # for requests on their way
        self._places = asyncio.Semaphore(math.ceil(_AHEAD * settings.max_concurrency))  # for calls, these included
        self._dialect = Dialect()

    async def close(self) -> None:
        await self._wire.close()

    async def ask(self, request: Request, till: Till) -> Reply:
        """The answer to `request`, paid at `till`.

        Raises Refused, Truncated, Unavailable, Precondition and BudgetSpent.
        """
        async with self._places:
            known = self._dialect
            dialect: Dialect | None = known
            while dialect is not None:
                spoken = dialect
                body = spoken.body(request, self.settings.model)
                try:
                    answered = await self._retried(body, till)
                except (NoAnswer, *retry.UNREADABLE, TimeoutError) as error:
                    refusal = error
                    dialect = spoken.simpler(error, body) if isinstance(error, Rejected) else None
                    continue
                if spoken != known:  # kept only now that it is known to help
                    log.info("endpoint takes less than asked", host=self._host, takes=str(spoken))
                    self._dialect = spoken
                break
            else:
                # Raised from nothing: an endpoint may have sent back the key and the images.
                raise self._meaning(refusal)
        return await self._settled(answered, till)  # while another call has the place

    async def _retried(self, body: Mapping[str, Any], till: Till) -> _Answered:
        """One request, tried again while what fails may pass."""
        waited_s = 0.0  # for a turn and a slot: no sign of a failure, so it does not end the retries

        def is_late(state: RetryCallState) -> bool:
            return (state.seconds_since_start or 0.0) - waited_s + state.upcoming_sleep >= self._patience_s

        attempts = AsyncRetrying(
            retry=retry_if_exception(retry.passes),
            wait=retry.wait,
            stop=lambda state: stop_after_attempt(self.settings.max_attempts)(state) or is_late(state),
            before_sleep=retry.log_retry,
            reraise=True,
        )
        size = tokens.of_request(body, till.image_rule)
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        likely = size.likely + (_LIKELY_OUTPUT if limit is None else limit)
        sent = encoded(body)
        async for attempt in attempts:
            with attempt:
                waited_s += await self._rate.acquire(likely, self._patience_s)
                begun = time.monotonic()
                async with self._slots:
                    waited_s += time.monotonic() - begun
                    answered = await self._once(sent, till, size.most, limit or MOST_OUTPUT, likely)
        return answered

    async def _once(self, body: bytes, till: Till, read: int, written: int, likely: int) -> _Answered:
        """One request. Every one has a reservation of its own: each may be billed.

        It is given back only when the request was surely not billed. A cancelled one is not settled at all: it counts
        as spent when its time is over.
        """
        try:
            paid = await till.reserve(read, written, self.settings.timeout_s)
        except HiBug2Error:
            await self._rate.settle(likely, 0)
            raise
        try:
            attributes = {"gen_ai.request.model": self.settings.model}
            with traces.span("chat", "client", attributes=attributes) as span:
                async with asyncio.timeout(self.settings.timeout_s):
                    completion = await self._wire.post(body)
                counted = _of(completion, "usage")
                for name, told in (("input", "prompt_tokens"), ("output", "completion_tokens")):
                    span.set({f"gen_ai.usage.{name}_tokens": _count(counted, told)})
        except (NoAnswer, *retry.UNREADABLE, TimeoutError) as error:
            metrics.LLM_CALLS.labels(retry.outcome(error)).inc()
            if retry.cost_nothing(error):
                await till.release(paid)
                await self._rate.settle(likely, 0)
            else:
                await till.lose(paid)
            if isinstance(error, Rejected) and error.status == 429:
                asked = retry.retry_after(error)
                if asked is not None and not retry.quota_spent(error):
                    await self._rate.pause(min(asked, _LONGEST_PAUSE_S))
            raise
        return _Answered(completion, paid, likely)

    async def _settled(self, answered: _Answered, till: Till) -> Reply:
        """What was answered, with what it has cost."""
        completion, paid, likely = answered
        if not isinstance(completion, dict) or not isinstance(completion.get("choices"), list):
            metrics.LLM_CALLS.labels("error").inc()
            await till.lose(paid)
            raise Precondition(
                f"{self._host} answers, but not with a chat completion; check that HIBUG2_LLM_BASE_URL is the base of "
                "an OpenAI-compatible API (it often ends in /v1)"
            )
        counted = _of(completion, "usage")
        usage = Usage(1, _count(counted, "prompt_tokens"), _count(counted, "completion_tokens"))
        usage = await till.settle(paid, usage, _count(_of(counted, "prompt_tokens_details"), "cached_tokens"))
        if usage.input_tokens:
            await self._rate.settle(likely, usage.input_tokens + usage.output_tokens)
        try:
            return self._read(completion, usage)
        except (Refused, Truncated) as error:
            metrics.LLM_CALLS.labels(error.reason.lower()).inc()
            raise

    def _read(self, completion: Mapping[str, Any], usage: Usage) -> Reply:
        model = _text(completion, "model") or self.settings.model
        if not completion["choices"]:
            return Reply("", None, usage, model)
        choice = completion["choices"][0]
        message, finish = _of(choice, "message"), _text(choice, "finish_reason")
        if refusal := _text(message, "refusal"):
            raise Refused(f"the model '{self.settings.model}' refused: {self._cleaned(refusal)}", usage=usage)
        if finish == "content_filter":
            raise Refused(f"a content filter of {self._host} withheld the answer", usage=usage)
        if finish == "length":
            raise Truncated(
                f"the answer of the model '{self.settings.model}' was cut off after {usage.output_tokens} tokens; "
                "raise max_tokens of the prompt, or the context of the model",
                usage=usage,
            )
        text = _text(message, "content").encode("utf-8", "replace").decode()
        return Reply(text, extract_json(text), usage, model)

    def _meaning(self, error: Exception) -> HiBug2Error:
        """The platform's error for a request that brought no answer; says nothing of key and request."""
        if isinstance(error, TimeoutError):
            return Unavailable(
                f"{self._host} gave no answer within {self.settings.timeout_s:g} s, tried {self.settings.max_attempts} "
                "times at most; raise HIBUG2_LLM_TIMEOUT_S if the model is slow"
            )
        if isinstance(error, Broken):
            return Unavailable(f"no connection to {self._host}: {self._cleaned(str(error))}")
        if not isinstance(error, Rejected):
            return Unavailable(f"{self._host} answered with what is no JSON; it may work later")
        said = self._cleaned(error.message)
        where = f"{self._host} answered {error.status}"
        if error.code in retry.FILTERED:
            return Refused(f"{where}, a content filter declined the request: {said}", usage=Usage(calls=1))
        if retry.quota_spent(error):
            return Precondition(f"{where}, the quota is spent: {said}; top it up at the provider")
        if retry.passes(error):
            return Unavailable(f"{where}: {said}; it may work later")
        if error.status in (401, 403):
            return Precondition(f"{where}, the key is not accepted: {said}; check HIBUG2_LLM_API_KEY")
        if error.status == 404:
            return Precondition(
                f"{where}: {said}; check HIBUG2_LLM_MODEL ('{self.settings.model}') and HIBUG2_LLM_BASE_URL"
            )
        return Precondition(f"{where}: {said}")

    @property
    def _patience_s(self) -> float:
        return self.settings.timeout_s * self.settings.max_attempts

    @property
    def _host(self) -> str:
        return "the LLM endpoint " + urlsplit(self.settings.base_url).netloc.rpartition("@")[2]

    def _cleaned(self, text: str) -> str:
        """`text` of an endpoint without key and image bytes: some send back what they were sent."""
        key = self.settings.api_key.get_secret_value()
        if key:
            text = text.replace(key, "<key>")
        return shortened(_LONG_RUN.sub("<…>", _DATA_URL.sub("<image>", text)), 300)


def _of(value: Any, name: str) -> Any:
    """A field of an object of an answer; None where there is none: endpoints leave out what they like."""
    return value.get(name) if isinstance(value, dict) else None


def _text(value: Any, name: str) -> str:
    found = _of(value, name)
    return found if isinstance(found, str) else ""


def _count(value: Any, name: str) -> int:
    found = _of(value, name)
    return found if isinstance(found, int) and found > 0 else 0
