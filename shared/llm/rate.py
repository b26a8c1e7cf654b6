"""Requests and tokens a minute, over all processes that call the same model.

Two buckets in Redis, filled by the clock of the server. A call takes its estimate out at once, even below empty, and
is told how long to wait until that was refilled: so calls go in the order in which they came, whatever their size,
and what was taken too much comes back when the endpoint says what was used. Nobody joins a queue longer than ten
seconds, for its places are lost when a process dies; who finds it full asks again later. Bucket and refill are such
that no minute sees more than the limit, calls aside that alone take more than a tenth of it.

While Redis is away each process keeps the limits for itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared import metrics
from shared.errors import Unavailable
from shared.llm.link import Away, Link

_PERIOD_S = 60.0
_BURST = 1 / 11  # of the limit may go at once, and the rest of it in the remaining time
_QUEUE_S = 10.0


@dataclass(frozen=True)
class Bucket:
    """What fits in, and what comes back in a second. Not limited when `capacity` is 0."""

    capacity: float
    refill: float

    @classmethod
    def of(cls, limit: int) -> Bucket:
        """The bucket that lets at most `limit` through in any period (0: no limit); one alone always passes."""
        if limit == 0:
            return cls(0, 0)
        capacity = max(1.0, limit * _BURST)
        return cls(capacity, max(limit - capacity, limit / 2) / _PERIOD_S)


@dataclass
class Queue:
    """Two buckets, as the scripts below have them in Redis; for one process. Times in seconds of any one clock."""

    requests: Bucket
    tokens: Bucket
    at: float = 0.0
    levels: list[float] = field(default_factory=list)
    paused_until: float = 0.0

    def take(self, now: float, tokens: float) -> tuple[bool, float, str]:
        """Whether a call has its place, how long to wait (for its turn, or before it asks again), and for what."""
        if now < self.paused_until:
            return False, self.paused_until - now, "pause"
        self._refill(now)
        debts = [max(0.0, -level / bucket.refill) for level, bucket in self._limited()]
        if (longest := max(debts, default=0.0)) > _QUEUE_S:
            return False, longest - _QUEUE_S, "queue"
        wait, what = 0.0, ""
        for i, (name, cost) in enumerate((("requests", 1.0), ("tokens", tokens))):
            bucket = (self.requests, self.tokens)[i]
            if bucket.capacity:
                self.levels[i] -= cost
                due = -self.levels[i] / bucket.refill
                if due > wait:
                    wait, what = due, name
        return True, wait, what

    def give(self, tokens: float) -> None:
        """Give tokens back, or take more when negative."""
        if self.levels:
            self.levels[1] = min(self.tokens.capacity, self.levels[1] + tokens)

    def _refill(self, now: float) -> None:
        buckets = (self.requests, self.tokens)
        if not self.levels:
            self.levels = [bucket.capacity for bucket in buckets]
        else:
            passed = max(0.0, now - self.at)
            self.levels = [
                min(b.capacity, level + passed * b.refill) for level, b in zip(self.levels, buckets, strict=True)
            ]
        self.at = now

    def _limited(self) -> Iterator[tuple[float, Bucket]]:
        buckets = (self.requests, self.tokens)
        return ((level, b) for level, b in zip(self.levels, buckets, strict=True) if b.capacity)


class Rate:
    """The limits of one model at one endpoint, 0 for none; without `link` for this process alone."""

    def __init__(
        self, link: Link | None, base_url: str, model: str, requests_per_minute: int, tokens_per_minute: int
    ) -> None:
        self._link = link
        self._requests, self._tokens = Bucket.of(requests_per_minute), Bucket.of(tokens_per_minute)
        self._here = Queue(self._requests, self._tokens)
        base = "hibug2:llm:rate:" + hashlib.sha256(f"{base_url}\0{model}".encode()).hexdigest()[:32]
        self._keys = (base, f"{base}:pause")

    async def acquire(self, tokens: int, patience_s: float) -> float:
        """Wait for the turn of a request of `tokens`; returns the seconds that it took.

        Raises Unavailable when the endpoint asked everybody to wait for longer than `patience_s`.
        """
        begun, waited_for = time.monotonic(), ""
        placed = False
        while True:
            placed_now, wait_s, what = await self._take(tokens, placed)
            placed = placed or placed_now
            if what == "pause" and wait_s > patience_s:
                raise Unavailable(f"the endpoint of the language model asked for no calls in the next {wait_s:.0f} s")
            if placed and wait_s <= 0:
                break
            waited_for = waited_for or what
            # Those who have no place spread out, so that they do not all ask in the same moment.
            await asyncio.sleep(wait_s if placed_now else wait_s + random.uniform(0, _QUEUE_S / 20))  # noqa: S311
        waited_s = time.monotonic() - begun
        if waited_for:
            metrics.LLM_WAIT_SECONDS.labels(waited_for).observe(waited_s)
        return waited_s

    async def settle(self, reserved: int, used: int) -> None:
        """Give back of the `reserved` tokens what was not `used`."""
        if not self._tokens.capacity or reserved == used:
            return
        self._here.give(reserved - used)
        if self._link is not None:
            try:
                await self._link.run(_GIVE, self._keys, (reserved - used, self._tokens.capacity))
            except Away:
                return

    async def pause(self, seconds: float) -> None:
        """Let nobody call for so long: the endpoint asked for it."""
        self._here.paused_until = max(self._here.paused_until, time.monotonic() + seconds)
        if self._link is not None:
            try:
                await self._link.run(_PAUSE, self._keys, (max(1, int(seconds * 1000)),))
            except Away:
                return

    async def _take(self, tokens: int, placed: bool) -> tuple[bool, float, str]:
        """As `Queue.take`; who is `placed` already only asks whether there is a pause."""
        if self._link is not None:
            limits = (self._requests.capacity, self._requests.refill, self._tokens.capacity, self._tokens.refill)
            try:
                found = await self._link.run(_TAKE, self._keys, (*limits, tokens, _QUEUE_S, int(placed)))
                return bool(found[0]), int(found[1]) / 1000, found[2].decode()
            except Away:
                pass
        now = time.monotonic()
        if placed:
            left = max(0.0, self._here.paused_until - now)
            return False, left, "pause" if left else ""
        return self._here.take(now, tokens)


_TAKE = """
local tokens, queue, placed = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] == '1'
local paused = redis.call('PTTL', KEYS[2])
if paused > 0 then return {0, paused, 'pause'} end
if placed then return {0, 0, ''} end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local buckets = {
  {name = 'requests', capacity = tonumber(ARGV[1]), refill = tonumber(ARGV[2]), cost = 1},
  {name = 'tokens', capacity = tonumber(ARGV[3]), refill = tonumber(ARGV[4]), cost = tokens},
}
local at = tonumber(redis.call('HGET', KEYS[1], 'at') or now)
local longest = 0
for _, b in ipairs(buckets) do
  local level = tonumber(redis.call('HGET', KEYS[1], b.name) or b.capacity)
  b.level = math.min(b.capacity, level + math.max(0, now - at) * b.refill)
  if b.capacity > 0 then longest = math.max(longest, -b.level / b.refill) end
end
if longest > queue then return {0, math.ceil((longest - queue) * 1000), 'queue'} end
local wait, what = 0, ''
for _, b in ipairs(buckets) do
  if b.capacity > 0 then
    b.level = b.level - b.cost
    if -b.level / b.refill > wait then wait, what = -b.level / b.refill, b.name end
  end
  redis.call('HSET', KEYS[1], b.name, string.format('%.6f', b.level))
end
redis.call('HSET', KEYS[1], 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((600 + 2 * wait) * 1000))
return {1, math.ceil(wait * 1000), what}
"""

_GIVE = """
local level = redis.call('HGET', KEYS[1], 'tokens')
if level then
  redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', math.min(ARGV[2], level + ARGV[1])))
end
"""

_PAUSE = "if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[2], '1', 'PX', ARGV[1]) end"
