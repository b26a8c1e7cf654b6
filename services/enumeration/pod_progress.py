"""How far the pod of a Kubernetes Job is: written by the pod, read by the service that made the Job. May be lost."""

from __future__ import annotations

from redis.asyncio import Redis

from services.enumeration.order import Order

_KEEP_S = 3600


def _key(order: Order) -> str:
    return f"hibug2:enumeration-pod:{order.team}:{order.name}"


async def tell(redis: Redis, order: Order, done: int, total: int) -> None:
    """Say that `done` of `total` are done."""
    await redis.set(_key(order), f"{done} {total}", ex=_KEEP_S)


async def told(redis: Redis, order: Order) -> tuple[int, int]:
    """(done, total) as the pod last said; (0, 0) where it said nothing."""
    found = await redis.get(_key(order))
    done, total = (int(part) for part in (found or b"0 0").split())
    return done, total
