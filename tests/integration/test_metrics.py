"""What the services tell Prometheus, read from a real /metrics page."""

from __future__ import annotations

import asyncio
import io
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.stack import Stack
from hibug2 import Client
from services.tagging import course, server, worker
from services.tagging.config import Settings
from services.tagging.worker import Worker
from shared import metrics
from shared.llm.ledger import Account, Ledger
from shared.llm.prices import NANO
from shared.queue.stream import connect
from shared.schema import Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.store import Store
from tests.integration.fleet import Fleet, last
from tests.integration.test_process import free_port
from tests.integration.waiting import eventually
from tests.scripted_llm import Fault, ScriptedLLM

N, PER_PART, CORRUPT = 12, 4, 5
SCHEMA = Schema(
    Task.CLASSIFICATION,
    ("cat",),
    (
        Attribute(
            "brightness", Category.GLOBAL, ("dark", "bright"), Tagger.MEASURED, measure=Measure("brightness", (0.5,))
        ),
    ),
)
Samples = Counter[tuple[str, frozenset[tuple[str, str]]]]


@pytest.fixture
def page() -> Iterator[Callable[[], Samples]]:
    """Reads all samples of this process: name and labels -> value."""
    port = free_port()
    stop = metrics.serve(port)

    def read() -> Samples:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = io.TextIOWrapper(answer).read()
        families = text_string_to_metric_families(text)
        return Counter({(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples})

    yield read
    stop()


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of all samples of `name` that have `labels`."""
    return sum(v for (n, has), v in samples.items() if n == name and has >= labels.items())


@pytest.fixture
async def fleet(redis_url, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "_POLL_S", 0.05)
    monkeypatch.setattr(worker, "_BLOCK_MS", 50)
    monkeypatch.setattr(server, "_MEASURE_S", 0.05)
    for i in range(N):
        Image.new("L", (12, 8), 20 * i).save(tmp_path / f"{i}.png")
    (tmp_path / f"{CORRUPT}.png").write_bytes(b"nothing")
    async with AsyncExitStack() as exits:
        made = Fleet(redis_url, tmp_path / "store", tmp_path, exits, item_rows=PER_PART, max_deliveries=1)
        uris = [f"{tmp_path.as_uri()}/{i}.png" for i in range(N)]
        made.add_dataset("pets", [{"instance_id": [f"i{i}" for i in range(N)], "image_uri": uris}])
        yield made


async def test_instances_dead_and_the_oldest_item_are_told(fleet, page, monkeypatch):
    tag = Worker._tag

    async def stumbles(self, item):
        if item.part == 2:
            raise KeyError("a bug")
        return await tag(self, item)

    monkeypatch.setattr(Worker, "_tag", stumbles)
    before = page()
    stub = await fleet.serve()
    job = await fleet.create(stub, SCHEMA)

    async def age() -> float:
        return value(await asyncio.to_thread(page), "hibug2_tagging_oldest_seconds")

    first = await eventually(age)
    assert 0 < first < 60

    async def is_older() -> bool:
        return await age() > first

    await eventually(is_older)
    fleet.work()
    await last(stub, job)
    after = await asyncio.to_thread(page)
    # Of three parts one was given up as a work item, and one image of the others is bad.
    for name, count in (("dead", 2), ("instances", 2 * PER_PART - 1)):
        told = f"hibug2_tagging_{name}_total"
        assert value(after, told) - value(before, told) == count

    async def is_empty() -> bool:
        return await age() == 0

    await eventually(is_empty)


async def test_budgets_in_use_are_told_by_team_and_account_and_go_when_they_rest(fleet, page, redis):
    def told() -> dict[tuple[str, str], float]:
        return {
            (dict(has)["team"], dict(has)["account"]): v
            for (name, has), v in page().items()
            if name == "hibug2_llm_budget_spent_ratio"
        }

    async def is_told(expected: dict[tuple[str, str], float]) -> bool:
        return await asyncio.to_thread(told) == expected

    ledger, cars, bears = Ledger(redis), Account("cars", "nightly"), Account("bears", "runs/a")
    await ledger.open(cars, 2.0)
    await ledger.open(bears, 0.0)
    await ledger.open(Account("bears", "free"), None)
    paid = await ledger.reserve(cars, NANO, "USD", 60)
    await fleet.serve()
    await eventually(lambda: is_told({("cars", "nightly"): 0.5, ("bears", "runs/a"): 1.0}))
    await ledger.settle(paid, NANO // 2, 1, 1, 1)
    await ledger.reserve(cars, NANO // 4, "USD", 60)  # counted as spent until it is settled
    await eventually(lambda: is_told({("cars", "nightly"): 0.375, ("bears", "runs/a"): 1.0}))
    await redis.zadd("hibug2:llm:accounts", {"cars nightly": 1})
    await eventually(lambda: is_told({("bears", "runs/a"): 1.0}))


async def test_one_run_shows_on_the_page_of_its_services(page, tmp_path):
    """Every figure that people ask for, of a run that a scripted model answers, wrongly once."""
    photos, rng = tmp_path / "photos" / "validation" / "cat", np.random.default_rng(0)
    photos.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    scores = tmp_path / "scores.csv"
    scores.write_text("id,score\n" + "".join(f"validation/cat/{i}.png,{i % 2}\n" for i in range(8)))
    prices = tmp_path / "prices.yaml"
    models = "{scripted: {input: 10, output: 10}}"
    prices.write_text(f"- {{source: here, date: 2026-01-01, currency: EUR, models: {models}}}\n")

    def debug(address: str) -> None:
        with Client(address) as client:
            client.create_dataset("pets", tmp_path / "photos")
            client.add_scores("pets", "v1", scores)
            client.run("pets", "v1", depth=1, min_count=2)

    before = page()
    with ScriptedLLM() as llm:
        llm.fail(Fault.EMPTY)
        settings = {
            "llm_base_url": llm.base_url,
            "llm_model": "scripted",
            "llm_api_key": "key",
            "llm_prices": str(prices),
        }
        async with Stack(tmp_path / "stack", ((tmp_path / "photos").as_uri(),), workers=0, settings=settings) as stack:
            redis, stop = connect(stack.redis_url), asyncio.Event()
            work = Worker(stack._settings(Settings), redis, Store(stack._settings(Settings).store_url))
            working = asyncio.create_task(work.run(stop))
            await asyncio.to_thread(debug, stack.address)
            stop.set()
            await working
            await redis.aclose()
            after = await asyncio.to_thread(page)

    def grew(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    run = "/hibug2.v1.RunService/CreateRun"
    assert grew("hibug2_rpc_handled_total", method=run, code="OK") == 1
    assert grew("hibug2_rpc_seconds_count", method=run, code="OK") == 1
    assert grew("hibug2_rpc_seconds_sum", method=run) > 0
    assert {dict(has)["kind"] for name, has in after if name == "hibug2_tagging_backlog"} == {
        "lag",
        "pending",
        "waiting",
    }
    assert grew("hibug2_tagging_instances_total") == 8
    assert grew("hibug2_llm_calls_total", outcome="invalid") == 1
    assert grew("hibug2_llm_calls_total", outcome="ok") == len(llm.calls) - 1 > 8
    for direction, told in (("input", "prompt_tokens"), ("output", "completion_tokens")):
        tokens = sum(call.usage[told] for call in llm.calls)
        assert grew("hibug2_llm_tokens_total", team="default", direction=direction) == tokens > 0
    spent = sum(call.usage["prompt_tokens"] + call.usage["completion_tokens"] for call in llm.calls) * 10 / 1e6
    assert grew("hibug2_llm_spend_total", team="default", currency="EUR") == pytest.approx(spent)
    assert grew("hibug2_llm_cache_total") > 0
    assert grew("hibug2_enumeration_slices_total") > 0
    assert grew("hibug2_jobs_total", service="ranking", state="succeeded") == 1
    assert grew("hibug2_job_seconds_count", service="run") == 1
    for service, step in (("tagging", "planning"), ("tagging", "tagging"), ("run", "ranking")):
        assert grew("hibug2_job_step_seconds_count", service=service, step=step) == 1
    assert value(after, "hibug2_peak_memory_bytes") > 10_000_000
