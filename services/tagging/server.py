"""The tagging service over gRPC: plans a tagging, hands its parts to workers, and closes the tag table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
from redis.asyncio import Redis

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import tagging_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.tagging import plan
from services.tagging.board import QUEUE, Board
from services.tagging.config import Settings
from shared.jobs import Jobs, Progress
from shared.names import Name, content_id, dataset_id, parse
from shared.queue.stream import WorkQueue, connect
from shared.rpc import context as call
from shared.rpc.server import RunningServer, start
from shared.schema import NOT_VISIBLE, UNKNOWN, Schema
from shared.store.artifacts import Artifacts, Manifest, Provenance, TagTable, tags_to_arrow
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
_POLL_S = 0.2
_RECHECK_S = 2.0


class TaggingServicer(rpc.TaggingServiceServicer):
    """proto in, plan and queue, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._redis = redis
        self._store = store
        self._queue = WorkQueue(redis, QUEUE, int(settings.lease_s * 1000))
        self.jobs = Jobs(redis, "tagging", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, "taggings", "name"))

    async def CreateTagging(self, request: pb.CreateTaggingRequest, context: Context) -> pb.CreateTaggingResponse:
        dataset = dataset_id(request.parent, "parent")
        schema_name = parse(request.schema, "schemas", "schema", within=dataset)
        artifacts = self._artifacts()
        record = await asyncio.to_thread(artifacts.dataset, dataset)
        schema, _ = await asyncio.to_thread(artifacts.schema, dataset, schema_name.id)
        instances = await asyncio.to_thread(artifacts.instances, record)
        rows = plan.rows_to_tag(instances, request.splits)
        splits = sorted(set(rows.column("split").to_pylist()))
        name = Name(dataset, "taggings", content_id(digest=record.digest, schema=schema_name.id, splits=splits))

        async def work(progress: Progress) -> None:
            await self._tag(progress, artifacts, name, rows, schema, record.digest, splits)

        return pb.CreateTaggingResponse(job=await self.jobs.create(str(name), work))

    async def _tag(
        self,
        progress: Progress,
        artifacts: Artifacts,
        name: Name,
        rows: pa.Table,
        schema: Schema,
        digest: str,
        splits: Sequence[str],
    ) -> None:
        """Queue the parts that are missing, wait for the workers, close the table."""
        per_part = self._settings.llm_item_rows if plan.needs_llm(schema) else self._settings.item_rows
        per_part = await asyncio.to_thread(self._plan, artifacts, name, rows, schema, per_part)
        folder = artifacts.path(name, "parts")
        parts = plan.parts_of(rows.num_rows, per_part)
        board = Board(self._redis, artifacts.team, str(name))
        await board.begin()
        await self._queue.ensure()
        todo = plan.missing(parts, await asyncio.to_thread(self._store.names, folder))
        before = rows.num_rows - sum(p.count for p in todo)
        progress.step, progress.done_at_start = "tagging", before
        progress.update(before, rows.num_rows)
        await self._enqueue(artifacts.team, name, todo)
        try:
            await self._wait(progress, board, artifacts.team, name, folder, todo, before)
        except asyncio.CancelledError:
            await board.cancel()
            raise
        await asyncio.to_thread(self._close, artifacts, name, rows, schema, digest, splits, parts)

    def _plan(self, artifacts: Artifacts, name: Name, rows: pa.Table, schema: Schema, per_part: int) -> int:
        """Store what workers read, and return the rows of a part: those of an earlier attempt, whose parts count."""
        path = artifacts.path(name, "plan.json")
        if self._store.exists(path):
            return int(self._store.read_json(path)["rows_per_part"])
        artifacts.write_part(name, "plan", rows)
        self._store.write_json(path, {"schema": schema.schema_id, "rows_per_part": per_part})
        return per_part

    async def _enqueue(self, team: str, name: Name, todo: Sequence[plan.Part]) -> None:
        items = [
            pb.TaggingItem(team=team, tagging=str(name), part=p.number, first_row=p.first, row_count=p.count)
            for p in todo
        ]
        for i in range(0, len(items), 1000):
            await self._queue.add([item.SerializeToString() for item in items[i : i + 1000]])

    async def _wait(
        self,
        progress: Progress,
        board: Board,
        team: str,
        name: Name,
        folder: str,
        todo: Sequence[plan.Part],
        before: int,
    ) -> None:
        numbers = {p.number for p in todo}
        idle = 0.0
        while True:
            await board.raise_failure()
            lost = await board.is_lost()
            if lost:
                await board.begin()
            done = await board.rows_done()
            progress.cost = await board.cost()
            progress.update(before + sum(done[n] for n in numbers & done.keys()), progress.total)
            if numbers <= done.keys():
                return
            idle = idle + _POLL_S if await self._queue.backlog() == (0, 0) else 0.0
            if lost or idle >= _RECHECK_S:
                # Redis lost its data, or the queue is empty and parts are missing. What is in the store is done.
                idle = 0.0
                left = plan.missing(todo, await asyncio.to_thread(self._store.names, folder))
                for part in (p for p in todo if p not in left and p.number not in done):
                    await board.part_done(part.number, part.count, types_pb2.Cost())
                await self._queue.ensure()
                await self._enqueue(team, name, left)
            await asyncio.sleep(_POLL_S)

    def _close(
        self,
        artifacts: Artifacts,
        name: Name,
        rows: pa.Table,
        schema: Schema,
        digest: str,
        splits: Sequence[str],
        parts: Sequence[plan.Part],
    ) -> None:
        tables = [self._store.read_table(artifacts.path(name, "parts", plan.part_file(p.number))) for p in parts]
        whole = pa.concat_tables(tables).combine_chunks()
        codes = np.column_stack([whole.column(plan.code_column(j)).to_numpy() for j in range(len(schema.attributes))])
        table = TagTable(whole.column("instance_id").combine_chunks(), codes, schema)
        artifacts.write_part(name, "tags", tags_to_arrow(table))
        dead = [e for e in whole.column("error").to_pylist() if e]
        artifacts.complete(
            name,
            Manifest(
                Provenance(
                    inputs={"dataset": digest, "schema": schema.schema_id},
                    parameters={"schema": schema.schema_id, "splits": list(splits)},
                ),
                {
                    "instance_count": rows.num_rows,
                    "dead_count": len(dead),
                    "dead_reasons": dead[:20],
                    "unknown": {a: int((codes[:, j] == UNKNOWN).sum()) for j, a in enumerate(schema.names())},
                    "not_visible": {
                        a.name: int((codes[:, j] == a.code(NOT_VISIBLE)).sum()) if NOT_VISIBLE in a.tags else 0
                        for j, a in enumerate(schema.attributes)
                    },
                },
            ),
        )
        self._store.delete(artifacts.path(name, "parts"))
        self._store.delete(artifacts.path(name, "plan.parquet"))

    async def GetTagging(self, request: pb.GetTaggingRequest, context: Context) -> pb.GetTaggingResponse:
        name = parse(request.name, "taggings", "name")
        response = pb.GetTaggingResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            summary = (await asyncio.to_thread(artifacts.manifest, name)).summary
            response.instance_count, response.dead_count = summary["instance_count"], summary["dead_count"]
            for attribute, unknown in summary["unknown"].items():
                response.coverage.add(
                    attribute=attribute, unknown_count=unknown, not_visible_count=summary["not_visible"][attribute]
                )
        return response

    async def CancelTagging(self, request: pb.CancelTaggingRequest, context: Context) -> pb.CancelTaggingResponse:
        parse(request.name, "taggings", "name")
        return pb.CancelTaggingResponse(job=await self.jobs.cancel(request.name))

    async def WatchTagging(
        self, request: pb.WatchTaggingRequest, context: Context
    ) -> AsyncIterator[pb.WatchTaggingResponse]:
        parse(request.name, "taggings", "name")
        async for job in self.jobs.watch(request.name):
            yield pb.WatchTaggingResponse(job=job)

    async def GetBacklog(self, request: pb.GetBacklogRequest, context: Context) -> pb.GetBacklogResponse:
        lag, pending = await self._queue.backlog()
        return pb.GetBacklogResponse(lag_count=lag, pending_count=pending)


async def start_server(settings: Settings) -> RunningServer:
    """Start the tagging service; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    servicer = TaggingServicer(settings, redis, Store(settings.store_url))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_TaggingServiceServicer_to_server(servicer, server)
        return [pb.DESCRIPTOR.services_by_name["TaggingService"].full_name]

    return await start(settings, add, closers=[servicer.jobs.close, redis.aclose])
