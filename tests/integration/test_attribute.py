"""The attribute service over real gRPC, Redis, images and HTTP; the schemas that it makes are kept as golden files.

`HIBUG2_REWRITE_GOLDEN=1 pytest tests/integration/test_attribute.py -k golden` writes tests/golden/schemas/ anew: look
at the difference before it is committed.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from hibug2.v1 import attribute_pb2 as pb
from hibug2.v1 import attribute_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.attribute.config import Settings
from services.attribute.server import start_server
from services.gateway.datasets import check_instances, record_of
from shared.errors import HiBug2Error, InvalidInput, NotFound, Precondition
from shared.rpc import status
from shared.rpc.channel import connect as channel_to
from shared.rpc.server import RunningServer
from shared.schema import Attribute, Category, Schema, Tagger, Task, schema_to_json
from shared.store.artifacts import Artifacts, ModelRecord, Provenance, table_digest
from shared.store.store import Store
from tests.integration.waiting import eventually
from tests.scripted_llm import MODEL, Fault, ScriptedLLM

pytestmark = pytest.mark.timeout(60)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "schemas"
N = 24
CLASSES = {
    Task.CLASSIFICATION: ("kettle", "teapot"),
    Task.DETECTION: ("lighthouse", "water tower"),
    Task.POSE: ("heron",),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of color on a ground, more and less rough, from dark to bright; one file that is none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(5)
    for i in range(N):
        picture = np.full((60, 80, 3), 20 + 8 * i)
        picture[15:45, 20 : 40 + i] = rng.integers(0, 256, 3)
        picture += rng.integers(0, 1 + (i % 4) * 50, picture.shape)
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as started:
        yield started


@pytest.fixture
def llm(running: ScriptedLLM) -> ScriptedLLM:
    running.reset()
    return running


class Service:
    """The service, a client of it, and the datasets in its store."""

    def __init__(self, settings: Settings, images: Path) -> None:
        self.settings = settings
        self.images = images
        self.artifacts = Artifacts(Store(settings.store_url), "default")
        self.server: RunningServer
        self.stub: rpc.AttributeServiceStub

    def add(self, task: Task, dataset: str = "", **changed: Any) -> str:
        """A dataset of `task` with the scores of the model v1, which takes every fourth for the next class."""
        dataset, classes = dataset or task.value, CLASSES[task]
        labels = [classes[i % len(classes)] for i in range(N)]
        columns: dict[str, Any] = {
            "instance_id": [f"i{i}" for i in range(N)],
            "image_uri": [f"{self.images.as_uri()}/{i}.png" for i in range(N)],
            "label": labels,
        }
        if task is not Task.CLASSIFICATION:
            boxes = {"left_px": 20.0, "top_px": 15.0, "height_px": 30.0}
            columns |= {name: [value] * N for name, value in boxes.items()}
            columns["width_px"] = [20.0 + i for i in range(N)]
        if task is Task.POSE:
            columns["keypoints"] = [[{"keypoint": "beak", "x_px": 25.0, "y_px": 20.0, "visibility": "visible"}]] * N
        instances = check_instances(pa.table(columns | changed), task)
        part = self.artifacts.write_instances(dataset, instances)
        self.artifacts.write_dataset(record_of(dataset, task, instances, [part], part, []))
        wrong = [i % 4 == 1 for i in range(N)]
        other = dict(zip(classes, (*classes[1:], classes[0]), strict=True))
        scores = pa.table(
            {
                "instance_id": columns["instance_id"],
                "score": [0.0 if bad else 1.0 for bad in wrong],
                "predicted_label": [other[a] if bad else a for a, bad in zip(labels, wrong, strict=True)],
            }
        )
        record = ModelRecord(dataset, "v1", "accuracy", table_digest(scores), N, 0.75, "")
        self.artifacts.write_scores(record, scores)
        return dataset

    async def start(self, dataset: str, **given: Any) -> types_pb2.Job:
        request = pb.CreateGenerationRequest(parent=f"datasets/{dataset}", **given)
        return (await self.stub.CreateGeneration(request)).job

    async def generate(self, dataset: str, **given: Any) -> pb.GetGenerationResponse:
        """The finished generation, or the error that it ended in."""
        job = await self.start(dataset, **given)
        async for told in self.stub.WatchGeneration(pb.WatchGenerationRequest(name=job.name)):
            job = told.job
        if job.state != types_pb2.JOB_STATE_SUCCEEDED:
            raise status.error_of_problem(job.problem)
        return await self.stub.GetGeneration(pb.GetGenerationRequest(name=job.name))

    def schema(self, dataset: str) -> Schema:
        current = self.artifacts.current_schema_id(dataset)
        assert current is not None
        return self.artifacts.schema(dataset, current)[0]


@pytest.fixture
async def service(redis_url: str, tmp_path: Path, images: Path, llm: ScriptedLLM) -> AsyncIterator[Service]:
    settings = Settings(
        listen="127.0.0.1:0",
        metrics_port=0,
        drain_s=0.1,
        redis_url=redis_url,
        store_url=tmp_path.as_uri(),
        image_prefixes=(images.as_uri(),),
        llm_base_url=llm.base_url,
        llm_model=MODEL,
        pair_count=6,
        image_count=12,
    )
    started = Service(settings, images)
    started.server = await start_server(settings)
    async with channel_to(started.server.address) as channel:
        started.stub = rpc.AttributeServiceStub(channel)
        yield started
    await started.server.stop()


async def refused(asked: Any) -> HiBug2Error:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked
    return status.error_of(caught.value)


@pytest.mark.parametrize("task", list(Task))
async def test_golden_schemas(service: Service, llm: ScriptedLLM, task: Task) -> None:
    dataset = service.add(task)
    made = await service.generate(dataset, model=f"datasets/{dataset}/models/v1")
    schema = service.schema(dataset)
    assert made.schema.name == f"datasets/{dataset}/schemas/{schema.schema_id}"
    assert made.job.cost.call_count == len(llm.calls)
    assert made.job.done_count == made.job.total_count > 0
    assert dict(made.provenance.prompt_digests)
    assert {i.input for i in made.provenance.inputs} == {"dataset", "scores", "encoder"}
    sources = {source for a in schema.attributes for source in a.sources}
    assert {"direct", "comparison", "difficulty", "catalogue"} <= sources
    text = yaml.safe_dump(
        {
            **schema_to_json(schema),
            "dropped": [{"attribute": out.attribute, "reason": out.reason} for out in made.dropped],
            "merged": [{"attribute": m.attribute, "into": m.into, "reason": m.reason} for m in made.merged],
        },
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=120,
    )
    golden = GOLDEN / f"{task.value}.yaml"
    if os.environ.get("HIBUG2_REWRITE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), f"{golden.name} is another schema; see the head of this file"


async def test_the_same_input_is_found_again_and_another_model_is_another_input(
    service: Service, llm: ScriptedLLM
) -> None:
    dataset = service.add(Task.CLASSIFICATION)
    first = await service.generate(dataset)
    asked = len(llm.calls)
    again = await service.start(dataset)
    assert (again.name, again.reused) == (first.job.name, True)
    assert len(llm.calls) == asked
    for other in ({"model": f"datasets/{dataset}/models/v1"}, {"pair_count": 2}, {"max_tags": 5}, {"seed": 3}):
        assert (await service.start(dataset, **other)).name != first.job.name


async def test_what_is_locked_or_the_users_survives_unchanged(service: Service) -> None:
    dataset = service.add(Task.CLASSIFICATION)
    await service.generate(dataset)
    before = service.schema(dataset)
    locked = Attribute(
        "brightness", Category.MAIN_OBJECT, ("dim", "bright"), Tagger.VLM, "by eye", sources=("direct",), locked=True
    )
    mine = Attribute("Glaze", Category.MAIN_OBJECT, ("matt", "glossy"), Tagger.VLM, sources=("user",))
    others = [a for a in before.attributes if a.name not in ("brightness", "object shape")]
    edited = Schema(before.task, before.main_objects, (*others[:3], locked, mine, *others[3:]))
    service.artifacts.write_schema(dataset, edited, Provenance({}))
    await service.generate(dataset)
    after = service.schema(dataset)
    assert after.attributes[:2] == (locked, mine)
    assert "object shape" in after.names()
    assert Counter(after.names())["brightness"] == 1
    again = await service.start(dataset)
    assert again.reused


async def test_a_list_of_names_is_enough_to_start(service: Service, llm: ScriptedLLM) -> None:
    dataset = service.add(Task.CLASSIFICATION)
    wanted = [
        types_pb2.Attribute(attribute="Lid position"),
        types_pb2.Attribute(attribute="place", category=types_pb2.CATEGORY_BACKGROUND, tags=["inside", "outside"]),
    ]
    await service.generate(dataset, attributes=wanted)
    schema = service.schema(dataset)
    assert schema.attribute("Lid position").tags == ("low", "medium", "high")
    assert schema.attribute("Lid position").sources == ("user",)
    assert schema.attribute("place").tags == ("inside", "outside")
    assert (await service.start(dataset, attributes=wanted)).reused


async def test_a_dataset_without_classes_is_told_what_it_shows(service: Service, llm: ScriptedLLM) -> None:
    dataset = service.add(Task.CLASSIFICATION, label=pa.nulls(N, pa.string()))
    assert "main_objects" in str(await refused(service.start(dataset)))
    assert not llm.calls
    made = await service.generate(dataset, main_objects=["kettle"])
    assert list(made.schema.main_objects) == ["kettle"]
    compared = next(c for c in llm.calls if len(c.images) == 2)
    assert "Main object: kettle" in compared.body["messages"][-1]["content"][0]["text"]


BAD: list[tuple[dict[str, Any], type[HiBug2Error], str]] = [
    ({"pair_count": 0}, InvalidInput, "pair_count"),
    ({"image_count": -1}, InvalidInput, "image_count"),
    ({"max_attributes": 73}, InvalidInput, "max_attributes"),
    ({"max_tags": 1}, InvalidInput, "max_tags"),
    ({"sample_count": -1}, InvalidInput, "sample_count"),
    ({"model": "datasets/classification/models/none"}, NotFound, "none"),
    ({"main_objects": [f"class {i}" for i in range(10_000)]}, InvalidInput, "10,000 classes"),
    ({"main_objects": ["kettle", " "]}, InvalidInput, r"main_objects\[1\]"),
    ({"attributes": [types_pb2.Attribute(attribute="a|b")]}, InvalidInput, r"attributes\[0\]"),
    ({"attributes": [types_pb2.Attribute(attribute="a", tags=["x"])]}, InvalidInput, r"attributes\[0\]"),
    ({"attributes": [types_pb2.Attribute(attribute=n) for n in ("Fur", "fur")]}, InvalidInput, "twice"),
    ({"attributes": [types_pb2.Attribute(attribute="a", tagger=types_pb2.TAGGER_CLIP)]}, InvalidInput, "tags"),
]


async def test_bad_input_is_refused_before_anything_is_paid(service: Service, llm: ScriptedLLM) -> None:
    service.add(Task.CLASSIFICATION)
    for given, error, says in BAD:
        told = await refused(service.start("classification", **given))
        assert isinstance(told, error), given
        assert re.search(says, told.message), given
    assert not llm.calls


async def test_images_that_cannot_be_read_end_it_before_anything_is_paid(service: Service, llm: ScriptedLLM) -> None:
    uris = [f"{service.images.as_uri()}/none{i}.png" for i in range(N)]
    dataset = service.add(Task.CLASSIFICATION, image_uri=uris)
    job = await service.start(dataset)
    async for told in service.stub.WatchGeneration(pb.WatchGenerationRequest(name=job.name)):
        job = told.job
    assert job.state == types_pb2.JOB_STATE_FAILED
    assert "no such file" in job.problem.message
    assert not llm.calls


async def test_a_cancel_ends_the_calls_within_a_second_and_leaves_nothing_half(
    service: Service, llm: ScriptedLLM
) -> None:
    dataset = service.add(Task.CLASSIFICATION)
    llm.skip(4)
    llm.fail(*[Fault.HANG] * 50)
    job = await service.start(dataset)
    await eventually(lambda: any(call.fault for call in llm.calls))
    began = time.monotonic()
    ended = (await service.stub.CancelGeneration(pb.CancelGenerationRequest(name=job.name))).job
    assert ended.state == types_pb2.JOB_STATE_CANCELLED
    assert time.monotonic() - began < 1.5
    assert service.artifacts.current_schema_id(dataset) is None
    llm.reset()
    made = await service.generate(dataset)
    assert made.job.name == job.name
    said = [call.body["messages"][0]["content"] for call in llm.calls]
    assert not [text for text in said if text.startswith("You list the visual attributes")]  # paid for already
    assert service.schema(dataset).attributes


async def test_an_answer_of_no_use_fails_the_job_and_says_so(service: Service, llm: ScriptedLLM) -> None:
    dataset = service.add(Task.CLASSIFICATION)
    llm.fail(*[Fault.QUOTA] * 20)
    job = await service.start(dataset)
    async for told in service.stub.WatchGeneration(pb.WatchGenerationRequest(name=job.name)):
        job = told.job
    assert job.state == types_pb2.JOB_STATE_FAILED
    assert "quota" in job.problem.message
    assert service.artifacts.current_schema_id(dataset) is None


async def test_without_a_language_model_only_what_is_measured_and_given(
    redis_url: str, tmp_path: Path, images: Path
) -> None:
    settings = Settings(
        listen="127.0.0.1:0",
        metrics_port=0,
        drain_s=0.1,
        redis_url=redis_url,
        store_url=tmp_path.as_uri(),
        image_prefixes=(images.as_uri(),),
    )
    service = Service(settings, images)
    service.server = await start_server(settings)
    async with channel_to(service.server.address) as channel:
        service.stub = rpc.AttributeServiceStub(channel)
        dataset = service.add(Task.DETECTION)
        first = await service.generate(dataset)
        assert {a.tagger for a in first.schema.attributes} == {types_pb2.TAGGER_GIVEN, types_pb2.TAGGER_MEASURED}
        assert (await service.start(dataset, pair_count=7, model=f"datasets/{dataset}/models/v1")).reused
        told = await refused(service.start(dataset, attributes=[types_pb2.Attribute(attribute="fur")]))
        assert isinstance(told, Precondition)
        assert "HIBUG2_LLM_BASE_URL" in told.message
        await service.generate(dataset, attributes=[types_pb2.Attribute(attribute="fur", tags=["a", "b"])])
        assert service.schema(dataset).names()[0] == "fur"
    await service.server.stop()
