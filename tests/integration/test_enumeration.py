"""The enumeration service over real sockets: what it refuses, and how soon it stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pytest

from hibug2.errors import from_rpc
from hibug2.v1 import enumeration_pb2 as pb
from hibug2.v1 import enumeration_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.enumeration.config import Settings
from services.enumeration.server import start_server
from services.gateway.datasets import check_instances, record_of
from shared.names import Name
from shared.rpc.arrow import send_table
from shared.rpc.channel import connect
from shared.schema import Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import Artifacts, Manifest, Provenance, TagTable, tags_to_arrow
from shared.store.store import Store
from tests.load.shapes import paper_table

ROWS, ATTRIBUTES, DEEP = 7_057, 47, 5  # at that depth there are hundreds of millions of slices
TAGGING = Name("pets", "taggings", "t")
SOON_S = 10.0  # stopping takes a fraction of a second; a machine that is busy otherwise may take longer


@pytest.fixture
async def start(tmp_path: Path, redis_url: str):
    """Starts the service with settings, and gives its stub."""
    running, channels = [], []

    async def started(**more) -> rpc.EnumerationServiceStub:
        settings = Settings(
            listen="127.0.0.1:0", metrics_port=0, drain_s=0.1, store_url=tmp_path.as_uri(), redis_url=redis_url, **more
        )
        running.append(await start_server(settings))
        channels.append(connect(running[-1].address))
        return rpc.EnumerationServiceStub(await channels[-1].__aenter__())

    yield started
    for channel in channels:
        await channel.__aexit__(None, None, None)
    for server in running:
        await server.stop()


def table() -> pa.Table:
    codes, _, scores = paper_table(ROWS, ATTRIBUTES)
    return pa.table({**{f"a{i}": codes[:, i] for i in range(ATTRIBUTES)}, "score": scores[:, 0]})


def store_tags(folder: Path) -> None:
    codes, tag_counts, _ = paper_table(ROWS, ATTRIBUTES)
    attributes = [
        Attribute(f"a{i}", Category.GLOBAL, tuple(f"t{t}" for t in range(n)), Tagger.VLM)
        for i, n in enumerate(tag_counts)
    ]
    schema = Schema(Task.CLASSIFICATION, (), tuple(attributes))
    artifacts = Artifacts(Store(folder.as_uri()), "default")
    ids = [f"i{row}" for row in range(ROWS)]
    given = pa.table({"instance_id": ids, "image_uri": ids, "split": ["validation"] * ROWS})
    instances = check_instances(given, schema.task)
    part = artifacts.write_instances("pets", instances)
    artifacts.write_dataset(record_of("pets", schema.task, instances, [part], part, []))
    artifacts.write_schema("pets", schema, Provenance({}))
    tags = TagTable(pa.array(ids), codes.astype(np.uint16), schema)
    artifacts.write_part(TAGGING, "tags", tags_to_arrow(tags))
    artifacts.complete(TAGGING, Manifest(Provenance({}, {"schema": schema.schema_id}), {}))


async def sent(messages: list[bytes], header: pb.TableHeader) -> AsyncIterator[pb.EnumerateTableRequest]:
    yield pb.EnumerateTableRequest(header=header)
    for message in messages:
        yield pb.EnumerateTableRequest(arrow=message)


async def refused(call: grpc.aio.Call) -> tuple[str, dict[str, str], list[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error = from_rpc(caught.value, request_id="", address="")
    return error.code, error.metadata, [v.field for v in error.violations]


async def test_a_table_that_is_small_only_while_it_is_packed_is_refused(start) -> None:
    stub = await start(max_table_bytes=4 << 20)
    sink = pa.BufferOutputStream()
    bomb = pa.table({"color": ["x" * (1 << 20)] * 64, "score": [1.0] * 64})
    with pa.ipc.new_stream(sink, bomb.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(bomb)
    data = sink.getvalue().to_pybytes()
    assert len(data) < 1 << 20
    code, _, fields = await refused(stub.EnumerateTable(sent([data], pb.TableHeader(score_columns=["score"]))))
    assert (code, fields) == ("INVALID_ARGUMENT", ["table"])


async def test_too_many_slices_are_refused_with_an_estimate(start, tmp_path: Path) -> None:
    stub = await start(max_slices=1_000_000)
    header = pb.TableHeader(score_columns=["score"], max_depth=4)
    code, metadata, _ = await refused(stub.EnumerateTable(sent(list(send_table(table())), header)))
    assert code == "RESOURCE_EXHAUSTED"
    assert 20e6 < int(metadata["estimate"]) < 26e6  # there are 23,114,047
    assert metadata["limit"] == "1000000"
    store_tags(tmp_path)
    created = await stub.CreateEnumeration(
        pb.CreateEnumerationRequest(parent="datasets/pets", tagging=str(TAGGING), max_depth=4)
    )
    async for answer in stub.WatchEnumeration(pb.WatchEnumerationRequest(name=created.job.name)):
        job = answer.job
    assert job.state == types_pb2.JOB_STATE_FAILED
    assert job.problem.reason == "TOO_LARGE"
    assert dict(job.problem.metadata) == metadata


async def test_a_job_tells_how_far_it_is_and_stops_when_it_is_cancelled(start, tmp_path: Path) -> None:
    stub = await start(max_slices=10**12)
    store_tags(tmp_path)
    created = await stub.CreateEnumeration(
        pb.CreateEnumerationRequest(parent="datasets/pets", tagging=str(TAGGING), max_depth=DEEP)
    )
    asked = 0.0
    async for answer in stub.WatchEnumeration(pb.WatchEnumerationRequest(name=created.job.name)):
        job = answer.job
        if job.done_count and not asked:
            assert job.done_count < job.total_count
            asked = time.monotonic()
            await stub.CancelEnumeration(pb.CancelEnumerationRequest(name=created.job.name))
    assert job.state == types_pb2.JOB_STATE_CANCELLED
    assert 0 < time.monotonic() - asked < SOON_S


async def test_a_caller_who_leaves_makes_room_for_the_next(start) -> None:
    stub = await start(max_slices=10**12, parallel_jobs=1)
    messages = list(send_table(table()))
    rule = pb.ErrorRule(margin=0.2)
    short = pb.TableHeader(score_columns=["score"], max_depth=1, min_count=2_000)
    long = stub.EnumerateTable(sent(messages, pb.TableHeader(score_columns=["score"], max_depth=DEEP, error_rule=rule)))

    async def answers() -> list[pb.EnumerateTableResponse]:
        return [answer async for answer in stub.EnumerateTable(sent(messages, short))]

    while not long.done():
        try:
            await asyncio.wait_for(answers(), 1.0)
        except TimeoutError:  # the long one is at work, and others wait
            break
    left = time.monotonic()
    assert long.cancel()
    assert await answers()
    assert time.monotonic() - left < SOON_S
