"""A work queue on one Redis Stream: at least once, nothing lost while Redis keeps its data.

An entry is delivered to one consumer, stays pending until it is done, and is claimed by another when its consumer has
been silent for longer than the lease. Done entries are deleted, so that `lag` stays true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

GROUP = "workers"
_FIELD = b"d"
# redis-py's own socket timeout must exceed every BLOCK, or an idle read looks like a dead connection.
SOCKET_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Entry:
    """One delivered entry: its id in the stream, its payload, and how often it was delivered."""

    id: bytes
    payload: bytes
    deliveries: int


class _Cancellable(AbstractConnection):
    """A connection on which no cancellation is lost.

    redis-py sends inside `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes in the moment
    in which the sending is done; a loop around it would then never end.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        await super().send_packed_command(command, check_health)
        if task and task.cancelling() > before:
            await self.disconnect(nowait=True)  # its answer must not go to the next call
            raise asyncio.CancelledError


def connect(url: str) -> Redis:
    """A client for `url` that survives blocking reads; bytes in, bytes out."""
    client = Redis.from_url(url, socket_timeout=SOCKET_TIMEOUT_S, health_check_interval=15)
    pool = client.connection_pool
    pool.connection_class = type("Connection", (_Cancellable, pool.connection_class), {})
    return client


class WorkQueue:
    """The queue `name`; every method talks to Redis."""

    def __init__(self, redis: Redis, name: str, lease_ms: int = 60_000) -> None:
        self._redis = redis
        self._stream = f"hibug2:queue:{name}"
        self._lease_ms = lease_ms

    async def ensure(self) -> None:
        """Make stream and group when they are missing; needed again after Redis lost its data."""
        try:
            await self._redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def add(self, payloads: Sequence[bytes]) -> None:
        """Append `payloads` in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for payload in payloads:
            pipeline.xadd(self._stream, {_FIELD: payload})
        await pipeline.execute()

    async def read(self, consumer: str, count: int, block_ms: int) -> list[Entry]:
        """Up to `count` entries for `consumer`: first those whose consumer went silent, then new ones.

        Waits up to `block_ms` for a new one; empty when none came.
        """
        entries = await self._claim(consumer, count)
        if entries:
            pending = await self._redis.xpending_range(
                self._stream, GROUP, min=entries[0][0], max=entries[-1][0], count=len(entries), consumername=consumer
            )
            times = {p["message_id"]: int(p["times_delivered"]) for p in pending}
            return [Entry(id_, fields[_FIELD], times.get(id_, 1)) for id_, fields in entries]
        found: Any = await self._redis.xreadgroup(GROUP, consumer, {self._stream: ">"}, count=count, block=block_ms)
        streams = found.items() if isinstance(found, dict) else found or []
        return [Entry(id_, fields[_FIELD], 1) for _, read in streams for id_, fields in read]

    async def _claim(self, consumer: str, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Entries whose consumer went silent. One call looks at some pending entries only: the cursor is followed."""
        cursor: Any = b"0-0"
        while True:
            cursor, found, *_ = await self._redis.xautoclaim(
                self._stream, GROUP, consumer, self._lease_ms, start_id=cursor, count=count
            )
            entries = [(id_, fields) for id_, fields in found if fields]
            if entries or cursor == b"0-0":
                return entries

    async def done(self, entry: Entry) -> None:
        """Acknowledge and delete."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.xack(self._stream, GROUP, entry.id)
        pipeline.xdel(self._stream, entry.id)
        await pipeline.execute()

    async def keep(self, consumer: str, entry: Entry) -> None:
        """Renew the lease of an entry that is still being worked on, without counting a delivery."""
        await self._redis.xclaim(self._stream, GROUP, consumer, 0, [entry.id], justid=True)

    async def backlog(self) -> tuple[int, int]:
        """(entries not yet delivered, entries delivered and not done)."""
        try:
            groups = await self._redis.xinfo_groups(self._stream)
        except ResponseError:
            return 0, 0
        for group in groups:
            if group["name"] in (GROUP, GROUP.encode()):
                pending = int(group["pending"])
                lag = group["lag"]
                if lag is None:  # unknown to Redis after some deletes; the length still tells
                    lag = max(int(await self._redis.xlen(self._stream)) - pending, 0)
                return int(lag), pending
        return 0, 0
