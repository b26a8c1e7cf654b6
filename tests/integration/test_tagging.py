"""The tagging service and its workers over a real queue, a real store and real images."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import tagging_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.gateway.datasets import check_instances, record_of
from services.tagging import plan, worker
from services.tagging import server as tagging_server
from services.tagging.config import Settings
from services.tagging.server import start_server
from services.tagging.worker import Worker
from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.metrics import JOBS
from shared.names import parse
from shared.queue.stream import connect
from shared.rpc import status
from shared.rpc.channel import connect as channel_to
from shared.rpc.server import RunningServer
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import Artifacts, Provenance, TagTable
from shared.store.store import Store
from tests.integration.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
N, PER_PART = 60, 4
PARTS = N // PER_PART
CORRUPT, MISSING = 7, 33
SCHEMA = Schema(
    Task.CLASSIFICATION,
    ("bear", "cat"),
    (
        Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, ("bear", "cat"), Tagger.GIVEN),
        Attribute(
            "brightness",
            Category.GLOBAL,
            ("dark", "bright"),
            Tagger.MEASURED,
            measure=Measure("brightness", (0.5,)),
        ),
        Attribute("error", Category.GLOBAL, ("small", "large"), Tagger.GIVEN),  # a name that parts use as well
    ),
)
LABELS = ["bear" if i % 3 else "cat" for i in range(N)]
BRIGHT = [i % 2 for i in range(N)]
ERRORS = ["small" if i % 5 else "large" for i in range(N)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(N):
        Image.new("L", (12, 8), 250 * BRIGHT[i]).save(folder / f"{i}.png")
    (folder / f"{CORRUPT}.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    (folder / f"{MISSING}.png").unlink()
    return folder


class Fleet:
    """One tagging service, its workers, and a dataset to tag."""

    def __init__(self, redis_url: str, folder: Path, images: Path, exits: AsyncExitStack) -> None:
        self.settings = Settings(
            listen="127.0.0.1:0",
            metrics_port=0,
            drain_s=0.1,
            redis_url=redis_url,
            store_url=folder.as_uri(),
            image_prefixes=(images.as_uri(),),
            item_rows=PER_PART,
            lease_s=1.0,
        )
        self._exits = exits
        self.store = Store(self.settings.store_url)
        self.artifacts = Artifacts(self.store, "default")
        self.server: RunningServer
        table = pa.table(
            {
                "instance_id": [f"i{i}" for i in range(N)],
                "image_uri": [f"{images.as_uri()}/{i}.png" for i in range(N)],
                "label": LABELS,
                "error": ERRORS,
            }
        )
        instances = check_instances(table, Task.CLASSIFICATION)
        part = self.artifacts.write_instances("pets", instances)
        self.artifacts.write_dataset(record_of("pets", Task.CLASSIFICATION, instances, [part], part, []))

    async def serve(self) -> rpc.TaggingServiceStub:
        """Start the service (another replica at the second call) and return a stub for it."""
        self.server = await start_server(self.settings)
        self._exits.push_async_callback(self.server.stop)
        return rpc.TaggingServiceStub(await self._exits.enter_async_context(channel_to(self.server.address)))

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

    async def work_apart(self) -> asyncio.subprocess.Process:
        """Start a worker as a process of its own."""
        s = self.settings
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HIBUG2_")},
            "HIBUG2_LISTEN": "127.0.0.1:0",
            "HIBUG2_METRICS_PORT": "0",
            "HIBUG2_REDIS_URL": s.redis_url,
            "HIBUG2_STORE_URL": s.store_url,
            "HIBUG2_IMAGE_PREFIXES": ",".join(s.image_prefixes),
            "HIBUG2_LEASE_S": str(s.lease_s),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")]),
        }
        command = [sys.executable, "-m", "services.tagging", "worker"]
        return await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT, stdout=DEVNULL, stderr=DEVNULL)

    async def create(self, stub: rpc.TaggingServiceStub, schema: Schema = SCHEMA) -> types_pb2.Job:
        self.artifacts.write_schema("pets", schema, Provenance({}))
        name = f"datasets/pets/schemas/{schema.schema_id}"
        answer = await stub.CreateTagging(pb.CreateTaggingRequest(parent="datasets/pets", schema=name))
        return answer.job

    def parts(self, job: types_pb2.Job) -> list[str]:
        return self.store.names(self.artifacts.path(parse(job.name, "taggings", "name"), "parts"))

    def table(self, job: types_pb2.Job) -> TagTable:
        return self.artifacts.tag_table(parse(job.name, "taggings", "name"))


@pytest.fixture
async def fleet(redis_url, tmp_path, images, monkeypatch):
    monkeypatch.setattr(tagging_server, "_POLL_S", 0.05)
    monkeypatch.setattr(tagging_server, "_RECHECK_S", 0.5)
    async with AsyncExitStack() as exits:
        yield Fleet(redis_url, tmp_path / "store", images, exits)


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


@pytest.fixture
def gates(monkeypatch) -> Gates:
    made, tag = Gates(), Worker._tag

    async def gated(self, item):
        await made.enter(item.part)
        return await tag(self, item)

    monkeypatch.setattr(Worker, "_tag", gated)
    return made


async def last(stub: rpc.TaggingServiceStub, job: types_pb2.Job) -> types_pb2.Job:
    async with asyncio.timeout(40):
        async for answer in stub.WatchTagging(pb.WatchTaggingRequest(name=job.name)):
            job = answer.job
    return job


def assert_all_tagged_once(table: TagTable) -> None:
    assert table.instance_ids.to_pylist() == [f"i{i}" for i in range(N)]
    dead = (CORRUPT, MISSING)
    expected = np.array(
        [
            [
                SCHEMA.attributes[0].code(LABELS[i]),
                UNKNOWN if i in dead else BRIGHT[i],
                SCHEMA.attributes[2].code(ERRORS[i]),
            ]
            for i in range(N)
        ]
    )
    assert table.codes.tolist() == expected.tolist()


async def test_every_instance_is_tagged_once_and_a_bad_image_is_dead_with_its_reason(fleet):
    stub = await fleet.serve()
    fleet.work(3)
    job = await last(stub, await fleet.create(stub))
    assert (job.state, job.done_count, job.total_count) == (types_pb2.JOB_STATE_SUCCEEDED, N, N)
    assert_all_tagged_once(fleet.table(job))
    told = await stub.GetTagging(pb.GetTaggingRequest(name=job.name))
    assert (told.instance_count, told.dead_count) == (N, 2)
    assert {c.attribute: c.unknown_count for c in told.coverage} == {MAIN_OBJECT: 0, "brightness": 2, "error": 0}
    reasons = fleet.artifacts.manifest(parse(job.name, "taggings", "name")).summary["dead_reasons"]
    assert f"{CORRUPT}.png" in reasons[0]
    assert "no such file" in reasons[1]
    backlog = await stub.GetBacklog(pb.GetBacklogRequest())
    assert (backlog.lag_count, backlog.pending_count) == (0, 0)
    assert fleet.parts(job) == []
    assert (await fleet.create(stub)).reused


async def test_progress_and_backlog_are_told_while_parts_are_held(fleet, gates):
    gates.hold(*range(3, PARTS))
    stub = await fleet.serve()
    job = await fleet.create(stub)
    await eventually(lambda: _backlog(stub, PARTS, 0))
    fleet.work(2)
    await eventually(lambda: _backlog(stub, PARTS - 5, 2))
    await eventually(lambda: _done(stub, job, 3 * PER_PART))
    gates.release()
    assert (await last(stub, job)).state == types_pb2.JOB_STATE_SUCCEEDED


async def _backlog(stub, lag: int, pending: int) -> bool:
    found = await stub.GetBacklog(pb.GetBacklogRequest())
    return (found.lag_count, found.pending_count) == (lag, pending)


async def _done(stub, job, count: int) -> bool:
    return (await stub.GetTagging(pb.GetTaggingRequest(name=job.name))).job.done_count == count


async def test_the_parts_of_a_worker_that_was_killed_are_finished_by_another(fleet):
    fleet.settings = fleet.settings.model_copy(update={"item_rows": 1})
    stub = await fleet.serve()
    victim = await fleet.work_apart()
    try:
        job = await fleet.create(stub)

        async def caught_in_mid_part() -> bool:
            if not fleet.parts(job):
                return False
            victim.send_signal(signal.SIGSTOP)
            if (await stub.GetBacklog(pb.GetBacklogRequest())).pending_count == 1:
                return True
            victim.send_signal(signal.SIGCONT)
            return False

        await eventually(caught_in_mid_part, 30)
    finally:
        victim.kill()
        await victim.wait()
    assert 0 < len(fleet.parts(job)) < N
    fleet.work()
    job = await last(stub, job)
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert_all_tagged_once(fleet.table(job))


async def test_redis_wiped_in_mid_run_loses_no_part(fleet, gates, redis):
    gates.hold(5)
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub)
    await eventually(lambda: len(fleet.parts(job)) == 5)
    await redis.flushall()
    gates.release()
    job = await last(stub, job)
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert job.done_count == N
    assert_all_tagged_once(fleet.table(job))


async def test_redis_wiped_loses_no_part_while_work_of_others_is_in_the_queue(fleet, gates, redis):
    gates.hold(5, 999)
    stub = await fleet.serve()
    fleet.work(2)
    job = await fleet.create(stub)
    await eventually(lambda: gates.begun[5])
    await redis.flushall()
    gone = pb.TaggingItem(team="other", tagging="datasets/d/taggings/gone", part=999, row_count=1)
    await redis.xadd("hibug2:queue:tagging", {"d": gone.SerializeToString()})
    await eventually(lambda: gates.begun[999])
    gates.release(5)
    assert (await last(stub, job)).state == types_pb2.JOB_STATE_SUCCEEDED
    assert_all_tagged_once(fleet.table(job))
    gates.release(999)
    await eventually(lambda: _backlog(stub, 0, 0))


async def test_cancelling_stops_the_work_and_what_is_done_is_found_again(fleet, gates):
    gates.hold(4)
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub)
    await eventually(lambda: gates.begun[4])
    cancelled = await stub.CancelTagging(pb.CancelTaggingRequest(name=job.name))
    assert cancelled.job.state == types_pb2.JOB_STATE_CANCELLED
    gates.release()  # what is in hand ends; the rest is dropped
    await eventually(lambda: _backlog(stub, 0, 0))
    assert fleet.parts(job) == [plan.part_file(part) for part in range(5)]
    again = await last(stub, await fleet.create(stub))
    assert again.state == types_pb2.JOB_STATE_SUCCEEDED
    assert gates.begun == dict.fromkeys(range(PARTS), 1)
    assert_all_tagged_once(fleet.table(again))


async def test_parts_that_are_there_are_not_done_again_whatever_the_settings_say_now(fleet, gates):
    gates.hold(*range(6, PARTS))
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub)
    await eventually(lambda: len(fleet.parts(job)) == 6)
    await fleet.server.stop()
    marked = fleet.artifacts.path(parse(job.name, "taggings", "name"), "parts", plan.part_file(0))
    table = fleet.store.read_table(marked)
    fleet.store.write_table(marked, table.set_column(2, "code_1", pa.array([1] * PER_PART, pa.uint16())))
    fleet.settings = fleet.settings.model_copy(update={"item_rows": 7})
    other = await fleet.serve()
    again = await fleet.create(other)
    assert again.name == job.name
    gates.release()
    again = await last(other, again)
    assert again.state == types_pb2.JOB_STATE_SUCCEEDED
    found = fleet.table(again)
    assert found.codes[:PER_PART, 1].tolist() == [1] * PER_PART  # as it was left, not tagged anew
    assert found.instance_ids.to_pylist() == [f"i{i}" for i in range(N)]


async def test_a_replica_that_lost_its_job_does_not_stop_the_one_that_has_it(fleet, gates, redis):
    gates.hold(*range(2, PARTS))
    one, two = await fleet.serve(), await fleet.serve()
    fleet.work()
    job = await fleet.create(one)
    await eventually(lambda: len(fleet.parts(job)) == 2)
    # As if the first had slept past its lease: the second takes the work, then the first wakes up.
    await redis.delete(f"hibug2:job:tagging:default:{job.name}:lease")
    ended = JOBS.labels("tagging", "cancelled")._value
    before = ended.get()
    await fleet.create(two)
    await eventually(lambda: ended.get() > before)
    gates.release()
    job = await last(two, job)
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert_all_tagged_once(fleet.table(job))


async def failure(stub: rpc.TaggingServiceStub, job: types_pb2.Job) -> HiBug2Error:
    job = await last(stub, job)
    assert job.state == types_pb2.JOB_STATE_FAILED
    return status.error_of_problem(job.problem)


def with_tagger(tagger: Tagger) -> Schema:
    return Schema(SCHEMA.task, (), (Attribute("pose", Category.MAIN_OBJECT, ("sits", "runs"), tagger),))


@pytest.mark.parametrize(("tagger", "text"), [(Tagger.VLM, "HIBUG2_LLM_BASE_URL"), (Tagger.CLIP, "asks for CLIP")])
async def test_a_schema_that_nobody_here_can_tag_fails_the_job_and_says_why(tagger, text, fleet):
    stub = await fleet.serve()
    fleet.work(2)
    error = await failure(stub, await fleet.create(stub, with_tagger(tagger)))
    assert isinstance(error, Precondition)
    assert "'pose'" in str(error)
    assert text in str(error)
    await eventually(lambda: _backlog(stub, 0, 0))


@pytest.mark.parametrize("error", [Unavailable("the storage is away"), KeyError("a bug")], ids=["away", "bug"])
async def test_a_part_that_nobody_can_finish_is_tried_again_and_then_fails_the_job(error, fleet, monkeypatch):
    tries = 0

    async def fail(*_):
        nonlocal tries
        tries += 1
        raise error

    monkeypatch.setattr(worker, "tag_instances", fail)
    fleet.settings = fleet.settings.model_copy(update={"max_deliveries": 2, "item_rows": N, "lease_s": 0.2})
    stub = await fleet.serve()
    fleet.work(2)
    assert isinstance(await failure(stub, await fleet.create(stub)), Unavailable)
    assert tries == 2
    monkeypatch.undo()
    assert (await last(stub, await fleet.create(stub))).state == types_pb2.JOB_STATE_SUCCEEDED  # the workers live on


async def test_a_part_that_takes_longer_than_the_lease_is_begun_once(fleet, gates):
    gates.hold(0)
    stub = await fleet.serve()
    fleet.work(3)
    job = await fleet.create(stub)
    await eventually(lambda: _done(stub, job, N - PER_PART))
    await asyncio.sleep(1.5 * fleet.settings.lease_s)
    gates.release()
    assert (await last(stub, job)).state == types_pb2.JOB_STATE_SUCCEEDED
    assert gates.begun == dict.fromkeys(range(PARTS), 1)


async def test_a_request_that_cannot_be_served_is_refused_at_once(fleet):
    stub = await fleet.serve()
    fleet.artifacts.write_schema("pets", SCHEMA, Provenance({}))
    schema = f"datasets/pets/schemas/{SCHEMA.schema_id}"
    for parent, named, splits, code in (
        ("datasets/none", "datasets/none/schemas/x", [], grpc.StatusCode.NOT_FOUND),
        ("datasets/pets", "datasets/pets/schemas/x", [], grpc.StatusCode.NOT_FOUND),
        ("datasets/pets", "datasets/other/schemas/x", [], grpc.StatusCode.INVALID_ARGUMENT),
        ("datasets/pets", schema, ["pool"], grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.CreateTagging(pb.CreateTaggingRequest(parent=parent, schema=named, splits=splits))
        assert refused.value.code() is code
