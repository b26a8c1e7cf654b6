"""The prediction service over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from redis.asyncio import Redis

from hibug2.v1 import prediction_pb2 as pb
from hibug2.v1 import prediction_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.prediction.config import Settings
from services.prediction.encoder import ClipEncoder, StaticEncoder, TextEncoder
from services.prediction.predict import predict_artifact
from shared.errors import invalid
from shared.jobs import Jobs, Progress
from shared.names import Name, content_id, dataset_id, parse
from shared.queue.stream import connect
from shared.rpc import context as call
from shared.rpc.paging import page_bounds
from shared.rpc.provenance import provenance_proto
from shared.rpc.server import RunningServer, start
from shared.schema import Schema
from shared.store.artifacts import Artifacts, items_of
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
MAX_PER_CLASS = 20
REVISION = 1  # raised when the same input would give another prediction


class PredictionServicer(rpc.PredictionServiceServicer):
    """proto in, domain in a thread, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._encoder: TextEncoder | None = None
        self.jobs = Jobs(redis, "prediction", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, "predictions", "name"))

    def _load_encoder(self) -> TextEncoder:
        if self._encoder is None:
            s = self._settings
            self._encoder = ClipEncoder(s.clip_model, s.clip_pretrained) if s.clip_model else StaticEncoder()
        return self._encoder

    async def CreatePrediction(
        self, request: pb.CreatePredictionRequest, context: Context
    ) -> pb.CreatePredictionResponse:
        dataset = dataset_id(request.parent, "parent")
        ranking = parse(request.ranking, "rankings", "ranking", within=dataset)
        if request.method not in (pb.PREDICTION_METHOD_UNSPECIFIED, pb.PREDICTION_METHOD_TAG_SUBSTITUTION):
            raise invalid("method", "this version predicts by tag substitution only")
        max_per_class = request.max_per_class if request.HasField("max_per_class") else MAX_PER_CLASS
        if max_per_class < 1:
            raise invalid("max_per_class", f"is {max_per_class}; give 1 or more")
        artifacts = self._artifacts()
        await asyncio.to_thread(artifacts.manifest, ranking)
        s = self._settings
        key = content_id(
            ranking=ranking.id,
            encoder=[s.clip_model, s.clip_pretrained],
            neighbours=s.neighbours,
            max_per_class=max_per_class,
            max_origins=s.max_origins,
            revision=REVISION,
        )
        name = Name(dataset, "predictions", key)

        async def work(progress: Progress) -> None:
            progress.step = "embedding tags"
            encoder = await asyncio.to_thread(self._load_encoder)
            progress.step = "substituting tags"
            await asyncio.to_thread(
                predict_artifact,
                artifacts,
                name,
                ranking,
                encoder,
                neighbours=s.neighbours,
                max_per_class=max_per_class,
                max_origins=s.max_origins,
            )

        return pb.CreatePredictionResponse(job=await self.jobs.create(str(name), work))

    async def GetPrediction(self, request: pb.GetPredictionRequest, context: Context) -> pb.GetPredictionResponse:
        name = parse(request.name, "predictions", "name")
        response = pb.GetPredictionResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            manifest = await asyncio.to_thread(artifacts.manifest, name)
            response.predicted_slice_count = manifest.summary["predicted_slice_count"]
            response.provenance.CopyFrom(provenance_proto(manifest.provenance))
        return response

    async def CancelPrediction(
        self, request: pb.CancelPredictionRequest, context: Context
    ) -> pb.CancelPredictionResponse:
        parse(request.name, "predictions", "name")
        return pb.CancelPredictionResponse(job=await self.jobs.cancel(request.name))

    async def WatchPrediction(
        self, request: pb.WatchPredictionRequest, context: Context
    ) -> AsyncIterator[pb.WatchPredictionResponse]:
        parse(request.name, "predictions", "name")
        async for job in self.jobs.watch(request.name):
            yield pb.WatchPredictionResponse(job=job)

    async def ListPredictedSlices(
        self, request: pb.ListPredictedSlicesRequest, context: Context
    ) -> pb.ListPredictedSlicesResponse:
        return await asyncio.to_thread(_list, self._artifacts(), request)


def _list(artifacts: Artifacts, request: pb.ListPredictedSlicesRequest) -> pb.ListPredictedSlicesResponse:
    name = parse(request.parent, "predictions", "parent")
    schema, _ = artifacts.schema(name.dataset, str(artifacts.manifest(name).provenance.parameters["schema"]))
    pairs = _pairs(schema)
    table = artifacts.read_part(name, "predicted")
    first, end, token = page_bounds(table.num_rows, request.page_size, request.page_token)
    response = pb.ListPredictedSlicesResponse(next_page_token=token)
    chosen = table.slice(first, end - first)
    for i, (row, items) in enumerate(zip(chosen.to_pylist(), items_of(chosen), strict=True)):
        predicted = response.predicted_slices.add(
            rank=first + i + 1,
            score=row["score"],
            method=pb.PREDICTION_METHOD_TAG_SUBSTITUTION,
            origin_ranks=row["origin_ranks"],
            similarity=row["similarity"],
        )
        predicted.tags.extend(pairs[item] for item in items if item >= 0)
        predicted.replaced.CopyFrom(pairs[row["from_item"]])
    return response


def _pairs(schema: Schema) -> list[types_pb2.AttributeTag]:
    return [types_pb2.AttributeTag(attribute=a.name, tag=t) for a in schema.attributes for t in a.tags]


async def start_server(settings: Settings) -> RunningServer:
    """Start the prediction service; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    servicer = PredictionServicer(settings, redis, Store(settings.store_url))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_PredictionServiceServicer_to_server(servicer, server)
        return [pb.DESCRIPTOR.services_by_name["PredictionService"].full_name]

    return await start(settings, add, closers=[servicer.jobs.close, redis.aclose])
