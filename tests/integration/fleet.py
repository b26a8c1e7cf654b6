"""A tagging service, its workers as tasks or processes, and a dataset of small images to tag."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import tagging_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.gateway.datasets import check_instances, record_of
from services.tagging.config import Settings
from services.tagging.server import start_server
from services.tagging.shelf import Shelf
from services.tagging.worker import Worker
from shared.names import parse
from shared.queue.stream import connect
from shared.rpc.channel import connect as channel_to
from shared.rpc.server import RunningServer
from shared.schema import Schema, Task
from shared.store.artifacts import Artifacts, Manifest, Provenance, TagTable
from shared.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
Stub = rpc.TaggingServiceStub


class Fleet:
    """Everything of one test; what is started ends with `exits`."""

    def __init__(self, redis_url: str, folder: Path, prefix: Path, exits: AsyncExitStack, **settings: Any) -> None:
        self.settings = Settings(
            **{
                "listen": "127.0.0.1:0",
                "metrics_port": 0,
                "drain_s": 0.1,
                "redis_url": redis_url,
                "store_url": folder.as_uri(),
                "image_prefixes": (prefix.as_uri(),),
                "lease_s": 1.0,
                **settings,
            }
        )
        self._exits = exits
        self.store = Store(self.settings.store_url)
        self.artifacts = Artifacts(self.store, "default")
        self.server: RunningServer

    def change(self, **settings: Any) -> None:
        """Other settings for what is started from now on."""
        self.settings = self.settings.model_copy(update=settings)

    def add_dataset(self, name: str, tables: Sequence[dict[str, list]], team: str = "default") -> None:
        """A dataset of one part a table."""
        artifacts = Artifacts(self.store, team)
        checked = [check_instances(pa.table(table), Task.CLASSIFICATION) for table in tables]
        parts = [artifacts.write_instances(name, table) for table in checked]
        whole = pa.concat_tables(checked).combine_chunks()
        record = record_of(name, Task.CLASSIFICATION, whole, parts, "-".join(parts), [])
        artifacts.write_dataset(record)

    async def serve(self) -> Stub:
        """Start the service (another replica at the second call) and return a stub for it."""
        self.server = await start_server(self.settings)
        self._exits.push_async_callback(self.server.stop)
        return Stub(await self._exits.enter_async_context(channel_to(self.server.address)))

    def work(self, count: int = 1) -> None:
        """Start workers in this process."""
        for _ in range(count):
            stop, redis = asyncio.Event(), connect(self.settings.redis_url)
            task = asyncio.create_task(Worker(self.settings, redis, self.store).run(stop))

            async def end(stop=stop, redis=redis, task=task) -> None:
                stop.set()
                await task
                await redis.aclose()

            self._exits.push_async_callback(end)

    async def create(
        self,
        stub: Stub,
        schema: Schema,
        dataset: str = "pets",
        team: str = "default",
        **more: Any,
    ) -> types_pb2.Job:
        Artifacts(self.store, team).write_schema(dataset, schema, Provenance({}))
        name = f"datasets/{dataset}/schemas/{schema.schema_id}"
        request = pb.CreateTaggingRequest(parent=f"datasets/{dataset}", schema=name, **more)
        return (await stub.CreateTagging(request, metadata=[("x-hibug2-team", team)])).job

    def chunks(self, job: types_pb2.Job) -> list[str]:
        return self.store.names(self.artifacts.path(parse(job.name, "taggings", "name"), "chunks"))

    def chunk(self, job: types_pb2.Job, file: str) -> pa.Table:
        return self.store.read_table(self.artifacts.path(parse(job.name, "taggings", "name"), "chunks", file))

    def written(self, job: types_pb2.Job) -> int:
        """How many parts are stored."""
        return len(Shelf(self.artifacts, parse(job.name, "taggings", "name")).written().parts)

    def table(self, job: types_pb2.Job) -> TagTable:
        return self.artifacts.tag_table(parse(job.name, "taggings", "name"))

    def manifest(self, job: types_pb2.Job) -> Manifest:
        return self.artifacts.manifest(parse(job.name, "taggings", "name"))


class Gates:
    """Holds parts back in this process's workers, and counts how often each was begun."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()
        self._held: dict[int, asyncio.Event] = {}

    def hold(self, *parts: int) -> None:
        self._held.update({part: asyncio.Event() for part in parts})

    def release(self, *parts: int) -> None:
        """Let `parts` go, all when none is named."""
        for part in parts or self._held:
            self._held[part].set()

    async def enter(self, part: int) -> None:
        self.begun[part] += 1
        if part in self._held:
            await self._held[part].wait()


async def last(stub: Stub, job: types_pb2.Job, timeout_s: float = 90, team: str = "default") -> types_pb2.Job:
    """The job when it has ended or is paused."""
    request = pb.WatchTaggingRequest(name=job.name)
    async with asyncio.timeout(timeout_s):
        async for answer in stub.WatchTagging(request, metadata=[("x-hibug2-team", team)]):
            job = answer.job
    return job


async def has_backlog(stub: Stub, lag: int, pending: int, waiting: int = 0) -> bool:
    found = await stub.GetBacklog(pb.GetBacklogRequest())
    return (found.lag_count, found.pending_count, found.waiting_count) == (lag, pending, waiting)


async def done_count(stub: Stub, job: types_pb2.Job) -> int:
    return (await stub.GetTagging(pb.GetTaggingRequest(name=job.name))).job.done_count
