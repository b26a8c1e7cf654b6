"""How long a small tagging takes behind a large one, in seconds; a part of the page of `bench_tagging`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import pyarrow as pa

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import tagging_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.gateway.datasets import check_instances, record_of
from shared.rpc.channel import connect as channel_to
from shared.schema import Schema, Task
from shared.store.artifacts import Artifacts, Provenance
from tests.load.page import table

if TYPE_CHECKING:
    from tests.load.bench_tagging import Stack

SMALL, LARGE = 200, 20_000
CALLS = 64  # of the one worker
LARGE_DONE = 400  # of the large one before the first small one comes
TIMES = 3  # each case, of which the median counts
BATCH, INTERACTIVE = pb.PRIORITY_BATCH, pb.PRIORITY_INTERACTIVE


@dataclass(frozen=True)
class Asked:
    """A tagging of images that nobody showed before."""

    team: str
    dataset: str
    schema: Schema
    priority: pb.Priority.ValueType

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [("x-hibug2-team", self.team)]

    async def begin(self, stub: rpc.TaggingServiceAsyncStub) -> types_pb2.Job:
        parent = f"datasets/{self.dataset}"
        name = f"{parent}/schemas/{self.schema.schema_id}"
        request = pb.CreateTaggingRequest(parent=parent, schema=name, priority=self.priority)
        return (await stub.CreateTagging(request, metadata=self.metadata)).job

    async def done_s(self, stub: rpc.TaggingServiceAsyncStub) -> float:
        """Seconds from the request to the written table."""
        start = time.perf_counter()
        job = await self.begin(stub)
        async for answer in stub.WatchTagging(pb.WatchTaggingRequest(name=job.name), metadata=self.metadata):
            job = answer.job
        assert job.state == types_pb2.JOB_STATE_SUCCEEDED, job
        return time.perf_counter() - start


class Askers:
    """Teams and their datasets, each of images under a class of its own: no answer of an earlier one serves it."""

    def __init__(self, stack: Stack, uris: Sequence[str], schema: Schema) -> None:
        self._stack = stack
        self._uris = uris
        self._schema = schema
        self._count = 0

    def ask(self, team: str, images: int, priority: pb.Priority.ValueType) -> Asked:
        self._count += 1
        name, there = f"fair{self._count}", len(self._uris)
        given = {
            "instance_id": [f"i{i}" for i in range(images)],
            "image_uri": [self._uris[i % there] for i in range(images)],
            "label": [f"{name} {i // there}" for i in range(images)],
        }
        instances = check_instances(pa.table(given), Task.CLASSIFICATION)
        artifacts = Artifacts(self._stack.store, team)
        part = artifacts.write_instances(name, instances)
        artifacts.write_dataset(record_of(name, Task.CLASSIFICATION, instances, [part], part, []))
        artifacts.write_schema(name, self._schema, Provenance({}))
        return Asked(team, name, self._schema, priority)


async def _behind(stub: rpc.TaggingServiceAsyncStub, large: Asked, small: Sequence[Asked]) -> list[float]:
    """Seconds of each of `small`, one after the other, all behind `large`, which is then cancelled."""
    job = await large.begin(stub)
    answers = stub.WatchTagging(pb.WatchTaggingRequest(name=job.name), metadata=large.metadata)
    async for answer in answers:
        if answer.job.done_count >= LARGE_DONE:
            break
    answers.cancel()
    taken = [await one.done_s(stub) for one in small]
    found = await stub.GetTagging(pb.GetTaggingRequest(name=job.name), metadata=large.metadata)
    assert found.job.state == types_pb2.JOB_STATE_RUNNING, "the large tagging ended first"
    await stub.CancelTagging(pb.CancelTaggingRequest(name=job.name), metadata=large.metadata)
    return taken


async def _seconds(address: str, askers: Askers) -> tuple[float, dict[str, float]]:
    """Seconds of a small tagging alone, and behind a large one by who asks for it."""
    cases = {
        "of another team, interactive": ("small", INTERACTIVE),
        "of another team, batch as the large one": ("small", BATCH),
        "of the same team, interactive": ("large", INTERACTIVE),
        "of the same team, batch as the large one": ("large", BATCH),
    }
    async with channel_to(address) as channel:
        stub: rpc.TaggingServiceAsyncStub = rpc.TaggingServiceStub(channel)
        await askers.ask("small", SMALL, BATCH).done_s(stub)
        alone = [await askers.ask("small", SMALL, BATCH).done_s(stub) for _ in range(TIMES)]
        behind = {}
        for name, (team, priority) in cases.items():
            large = askers.ask("large", LARGE, BATCH)
            small = [askers.ask(team, SMALL, priority) for _ in range(TIMES)]
            behind[name] = median(await _behind(stub, large, small))
    return median(alone), behind


def section(stack: Stack, address: str, uris: Sequence[str], schema: Schema) -> list[str]:
    """Paragraphs of the page."""
    settings = {"llm_base_url": stack.llm_url, "llm_model": "quick", "llm_max_concurrency": CALLS}
    with stack.workers(1, **settings):
        alone, behind = asyncio.run(_seconds(address, Askers(stack, uris, schema)))
    rows = [("alone", f"{alone:.2f}", "")] + [(k, f"{s:.2f}", f"{s / alone:.2f}x") for k, s in behind.items()]
    return [
        "### A small tagging behind a large one",
        f"A tagging of {SMALL} images asked for while one of {LARGE:,} is at work, one worker with {CALLS} calls; "
        f"seconds from the request to the written table, the median of {TIMES}.",
        table(("the small one", "seconds", "of alone"), rows),
    ]
