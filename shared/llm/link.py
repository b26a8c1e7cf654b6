"""The way to Redis from a process that must go on while Redis is away."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared import logs

log = logs.get("llm")

_PATIENCE_S = 3.0  # for one answer of Redis
_REST_S = 2.0  # after a failure nobody asks for so long


class Away(Exception):
    """Redis does not answer."""


class Redis(Protocol):
    """What is used of `redis.asyncio.Redis`; domain code that calls a model need not know the library."""

    def pipeline(self, transaction: bool) -> Any: ...


@dataclass(frozen=True)
class _Asked:
    script: str
    arguments: tuple[str | int | float | bytes, ...]  # the number of keys, the keys, and what else the script is given
    answer: asyncio.Future[Any]


class Link:
    """Runs Lua scripts on Redis. When one fails, those of the next two seconds fail at once: no call waits in vain.

    Those that are asked for while others are on their way go together after them, each still a step of its own: many
    calls make few round trips, and one at a time costs the process most of what a script costs. Belongs to one loop.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._rest_until = 0.0
        self._away = False
        self._hashes: dict[str, str] = {}
        self._waiting: list[_Asked] = []
        self._sending: asyncio.Task[None] | None = None

    async def run(self, script: str, keys: Sequence[str], arguments: Sequence[str | int | float | bytes] = ()) -> Any:
        """What `script` returns. Raises Away."""
        if time.monotonic() < self._rest_until:
            raise Away
        asked = _Asked(script, (len(keys), *keys, *arguments), asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        answer = await asked.answer
        if isinstance(answer, Exception):  # whatever the library raises, Redis did not do it
            raise Away from answer
        return answer

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                together = [asked for asked in self._waiting if not asked.answer.done()]  # else it was cancelled
                self._waiting.clear()
                if not together:
                    return
                for asked, answer in zip(together, await self._answers(together), strict=True):
                    if not asked.answer.done():
                        asked.answer.set_result(answer)
        finally:
            self._sending = None

    async def _answers(self, together: Sequence[_Asked]) -> list[Any]:
        """What each script returned, or the exception in its place."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                answers = await self._pipelined([("EVALSHA", self._hash(a.script), *a.arguments) for a in together])
                # Known to Redis from then on: it was not yet, or was restarted.
                strange = [i for i, answer in enumerate(answers) if type(answer).__name__ == "NoScriptError"]
                told = await self._pipelined([("EVAL", together[i].script, *together[i].arguments) for i in strange])
                for i, answer in zip(strange, told, strict=True):
                    answers[i] = answer
        except Exception as error:  # noqa: BLE001 it is handed to who asked
            answers = [error] * len(together)
        failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if failed is not None:
            self._rest_until = time.monotonic() + _REST_S
            if not self._away:
                log.warning("redis is away: calls are limited in this process alone", error=str(failed))
        elif self._away:
            log.info("redis is back")
        self._away = failed is not None
        return answers

    async def _pipelined(self, commands: Sequence[Sequence[str | int | float | bytes]]) -> list[Any]:
        if not commands:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    def _hash(self, script: str) -> str:
        found = self._hashes.get(script)
        if found is None:
            found = self._hashes[script] = hashlib.sha1(script.encode()).hexdigest()  # noqa: S324 as Redis names it
        return found
