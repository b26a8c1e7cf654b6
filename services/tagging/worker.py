"""A tagging worker: takes parts off the queue, tags them, stores the codes. Any number of them, anywhere."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from functools import lru_cache

import numpy as np
import pyarrow as pa
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from hibug2.v1 import tagging_pb2, types_pb2
from services.tagging import plan
from services.tagging.board import QUEUE, Board
from services.tagging.config import Settings
from services.tagging.tagger import Tagged, tag_instances
from shared import logs
from shared.errors import HiBug2Error, NotFound, Unavailable
from shared.images.reader import ImageReader
from shared.llm import LLM, llm_from
from shared.names import Name, parse
from shared.prompting import load_prompt, prompts_root
from shared.queue.stream import Entry, WorkQueue
from shared.rpc import status
from shared.schema import Schema
from shared.store.artifacts import Artifacts
from shared.store.store import Store

log = logs.get("tagging.worker")


class Worker:
    """Runs until `stop` is set; parts in hand are finished first."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._redis = redis
        self._store = store
        self._reader = ImageReader(settings.image_prefixes)
        self._llm: LLM | None = llm_from(settings)
        self._queue = WorkQueue(redis, QUEUE, int(settings.lease_s * 1000))
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._plan = lru_cache(maxsize=4)(self._read_plan)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; while Redis is away, wait for it."""
        lanes = 1 if self._llm is None else max(1, self._settings.llm_max_concurrency // self._settings.llm_item_rows)
        log.info("working", worker=self._name, lanes=lanes)
        await asyncio.gather(*(self._lane(f"{self._name}-{i}", stop) for i in range(lanes)))
        if self._llm is not None:
            await self._llm.close()

    async def _lane(self, consumer: str, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self._queue.ensure()
                while not stop.is_set():
                    for entry in await self._queue.read(consumer, 1, block_ms=500):
                        await self._handle(consumer, entry)
            except RedisError as error:
                log.warning("waiting for redis", error=str(error))
                await asyncio.sleep(0.5)

    async def _handle(self, consumer: str, entry: Entry) -> None:
        item = tagging_pb2.TaggingItem.FromString(entry.payload)
        board = Board(self._redis, item.team, item.tagging)
        with structlog.contextvars.bound_contextvars(team=item.team, job=item.tagging, part=item.part):
            if await board.is_stopped():
                await self._queue.done(entry)
                return
            keeper = asyncio.create_task(self._keep(consumer, entry))
            try:
                if entry.deliveries > self._settings.max_deliveries:
                    raise Unavailable(
                        f"part {item.part} was given to {entry.deliveries} workers and none finished it; see their logs"
                    )
                tagged = await self._tag(item)
                await board.part_done(item.part, item.row_count, _cost(tagged))
                await self._queue.done(entry)
            except Unavailable as error:
                if entry.deliveries > self._settings.max_deliveries:
                    await board.fail(status.problem_of(error))
                    await self._queue.done(entry)
                else:  # stays pending; another try when the lease is over
                    log.warning("part put back", error=str(error), deliveries=entry.deliveries)
            except NotFound:
                log.info("part dropped: its tagging is gone")
                await self._queue.done(entry)
            except HiBug2Error as error:
                log.warning("tagging cannot go on", error=str(error))
                await board.fail(status.problem_of(error))
                await self._queue.done(entry)
            except RedisError:
                raise
            except Exception:  # the worker lives on; the part gets its other tries, then fails the tagging
                log.exception("part put back after an unexpected error")
            finally:
                keeper.cancel()

    async def _keep(self, consumer: str, entry: Entry) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / 4)
            try:
                await self._queue.keep(consumer, entry)
            except RedisError as error:
                log.warning("lease not renewed", error=str(error))

    async def _tag(self, item: tagging_pb2.TaggingItem) -> Tagged:
        name = parse(item.tagging, "taggings", "tagging")
        rows, schema = await asyncio.to_thread(self._plan, item.team, name)
        chosen = rows.slice(item.first_row, item.row_count)
        prompt = None
        if plan.needs_llm(schema):
            prompt = load_prompt("tagging", "tag", schema.task.value, root=prompts_root(self._settings.prompts_dir))
        tagged = await tag_instances(chosen, schema, self._reader, self._llm, prompt)
        codes = {plan.code_column(j): pa.array(np.ascontiguousarray(c)) for j, c in enumerate(tagged.codes.T)}
        errors = pa.array(tagged.errors, pa.string())
        table = pa.table({"instance_id": chosen.column("instance_id"), **codes, "error": errors})
        artifacts = Artifacts(self._store, item.team)
        path = artifacts.path(name, "parts", plan.part_file(item.part))
        await asyncio.to_thread(self._store.write_table, path, table)
        return tagged

    def _read_plan(self, team: str, name: Name) -> tuple[pa.Table, Schema]:
        artifacts = Artifacts(self._store, team)
        asked = self._store.read_json(artifacts.path(name, "plan.json"))
        schema, _ = artifacts.schema(name.dataset, asked["schema"])
        return artifacts.read_part(name, "plan"), schema


def _cost(tagged: Tagged) -> types_pb2.Cost:
    return types_pb2.Cost(
        call_count=tagged.usage.calls,
        input_token_count=tagged.usage.input_tokens,
        output_token_count=tagged.usage.output_tokens,
        invalid_answer_count=tagged.invalid_answers,
    )
