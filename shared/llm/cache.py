"""Answers of language models kept for the team that paid for them, so that what is asked again costs nothing."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shared import logs
from shared.llm.encoding import ordered
from shared.llm.link import Away, Link

log = logs.get("llm.cache")

_MAX_BYTES = 64 * 1024  # of one answer, compressed


class Kept(NamedTuple):
    """The text of an answer and the model that gave it."""

    text: str
    model: str


def key_of(team: str, base_url: str, model: str, request: Mapping[str, Any], salt: str = "") -> str:
    """The key of `request` (messages with their image bytes, schema, name, sampling) of `team`: hashes alone.

    Another `salt` makes another key of the same request.
    """
    said = ordered([team, base_url, model, *([salt] if salt else [])], request)
    return f"hibug2:llm:answer:{team}:{hashlib.sha256(said).hexdigest()}"


class AnswerCache:
    """Answers in Redis for `ttl_s` seconds; keeps nothing without `link` or while Redis is away."""

    def __init__(self, link: Link | None, ttl_s: float) -> None:
        self._link = link
        self._ttl_ms = int(ttl_s * 1000)

    async def get(self, key: str) -> Kept | None:
        """What is kept under `key`, None when nothing is, or nothing that can be read."""
        found = await self._run("return redis.call('GET', KEYS[1])", key)
        if not isinstance(found, bytes):
            return None
        try:
            text, model = json.loads(zlib.decompress(found))
        except (ValueError, zlib.error):
            log.warning("a kept answer cannot be read")
            return None
        return Kept(text, model)

    async def put(self, key: str, answer: Kept) -> None:
        """Keep `answer`, unless it is too large."""
        packed = zlib.compress(json.dumps(answer, ensure_ascii=False).encode())
        if len(packed) <= _MAX_BYTES:
            await self._run("redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])", key, (packed, self._ttl_ms))

    async def _run(self, script: str, key: str, arguments: Sequence[bytes | int] = ()) -> Any:
        if self._link is None:
            return None
        try:
            return await self._link.run(script, (key,), arguments)
        except Away:
            return None
