"""What workers and the tagging service tell each other through Redis; all of it may be lost."""

from __future__ import annotations

import uuid

from redis.asyncio import Redis

from hibug2.v1 import types_pb2
from shared.rpc import status

_KEEP_S = 7 * 24 * 3600
QUEUE = "tagging"
# Only the attempt that is the latest may stop the work: one that lost its job to another process must not.
_CANCEL = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[2], '1', 'EX', ARGV[2]) end"
_COST = ("call_count", "input_token_count", "output_token_count", "invalid_answer_count")


class Board:
    """Progress, failure and cancellation of one tagging of one team."""

    def __init__(self, redis: Redis, team: str, tagging: str) -> None:
        self._redis = redis
        self._base = f"hibug2:tagging:{team}:{tagging}"
        self._attempt = uuid.uuid4().hex

    async def begin(self) -> None:
        """Begin an attempt and forget what an earlier one left."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.delete(*(f"{self._base}:{k}" for k in ("rows", "cost", "failure", "cancel")))
        pipeline.set(f"{self._base}:attempt", self._attempt, ex=_KEEP_S)
        await pipeline.execute()

    async def is_lost(self) -> bool:
        """True when Redis lost what was told since `begin`."""
        return not await self._redis.exists(f"{self._base}:attempt")

    async def part_done(self, part: int, rows: int, cost: types_pb2.Cost) -> None:
        """Count a part once, however often it is reported; its cost is added each time, for it was spent."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hset(f"{self._base}:rows", str(part), str(rows))
        for field in _COST:
            pipeline.hincrby(f"{self._base}:cost", field, getattr(cost, field))
        for kind in ("rows", "cost"):
            pipeline.expire(f"{self._base}:{kind}", _KEEP_S)
        await pipeline.execute()

    async def rows_done(self) -> dict[int, int]:
        """Part number -> rows, for the parts reported since `begin`."""
        found = await self._redis.hgetall(f"{self._base}:rows")
        return {int(k): int(v) for k, v in found.items()}

    async def cost(self) -> types_pb2.Cost:
        found = await self._redis.hmget(f"{self._base}:cost", list(_COST))
        cost = types_pb2.Cost()
        for name, value in zip(_COST, found, strict=True):
            setattr(cost, name, int(value or 0))
        return cost

    async def fail(self, problem: types_pb2.Problem) -> None:
        """Say that going on makes no sense; the first to say it is heard."""
        await self._redis.set(f"{self._base}:failure", problem.SerializeToString(), nx=True, ex=_KEEP_S)

    async def raise_failure(self) -> None:
        """Raise what a worker said in `fail`, if one did."""
        raw = await self._redis.get(f"{self._base}:failure")
        if isinstance(raw, bytes):
            raise status.error_of_problem(types_pb2.Problem.FromString(raw))

    async def cancel(self) -> None:
        """Let workers drop what they have of this attempt."""
        await self._redis.eval(_CANCEL, 2, f"{self._base}:attempt", f"{self._base}:cancel", self._attempt, _KEEP_S)

    async def is_stopped(self) -> bool:
        """True when nobody waits for this tagging any more."""
        return bool(await self._redis.exists(f"{self._base}:cancel", f"{self._base}:failure"))
