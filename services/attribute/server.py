"""The attribute service over gRPC: a dataset in, a schema out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import pyarrow as pa
from redis.asyncio import Redis

from hibug2.v1 import attribute_pb2 as pb
from hibug2.v1 import attribute_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.attribute.catalogue import catalogue, catalogue_measures, measured_attributes
from services.attribute.config import Settings
from services.attribute.proposal import propose_schema
from services.attribute.sample import given_attributes, measure_sample, sample_rows
from shared.errors import invalid
from shared.images.reader import ImageReader
from shared.jobs import Jobs, Progress
from shared.llm import LLM, llm_from
from shared.names import Name, content_id, dataset_id, parse
from shared.prompting import load_prompt, prompts_root
from shared.queue.stream import connect
from shared.rpc import context as call
from shared.rpc.schemas import schema_proto
from shared.rpc.server import RunningServer, start
from shared.schema import MAX_ATTRIBUTES, Attribute, Schema, check_schema
from shared.store.artifacts import Artifacts, DatasetRecord, Manifest, Provenance
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
MAX_SAMPLE = 100_000
REVISION = 1  # raised when the same input would give another schema


class AttributeServicer(rpc.AttributeServiceServicer):
    """proto in, domain, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._reader = ImageReader(settings.image_prefixes)
        self._prompts = prompts_root(settings.prompts_dir)
        self.llm: LLM | None = llm_from(settings)
        self.jobs = Jobs(redis, "attribute", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, "generations", "name"))

    def _digests(self, record: DatasetRecord) -> Mapping[str, str]:
        """The prompts that this generation would use, by name; none without a language model."""
        if self.llm is None:
            return {}
        names = ("attributes", "tags")
        prompts = {n: load_prompt("attribute", n, record.task.value, root=self._prompts) for n in names}
        return {f"attribute/{n}": p.digest for n, p in prompts.items()}

    async def CreateGeneration(
        self, request: pb.CreateGenerationRequest, context: Context
    ) -> pb.CreateGenerationResponse:
        dataset = dataset_id(request.parent, "parent")
        if not 0 <= request.sample_count <= MAX_SAMPLE:
            raise invalid("sample_count", f"is {request.sample_count}; give 0 (the default) to {MAX_SAMPLE}")
        if request.model:
            parse(request.model, "models", "model", within=dataset)
        count = request.sample_count or self._settings.sample_count
        artifacts = self._artifacts()
        record = await asyncio.to_thread(artifacts.dataset, dataset)
        key = content_id(
            digest=record.digest,
            task=record.task,
            sample=count,
            seed=request.seed,
            catalogue=[asdict(entry) for entry in catalogue()],
            prompts=self._digests(record),
            llm=self._settings.llm_model if self.llm else "",
            limits=[self._settings.max_attributes, self._settings.max_tags],
            revision=REVISION,
        )
        name = Name(dataset, "generations", key)

        async def work(progress: Progress) -> None:
            await self._generate(progress, artifacts, record, name, count, request.seed)

        return pb.CreateGenerationResponse(job=await self.jobs.create(str(name), work))

    async def _generate(
        self, progress: Progress, artifacts: Artifacts, record: DatasetRecord, name: Name, count: int, seed: int
    ) -> None:
        progress.step = "measuring a sample"
        instances = await asyncio.to_thread(artifacts.instances, record)
        known = await asyncio.to_thread(self._known, instances, record, count, seed)
        digests, snapshot = self._digests(record), ""
        if self.llm is not None:
            progress.step = "asking the language model"
            proposal = await propose_schema(
                self.llm,
                self._prompts,
                record.task,
                record.main_objects or ("object",),
                catalogue=known,
                max_attributes=self._settings.max_attributes,
                max_tags=self._settings.max_tags,
            )
            schema, digests, snapshot = proposal.schema, proposal.digests, self._settings.llm_model
            progress.cost = types_pb2.Cost(
                call_count=proposal.usage.calls,
                input_token_count=proposal.usage.input_tokens,
                output_token_count=proposal.usage.output_tokens,
            )
        else:
            schema = check_schema(Schema(record.task, record.main_objects, known[:MAX_ATTRIBUTES]))
        provenance = Provenance(
            inputs={"dataset": record.digest},
            parameters={"sample_count": count, "generation": str(name)},
            prompt_digests=dict(digests),
            model_snapshot=snapshot,
            seed=seed,
        )
        schema_id = await asyncio.to_thread(artifacts.write_schema, name.dataset, schema, provenance)
        await asyncio.to_thread(artifacts.complete, name, Manifest(provenance, {"schema": schema_id}))

    def _known(self, instances: pa.Table, record: DatasetRecord, count: int, seed: int) -> tuple[Attribute, ...]:
        """Given and measured attributes."""
        has_boxes = instances.column("left_px").null_count < instances.num_rows
        measures = catalogue_measures(record.task, has_boxes)
        values = measure_sample(instances, sample_rows(instances, count, seed), measures, self._reader)
        given = given_attributes(instances)
        measured = measured_attributes(values, measures, record.task, has_boxes)
        taken = {a.name.casefold() for a in given}
        return (*given, *(a for a in measured if a.name.casefold() not in taken))

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        name = parse(request.name, "generations", "name")
        response = pb.GetGenerationResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            schema_id = (await asyncio.to_thread(artifacts.manifest, name)).summary["schema"]
            schema, _ = await asyncio.to_thread(artifacts.schema, name.dataset, schema_id)
            response.schema.CopyFrom(schema_proto(schema, name.dataset))
        return response

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        parse(request.name, "generations", "name")
        return pb.CancelGenerationResponse(job=await self.jobs.cancel(request.name))

    async def WatchGeneration(
        self, request: pb.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[pb.WatchGenerationResponse]:
        parse(request.name, "generations", "name")
        async for job in self.jobs.watch(request.name):
            yield pb.WatchGenerationResponse(job=job)


async def start_server(settings: Settings) -> RunningServer:
    """Start the attribute service; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    servicer = AttributeServicer(settings, redis, Store(settings.store_url))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_AttributeServiceServicer_to_server(servicer, server)
        return [pb.DESCRIPTOR.services_by_name["AttributeService"].full_name]

    closers = [servicer.jobs.close, redis.aclose]
    if servicer.llm is not None:
        closers.append(servicer.llm.close)
    return await start(settings, add, closers=closers)
