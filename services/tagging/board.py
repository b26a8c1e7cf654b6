"""What workers and the tagging service tell each other of one tagging, through Redis; all of it may be lost."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
import numpy.typing as npt
from redis.asyncio import Redis

from hibug2.v1 import tagging_pb2, types_pb2
from services.tagging.plan import Part
from services.tagging.shelf import Figures, PartResult
from services.tagging.tagger import Tagged
from shared.llm import Usage
from shared.queue.stream import Effect
from shared.rpc import status
from shared.rpc.costs import spent_cost

_KEEP_S = 7 * 24 * 3600
QUEUE = "tagging"
WORKED_ON = ("taggings", "checks")  # collections whose artifacts workers help to make
# Only the attempt that is the latest may stop the work: one that lost its job to another process must not.
_CANCEL = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[2], '1', 'EX', ARGV[2]) end"
# KEYS: attempt, what to set. ARGV: attempt, text, seconds to keep. What an earlier attempt met stops no later one.
_STOP = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[2], ARGV[2], 'NX', 'EX', ARGV[3]) end"
# K: done, results. A: part, result, seconds to keep. The first result of a part stands; a second changes nothing.
_COMMIT = """
if redis.call('SETBIT', K[1], A[1], 1) == 1 then return 0 end
redis.call('HSET', K[2], A[1], A[2])
redis.call('EXPIRE', K[1], A[3])
redis.call('EXPIRE', K[2], A[3])
return 1
"""
# K: buried. A: the bit, seconds to keep, then the parts.
_MARK = """
for i = 3, #A do redis.call('SETBIT', K[1], A[i], A[1]) end
redis.call('EXPIRE', K[1], A[2])
return 1
"""
# KEYS: done. ARGV: the parts.
_REOPEN = "for _, part in ipairs(ARGV) do redis.call('SETBIT', KEYS[1], part, 0) end"


class Look(Enum):
    """What a worker finds when it comes with a part."""

    WANTED = auto()
    DONE = auto()  # by another
    STOPPED = auto()  # nobody waits for this tagging any more


@dataclass(frozen=True)
class News:
    """How a tagging stands. `done` and `buried` (parts,) bool; `results` are parts whose result is not fetched yet."""

    failure: types_pb2.Problem | None
    pause: str | None
    lost: bool  # Redis lost what was told since `begin`
    done: npt.NDArray[np.bool_]
    buried: npt.NDArray[np.bool_]
    results: frozenset[int]


class Board:
    """One plan of one tagging of one team."""

    def __init__(self, redis: Redis, team: str, tagging: str, plan: str) -> None:
        self._redis = redis
        self._base = f"hibug2:tagging:{team}:{tagging}:{plan}"
        self._attempt = uuid.uuid4().hex  # the service's own; workers learn it when they `look`

    def _key(self, what: str) -> str:
        return f"{self._base}:{what}"

    # The service

    async def begin(self, written: Iterable[int]) -> None:
        """Begin an attempt: forget why an earlier one stopped, and count the parts that the store has as done."""
        numbers = np.fromiter(written, dtype=np.int64)
        bits = np.zeros(int(numbers.max()) + 1 if len(numbers) else 0, dtype=np.bool_)
        bits[numbers] = True
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.delete(*(self._key(k) for k in ("failure", "pause", "cancel")))
        if len(bits):
            pipeline.set(self._key("written"), np.packbits(bits).tobytes())
            pipeline.bitop("OR", self._key("done"), self._key("done"), self._key("written"))
            pipeline.delete(self._key("written"))
            pipeline.expire(self._key("done"), _KEEP_S)
        pipeline.set(self._key("attempt"), self._attempt, ex=_KEEP_S)
        await pipeline.execute()

    async def news(self, part_count: int) -> News:
        """How the tagging stands, in one round trip."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.mget([self._key(k) for k in ("failure", "pause", "attempt", "done", "buried")])
        pipeline.hkeys(self._key("results"))
        (failure, pause, attempt, done, buried), results = await pipeline.execute()
        return News(
            types_pb2.Problem.FromString(failure) if failure else None,
            pause.decode() if pause else None,
            attempt is None,
            _bits(done, part_count),
            _bits(buried, part_count),
            frozenset(int(part) for part in results),
        )

    async def results(self, parts: Sequence[Part], widths: Sequence[int]) -> list[PartResult]:
        """The results of `parts` that are there; `widths` are the numbers of attributes of each."""
        if not parts:
            return []
        found: Any = await self._redis.hmget(self._key("results"), [str(part.number) for part in parts])
        return [
            result_of(part, width, tagging_pb2.TaggingResult.FromString(raw))
            for part, width, raw in zip(parts, widths, found, strict=True)
            if raw is not None
        ]

    async def drop_results(self, parts: Iterable[int]) -> None:
        """Forget results that are in the store; the parts stay done."""
        if numbers := [str(part) for part in parts]:
            await self._redis.hdel(self._key("results"), *numbers)

    async def reopen(self, parts: Iterable[int]) -> None:
        """Count `parts` as not done: their results are nowhere."""
        await self._redis.eval(_REOPEN, 1, self._key("done"), *(str(part) for part in parts))

    def exhume(self, parts: Iterable[int]) -> Effect:
        """What happens when dead entries are taken off: their parts are to be done again."""
        return Effect(_MARK, [self._key("buried")], [0, _KEEP_S, *parts])

    async def tell(self, figures: Figures) -> None:
        """Show the figures to watchers."""
        told = tagging_pb2.WatchTaggingResponse(
            dead_count=figures.dead, invalid_answer_share=figures.invalid_share
        ).SerializeToString()
        await self._redis.set(self._key("figures"), told, ex=_KEEP_S)

    async def told(self) -> tagging_pb2.WatchTaggingResponse:
        """The figures that were told last."""
        raw = await self._redis.get(self._key("figures"))
        return tagging_pb2.WatchTaggingResponse.FromString(raw if isinstance(raw, bytes) else b"")

    async def cancel(self) -> None:
        """Let workers drop what they have of this attempt."""
        await self._redis.eval(_CANCEL, 2, self._key("attempt"), self._key("cancel"), self._attempt, _KEEP_S)

    async def clear(self) -> None:
        """The tagging is complete: nothing of it is needed any more, but a late worker must see that it is over."""
        names = ("failure", "pause", "attempt", "done", "buried", "results", "figures")
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.delete(*(self._key(name) for name in names))
        pipeline.set(self._key("cancel"), b"1", ex=_KEEP_S)
        await pipeline.execute()

    # Workers

    async def look(self, part: int) -> Look:
        """Whether a part is to be worked on."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.exists(*self.halts, self._key("pause"))
        pipeline.getbit(self._key("done"), part)
        pipeline.get(self._key("attempt"))
        stopped, done, attempt = await pipeline.execute()
        self._attempt = (attempt or b"").decode()
        return Look.STOPPED if stopped else Look.DONE if done else Look.WANTED

    @property
    def halts(self) -> tuple[str, str]:
        """The keys one of which is there once what is in hand is dropped; in a pause it is finished, for it is paid."""
        return self._key("cancel"), self._key("failure")

    def commit(self, part: int, tagged: Tagged) -> Effect:
        """What happens when a part is done."""
        answer = tagged.answer
        result = tagging_pb2.TaggingResult(
            codes=answer.codes.astype("<u2").tobytes(), asked_count=answer.asked, cost=spent_cost(answer.usage)
        )
        result.cost.invalid_answer_count = answer.invalid
        for row, reason in enumerate(tagged.errors):
            if reason:
                result.dead_rows.add(row=row, reason=reason[:1000])
        keys = [self._key("done"), self._key("results")]
        return Effect(_COMMIT, keys, [part, result.SerializeToString(), _KEEP_S])

    def bury(self, part: int) -> Effect:
        """What happens when a part is given up."""
        return Effect(_MARK, [self._key("buried")], [1, _KEEP_S, part])

    async def fail(self, problem: types_pb2.Problem) -> None:
        """Say that going on makes no sense; the first to say it is heard."""
        await self._halt("failure", problem.SerializeToString())

    async def pause(self, why: str) -> None:
        """Say that nothing can go on before somebody acts."""
        await self._halt("pause", why.encode())

    async def _halt(self, how: str, told: bytes) -> None:
        await self._redis.eval(_STOP, 2, self._key("attempt"), self._key(how), self._attempt, told, _KEEP_S)

    async def stumbled(self, part: int, why: str) -> None:
        """Remember what went wrong with a part that will be tried again."""
        key = self._key(f"stumbled:{part}")
        await self._redis.set(key, why[:1000].encode(), ex=_KEEP_S)

    async def why_stumbled(self, part: int) -> str:
        """What went wrong with a part at the last try that could still say so; "" when none could."""
        raw = await self._redis.get(self._key(f"stumbled:{part}"))
        return raw.decode() if isinstance(raw, bytes) else ""


def raise_failure(news: News) -> None:
    """Raise what a worker said in `fail`, if one did."""
    if news.failure is not None:
        raise status.error_of_problem(news.failure)


def result_of(part: Part, width: int, told: tagging_pb2.TaggingResult) -> PartResult:
    """The result that a worker told of `part`, which lacked `width` attributes."""
    cost = told.cost
    usage = Usage(
        cost.call_count,
        cost.input_token_count,
        cost.output_token_count,
        amount=cost.amount if cost.HasField("amount") else None,
        currency=cost.currency,
    )
    codes = np.frombuffer(told.codes, dtype="<u2").reshape(part.count, width).astype(np.uint16)
    dead = {row.row: row.reason for row in told.dead_rows}
    return PartResult(part.number, codes, dead, Figures(usage, told.asked_count, cost.invalid_answer_count, len(dead)))


def _bits(raw: bytes | None, count: int) -> npt.NDArray[np.bool_]:
    bits = np.zeros(count, dtype=np.bool_)
    told = np.unpackbits(np.frombuffer(raw or b"", dtype=np.uint8))[:count]
    bits[: len(told)] = told
    return bits
