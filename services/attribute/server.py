"""The attribute service over gRPC: a dataset in, a schema out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from redis.asyncio import Redis

from hibug2.v1 import attribute_pb2 as pb
from hibug2.v1 import attribute_pb2_grpc as rpc
from services.attribute.catalogue import catalogue, catalogue_measures, measurable, measured_attributes
from services.attribute.config import Settings
from services.attribute.difficulty import confusable_pairs
from services.attribute.estimate import USUAL_ATTRIBUTES, estimate_generation
from services.attribute.interview import Tally
from services.attribute.normalise import overlap_key
from services.attribute.order import Order, order_of
from services.attribute.proposal import Proposal, propose_schema
from services.attribute.questions import Questions, load_questions
from services.attribute.sample import SHOWN_SIDE_PX, Sample, given_attributes, sample_rows, take_sample
from shared.images.reader import ImageReader
from shared.jobs import Jobs, Paused, Progress
from shared.llm import LLM, Account, BudgetSpent, llm_from
from shared.names import Name, content_id, parse
from shared.prompting import prompts_root
from shared.queue.stream import connect
from shared.rpc import context as call
from shared.rpc.costs import estimated_cost, spent_cost
from shared.rpc.provenance import provenance_proto
from shared.rpc.schemas import schema_proto
from shared.rpc.server import RunningServer, start
from shared.schema import Attribute, Schema, Task, check_schema, schema_to_json
from shared.store.artifacts import (
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    column_by_id,
    scores_in_order,
)
from shared.store.store import Store
from shared.text import StaticEncoder, TextEncoder

Context = grpc.aio.ServicerContext[Any, Any]
REVISION = 2  # raised when the same input would give another schema


class _Known(NamedTuple):
    """What is known before anything is asked."""

    attributes: tuple[Attribute, ...]
    measurable: tuple[str, ...]
    sample: Sample
    confusions: list[tuple[str, str]]


class AttributeServicer(rpc.AttributeServiceServicer):
    """proto in, domain, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._reader = ImageReader(settings.image_prefixes)
        self._prompts = prompts_root(settings.prompts_dir)
        self._encoder: TextEncoder | None = None
        self.llm: LLM | None = llm_from(settings, redis)
        self.jobs = Jobs(redis, "attribute", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, "generations", "name"))

    async def CreateGeneration(
        self, request: pb.CreateGenerationRequest, context: Context
    ) -> pb.CreateGenerationResponse:
        artifacts = self._artifacts()
        order = await asyncio.to_thread(order_of, artifacts, request, self._settings)
        questions: Questions | None = None
        asked: dict[str, object] = {}
        if self.llm is not None:
            questions = await asyncio.to_thread(load_questions, self._prompts, order.record.task.value)
            asked = {
                "prompts": questions.digests,
                "llm": self._settings.llm_model,
                "limits": asdict(order.limits),
                "main_objects": order.main_objects,
                "model": order.model.digest if order.model else "",
                "own": [asdict(candidate) for candidate in order.own],
                "image_side_px": SHOWN_SIDE_PX,
            }
        key = content_id(
            digest=order.record.digest,
            task=order.record.task,
            sample=order.sample_count,
            seed=order.seed,
            catalogue=[asdict(entry) for entry in catalogue()],
            kept=_attributes_json(order.kept),
            max_attributes=order.limits.max_attributes,
            revision=REVISION,
            **asked,
        )
        name = Name(order.record.dataset, "generations", key)

        capped = request.HasField("budget") and self.llm is not None
        account = Account(call.team.get(), request.budget.account or str(name))
        if self.llm is not None and self.llm.ledger is not None and capped and not await self._is_complete(str(name)):
            await self.llm.ledger.open(account, request.budget.amount)
        llm = self.llm.charging(account, capped=capped) if self.llm is not None else None

        async def work(progress: Progress) -> None:
            try:
                await self._generate(progress, artifacts, order, name, questions, llm)
            except BudgetSpent as spent:
                raise Paused(str(spent)) from spent

        return pb.CreateGenerationResponse(job=await self.jobs.create(str(name), work))

    async def _generate(
        self,
        progress: Progress,
        artifacts: Artifacts,
        order: Order,
        name: Name,
        questions: Questions | None,
        llm: LLM | None,
    ) -> None:
        progress.step = "measuring a sample"
        record, limits = order.record, order.limits
        known = await asyncio.to_thread(self._known, artifacts, order)
        summary: dict[str, Any] = {}
        inputs = {"dataset": record.digest}
        parameters: dict[str, Any] = {"sample_count": order.sample_count, "generation": str(name)}
        digests: Mapping[str, str] = {}
        if llm is not None and questions is not None:
            encoder = await asyncio.to_thread(self._load_encoder)
            proposal = await _propose(progress, llm, questions, order, known, encoder)
            schema, digests = proposal.schema, proposal.digests
            summary = {
                "dropped": [asdict(out) for out in proposal.dropped],
                "merged": [asdict(out) for out in proposal.merged],
                "compared_pair_count": proposal.compared_count,
                "viewed_image_count": proposal.looked_count,
            }
            inputs["encoder"] = encoder.name
            if order.model is not None:
                inputs["scores"] = order.model.digest
            parameters |= {**asdict(limits), "image_side_px": SHOWN_SIDE_PX}
        else:
            attributes = known.attributes[: limits.max_attributes]
            schema = check_schema(Schema(record.task, order.main_objects, attributes))
        provenance = Provenance(
            inputs=inputs,
            parameters=parameters,
            prompt_digests=dict(digests),
            model_snapshot=self._settings.llm_model if llm is not None else "",
            seed=order.seed,
        )
        schema_id = await asyncio.to_thread(artifacts.write_schema, name.dataset, schema, provenance)
        await asyncio.to_thread(artifacts.complete, name, Manifest(provenance, {"schema": schema_id, **summary}))

    def _load_encoder(self) -> TextEncoder:
        if self._encoder is None:
            self._encoder = StaticEncoder()
        return self._encoder

    def _known(self, artifacts: Artifacts, order: Order) -> _Known:
        """Kept, given and measured attributes, and the images that are looked at."""
        record = order.record
        instances = artifacts.instances(record)
        has_boxes = instances.column("left_px").null_count < instances.num_rows
        measures = catalogue_measures(record.task, has_boxes)
        scores: npt.NDArray[np.float64] | None = None
        confusions: list[tuple[str, str]] = []
        if order.model is not None:
            scores, confusions = _told(artifacts, order.model, instances, order.limits.confusion_count)
        rows = sample_rows(instances, order.sample_count, order.seed)
        sample = take_sample(instances, rows, measures, self._reader, scores, unnamed=_unnamed(order.main_objects))
        taken = {a.name.casefold() for a in order.kept}
        given = [a for a in given_attributes(instances) if a.name.casefold() not in taken]
        taken |= {a.name.casefold() for a in given}
        said = {overlap_key(a.name) for a in order.kept}
        measured = measured_attributes(sample.values, measures, record.task, has_boxes)
        measured = tuple(a for a in measured if a.name.casefold() not in taken and overlap_key(a.name) not in said)
        return _Known((*order.kept, *given, *measured), measurable(sample.values, measures), sample, confusions)

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        name = parse(request.name, "generations", "name")
        response = pb.GetGenerationResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            manifest = await asyncio.to_thread(artifacts.manifest, name)
            summary = manifest.summary
            schema, _ = await asyncio.to_thread(artifacts.schema, name.dataset, summary["schema"])
            response.schema.CopyFrom(schema_proto(schema, name.dataset))
            for out in summary.get("dropped", ()):
                response.dropped.add(attribute=out["name"], reason=out["reason"])
            for out in summary.get("merged", ()):
                response.merged.add(attribute=out["name"], into=out["into"], reason=out["reason"])
            response.provenance.CopyFrom(provenance_proto(manifest.provenance))
            response.compared_pair_count = summary.get("compared_pair_count", 0)
            response.viewed_image_count = summary.get("viewed_image_count", 0)
        return response

    async def EstimateGeneration(
        self, request: pb.EstimateGenerationRequest, context: Context
    ) -> pb.EstimateGenerationResponse:
        artifacts, settings = self._artifacts(), self._settings
        order = await asyncio.to_thread(order_of, artifacts, request.generation, settings)
        if self.llm is None:
            return pb.EstimateGenerationResponse()
        price = self.llm.prices.known(settings.llm_model)
        questions = await asyncio.to_thread(load_questions, self._prompts, order.record.task.value)
        limits = order.limits
        found = estimate_generation(price, questions, order.main_objects, limits, settings.llm_image_detail)
        return pb.EstimateGenerationResponse(
            cost=estimated_cost(found),
            assumption=f"at most {limits.pair_count} pairs and {limits.image_count} images are looked at, and "
            f"{min(USUAL_ATTRIBUTES, limits.max_attributes)} attributes are found",
        )

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


async def _propose(
    progress: Progress, llm: LLM, questions: Questions, order: Order, known: _Known, encoder: TextEncoder
) -> Proposal:
    def tell(tally: Tally) -> None:
        progress.step = tally.step
        progress.update(tally.done, tally.total)
        progress.cost = spent_cost(tally.usage)

    return await propose_schema(
        llm,
        questions,
        order.record.task,
        order.main_objects,
        encoder=encoder,
        catalogue=known.attributes,
        own=order.own,
        measurable=known.measurable,
        sample=known.sample,
        confusions=known.confusions,
        limits=order.limits,
        seed=order.seed,
        tell=tell,
    )


def _told(
    artifacts: Artifacts, model: ModelRecord, instances: pa.Table, count: int
) -> tuple[npt.NDArray[np.float64], list[tuple[str, str]]]:
    """The model's score of each instance, and the classes that it takes for one another."""
    table = artifacts.scores(model)
    ids = instances.column("instance_id").combine_chunks()
    predicted = column_by_id(table, ids, "predicted_label").to_pylist()
    confusions = confusable_pairs(instances.column("label").to_pylist(), predicted, count)
    return scores_in_order(table, ids), confusions


def _unnamed(main_objects: Sequence[str]) -> str:
    """What an instance without a label is called."""
    return main_objects[0] if len(main_objects) == 1 else "object"


def _attributes_json(attributes: tuple[Attribute, ...]) -> object:
    return schema_to_json(Schema(Task.CLASSIFICATION, (), attributes))["attributes"]


async def start_server(settings: Settings) -> RunningServer:
    """Start the attribute service; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    servicer = AttributeServicer(settings, redis, Store(settings.store_url))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_AttributeServiceServicer_to_server(servicer, server)
        return [pb.DESCRIPTOR.services_by_name["AttributeService"].full_name]

    closers = [servicer.jobs.close]
    if servicer.llm is not None:
        closers.append(servicer.llm.close)
    return await start(settings, add, closers=[*closers, redis.aclose])
