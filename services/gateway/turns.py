"""One at a time over all gateways: who changes what the store cannot change in one step takes a turn, kept in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import LockError, RedisError

from shared.errors import Busy, Unavailable

LEASE_S = 30.0  # of a gateway that died, or lost Redis, while it had its turn
_WAIT_S = 60.0
_POLL_S = 0.05

Confirm = Callable[[], Awaitable[None]]


@asynccontextmanager
async def turn(redis: Redis, what: str) -> AsyncIterator[Confirm]:
    """Inside, nobody else has a turn at `what`. Waits for it, for a minute at most; then raises Busy.

    Yields what is to be awaited right before the change is made: it raises Unavailable where the turn was lost, and
    else keeps it for LEASE_S more.
    """
    lock = redis.lock(f"hibug2:turn:{what}", LEASE_S, _POLL_S, blocking_timeout=_WAIT_S, thread_local=False)
    if not await lock.acquire():
        raise Busy(f"others are changing {what.rpartition(':')[2]}; try again", retry_s=5.0)

    async def confirm() -> None:
        try:
            await lock.reacquire()
        except LockError as error:
            raise Unavailable(f"another changes {what.rpartition(':')[2]} in between; try again") from error

    keeping = asyncio.create_task(_keep(lock))
    try:
        yield confirm
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        with suppress(RedisError):  # it ends by itself
            await lock.release()


async def _keep(lock: Lock) -> None:
    """Renew the turn; one that is lost is found out by `confirm`."""
    while True:
        await asyncio.sleep(LEASE_S / 3)
        with suppress(RedisError):
            await lock.reacquire()
