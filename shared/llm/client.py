"""Calls to a language model: one retry layer, structured answers however the endpoint gives them, what they cost.

Endpoints differ in what they take. A call starts with what is strictest, `response_format` with a strict JSON
schema, and steps down to JSON mode and to plain text when the endpoint refuses; what was found out holds for all
later calls of the client.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from enum import IntEnum
from typing import Any, Self, cast
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from shared import logs
from shared.config import LLMEnvironment
from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.llm.answer import (
    Refused,
    Reply,
    Truncated,
    Usage,
    WrongAnswer,
    extract_json,
    listed,
    problems_of,
    shortened,
)
from shared.prompting import Message

log = logs.get("llm")

Check = Callable[[Any], list[str]]  # what is wrong with an answer that fits its JSON schema

_MAX_ECHO = 8000  # characters of a wrong answer that are sent back
_FORMAT_WORDS = re.compile(r"response_format|json_schema|json_object|schema|grammar|structured output", re.IGNORECASE)
_FILTERED = frozenset({"content_filter", "content_policy_violation", "moderation_blocked"})
_DATA_URL = re.compile(r"data:[\w/+.-]+;base64,[\w+/=%-]*")
_LONG_RUN = re.compile(r"[A-Za-z0-9+/=_-]{65,}")  # nothing a person reads: image bytes, keys

_UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError)  # a body that is no JSON: cut off, or of a proxy

_backoff = wait_random_exponential(multiplier=0.5, max=20)


class LLMSettings(BaseModel):
    """How to reach a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(pattern=r"^https?://[^/\s]+")
    api_key: SecretStr = SecretStr("")
    model: str = Field(min_length=1)
    timeout_s: float = Field(120.0, gt=0)  # of one attempt; max_attempts times as much bounds a call with its waits
    max_concurrency: int = Field(16, ge=1)
    max_attempts: int = Field(5, ge=1)


class _Format(IntEnum):
    """How the endpoint is told the form of the answer, strictest first."""

    JSON_SCHEMA = 0
    JSON_OBJECT = 1
    TEXT = 2


@dataclass(frozen=True)
class _Dialect:
    """What an endpoint takes of the chat completions API."""

    format: _Format = _Format.JSON_SCHEMA
    limit_name: str = "max_tokens"
    temperature: bool = True


class LLM:
    """A model behind an OpenAI-compatible endpoint. Belongs to one event loop; close it when done."""

    def __init__(self, settings: LLMSettings) -> None:
        self.settings = settings
        # The SDK logs whole requests, images included, when OPENAI_LOG asks for debug.
        logging.getLogger("openai").setLevel(logging.INFO)
        self._api = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=settings.api_key.get_secret_value() or "none",  # local servers take any
            timeout=settings.timeout_s,
            max_retries=0,
        )
        self._slots = asyncio.Semaphore(settings.max_concurrency)
        self._dialect = _Dialect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._api.close()

    async def ask(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        check: Check = lambda _: [],
        *,
        name: str = "answer",
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Reply:
        """The answer to `messages`, as JSON that fits `schema` and in which `check` finds nothing wrong.

        A wrong answer is sent back once with what is wrong. `name` (letters, digits, - and _) is told to the
        endpoint. The reply's usage counts both calls. Raises WrongAnswer when the second is wrong too, Refused,
        Truncated, Unavailable when the endpoint stays away, Precondition when it will not serve this client.
        """
        conversation = list(messages)
        spent = Usage()
        for last in (False, True):
            try:
                reply = await self.complete(
                    conversation, schema, name=name, temperature=temperature, max_tokens=max_tokens
                )
            except WrongAnswer as wrong:
                wrong.usage = spent + wrong.usage
                raise
            spent += reply.usage
            unfit = ["it holds no JSON"] if reply.value is None else problems_of(reply.value, schema)
            problems = unfit or check(reply.value)
            if not problems:
                return Reply(reply.text, reply.value, spent, reply.model)
            if not last:
                conversation += correction(reply, problems, schema if unfit else None)
        raise WrongAnswer(
            f"the model '{self.settings.model}' answered '{name}' wrongly twice:\n{listed(problems)}",
            usage=spent,
            value=None if unfit else reply.value,
            problems=tuple(problems),
        )

    async def complete(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        *,
        name: str = "answer",
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Reply:
        """One answer, its JSON extracted but not validated: for callers that can use parts of an answer.

        Raises as `ask` does, WrongAnswer itself excepted.
        """
        async with self._slots:
            known = self._dialect
            dialect: _Dialect | None = known
            while dialect is not None:
                spoken = dialect
                body: dict[str, Any] = {
                    "model": self.settings.model,
                    "messages": _told(messages, schema, spoken.format),
                }
                if spoken.format is _Format.JSON_SCHEMA:
                    wanted = {"name": name, "schema": schema, "strict": True}
                    body["response_format"] = {"type": "json_schema", "json_schema": wanted}
                elif spoken.format is _Format.JSON_OBJECT:
                    body["response_format"] = {"type": "json_object"}
                if max_tokens is not None:
                    body[spoken.limit_name] = max_tokens
                if temperature is not None and spoken.temperature:
                    body["temperature"] = temperature
                try:
                    completion = await self._call(body)
                except (openai.APIError, *_UNREADABLE, TimeoutError) as error:
                    refusal = error
                    dialect = _simpler(spoken, error, body) if isinstance(error, openai.APIStatusError) else None
                    continue
                if spoken != known:  # kept only now that it is known to help
                    log.info("endpoint takes less than asked", host=self._host, takes=str(spoken))
                    self._dialect = spoken
                return self._read(completion)
        # Not raised from the SDK's error: its request holds the key and the images.
        raise self._meaning(refusal)

    async def _call(self, body: Mapping[str, Any]) -> ChatCompletion:
        """One request, tried again while what fails may pass."""
        attempts = AsyncRetrying(
            retry=retry_if_exception(_passes),
            wait=_wait,
            stop=stop_after_attempt(self.settings.max_attempts)
            | stop_before_delay(self.settings.timeout_s * self.settings.max_attempts),
            before_sleep=_log_retry,
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                # The SDK's timeout is for each read; a server that drips would never meet it.
                async with asyncio.timeout(self.settings.timeout_s):
                    completion: ChatCompletion = await self._api.chat.completions.create(**cast(Any, body))
        return completion

    def _read(self, completion: object) -> Reply:
        if not isinstance(completion, ChatCompletion) or not isinstance(completion.choices, list):
            raise Precondition(
                f"{self._host} answers, but not with a chat completion; check that HIBUG2_LLM_BASE_URL is the base of "
                "an OpenAI-compatible API (it often ends in /v1)"
            )
        counted = completion.usage
        usage = Usage(
            1,
            (counted.prompt_tokens or 0) if counted else 0,
            (counted.completion_tokens or 0) if counted else 0,
        )
        if not completion.choices:
            return Reply("", None, usage, completion.model or self.settings.model)
        choice = completion.choices[0]
        if choice.message.refusal:
            said = self._cleaned(choice.message.refusal)
            raise Refused(f"the model '{self.settings.model}' refused: {said}", usage=usage)
        if choice.finish_reason == "content_filter":
            raise Refused(f"a content filter of {self._host} withheld the answer", usage=usage)
        if choice.finish_reason == "length":
            raise Truncated(
                f"the answer of the model '{self.settings.model}' was cut off after {usage.output_tokens} tokens; "
                "raise max_tokens of the prompt, or the context of the model",
                usage=usage,
            )
        text = (choice.message.content or "").encode("utf-8", "replace").decode()
        return Reply(text, extract_json(text), usage, completion.model or self.settings.model)

    def _meaning(self, error: Exception) -> HiBug2Error:
        """The platform's error for what the SDK raised; says nothing of key and request."""
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return Unavailable(
                f"{self._host} gave no answer within {self.settings.timeout_s:g} s, tried {self.settings.max_attempts} "
                "times at most; raise HIBUG2_LLM_TIMEOUT_S if the model is slow"
            )
        if not isinstance(error, openai.APIStatusError):
            return Unavailable(f"no connection to {self._host}: {self._cleaned(_cause(error))}")
        said = self._cleaned(_message(error))
        where = f"{self._host} answered {error.status_code}"
        if error.code in _FILTERED:
            return Refused(f"{where}, a content filter declined the request: {said}", usage=Usage(calls=1))
        if _quota_spent(error):
            return Precondition(f"{where}, the quota is spent: {said}; top it up at the provider")
        if _passes(error):
            return Unavailable(f"{where}: {said}; it may work later")
        if error.status_code in (401, 403):
            return Precondition(f"{where}, the key is not accepted: {said}; check HIBUG2_LLM_API_KEY")
        if error.status_code == 404:
            return Precondition(
                f"{where}: {said}; check HIBUG2_LLM_MODEL ('{self.settings.model}') and HIBUG2_LLM_BASE_URL"
            )
        return Precondition(f"{where}: {said}")

    @property
    def _host(self) -> str:
        return "the LLM endpoint " + urlsplit(self.settings.base_url).netloc.rpartition("@")[2]

    def _cleaned(self, text: str) -> str:
        """`text` of an endpoint without key and image bytes: some send back what they were sent."""
        key = self.settings.api_key.get_secret_value()
        if key:
            text = text.replace(key, "<key>")
        return shortened(_LONG_RUN.sub("<…>", _DATA_URL.sub("<image>", text)), 300)


def llm_from(settings: LLMEnvironment) -> LLM | None:
    """The model that the environment names, None when it names none."""
    if not settings.llm_base_url:
        return None
    return LLM(
        LLMSettings(
            base_url=settings.llm_base_url,
            api_key=settings.llm_api_key,
            model=settings.llm_model,
            timeout_s=settings.llm_timeout_s,
            max_concurrency=settings.llm_max_concurrency,
        )
    )


def correction(reply: Reply, problems: Sequence[str], schema: Mapping[str, Any] | None = None) -> list[Message]:
    """The messages that send `reply` back with what is wrong, and with the form that was asked for if given."""
    wish = "Your answer cannot be used:\n" + listed(problems) + "\n\nAnswer again, with JSON alone."
    if schema is not None:
        wish += " It must fit this JSON schema:\n" + json.dumps(schema, ensure_ascii=False)
    return [
        {"role": "assistant", "content": shortened(reply.text, _MAX_ECHO) or "(nothing)"},
        {"role": "user", "content": wish.encode("utf-8", "replace").decode()},
    ]


def _told(messages: Sequence[Message], schema: Mapping[str, Any], form: _Format) -> list[Message]:
    """`messages`, and where the endpoint is not told the schema otherwise, the schema in the instructions."""
    if form is _Format.JSON_SCHEMA:
        return list(messages)
    first, *rest = messages
    wish = "Answer with JSON alone. It must fit this JSON schema:\n" + json.dumps(schema, ensure_ascii=False)
    return [{**first, "content": f"{first['content']}\n\n{wish}"}, *rest]


def _simpler(spoken: _Dialect, error: openai.APIStatusError, body: Mapping[str, Any]) -> _Dialect | None:
    """What to speak next when `error` says that the endpoint does not take a part of `body`; None if it does not."""
    if error.status_code not in (400, 404, 415, 422, 501):
        return None
    # Some endpoints send back the request, so a named parameter says more than the words, and the first words more
    # than the rest.
    said = error.param or _message(error)[:300]
    if "max_tokens" in body and "max_completion_tokens" in _message(error):
        return replace(spoken, limit_name="max_completion_tokens")
    if "temperature" in body and "temperature" in said:
        return replace(spoken, temperature=False)
    if spoken.format is not _Format.TEXT and _FORMAT_WORDS.search(said):
        return replace(spoken, format=_Format(spoken.format + 1))
    return None


def _passes(error: BaseException) -> bool:
    """Whether what failed may work when tried again."""
    if isinstance(error, openai.APIStatusError):
        if error.status_code == 501 or _quota_spent(error):
            return False
        return error.status_code in (408, 429) or error.status_code >= 500
    return isinstance(error, (TimeoutError, openai.APIConnectionError, *_UNREADABLE))


def _quota_spent(error: openai.APIStatusError) -> bool:
    return "insufficient_quota" in (error.code, error.type)


def _wait(state: RetryCallState) -> float:
    """Seconds to the next attempt: what the endpoint asks for and a little more, else jittered backoff."""
    error = state.outcome.exception() if state.outcome else None
    asked = _retry_after(error) if isinstance(error, openai.APIStatusError) else None
    return _backoff(state) if asked is None else asked + random.uniform(0, 0.25)  # noqa: S311 not a secret


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the response asks to wait: a number or a date; None when it asks for nothing readable."""
    value = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value)) if value.strip().lower() != "nan" else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning(
        "llm call failed, will be tried again",
        error=type(error).__name__,
        status=getattr(error, "status_code", None),
        attempt=state.attempt_number,
        wait_s=round(state.upcoming_sleep, 2),
    )


def _message(error: openai.APIStatusError) -> str:
    """What the endpoint says, without the wrapping of the SDK."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return said if isinstance(said, str) else str(error.body or error.message)


def _cause(error: Exception) -> str:
    """The innermost reason: the SDK says "Connection error." whatever happened."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return f"{type(inner).__name__} {inner}".strip()
