"""One tagging from its plan to its table: keeps workers supplied, gathers what they find, writes it down."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from hibug2.v1 import tagging_pb2 as pb
from services.tagging import board, plan, reuse
from services.tagging.board import Board, News
from services.tagging.config import Settings
from services.tagging.plan import Part, Plan
from services.tagging.shelf import Figures, Outline, PartResult, Shelf
from shared import logs, metrics, traces
from shared.errors import NotFound, Unavailable
from shared.jobs import Paused, Progress
from shared.llm import Account, Ledger, Spend
from shared.names import Name
from shared.queue.stream import DeadEntry, Priority, WorkQueue
from shared.rpc.costs import spent_cost
from shared.schema import Schema, Tagger
from shared.store.artifacts import Artifacts, Provenance

log = logs.get("tagging")
T = TypeVar("T")

_POLL_S = 0.1
_RECHECK_S = 2.0  # between two looks whether what was queued is still there, or the dataset
_COST_S = 1.0  # between two looks at what was spent
_OFFERED = 256  # items in one round trip
_FETCHED = 256  # results in one round trip
_MIN_ITEMS = 16  # of a team in the queue, however few workers there are


@dataclass(frozen=True)
class Wanted:
    """A tagging that somebody asked for."""

    name: Name
    instances: pa.Table
    schema: Schema
    dataset_digest: str
    splits: tuple[str, ...]
    prompt_digest: str  # "" where no language model is asked
    model: str
    clip: str  # as clip.clip_id tells; "" where CLIP tags nothing
    redrive: int  # how often dead instances were tried again before
    priority: Priority | None = None  # None: as the number of instances has it
    # Only these attributes, by position, are tagged, of a language model, and nothing is taken over; None: all.
    anew: tuple[int, ...] | None = None

    @property
    def keys(self) -> list[str]:
        """What each attribute's tags can be found again by."""
        return [reuse.attribute_key(a, self.prompt_digest, self.model, self.clip) for a in self.schema.attributes]


class Course:
    """One attempt at one tagging. What the store has of it is kept; what Redis has may be lost at any moment."""

    def __init__(
        self, settings: Settings, redis: Redis, queue: WorkQueue, artifacts: Artifacts, wanted: Wanted
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._queue = queue
        self._artifacts = artifacts
        self._wanted = wanted
        self._team, self._job = artifacts.team, str(wanted.name)
        self._ledger = Ledger(redis)
        self._shelf = Shelf(artifacts, wanted.name)
        self._outline: Outline
        self._plan: Plan
        self._board: Board
        self._account = Account(self._team, self._job)
        self._cap: float | None = None
        self._written: set[int] = set()  # parts that the store has
        self._buffer: dict[int, PartResult] = {}  # fetched from Redis, and still there
        self._buffered_since = 0.0
        self._figures = Figures()  # of all that is written or fetched
        self._left: deque[int] | None = None  # parts that wait here; None: not known
        self._recheck_at = self._cost_at = self._look_at = 0.0
        self._idle = False
        self._waits = False  # the queue holds this job for one that has more to offer

    async def work(self, progress: Progress) -> None:
        """Do what is left to do and close the table. Raises Paused, and what a worker says makes going on senseless."""
        progress.step = "planning"
        await asyncio.to_thread(self._prepare)
        progress.step = "tagging"
        self._progress_from(progress)
        if self._plan.parts:
            await self._follow(progress)
        else:
            await self._close({})

    async def _follow(self, progress: Progress) -> None:
        try:
            await self._patiently(self._begin)
            while True:
                if await self._patiently(lambda: self._turn(progress)):
                    break
                await asyncio.sleep(_POLL_S)
        except asyncio.CancelledError:
            if progress.cancelled:  # by somebody; a process that is stopped leaves its workers at work
                await self._quietly(self._board.cancel)
            await self._break_off()
            raise
        except Exception:
            await self._break_off()
            raise
        dead = [e for e in await self._patiently(lambda: self._queue.dead(self._team, self._job)) if self._is_own(e)]
        buried = {entry.number: entry.reason for entry in dead}
        await self._close(buried)
        await self._quietly(self._board.clear)
        await self._quietly(lambda: self._queue.drop_dead(self._team, dead))
        for priority in Priority:
            await self._quietly(partial(self._queue.forget, priority, self._team, self._job))

    def _is_own(self, entry: DeadEntry) -> bool:
        return pb.TaggingItem.FromString(entry.payload).plan == self._outline.id

    # The plan

    def _prepare(self) -> None:
        """The plan of an earlier attempt, whose parts count, or a new one."""
        try:
            self._outline = self._shelf.outline()
            self._plan = self._shelf.plan(self._outline)
        except NotFound:
            self._plan, self._outline = self._planned()
        self._board = Board(self._redis, self._team, self._job, self._outline.id)
        written = self._shelf.written()
        self._written, self._figures = set(written.parts), written.figures
        if (budget := self._shelf.budget()) is not None:
            self._account, self._cap = Account(self._team, budget[0] or self._job), budget[1]

    def _planned(self) -> tuple[Plan, Outline]:
        wanted, attributes = self._wanted, self._wanted.schema.attributes
        looked = list(plan.looked_at(wanted.schema) if wanted.anew is None else wanted.anew)
        taken = looked if wanted.anew is None else []
        keys = wanted.keys
        found = reuse.known_codes(
            self._artifacts,
            wanted.name.dataset,
            wanted.instances,
            [attributes[j] for j in taken],
            [keys[j] for j in taken],
        )
        known = found.spread(taken, len(attributes))
        lacking = ~known.mask
        lacking[:, [j for j in range(len(attributes)) if j not in looked]] = False
        groups = plan.groups_of(lacking)
        asked = {attributes[j].tagger for group in groups for j in group.attributes}
        by_llm = Tagger.VLM in asked or wanted.anew is not None
        rows_per_part = self._settings.llm_item_rows if by_llm else self._settings.item_rows
        self._artifacts.dataset(wanted.name.dataset)  # deleted meanwhile, its folder would be made again
        made = Plan(wanted.instances.num_rows, groups, rows_per_part)
        outline = self._shelf.write_plan(
            made,
            wanted.instances,
            known,
            dataset=wanted.dataset_digest,
            schema=wanted.schema.schema_id,
            prompt_digest=wanted.prompt_digest,
            model=wanted.model,
            clip=wanted.clip,
        )
        return made, outline

    @property
    def _priority(self) -> Priority:
        few = len(self._plan.rows) <= self._settings.interactive_rows
        return self._wanted.priority or (Priority.INTERACTIVE if few else Priority.BATCH)

    def _item(self, part: Part) -> bytes:
        return pb.TaggingItem(
            team=self._team,
            tagging=self._job,
            plan=self._outline.id,
            part=part.number,
            shard=part.shard,
            first_row=part.first,
            row_count=part.count,
            attributes=self._plan.attributes_of(part),
            account=self._account.name,
            capped=self._cap is not None,
            anew=self._wanted.anew is not None,
            traceparent=traces.traceparent(),
        ).SerializeToString()

    # Following the workers

    async def _begin(self) -> None:
        """Say that this attempt has begun, and what is done. After Redis lost its data all is told again."""
        await self._flush()
        if self._cap is not None:
            await self._of_ledger(self._ledger.open(self._account, self._cap))
        usage = self._figures.usage
        if usage.calls:
            spend = Spend(usage.amount or 0.0, usage.currency, usage.calls, usage.input_tokens, usage.output_tokens)
            await self._of_ledger(self._ledger.seed(self._account, spend))
        await self._queue.ensure()
        await self._board.begin(self._written)
        self._left = None

    async def _turn(self, progress: Progress) -> bool:
        """One look at how things stand; true when all parts have ended and their results are written."""
        news = await self._board.news(len(self._plan.parts))
        # A worker that did not find its part says so: the dataset may be gone.
        if news.failure is not None or time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _RECHECK_S
            try:
                await self._check_there()
            except Unavailable as error:
                log.warning("nobody knows whether the dataset is there", error=str(error))
        board.raise_failure(news)
        if news.pause is not None:
            raise Paused(news.pause)
        if news.lost:
            log.warning("redis lost its data; going on from what is stored", tagging=self._job)
            await self._begin()
            return False
        await self._gather(news)
        ended = news.done | news.buried
        self._show(progress, ended)
        await self._count(progress)
        if ended.all():
            return await self._finish(news.done, progress)
        if self._buffer and (
            time.monotonic() - self._buffered_since >= self._settings.flush_s
            or sum(self._plan.parts[part].count for part in self._buffer) >= self._settings.flush_rows
        ):
            await self._flush()
        await self._top_up(ended)
        return False

    async def _finish(self, done: npt.NDArray[np.bool_], progress: Progress) -> bool:
        """Write the last results; false when some are not here, be it that they come or that they are lost."""
        await self._flush()
        absent = set(np.flatnonzero(done).tolist()) - self._written
        if not absent:
            self._cost_at = 0.0
            await self._count(progress)
            return True
        there = (await self._board.news(len(done))).results
        if gone := absent - there:
            await self._board.reopen(gone)
            self._left = None
        return False

    async def _gather(self, news: News) -> None:
        """Fetch the results that are new; forget those that an earlier attempt wrote and did not come to forget."""
        await self._board.drop_results(news.results & self._written)
        fresh = sorted(news.results - self._written - self._buffer.keys())
        for i in range(0, len(fresh), _FETCHED):
            parts = [self._plan.parts[number] for number in fresh[i : i + _FETCHED]]
            widths = [len(self._plan.attributes_of(part)) for part in parts]
            for result in await self._board.results(parts, widths):
                if not self._buffer:
                    self._buffered_since = time.monotonic()
                self._buffer[result.part] = result
                self._figures += result.figures
        if fresh:
            await self._board.tell(self._figures)

    async def _flush(self) -> None:
        """Write down what is fetched, then let Redis forget it. NotFound when the dataset was deleted."""
        if not self._buffer:
            return
        await self._check_there()
        results = [self._buffer[part] for part in sorted(self._buffer)]
        width = len(self._wanted.schema.attributes)
        await asyncio.to_thread(self._shelf.write_chunk, self._plan, results, width)
        self._written |= self._buffer.keys()
        self._buffer.clear()
        dead = sum(result.figures.dead for result in results)
        metrics.DEAD.inc(dead)
        metrics.TAGGED.inc(sum(self._plan.parts[result.part].count for result in results) - dead)
        await self._quietly(lambda: self._board.drop_results(result.part for result in results))

    async def _check_there(self) -> None:
        """NotFound when the dataset was deleted: workers then drop what they have, and nothing may be written down.

        Where another has its name by now, the plan is gone all the same.
        """
        try:
            await asyncio.to_thread(self._artifacts.dataset, self._wanted.name.dataset)
            await asyncio.to_thread(self._shelf.outline)
        except NotFound as error:
            await self._quietly(self._board.clear)
            raise NotFound(f"dataset '{self._wanted.name.dataset}' was deleted while it was tagged") from error

    async def _top_up(self, ended: npt.NDArray[np.bool_]) -> None:
        """Offer the queue what it may take of the parts that wait here."""
        now = time.monotonic()
        if self._left is None or (not self._left and now >= self._recheck_at):
            self._recheck_at = now + _RECHECK_S
            self._left = deque(await self._unqueued(ended))
        while self._left and ended[self._left[0]]:
            self._left.popleft()
        if not self._left and not self._waits:
            return
        slots = await self._queue.slots()
        cap = self._settings.team_items or max(_MIN_ITEMS, 2 * slots)
        offered = [self._plan.parts[self._left[i]] for i in range(min(len(self._left), _OFFERED))]
        items = [(part.number, self._item(part)) for part in offered]
        taken = await self._queue.offer(self._priority, self._team, self._job, items, len(self._left), cap)
        for _ in range(taken):
            self._left.popleft()
        self._waits = bool(self._left)

    async def _unqueued(self, ended: npt.NDArray[np.bool_]) -> list[int]:
        """Parts that have not ended and are not in the queue either."""
        queued: set[int] = set()
        for priority in Priority:
            queued |= await self._queue.in_flight(priority, self._team, self._job)
        missing = np.flatnonzero(~ended).tolist()
        left = [part for part in missing if part not in queued]
        backlog = await self._queue.backlog()
        empty = backlog.lag + backlog.pending == 0
        if missing and not left and empty and self._idle:  # said to be in streams that are empty
            for priority in Priority:
                await self._queue.forget(priority, self._team, self._job)
        self._idle = empty
        return left

    # What is told

    def _progress_from(self, progress: Progress) -> None:
        done = np.zeros(len(self._plan.parts), dtype=np.bool_)
        done[sorted(self._written)] = True
        self._show(progress, done)
        progress.done_at_start = progress.done
        self._tell_cost(progress)

    def _show(self, progress: Progress, ended: npt.NDArray[np.bool_]) -> None:
        rows = self._plan.row_count
        progress.update(rows - int(self._plan.part_rows[~ended].sum()), rows)

    def _tell_cost(self, progress: Progress) -> None:
        progress.cost = spent_cost(self._figures.usage)
        progress.cost.invalid_answer_count = self._figures.invalid

    async def _count(self, progress: Progress) -> None:
        """What was spent: by its own account, which knows of lost calls as well, else as the results tell."""
        if time.monotonic() < self._cost_at:
            return
        self._cost_at = time.monotonic() + _COST_S
        self._tell_cost(progress)
        if self._account.name == self._job and self._wanted.prompt_digest:
            spend = await self._of_ledger(self._ledger.spent(self._account))
            if spend.calls > progress.cost.call_count:
                progress.cost.call_count = spend.calls
                progress.cost.input_token_count = spend.input_tokens
                progress.cost.output_token_count = spend.output_tokens
                if spend.currency:
                    progress.cost.amount, progress.cost.currency = spend.amount, spend.currency

    # The end

    async def _close(self, buried: dict[int, str]) -> None:
        await self._check_there()
        wanted = self._wanted
        digests = {"tagging/tag": wanted.prompt_digest} if wanted.prompt_digest else {}
        provenance = Provenance(
            inputs={
                "dataset": wanted.dataset_digest,
                "schema": wanted.schema.schema_id,
                **({"clip": wanted.clip} if wanted.clip else {}),
            },
            parameters={"schema": wanted.schema.schema_id, "splits": list(wanted.splits), "redrive": wanted.redrive},
            prompt_digests=digests,
            model_snapshot=wanted.model if wanted.prompt_digest else "",
        )
        keys = dict(zip(wanted.schema.names(), wanted.keys, strict=True))
        await asyncio.to_thread(
            self._shelf.close, self._plan, self._outline, wanted.instances, wanted.schema, buried, provenance, keys
        )

    # Redis that is away

    async def _of_ledger(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except Unavailable as error:
            raise RedisConnectionError(str(error)) from error

    async def _patiently(self, step: Callable[[], Awaitable[T]]) -> T:
        """`step`, tried until Redis answers."""
        while True:
            try:
                return await step()
            except RedisError as error:
                log.warning("waiting for redis", error=str(error))
                await asyncio.sleep(_RECHECK_S / 4)

    async def _quietly(self, step: Callable[[], Awaitable[object]]) -> None:
        try:
            await step()
        except RedisError as error:
            log.warning("not told to redis", error=str(error))

    async def _break_off(self) -> None:
        """Leave what was found in the store, where the next attempt finds it whatever becomes of Redis."""
        try:
            await self._flush()
        except (NotFound, Unavailable) as error:
            log.warning("results not stored", error=str(error))
        await self._quietly(lambda: self._queue.withdraw(self._priority, self._team, self._job))
