"""The way to Redis from a process that must go on while Redis is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

from shared import logs

log = logs.get("llm")

_PATIENCE_S = 3.0  # for one answer of Redis
_REST_S = 2.0  # after a failure nobody asks for so long


class Away(Exception):
    """Redis does not answer."""


class Redis(Protocol):
    """What is used of `redis.asyncio.Redis`; domain code that calls a model need not know the library."""

    def register_script(self, script: str) -> Any: ...


class Link:
    """Runs Lua scripts on Redis. When one fails, those of the next two seconds fail at once: no call waits in vain."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._rest_until = 0.0
        self._away = False
        self._scripts: dict[str, Any] = {}  # registered: each has its hash, which costs

    async def run(self, script: str, keys: Sequence[str], arguments: Sequence[str | int | float | bytes] = ()) -> Any:
        """What `script` returns. Raises Away."""
        if time.monotonic() < self._rest_until:
            raise Away
        try:
            registered = self._scripts.get(script) or self._scripts.setdefault(
                script, self._redis.register_script(script)
            )
            async with asyncio.timeout(_PATIENCE_S):
                answer = await registered(keys=keys, args=arguments)
        except Exception as error:  # whatever the library raises, Redis did not do it
            self._rest_until = time.monotonic() + _REST_S
            if not self._away:
                log.warning("redis is away: calls are limited in this process alone", error=str(error))
            self._away = True
            raise Away from error
        if self._away:
            log.info("redis is back")
        self._away = False
        return answer
