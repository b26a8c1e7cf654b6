"""Checks of tags, and tags by CLIP: a service, workers, and a language model that does not always say the same."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import types_pb2
from services.tagging import course, worker
from shared.errors import NotFound
from shared.llm import retry
from shared.names import Name, parse
from shared.schema import Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import Manifest, Provenance
from tests import scripted_llm
from tests.integration.fleet import Fleet, last
from tests.scripted_llm import MODEL, ScriptedLLM

N, SAMPLE = 40, 30
BRIGHT = [i % 2 for i in range(N)]
VLM = ("picture brightness", "mood", "pose")
SCHEMA = Schema(
    Task.CLASSIFICATION,
    (),
    (
        *(Attribute(name, Category.GLOBAL, ("dark", "bright"), Tagger.VLM) for name in VLM),
        Attribute("light", Category.GLOBAL, ("dark", "bright"), Tagger.MEASURED, measure=Measure("brightness", (0.5,))),
    ),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(N):
        # No two are alike: the answer to one would be that to the other.
        Image.fromarray(rng.integers(0, 9, (8, 12), np.uint8) + np.uint8(240 * BRIGHT[i])).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def llm(monkeypatch):
    """Tells whether an image is bright, whatever it is asked, but where it is in two minds."""
    rng = np.random.default_rng(1)
    doubted: set[str] = set()

    def tag(name: str, tags: list[str], seen: np.ndarray) -> str:
        return tags[rng.integers(2) if name in doubted else int(seen[0] > 0.5)]

    monkeypatch.setattr(scripted_llm, "_tag", tag)
    with ScriptedLLM() as server:
        server.doubted = doubted
        yield server


@pytest.fixture
async def fleet(redis_url, tmp_path, images, llm, monkeypatch):
    monkeypatch.setattr(course, "_POLL_S", 0.05)
    monkeypatch.setattr(course, "_RECHECK_S", 0.5)
    monkeypatch.setattr(worker, "_BLOCK_MS", 50)
    async with AsyncExitStack() as exits:
        told = {"llm_base_url": llm.base_url, "llm_model": MODEL, "llm_item_rows": 4}
        made = Fleet(redis_url, tmp_path / "store", images, exits, **told)
        made.add_dataset(
            "pets",
            [
                {
                    "instance_id": [f"i{i}" for i in range(N)],
                    "image_uri": [f"{images.as_uri()}/{i}.png" for i in range(N)],
                    "label": ["cat"] * N,
                    "Pose": [("bright", "dark")[b] for b in BRIGHT],  # the contrary of what the model says
                }
            ],
        )
        yield made


async def checked(stub: Any, **asked: Any) -> types_pb2.Job:
    """The job of a check that is asked for, when it has ended."""
    job = (await stub.CreateTagCheck(pb.CreateTagCheckRequest(parent="datasets/pets", **asked))).job
    async for answer in stub.WatchTagCheck(pb.WatchTagCheckRequest(name=job.name)):
        job = answer.job
    return job


async def quality(stub: Any, parent: str = "datasets/pets", schema: str = "") -> pb.TagQuality:
    return (await stub.GetTagQuality(pb.GetTagQualityRequest(parent=parent, schema=schema))).quality


async def test_a_check_asks_again_and_tells_what_to_doubt(fleet, llm):
    stub = await fleet.serve()
    fleet.work(2)
    tagging = await last(stub, await fleet.create(stub, SCHEMA))
    assert len(llm.calls) == N
    with pytest.raises(grpc.aio.AioRpcError, match="nobody has checked"):
        await quality(stub)
    assert fleet.artifacts.doubtful_attributes(parse(tagging.name, "taggings", "name")) == frozenset()

    llm.doubted.add("mood")
    job = await checked(stub, sample_count=SAMPLE, seed=3)
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert (job.done_count, job.total_count, job.cost.call_count) == (SAMPLE, SAMPLE, SAMPLE)
    assert len(llm.calls) == N + SAMPLE  # none came from the cache

    found = await quality(stub)
    assert found == await quality(stub, tagging.name)
    assert found == (await stub.GetTagCheck(pb.GetTagCheckRequest(name=job.name))).quality
    assert (found.tagging, found.check, found.model) == (tagging.name, job.name, MODEL)
    assert (found.sampled_count, found.seed, found.cost.call_count) == (SAMPLE, 3, SAMPLE)
    told = {a.attribute: a for a in found.attributes}
    assert list(told) == [*VLM, "light"]
    assert {name for name, a in told.items() if a.doubt} == {"mood", "pose"}
    steady = told["picture brightness"]
    assert (steady.retagged.compared_count, steady.retagged.share, steady.retagged.kappa) == (SAMPLE, 1, 1)
    assert [(r.reference, r.agreement.compared_count, r.agreement.kappa) for r in steady.references] == [
        ("light", N, 1)
    ]
    assert told["mood"].retagged.kappa < 0.6
    assert (told["pose"].retagged.kappa, told["pose"].references[0].agreement.kappa) == (1, -1)
    assert not told["light"].HasField("retagged")
    doubtful = fleet.artifacts.doubtful_attributes(parse(tagging.name, "taggings", "name"))
    assert doubtful == {"mood", "pose"}
    # A tagging by the same schema that nobody has checked yet goes by that check, as after images were mended.
    name = Name("pets", "taggings", "later")
    fleet.artifacts.complete(name, Manifest(Provenance({}, {"schema": SCHEMA.schema_id}), {}))
    assert fleet.artifacts.doubtful_attributes(name) == {"mood", "pose"}
    fleet.artifacts.complete(name, Manifest(Provenance({}, {"schema": "another"}), {}))
    assert fleet.artifacts.doubtful_attributes(name) == frozenset()
    fleet.store.delete(fleet.artifacts.path(name, "manifest.json"))

    again = await stub.CreateTagCheck(pb.CreateTagCheckRequest(parent="datasets/pets", sample_count=SAMPLE, seed=3))
    assert again.job.reused
    llm.doubted.clear()
    await checked(stub, tagging=tagging.name, sample_count=N + 1)
    assert len(llm.calls) == N + SAMPLE + N  # the first check is not paid again, the other is of all there are
    assert [a.attribute for a in (await quality(stub)).attributes if a.doubt] == ["pose"]
    dead = await stub.ListDeadItems(pb.ListDeadItemsRequest())
    assert not dead.dead_items


async def test_a_check_ends_where_its_money_does_and_goes_on_with_more(fleet, llm, tmp_path):
    (tmp_path / "prices.yaml").write_text(
        f"- source: tests\n  date: 2026-01-01\n  currency: USD\n  models:\n    {MODEL}: {{input: 1.0, output: 1.0}}\n"
    )
    fleet.change(llm_prices=str(tmp_path / "prices.yaml"))
    stub = await fleet.serve()
    fleet.work()
    await last(stub, await fleet.create(stub, SCHEMA))
    job = await checked(stub, sample_count=SAMPLE, budget=types_pb2.Budget(amount=1e-7))
    assert job.state == types_pb2.JOB_STATE_PAUSED
    with pytest.raises(NotFound):
        fleet.artifacts.quality(parse(job.name, "checks", "name"))
    job = await checked(stub, sample_count=SAMPLE, budget=types_pb2.Budget(amount=100))
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert (await quality(stub)).sampled_count == SAMPLE


async def test_an_answer_is_paid_once_while_another_of_its_part_does_not_come(fleet, llm, monkeypatch):
    monkeypatch.setattr(retry, "_backoff", lambda state: 0.01)
    monkeypatch.setattr(worker, "_WAIT_S", (0.05, 0.05))
    stub = await fleet.serve()
    fleet.work()
    await last(stub, await fleet.create(stub, SCHEMA))
    respond, refused = llm._respond, []

    async def failing(call, request):
        if call.images[0] == llm.calls[N].images[0] and len(refused) < 12:  # more than one round of tries
            refused.append(call)
            return scripted_llm._error(500, "The server had an error", "server_error")
        return await respond(call, request)

    monkeypatch.setattr(llm, "_respond", failing)
    assert (await checked(stub, sample_count=SAMPLE)).state == types_pb2.JOB_STATE_SUCCEEDED
    assert len(refused) == 12
    paid = Counter(call.images[0] for call in llm.calls[N:] if call.status == 200)
    assert sorted(paid.values()) == [1] * SAMPLE
    before = len(llm.calls)
    await checked(stub, sample_count=SAMPLE, seed=1)  # another check asks anew
    assert len(llm.calls) - before == SAMPLE


async def test_a_check_whose_money_ends_within_a_part_pays_for_the_rest_alone(fleet, llm, tmp_path):
    (tmp_path / "prices.yaml").write_text(
        f"- source: tests\n  date: 2026-01-01\n  currency: USD\n  models:\n    {MODEL}: {{input: 1.0, output: 1.0}}\n"
    )
    fleet.change(llm_prices=str(tmp_path / "prices.yaml"), llm_item_rows=SAMPLE)  # all of the check in one part
    stub = await fleet.serve()
    fleet.work()
    await last(stub, await fleet.create(stub, SCHEMA))
    job = await checked(stub, sample_count=SAMPLE, budget=types_pb2.Budget(amount=0.012))
    assert job.state == types_pb2.JOB_STATE_PAUSED
    assert 0 < len(llm.calls) - N < SAMPLE
    job = await checked(stub, sample_count=SAMPLE, budget=types_pb2.Budget(amount=100))
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert len(llm.calls) == N + SAMPLE


async def test_what_cannot_be_checked_is_refused_with_the_reason(fleet, llm):
    stub = await fleet.serve()
    fleet.work()
    with pytest.raises(grpc.aio.AioRpcError, match="nothing of dataset 'pets' is tagged"):
        await checked(stub)
    job = await last(stub, await fleet.create(stub, SCHEMA))
    with pytest.raises(grpc.aio.AioRpcError, match="sample_count"):
        await checked(stub, sample_count=-1)
    with pytest.raises(grpc.aio.AioRpcError, match="another dataset"):
        await checked(stub, tagging=job.name.replace("pets", "cars"))
    fleet.change(llm_base_url="", llm_model="")
    with pytest.raises(grpc.aio.AioRpcError, match="HIBUG2_LLM_BASE_URL"):
        await checked(await fleet.serve())


class Lightness:
    """A CLIP model that tells dark from bright."""

    side_px = 4

    def __init__(self, model: str, weights: str, device: str) -> None:
        assert (model, device) == ("tiny", "cpu")

    def texts(self, texts):
        return np.array([[1, 0] if text.endswith("dark") else [0, 1] for text in texts], np.float32)

    def images(self, images):
        light = np.stack(images)[:, 2].mean(axis=(1, 2)) / 255  # a row in the middle: above and below is padding
        return np.column_stack([1 - light, light]).astype(np.float32)


async def test_clip_tags_without_a_call_and_a_check_asks_the_language_model(fleet, llm, monkeypatch):
    monkeypatch.setattr(worker, "Clip", Lightness)
    fleet.change(clip_model="tiny", clip_weights="first", patience_s=0.0)
    schema = Schema(Task.CLASSIFICATION, (), (Attribute("mood", Category.GLOBAL, ("dark", "bright"), Tagger.CLIP),))
    stub = await fleet.serve()
    fleet.work()
    job = await last(stub, await fleet.create(stub, schema))
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert not llm.calls
    assert fleet.table(job).codes[:, 0].tolist() == BRIGHT
    assert fleet.manifest(job).provenance.inputs["clip"].startswith("tiny@first/")

    await checked(stub, sample_count=SAMPLE)
    assert len(llm.calls) == SAMPLE
    (mood,) = (await quality(stub)).attributes
    assert (mood.tagger, mood.retagged.kappa, mood.doubt) == (types_pb2.TAGGER_CLIP, 1, "")

    # A service with other weights plans other work, takes no tag over, and this worker does not touch it.
    fleet.change(clip_weights="second")
    other = await fleet.serve()
    moved = await last(other, await fleet.create(other, schema))
    assert moved.name != job.name
    assert moved.state == types_pb2.JOB_STATE_FAILED
    assert "another CLIP model" in moved.problem.message
