"""Calls to a language model: structured answers however the endpoint gives them, paid by an account, kept for its team.

A call first looks whether the team has the answer already, then waits for a place (`endpoint.py`), for its turn
(`rate.py`), for a slot (`endpoint.py`) and for the money (`ledger.py`), and only then asks.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

from shared import logs, metrics
from shared.config import LLMEnvironment
from shared.errors import Precondition
from shared.llm.answer import Reply, Usage, WrongAnswer, extract_json, listed, problems_of, shortened
from shared.llm.cache import AnswerCache, Kept, key_of
from shared.llm.dialect import Request
from shared.llm.endpoint import MOST_OUTPUT, Endpoint
from shared.llm.ledger import Account, BudgetSpent, Ledger
from shared.llm.link import Redis
from shared.llm.prices import Prices
from shared.llm.rate import Rate
from shared.llm.settings import LLMSettings
from shared.llm.till import Till
from shared.llm.tokens import with_detail
from shared.prompting import Message

log = logs.get("llm")
T = TypeVar("T")

Check = Callable[[Any], list[str]]  # what is wrong with an answer that fits its JSON schema

_MAX_ECHO = 8000  # characters of a wrong answer that are sent back


class LLM:
    """A model behind an OpenAI-compatible endpoint. Belongs to one event loop; close it when done.

    With `redis` the limits, the accounts and the answers are those of all processes; without, limits are kept by this
    process, and nothing is charged or kept.
    """

    def __init__(self, settings: LLMSettings, redis: Redis | None = None, prices: Prices | None = None) -> None:
        self.settings = settings
        self.prices = Prices.load() if prices is None else prices
        self.ledger = None if redis is None else Ledger(redis)
        link = None if self.ledger is None else self.ledger.link
        limits = (settings.requests_per_minute, settings.tokens_per_minute)
        self._endpoint = Endpoint(settings, Rate(link, settings.base_url, settings.model, *limits))
        self._cache = AnswerCache(link, settings.cache_ttl_s)
        self._flights: dict[str, asyncio.Future[Kept | None]] = {}
        self._till = Till(price=self.prices.of(settings.model))
        self._salt = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._endpoint.close()

    def charging(self, account: Account, *, capped: bool = False, salt: str = "") -> Self:
        """The same model, its calls charged to `account` and answered from what its team asked before with this `salt`.

        `capped` says that the account was opened with a cap: then nothing is paid while Redis does not know the
        account, as after it lost its data. Slots, limits and what is known of the endpoint are shared; closing one
        closes all. Raises Precondition for a cap where there is no Redis to keep it.
        """
        if capped and self.ledger is None:
            raise Precondition(f"the budget of {account} needs Redis, and this client has none")
        view = copy.copy(self)
        view._till = replace(self._till, ledger=self.ledger, account=account, capped=capped)
        view._salt = salt
        return view

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
        Truncated, Unavailable when the endpoint stays away, Precondition when it will not serve this client, and
        BudgetSpent before a call that the account may not be able to pay.
        """
        conversation = list(messages)
        spent = Usage()
        for last in (False, True):
            try:
                reply = await self._answer(conversation, schema, name, temperature, max_tokens)
            except WrongAnswer as wrong:
                wrong.usage = spent + wrong.usage
                raise
            spent += reply.usage
            unfit = ["it holds no JSON"] if reply.value is None else problems_of(reply.value, schema)
            problems = unfit or check(reply.value)
            _count(reply, not problems)
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
        reply = await self._answer(messages, schema, name, temperature, max_tokens)
        _count(reply, reply.value is not None)
        return reply

    async def _answer(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        name: str,
        temperature: float | None,
        max_tokens: int | None,
    ) -> Reply:
        """The answer that the team has, else that of the endpoint; of equal calls at a time one is made."""
        account = self._till.account
        if max_tokens is None and account is not None:
            max_tokens = MOST_OUTPUT  # what it may cost must be known before
        shown = with_detail(messages, self.settings.image_detail)
        request = Request(shown, schema, name, temperature, max_tokens)
        if account is None or not self.settings.cache_ttl_s:
            return await self._endpoint.ask(request, self._till)
        key = key_of(account.team, self.settings.base_url, self.settings.model, vars(request), self._salt)
        while (flight := self._flights.get(key)) is not None:
            if kept := await asyncio.shield(flight):  # None: the other failed, so it is this one's turn
                return self._hit(kept, "shared")
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        kept = None
        try:
            if kept := await self._cache.get(key):
                return self._hit(kept, "hit")
            metrics.LLM_CACHE.labels("miss").inc()
            reply = await self._endpoint.ask(request, self._till)
            if reply.value is not None:
                kept = Kept(reply.text, reply.model)
                await self._cache.put(key, kept)
            return reply
        finally:
            del self._flights[key]
            flight.set_result(kept)

    def _hit(self, kept: Kept, how: str) -> Reply:
        metrics.LLM_CACHE.labels(how).inc()
        price = self._till.price
        free = Usage(cached=1, amount=0.0, currency=price.currency) if price else Usage(cached=1)
        return Reply(kept.text, extract_json(kept.text), free, kept.model)


def _count(reply: Reply, fits: bool) -> None:
    metrics.LLM_CALLS.labels("cached" if reply.usage.cached else "ok" if fits else "invalid").inc()


def llm_from(settings: LLMEnvironment, redis: Redis | None = None) -> LLM | None:
    """The model that the environment names, None when it names none. `redis` stays the caller's to close.

    Raises NotFound or InvalidInput when the price table that it names cannot be read.
    """
    if not settings.llm_base_url:
        return None
    return LLM(
        LLMSettings(
            base_url=settings.llm_base_url,
            api_key=settings.llm_api_key,
            model=settings.llm_model,
            timeout_s=settings.llm_timeout_s,
            max_concurrency=settings.llm_max_concurrency,
            requests_per_minute=settings.llm_requests_per_minute,
            tokens_per_minute=settings.llm_tokens_per_minute,
            image_detail=settings.llm_image_detail,
            cache_ttl_s=settings.llm_cache_ttl_s,
        ),
        redis,
        Prices.load(settings.llm_prices),
    )


async def together(questions: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What `questions` give, in their order, asked side by side; the first failure ends the others.

    When the budget is spent those on their way are waited for: they are paid, and kept for when it is raised.
    """
    tasks = [asyncio.create_task(question) for question in questions]
    try:
        return await asyncio.gather(*tasks)
    except BudgetSpent:
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def correction(reply: Reply, problems: Sequence[str], schema: Mapping[str, Any] | None = None) -> list[Message]:
    """The messages that send `reply` back with what is wrong, and with the form that was asked for if given."""
    wish = "Your answer cannot be used:\n" + listed(problems) + "\n\nAnswer again, with JSON alone."
    if schema is not None:
        wish += " It must fit this JSON schema:\n" + json.dumps(schema, ensure_ascii=False)
    return [
        {"role": "assistant", "content": shortened(reply.text, _MAX_ECHO) or "(nothing)"},
        {"role": "user", "content": wish.encode("utf-8", "replace").decode()},
    ]
