"""A work queue on Redis Streams: at least once, nothing lost while Redis keeps its data.

An item is offered by its job, delivered to one consumer, stays pending until it is done, and is taken over by another
consumer when its own has been silent for longer than the lease. Done entries are deleted, so that `lag` stays true;
nothing is ever trimmed. There are two classes: consumers take three interactive entries for each batch entry while
both wait. A job keeps back what its team may not have in the queue yet and offers it again later, so that a large job
does not stand before a small one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError, ResponseError

from shared.queue import scripts

GROUP = "workers"
# redis-py's own socket timeout must exceed every BLOCK, or an idle read looks like a dead connection.
SOCKET_TIMEOUT_S = 30.0
_CONNECTIONS = 64  # of a process
_SILENT_MS = 15_000  # a job or a worker that said nothing for so long is gone
_TURNS = 4  # every fourth entry is a batch entry first


class Priority(StrEnum):
    """The classes, the one that is taken first before the other."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True)
class Entry:
    """One delivered entry: its id in the stream of its class, what it carries, and how often it was delivered."""

    id: bytes
    priority: Priority
    team: str
    job: str
    number: int  # of the item in its job
    payload: bytes
    deliveries: int


@dataclass(frozen=True)
class Effect:
    """What happens in the same step in which an entry is done: Lua that sees its keys as K, its arguments as A."""

    lua: str
    keys: Sequence[str]
    arguments: Sequence[str | int | bytes] = ()


NO_EFFECT = Effect("", ())


@dataclass(frozen=True)
class DeadEntry:
    """An entry that was given up, and why."""

    id: bytes
    job: str
    number: int
    payload: bytes
    reason: str


@dataclass(frozen=True)
class Backlog:
    """Entries not yet delivered, entries delivered and not done, and items that jobs keep back."""

    lag: int = 0
    pending: int = 0
    waiting: int = 0

    @property
    def total(self) -> int:
        return self.lag + self.pending + self.waiting


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
    # After a restart of the server every connection of the pool is dead, and each would fail one call.
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), 2, supported_errors=(ConnectionError,))
    # Who finds all connections in use waits for one; the usual pool would say that Redis is not there.
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_CONNECTIONS,
        timeout=SOCKET_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        health_check_interval=15,
        retry=retry,
    )
    pool.connection_class = type("Connection", (_Cancellable, pool.connection_class), {})
    return Redis.from_pool(pool)


class WorkQueue:
    """The queue `name`; every method talks to Redis."""

    def __init__(self, redis: Redis, name: str, lease_ms: int = 60_000) -> None:
        self._redis = redis
        self._base = f"hibug2:queue:{name}"
        self._lease_ms = lease_ms
        self._turn = 0

    def _stream(self, priority: Priority) -> str:
        return f"{self._base}:{priority}"

    def _flight(self, priority: Priority, team: str, job: str) -> tuple[str, str]:
        base = f"{self._base}:flight:{priority}:{team}"
        return f"{base}:{job}", base

    def _waiting(self, priority: Priority) -> str:
        return f"{self._base}:waiting:{priority}"

    def _dead(self, team: str) -> str:
        return f"{self._base}:dead:{team}"

    async def _run(self, script: str, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> Any:
        return await self._redis.register_script(script)(keys=keys, args=arguments)

    async def ensure(self) -> None:
        """Make streams and consumer group where they are missing; without loss where they are there."""
        for priority in Priority:
            try:
                await self._redis.xgroup_create(self._stream(priority), GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    # What jobs do

    async def offer(
        self, priority: Priority, team: str, job: str, items: Sequence[tuple[int, bytes]], left: int, cap: int
    ) -> int:
        """Add `items` (number in the job, payload) from the front as far as the team has room; returns how many.

        Of `cap` items that a team may have in the queue each of its jobs gets its share; one that is there already
        is not added again. `left` is how many the job has to offer in all, `items` included.
        """
        flat = [part for item in items for part in item]
        keys = [self._stream(priority), *self._flight(priority, team, job), self._waiting(priority)]
        return int(await self._run(scripts.OFFER, keys, [team, job, cap, left, _SILENT_MS, *flat]))

    async def in_flight(self, priority: Priority, team: str, job: str) -> set[int]:
        """Numbers of the job's items that are in the queue."""
        found: Any = await self._redis.smembers(self._flight(priority, team, job)[0])
        return {int(number) for number in found}

    async def withdraw(self, priority: Priority, team: str, job: str) -> None:
        """The job has nothing more to offer; what of it is in the queue stays there."""
        await self._redis.hdel(self._waiting(priority), f"{team} {job}")

    async def forget(self, priority: Priority, team: str, job: str) -> None:
        """Hold nothing of the job for queued or waiting any more: it has ended, or the streams were lost."""
        keys = [*self._flight(priority, team, job), self._waiting(priority)]
        await self._run(scripts.FORGET, keys, [team, job])

    # What workers do

    async def take(self, consumer: str, block_ms: int = 0, *, claim: bool = True) -> list[Entry]:
        """The next entry for `consumer`; with `claim` first one whose consumer went silent.

        Waits up to `block_ms` for one; empty when none came, in rare cases one of each class.
        """
        self._turn = (self._turn + 1) % _TURNS
        order = list(Priority) if self._turn else list(reversed(Priority))
        streams = [self._stream(priority) for priority in order]
        lease = self._lease_ms if claim else 0
        found = await self._run(scripts.TAKE, streams, [GROUP, consumer, lease])
        if found:
            position, id_, fields, deliveries = found
            pairs = dict(zip(fields[::2], fields[1::2], strict=True))
            return [_entry(order[position - 1], id_, pairs, deliveries)]
        if not block_ms:
            return []
        read: Any = await self._redis.xreadgroup(GROUP, consumer, dict.fromkeys(streams, ">"), count=1, block=block_ms)
        by_name = dict(zip(streams, order, strict=True))
        return [
            _entry(by_name[_text(name)], id_, fields, 1)
            for name, entries in (read.items() if isinstance(read, dict) else read or [])
            for id_, fields in entries
        ]

    async def renew(self, consumer: str, entries: Sequence[Entry]) -> set[bytes]:
        """Renew the leases of what `consumer` still owns of `entries`; returns the ids."""
        order = list(Priority)
        streams = [self._stream(priority) for priority in order]
        told = [part for e in entries for part in (order.index(e.priority) + 1, e.id)]
        return set(await self._run(scripts.RENEW, streams, [GROUP, consumer, *told]))

    async def release(self, consumer: str, entry: Entry) -> None:
        """Let another take the entry at once."""
        await self._run(scripts.RELEASE, [self._stream(entry.priority)], [GROUP, consumer, entry.id, self._lease_ms])

    async def done(self, entry: Entry, effect: Effect = NO_EFFECT) -> Any:
        """Acknowledge and delete, with `effect` in the same step; returns what that returns."""
        keys = [self._stream(entry.priority), *self._flight(entry.priority, entry.team, entry.job), *effect.keys]
        arguments = [GROUP, entry.id, entry.number, entry.job, *effect.arguments]
        return await self._run(scripts.done(effect.lua), keys, arguments)

    async def bury(self, entry: Entry, reason: str, effect: Effect = NO_EFFECT) -> bool:
        """Give the entry up: move it to the dead of its team, with `effect` in the same step.

        False, and nothing happens, where it is no more pending.
        """
        flight = self._flight(entry.priority, entry.team, entry.job)
        keys = [self._stream(entry.priority), *flight, self._dead(entry.team), *effect.keys]
        arguments = [GROUP, entry.id, entry.number, entry.job, entry.payload, reason, *effect.arguments]
        return bool(await self._run(scripts.bury(effect.lua), keys, arguments))

    async def register(self, worker: str, slots: int) -> None:
        """Say that `worker` is there and does `slots` items at a time; to be said again every few seconds."""
        await self._run(scripts.REGISTER, [f"{self._base}:workers"], [f"{worker} {slots}", _SILENT_MS])

    async def leave(self, worker: str, slots: int) -> None:
        """Say that `worker` is gone."""
        await self._redis.zrem(f"{self._base}:workers", f"{worker} {slots}")
        await self._run(scripts.LEAVE, [self._stream(priority) for priority in Priority], [GROUP, worker])

    # What people and machines ask

    async def slots(self) -> int:
        """How many items the workers that are there do at a time."""
        return int(await self._run(scripts.SLOTS, [f"{self._base}:workers"], [_SILENT_MS]))

    async def dead(self, team: str, job: str | None = None) -> list[DeadEntry]:
        """What was given up, of all jobs of the team or of one, the oldest first."""
        found: Any = await self._redis.xrange(self._dead(team))
        entries = [
            DeadEntry(id_, _text(f[b"j"]), int(f[b"k"]), f[b"d"], f[b"r"].decode(errors="replace")) for id_, f in found
        ]
        return [entry for entry in entries if job is None or entry.job == job]

    async def drop_dead(self, team: str, entries: Sequence[DeadEntry], effect: Effect = NO_EFFECT) -> None:
        """Take `entries` off the dead, with `effect` in the same step."""
        if entries:
            arguments = [len(entries), *(entry.id for entry in entries), *effect.arguments]
            await self._run(scripts.drop_dead(effect.lua), [self._dead(team), *effect.keys], arguments)

    async def backlog(self) -> Backlog:
        """What there is to do, of all teams."""
        lag, pending = 0, 0
        for priority in Priority:
            late, held = await self._of_stream(self._stream(priority))
            lag, pending = lag + late, pending + held
        keys = [self._waiting(priority) for priority in Priority]
        return Backlog(lag, pending, int(await self._run(scripts.WAITING, keys, [_SILENT_MS])))

    async def oldest_s(self) -> float:
        """For how many seconds the oldest entry that is not done has been in the queue; 0 where there is none."""
        return int(await self._run(scripts.OLDEST, [self._stream(priority) for priority in Priority], [])) / 1000

    async def _of_stream(self, stream: str) -> tuple[int, int]:
        try:
            groups = await self._redis.xinfo_groups(stream)
        except ResponseError:
            return 0, 0
        for group in groups:
            if _text(group["name"]) == GROUP:
                pending, lag = int(group["pending"]), group["lag"]
                if lag is None:  # unknown to Redis after some deletes; the length still tells
                    lag = max(int(await self._redis.xlen(stream)) - pending, 0)
                return int(lag), pending
        return 0, 0


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _entry(priority: Priority, id_: bytes, fields: Mapping[bytes, bytes], deliveries: int) -> Entry:
    team, job = fields[b"t"].decode(), fields[b"j"].decode()
    return Entry(id_, priority, team, job, int(fields[b"k"]), fields[b"d"], deliveries)
