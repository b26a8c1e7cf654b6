"""Two gateways, each a process, over one store and one Redis: what both change at a time is not lost."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import pyarrow as pa
import pytest

from hibug2.v1 import dataset_pb2 as pb
from hibug2.v1 import dataset_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.gateway import turns
from services.gateway.turns import turn
from shared.errors import Busy, Unavailable
from shared.queue.stream import connect
from shared.rpc.arrow import send_table
from tests.integration.test_process import process


@pytest.fixture
async def stubs(redis_url, tmp_path) -> AsyncIterator[list[rpc.DatasetServiceStub]]:
    settings = {"LISTEN": "127.0.0.1:0", "METRICS_PORT": "0", "HTTP_PORT": "0", "DRAIN_S": "0"}
    prefixes = {"IMAGE_PREFIXES": "file:///images", "STORE_URL": (tmp_path / "store").as_uri()}
    started = [await process("services.gateway", **settings, **prefixes, REDIS_URL=redis_url) for _ in range(2)]
    try:
        addresses = [await asyncio.wait_for(_address(gateway), 60) for gateway in started]
        channels = [grpc.aio.insecure_channel(address) for address in addresses]
        yield [rpc.DatasetServiceStub(channel) for channel in channels]
        for channel in channels:
            await channel.close()
    finally:
        for gateway in started:
            with suppress(ProcessLookupError):
                gateway.kill()
            await gateway.wait()


async def _address(gateway: asyncio.subprocess.Process) -> str:
    while line := await gateway.stderr.readline():
        if re.search(rb'"serving"', line):
            return json.loads(line)["address"]
    raise AssertionError("the gateway ended")


def rows(*names: str) -> pa.Table:
    return pa.table({"instance_id": list(names), "image_uri": [f"file:///images/{name}.png" for name in names]})


def upload(kind, header, table):
    yield kind(header=header)
    for chunk in send_table(table):
        yield kind(arrow=chunk)


def create(stub, name: str, table: pa.Table):
    header = pb.DatasetHeader(dataset_id=name, task=types_pb2.TASK_CLASSIFICATION, skip_image_check=True)
    return stub.CreateDataset(upload(pb.CreateDatasetRequest, header, table))


def add(stub, table: pa.Table, request_id: str = ""):
    header = pb.InstancesHeader(parent="datasets/d", request_id=request_id, skip_image_check=True)
    return stub.AddInstances(upload(pb.AddInstancesRequest, header, table))


async def test_what_is_added_through_two_gateways_at_a_time_is_all_there(stubs):
    await create(stubs[0], "d", rows("first"))
    names = [f"i{i}" for i in range(24)]
    answers = await asyncio.gather(*(add(stubs[i % 2], rows(name)) for i, name in enumerate(names)))
    assert sorted(answer.dataset.instance_count for answer in answers) == list(range(2, 26))
    found = await stubs[0].ListInstances(pb.ListInstancesRequest(parent="datasets/d", page_size=100))
    assert sorted(instance.instance_id for instance in found.instances) == sorted([*names, "first"])

    # One request that arrives at both adds once; two that bring the same instance: one is refused.
    await asyncio.gather(*(add(stub, rows("same"), "r1") for stub in stubs))
    refused = await asyncio.gather(*(add(stub, rows("twin")) for stub in stubs), return_exceptions=True)
    (failure,) = [answer for answer in refused if isinstance(answer, grpc.aio.AioRpcError)]
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await stubs[1].GetDataset(pb.GetDatasetRequest(name="datasets/d"))).dataset.instance_count == 27

    # A name is given once.
    made = await asyncio.gather(*(create(stubs[i % 2], "e", rows(f"of-{i}")) for i in range(6)), return_exceptions=True)
    failures = [answer.code() for answer in made if isinstance(answer, grpc.aio.AioRpcError)]
    assert failures == [grpc.StatusCode.ALREADY_EXISTS] * 5


async def test_turns_exclude_each_other_and_only_at_the_same_thing(redis_url, redis):
    other, inside, most = connect(redis_url), 0, 0

    async def take(client) -> None:
        nonlocal inside, most
        async with turn(client, "a:datasets/d") as confirm:
            inside += 1
            most = max(most, inside)
            await confirm()
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(take(client) for client in (redis, other) for _ in range(5)))
    assert most == 1
    async with turn(redis, "a:datasets/d"), turn(other, "a:datasets/e"), turn(other, "b:datasets/d"):
        pass
    await other.aclose()


async def test_a_turn_is_kept_as_long_as_it_takes_and_ends_with_its_process(redis, monkeypatch):
    monkeypatch.setattr(turns, "LEASE_S", 0.3)
    monkeypatch.setattr(turns, "_WAIT_S", 0.6)
    async with turn(redis, "a:datasets/d") as confirm:
        with pytest.raises(Busy, match="others are changing datasets/d"):
            async with turn(redis, "a:datasets/d"):
                pass
        await confirm()
    await redis.set("hibug2:turn:a:datasets/d", "of a dead process", px=300)
    async with turn(redis, "a:datasets/d"):
        pass


async def test_who_lost_the_turn_changes_nothing(redis):
    async with turn(redis, "a:datasets/d") as confirm:
        await redis.flushall()
        with pytest.raises(Unavailable, match="another changes datasets/d"):
            await confirm()
        async with turn(redis, "a:datasets/d") as theirs:
            with pytest.raises(Unavailable):
                await confirm()
            await theirs()
