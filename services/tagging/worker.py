"""A tagging worker: takes parts off the queue, tags them, hands back the codes. Any number of them, anywhere."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import socket
import time
import uuid
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

import pyarrow as pa
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from hibug2.v1 import tagging_pb2
from services.tagging.board import QUEUE, WORKED_ON, Board, Look
from services.tagging.clip import ClipTagger, clip_id
from services.tagging.config import Settings
from services.tagging.measured import MeasuredTagger
from services.tagging.shelf import Outline, Shelf
from services.tagging.tagger import ImageTagger, Tagged, tag_instances
from services.tagging.vlm import VlmTagger
from shared import logs, metrics, traces
from shared.clip import Clip
from shared.errors import HiBug2Error, NotFound, Unavailable
from shared.images.reader import ImageReader
from shared.llm import Account, BudgetSpent, llm_from
from shared.names import parse_any
from shared.prompting import Prompt, load_prompt, prompts_root
from shared.queue.stream import Entry, WorkQueue, connect
from shared.rpc import status
from shared.rpc.server import start, stop_signal
from shared.schema import Schema, Tagger
from shared.store.artifacts import Artifacts
from shared.store.store import Store

log = logs.get("tagging.worker")

_BLOCK_MS = 500
_TICK_S = 0.25  # between two looks whether somebody still waits for what is in hand: a cancel is heard within it
_REGISTER_S = 2.0
_WAIT_S = (0.5, 15.0)  # before another try while a storage or a model is away
_AHEAD = 1.5  # parts in hand for each whose calls are on their way: others are being opened or handed back


@dataclass
class _Held:
    """A part in hand."""

    entry: Entry
    board: Board
    task: asyncio.Task[None]
    renewed: float  # monotonic
    reachable: bool = True  # Redis answered when the lease was last to be renewed
    dropped: bool = False  # nobody waits for it: it leaves the queue
    lost: bool = False  # another may have it: the queue is left alone
    guard: asyncio.TimerHandle | None = None


class Worker:
    """Runs until `stop` is set; parts in hand are finished first."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._redis = redis
        self._store = store
        self._reader = ImageReader(settings.image_prefixes)
        self._llm = llm_from(settings, redis)
        self._clip: tuple[str, ClipTagger] | None = None  # with what its weights were when it was loaded
        self._loading = Lock()
        self._prompts: dict[str, Prompt] = {}  # by task
        self._queue = WorkQueue(redis, QUEUE, int(settings.lease_s * 1000))
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._held: dict[bytes, _Held] = {}
        self._stop = asyncio.Event()
        self._outline = lru_cache(maxsize=64)(self._read_outline)
        self._shard = lru_cache(maxsize=16)(self._read_shard)
        self.slots = 2  # one part is opened while another is written
        if self._llm is not None:
            self.slots = math.ceil(_AHEAD * settings.llm_max_concurrency / settings.llm_item_rows) + 2

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; while Redis is away, wait for it."""
        self._stop = stop
        log.info("working", worker=self._name, slots=self.slots)
        watch = asyncio.create_task(self._watch())
        await self._take_all()
        await asyncio.gather(*(held.task for held in self._held.values()), return_exceptions=True)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        try:
            await self._queue.leave(self._name, self.slots)
        except RedisError as error:
            log.warning("not signed off", error=str(error))
        if self._llm is not None:
            await self._llm.close()

    async def _take_all(self) -> None:
        room, claimed, ready = asyncio.Semaphore(self.slots), 0.0, False
        while not self._stop.is_set():
            await room.acquire()
            if self._stop.is_set():
                return
            entries: list[Entry] = []
            try:
                if not ready:
                    await self._queue.ensure()
                    await self._queue.register(self._name, self.slots)
                    ready = True
                # Looking through all that is pending for what somebody left costs, so it is done now and then.
                claim = time.monotonic() - claimed >= self._settings.lease_s / 4
                entries = await self._queue.take(self._name, _BLOCK_MS, claim=claim)
                if claim and not any(entry.deliveries > 1 for entry in entries):
                    claimed = time.monotonic()
            except RedisError as error:
                ready = False
                log.warning("waiting for redis", error=str(error))
                await asyncio.sleep(_BLOCK_MS / 1000)
            if not entries:
                room.release()
            for i, entry in enumerate(entries):
                self._hold(entry, room if i == 0 else None)

    def _hold(self, entry: Entry, room: asyncio.Semaphore | None) -> None:
        item = tagging_pb2.TaggingItem.FromString(entry.payload)
        board = Board(self._redis, item.team, item.tagging, item.plan)
        task = asyncio.create_task(self._handle(entry, item, board))
        held = self._held[entry.id] = _Held(entry, board, task, time.monotonic())
        self._guard(held)

        def let_go(_: asyncio.Task[None]) -> None:
            if held.guard is not None:
                held.guard.cancel()
            if self._held.get(entry.id) is held:
                del self._held[entry.id]
            if room is not None:
                room.release()

        task.add_done_callback(let_go)

    # While parts are in hand

    async def _watch(self) -> None:
        """Renew leases, drop what nobody waits for any more, say that this worker is there."""
        renewed = registered = time.monotonic()
        while True:
            await asyncio.sleep(min(_TICK_S, self._settings.lease_s / 8))
            now = time.monotonic()
            try:
                await self._drop_stopped()
                if now - renewed >= self._settings.lease_s / 4:
                    renewed = now
                    await self._renew()
                if now - registered >= _REGISTER_S:
                    registered = now
                    await self._queue.register(self._name, self.slots)
            except RedisError as error:
                for held in self._held.values():
                    held.reachable = False
                log.warning("leases not renewed", error=str(error))

    async def _drop_stopped(self) -> None:
        held = list(self._held.values())
        if not held:
            return
        there = await self._redis.mget([key for one in held for key in one.board.halts])
        for one, *halted in zip(held, there[::2], there[1::2], strict=True):
            if any(halted) and not one.dropped:
                one.dropped = True
                one.task.cancel()

    async def _renew(self) -> None:
        held = dict(self._held)
        if not held:
            return
        mine = await self._queue.renew(self._name, [one.entry for one in held.values()])
        for id_, one in held.items():
            if id_ in mine:
                one.renewed, one.reachable = time.monotonic(), True
                self._guard(one)
            elif not one.task.done():
                self._lose(one)

    def _guard(self, held: _Held) -> None:
        """Stop paying for a part at the moment in which its lease is over, as after a sleep of this process."""
        if held.guard is not None:
            held.guard.cancel()
        loop = asyncio.get_running_loop()
        held.guard = loop.call_at(loop.time() + self._settings.lease_s, self._expire, held)

    def _expire(self, held: _Held) -> None:
        if held.reachable:  # else Redis is away, so nobody else has taken it
            self._lose(held)

    def _lose(self, held: _Held) -> None:
        if not (held.lost or held.dropped):
            log.info("part left to another worker", part=held.entry.number, tagging=held.entry.job)
            held.lost = True
            held.task.cancel()

    # One part

    async def _handle(self, entry: Entry, item: tagging_pb2.TaggingItem, board: Board) -> None:
        with (
            structlog.contextvars.bound_contextvars(team=item.team, job=item.tagging, part=item.part),
            traces.span("tag part", "consumer", parent=item.traceparent, attributes={"hibug2.job": item.tagging}),
        ):
            try:
                await self._do(entry, item, board)
            except asyncio.CancelledError:
                held = self._held.get(entry.id)
                if held is None or not (held.dropped or held.lost):
                    raise
                if held.dropped:
                    await self._off_the_queue(entry)
            except RedisError as error:
                log.warning("part left: redis is away", error=str(error))

    async def _do(self, entry: Entry, item: tagging_pb2.TaggingItem, board: Board) -> None:
        if await board.look(item.part) is not Look.WANTED:
            await self._queue.done(entry)
            return
        if entry.deliveries > self._settings.max_deliveries:
            why = await board.why_stumbled(item.part) or "the last ones died or were cut off; see their logs"
            reason = f"{entry.deliveries - 1} workers were given it and none finished it: {why}"
            log.warning("part given up", reason=reason)
            if await self._queue.bury(entry, reason, board.bury(item.part)):
                metrics.DEAD.inc()
            return
        try:
            tagged = await self._tag_patiently(item)
        except _Stopping:
            await self._queue.release(self._name, entry)
        except BudgetSpent as spent:
            await board.pause(str(spent))
            await self._queue.done(entry)
        except HiBug2Error as error:
            log.warning("tagging cannot go on", error=str(error))
            await board.fail(status.problem_of(error))
            await self._queue.done(entry)
        except Exception as error:  # the worker lives on; the part gets its other tries, then counts as dead
            log.exception("part put back after an unexpected error")
            await board.stumbled(item.part, f"{type(error).__name__}: {error}")
        else:
            await self._commit(entry, board, tagged)

    async def _commit(self, entry: Entry, board: Board, tagged: Tagged) -> None:
        """Hand the result back; it was paid for, so while Redis is away it waits for it."""
        while True:
            try:
                await self._queue.done(entry, board.commit(entry.number, tagged))
                return
            except RedisError as error:
                log.warning("result waits for redis", error=str(error))
                await asyncio.sleep(_WAIT_S[0])

    async def _off_the_queue(self, entry: Entry) -> None:
        try:
            await self._queue.done(entry)
        except RedisError as error:
            log.warning("part not taken off the queue", error=str(error))

    async def _tag_patiently(self, item: tagging_pb2.TaggingItem) -> Tagged:
        """As `_tag`; while a storage or the model is away it is tried again, and the part kept, for `patience_s`."""
        end, wait_s = time.monotonic() + self._settings.patience_s, _WAIT_S[0]
        while True:
            try:
                return await self._tag(item)
            except Unavailable as error:
                if time.monotonic() + wait_s > end:
                    raise
                log.warning("part waits", error=str(error), wait_s=wait_s)
            try:
                await asyncio.wait_for(self._stop.wait(), wait_s)
            except TimeoutError:
                wait_s = min(2 * wait_s, _WAIT_S[1])
            else:
                raise _Stopping

    async def _tag(self, item: tagging_pb2.TaggingItem) -> Tagged:
        outline, schema = await asyncio.to_thread(self._outline, item.team, item.tagging, item.plan)
        shard = await asyncio.to_thread(self._shard, item.team, item.tagging, item.plan, item.shard)
        instances = shard.slice(item.first_row, item.row_count)
        attributes = [schema.attributes[j] for j in item.attributes]
        if item.anew:  # a model's tags are held against a language model's; CLIP would only say the same again
            attributes = [replace(attribute, tagger=Tagger.VLM) for attribute in attributes]
        taggers: dict[Tagger, ImageTagger] = {Tagger.MEASURED: MeasuredTagger()}
        if self._llm is not None and any(a.tagger is Tagger.VLM for a in attributes):
            prompt = self._prompt(schema.task.value, outline.prompt_digest)
            if prompt.digest != outline.prompt_digest or (outline.model and self._settings.llm_model != outline.model):
                raise Unavailable(
                    "this worker has another prompt or model than the tagging service that planned the work; "
                    "give both the same version and the same HIBUG2_LLM_MODEL"
                )
            account = Account(item.team, item.account)
            # A check takes no answer of the tagging that it checks, and pays for its own once.
            llm = self._llm.charging(account, capped=item.capped, salt=item.tagging if item.anew else "")
            taggers[Tagger.VLM] = VlmTagger(llm, prompt)
        if self._settings.clip_model and any(a.tagger is Tagger.CLIP for a in attributes):
            taggers[Tagger.CLIP] = await asyncio.to_thread(self._clip_tagger, outline.clip)
        return await tag_instances(instances, attributes, self._reader, taggers)

    def _prompt(self, task: str, planned: str) -> Prompt:
        """The prompt of `task`, read again where it is not the one that was `planned`: files may have changed."""
        known = self._prompts.get(task)
        if known is None or known.digest != planned:
            known = load_prompt("tagging", "tag", task, root=prompts_root(self._settings.prompts_dir))
            self._prompts[task] = known
        return known

    def _clip_tagger(self, planned: str) -> ClipTagger:
        """The tagger of `planned`, loaded when it is first asked for: seconds, and the memory of its weights."""
        settings = self._settings
        if clip_id(settings.clip_model, settings.clip_weights) != planned:
            raise Unavailable(
                "this worker has another CLIP model than the tagging service that planned the work; "
                "give both the same version and the same HIBUG2_CLIP_MODEL and HIBUG2_CLIP_WEIGHTS"
            )
        with self._loading:
            if self._clip is None or self._clip[0] != planned:
                model = Clip(settings.clip_model, settings.clip_weights, settings.clip_device)
                self._clip = planned, ClipTagger(model)
            return self._clip[1]

    def _read_outline(self, team: str, tagging: str, plan: str) -> tuple[Outline, Schema]:
        name = parse_any(tagging, WORKED_ON, "tagging")
        artifacts = Artifacts(self._store, team)
        outline = Shelf(artifacts, name).outline()
        if outline.id != plan:
            raise NotFound(f"{tagging} is planned anew")
        return outline, artifacts.schema(name.dataset, outline.schema)[0]

    def _read_shard(self, team: str, tagging: str, plan: str, number: int) -> pa.Table:
        return Shelf(Artifacts(self._store, team), parse_any(tagging, WORKED_ON, "tagging")).shard(number)


async def work(settings: Settings) -> None:
    """A worker as a process, with health and /metrics beside, until SIGTERM or SIGINT."""
    stopped = stop_signal()
    gc.collect()
    gc.freeze()  # what is loaded now stays: going through it again and again took a sixth of a worker's time
    stop_metrics = metrics.serve(settings.metrics_port)
    redis = connect(settings.redis_url)
    health = await start(settings, lambda server: [])  # a worker answers no call but the prober's
    try:
        await Worker(settings, redis, Store(settings.store_url)).run(stopped)
    finally:
        await health.stop()
        await redis.aclose()
        stop_metrics()


class _Stopping(Exception):
    """The worker is to end while a part waits."""
